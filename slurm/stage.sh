#!/usr/bin/env bash
# The batch body of every job: the cluster's environment, then the supervisor, which holds all decisions.
# Arguments: the folder of env.sh (Slurm runs a copy of this script elsewhere), the run directory, the link, the iteration.
set -euo pipefail

# Until a step runs, Slurm's notice before the time limit has nothing to save, and its default action would end this shell.
trap '' USR1

scripts=$1
shift
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$scripts/env.sh"

# exec: Slurm's signal for the batch shell then reaches the supervisor itself.
exec "$SPIN_PYTHON" -m spin_megatron.launch.supervise "$@"
