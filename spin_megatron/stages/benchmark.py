"""benchmark: theta_{t+1} on one task of lm-evaluation-harness, as a subprocess: its dependencies stay out of this one.

The harness decides prompts, few-shot examples and metrics of each task; scores of different versions of it differ, so
results without the version mean little (the original SPIN tables are of v0.4.0). One stage a task: tasks run beside each
other on a cluster, and a task that fails costs no other's result.
"""

import json
import logging
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spin_megatron.run.children import ended_with_parent
from spin_megatron.run.manifest import write_json
from spin_megatron.stages.context import StageContext, StageOutput

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 48 * 3600
PROGRAM = (sys.executable, "-m", "lm_eval")
_PACKAGE = "lm-eval"
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")


def run(context: StageContext) -> StageOutput:
    """Run task number context.shard of evaluate.lm_eval_tasks on theta_{context.iteration + 1}."""
    settings, t, number = context.config.evaluate, context.iteration, context.shard or 0
    task = settings.lm_eval_tasks[number]
    model = {"pretrained": str(context.layout.theta(t + 1)), "dtype": context.config.train.dtype, **settings.lm_eval_model_args}
    include = None if settings.lm_eval_include is None else Path(settings.lm_eval_include)
    result = {"theta": t + 1, "task": task, **run_harness(task, model, include=include)}
    file = context.layout.benchmark_result(t, number)
    write_json(file, result)
    return StageOutput(files={file: None}, summary={"theta": t + 1, "task": task, "metrics": result["results"].get(task, {})})


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


def run_harness(
    task: str, model: Mapping[str, Any], *, include: Path | None = None, program: Sequence[str] | None = None
) -> dict[str, Any]:
    """Run a task; returns {"version", "results": (sub)task -> metric -> value, "num_fewshot": (sub)task -> shots}.

    Args:
        task: a name the harness knows, or of a file in `include`. model: arguments of its Hugging Face model. program: what starts it.

    Raises:
        ValueError: the task is unknown, or the harness failed; the message is the end of what it wrote.
    """
    found = harness_version()
    with tempfile.TemporaryDirectory(prefix="lm_eval_") as folder:
        # The harness is one process: as a rank of this stage it would wait for others.
        alone = [word for name in _RANK_VARIABLES for word in ("-u", name)]
        command = ["env", *alone, *(program or PROGRAM), "--model", "hf", "--model_args", json.dumps(dict(model)), "--tasks", task]
        command += ["--batch_size", "auto", "--output_path", folder]
        if include is not None:
            command += ["--include_path", str(include)]
        logger.info("lm-evaluation-harness %s: %s", found, task)
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
            preexec_fn=ended_with_parent(signal.SIGKILL),
        )
        written = sorted(Path(folder).rglob("*results*.json"))
        if done.returncode != 0 or not written:
            raise ValueError(
                f"lm-evaluation-harness {found} failed (exit code {done.returncode}) on the task {task!r} of evaluate.lm_eval_tasks; "
                f"check the name with `lm_eval --tasks list`. It wrote:\n{(done.stderr or done.stdout)[-2000:]}"
            )
        content = json.loads(written[-1].read_text(encoding="utf-8"))
    return {"version": found, "results": content["results"], "num_fewshot": content.get("n-shot", {})}
