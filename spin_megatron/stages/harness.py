"""Benchmarks of lm-evaluation-harness, as a subprocess: its dependencies stay out of this one, and its version is recorded.

The harness decides prompts, few-shot examples and metrics of each task; scores of different versions of it differ, so
results without the version mean little (the original SPIN tables are of v0.4.0).
"""

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 48 * 3600
PROGRAM = (sys.executable, "-m", "lm_eval")
_PACKAGE = "lm-eval"


def harness_version() -> str:
    """The installed version.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return version(_PACKAGE)
    except PackageNotFoundError:
        raise ValueError(
            "evaluate.lm_eval_tasks needs lm-evaluation-harness, which is not installed; "
            "install it (pip install 'spin-megatron[eval]') or leave the list empty."
        ) from None


_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")


def run_harness(model: Path, tasks: Sequence[str], *, dtype: str, program: Sequence[str] = PROGRAM) -> dict[str, Any]:
    """Run tasks on a Hugging Face folder; returns {"version", "results": task -> metric -> value, "num_fewshot": task -> shots}.

    Args:
        model: folder. tasks: names the harness knows. dtype: of the computation. program: what starts the harness.

    Raises:
        ValueError: a task is unknown, or the harness failed; the message is the end of what it wrote.
    """
    found = harness_version()
    arguments = json.dumps({"pretrained": str(model), "dtype": dtype})
    with tempfile.TemporaryDirectory(prefix="lm_eval_") as folder:
        # The harness is one process: as a rank of this stage it would wait for the others.
        alone = [word for name in _RANK_VARIABLES for word in ("-u", name)]
        command = ["env", *alone, *program, "--model", "hf", "--model_args", arguments, "--tasks", ",".join(tasks), "--batch_size", "auto"]
        logger.info("lm-evaluation-harness %s: %s", found, ", ".join(tasks))
        done = subprocess.run([*command, "--output_path", folder], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        written = sorted(Path(folder).rglob("*results*.json"))
        if done.returncode != 0 or not written:
            raise ValueError(
                f"lm-evaluation-harness {found} failed (exit code {done.returncode}) on evaluate.lm_eval_tasks={list(tasks)}; check the "
                f"names with `lm_eval --tasks list`. It wrote:\n{(done.stderr or done.stdout)[-2000:]}"
            )
        content = json.loads(written[-1].read_text(encoding="utf-8"))
    return {"version": found, "results": content["results"], "num_fewshot": content.get("n-shot", {})}
