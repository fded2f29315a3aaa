"""One rank under srun: `python -m spin_megatron.launch.rank LOG_FOLDER VERB OPTIONS`.

Gives the process the coordinates that torch.distributed reads (RANK, WORLD_SIZE, LOCAL_RANK; MASTER_ADDR and MASTER_PORT come
from the batch shell) out of Slurm's, and then is the command line. On a CPU it first starts itself anew with tcmalloc, where its node, or
its container, has it: what a process preloads is settled before it runs, and only here is it known what there is.
"""

import os
import socket
import sys
from pathlib import Path

from spin_megatron.launch.allocator import allocator_variables
from spin_megatron.pipeline import LOCK_STALE_SECONDS
from spin_megatron.run.lock import Owner


def slurm_owner() -> tuple[Owner | None, float]:
    """The lock owner this process is under Slurm, and how long it waits for a lock of a job that may have died."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    if job is None or "RANK" not in os.environ:
        return None, 0.0
    element = os.environ.get("SLURM_ARRAY_TASK_ID", "0")
    return Owner.this_process(f"{job}_{element}", int(os.environ.get("SLURM_RESTART_COUNT", "0"))), 2 * LOCK_STALE_SECONDS


def main() -> int:
    """Set the coordinates and run the verb."""
    if variables := allocator_variables():  # which set, they are the user's choice
        os.execve(sys.executable, sys.orig_argv, os.environ | variables)  # noqa: S606 (a list, no shell)
    log_folder, *arguments = sys.argv[1:]
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log_file = Path(log_folder) / f"rank_{os.environ['RANK']}_{socket.gethostname()}.log"

    from spin_megatron.cli import main as command_line

    return command_line([*arguments, "--log-file", str(log_file)])


if __name__ == "__main__":
    sys.exit(main())
