# shellcheck shell=bash
# The one file a cluster owner edits: what every job of a run needs of this cluster. It is sourced by stage.sh and spin_iter.sh.
# Nodes, GPUs and time limits of a run stand in its config, section [slurm].

# Partition and account of every job. A run's own, [slurm] partition and account in its config, come before these.
#   export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my-project

# The Python that submits and supervises. It runs on the host (never in a container), where sbatch, srun and scontrol are.
# It needs `pip install spin-megatron` with its torch-free parts only: pydantic, rich and pyarrow.
export SPIN_PYTHON="${SPIN_PYTHON:-python3}"

# What starts the Python of the ranks, with torch and Megatron Core, as shell-quoted words; inside the container where there is one.
# Apptainer, for example, has no srun options: SPIN_RANK_PYTHON="apptainer exec --nv --bind /lustre /images/megatron.sif python3"
export SPIN_RANK_PYTHON="${SPIN_RANK_PYTHON:-$(printf %q "$SPIN_PYTHON")}"

# Further srun options of the ranks, shell-quoted. With pyxis and enroot, for example (docs/slurm.md says what each is for):
#   export SPIN_RANK_PYTHON=python3 PYTHONPATH=/home/me/spin_megatron
#   SPIN_SRUN_OPTIONS="--container-image=/images/megatron.sqsh --no-container-mount-home --container-env=PYTHONPATH"
#   SPIN_SRUN_OPTIONS+=" --container-mounts=/lustre:/lustre,/home/me/spin_megatron:/home/me/spin_megatron"
export SPIN_SRUN_OPTIONS="${SPIN_SRUN_OPTIONS:-}"

# An engine of another environment ([generate] engine = "trtllm-engine", "trtllm-torch" or "vllm"): further srun options of its steps,
# and what starts its Python inside them, both as shell-quoted words. The host's SPIN_PYTHON, which needs packaging too, drives it.
# With pyxis and enroot, for example (with Apptainer it is all in SPIN_ENGINE_PYTHON, as above):
#   SPIN_ENGINE_SRUN_OPTIONS="--container-image=/images/trtllm-1.2.1.sqsh --container-mounts=/lustre:/lustre --no-container-mount-home"
# The config's [generate.environment] says the same for one run; its launcher, where it has one, replaces srun and these options.
export SPIN_ENGINE_SRUN_OPTIONS="${SPIN_ENGINE_SRUN_OPTIONS:-}"
export SPIN_ENGINE_PYTHON="${SPIN_ENGINE_PYTHON:-}"

# Environment modules, if the cluster has them:
#   module purge; module load cuda/13.0

# NCCL. The interface names are the site's; there is no default that is right everywhere.
#   export NCCL_SOCKET_IFNAME==ib0        (a second = means exactly this name)
#   export GLOO_SOCKET_IFNAME=ib0
# Tensor parallelism overlaps communication best with one hardware queue before Blackwell:
#   export CUDA_DEVICE_MAX_CONNECTIONS=1

# Step-0 margins are exactly 0 only when equal inputs give equal outputs.
export NVTE_ALLOW_NONDETERMINISTIC_ALGO="${NVTE_ALLOW_NONDETERMINISTIC_ALGO:-0}"

# Nothing is fetched while a job runs.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export PYTHONUNBUFFERED=1
