#!/usr/bin/env bash
# Take a run from wherever it stands to its end:
#
#   sbatch slurm/spin_iter.sh RUN_DIR [--set slurm.KEY=VALUE ...]     from the project's folder
#   bash slurm/spin_iter.sh RUN_DIR                                   from a login node
#
# RUN_DIR may be a config file: the run is started then (in --run-dir). Does nothing while jobs of the run are under way.
#SBATCH --job-name=spin-submit
#SBATCH --time=00:10:00
#SBATCH --ntasks=1
set -euo pipefail

if [[ -n ${SLURM_JOB_ID:-} ]]; then
    # Slurm runs a copy of this script from its spool: the original's folder is not $0's.
    scripts=${SPIN_SCRIPTS:-$SLURM_SUBMIT_DIR/slurm}
else
    scripts=${SPIN_SCRIPTS:-$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)}
fi
if [[ ! -f $scripts/env.sh ]]; then
    echo "spin_iter.sh: no env.sh in $scripts; run sbatch from the project's folder, or set SPIN_SCRIPTS to its slurm folder" >&2
    exit 2
fi
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$scripts/env.sh"
exec "$SPIN_PYTHON" -m spin_megatron.cli submit "$@" --scripts "$scripts"
