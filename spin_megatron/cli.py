"""The command line: verbs -> functions. Exit codes: 0 done, 1 a defect, 2 bad config or input, 3 incomplete input, 75 stopped on request.

A verb's code is imported when the verb is called, so `--help`, `status` and `submit` answer without loading torch.
"""

import argparse
import gc
import importlib
import logging
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from spin_megatron import __version__
from spin_megatron.launch.local import BAD_INPUT, DONE, INCOMPLETE, STOPPED, Launcher, end_with_parent, stop_signals
from spin_megatron.run.manifest import StageIncomplete, StaleStage, is_disk_full
from spin_megatron.run.option_types import positive

DEFECT = 1
_STAGE_VERBS = {
    "prepare": "render the supervised set to token ids (once a run)",
    "export": "make theta_t as a Hugging Face folder; t is that of the theta made, 0 the base model",
    "build-engine": "make the generation engine of theta_t",
    "generate": "answer the prompts of one shard with theta_t",
    "merge": "join the shards to pairs and plan the packs",
    "train": "train theta_{t+1} against the opponent theta_t",
    "evaluate": "score theta_{t+1} on the held-out pairs",
    "benchmark": "score theta_{t+1} on one task of lm-evaluation-harness; --shard is its number in evaluate.lm_eval_tasks",
}
# Stages that poll for a stop request; the others are short, start over, and simply end on SIGTERM.
_POLLING = ("generate", "train")
LOOK_SECONDS = 1.0
_OUT_OF_MEMORY = (
    "The GPU's memory does not suffice. Training takes less of it with train.recompute=full, train.kept_logit_bytes=0 or more ranks in "
    "[parallel], which a started run may change with --set; `spin-megatron plan` shows what fits."
)
# Verbs whose options stand beside their code (`add_parser`), which is imported only for the verb that is called.
_OTHER_VERBS = {
    "score": ("spin_megatron.stages.score", "log-probabilities of given pairs under a Hugging Face model"),
    "convert": ("spin_megatron.convert.command", "checkpoints: Hugging Face to Megatron Core, back, and inspect"),
    "plan": ("spin_megatron.launch.plan", "which layouts fit on N GPUs, how fast, and what the run costs"),
    "doctor": ("spin_megatron.report.doctor", "what is installed here and which kernels that turns on"),
}


def build_parser(called: str | None = None) -> argparse.ArgumentParser:
    """The parser of all verbs; `arguments.handler` is the function to call. `called` is the verb whose options are wanted."""
    parser = argparse.ArgumentParser(prog="spin-megatron", description="Self-Play Fine-Tuning (SPIN) on Megatron Core.")
    parser.add_argument("--version", action="version", version=f"spin-megatron {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    check = verbs.add_parser("check", help="check a config, its model and its data, and print the line that would run")
    check.add_argument("config", type=Path, help="a config file")
    _add_overrides(check)
    check.set_defaults(handler=_lazy("spin_megatron.launch.check", "check"))

    run = verbs.add_parser("run", help="run the whole loop on this machine; the same command again resumes it")
    run.add_argument("target", type=Path, help="a config file, or the run directory of a started run")
    run.add_argument("--run-dir", type=Path, help="where the run lives; default runs/NAME in the current folder")
    _add_redo(run)
    _add_overrides(run)
    run.set_defaults(handler=_lazy("spin_megatron.launch.loop", "run"))

    submit = verbs.add_parser("submit", help="submit the run to Slurm as job arrays; the same command again goes on from where it stands")
    submit.add_argument("target", type=Path, help="a config file, or the run directory of a started run")
    submit.add_argument("--run-dir", type=Path, help="where the run lives, on a file system that every node sees")
    _add_redo(submit)
    submit.add_argument("--dry-run", action="store_true", help="print every sbatch line and submit nothing")
    submit.add_argument("--scripts", type=Path, help="folder of env.sh, stage.sh and spin_iter.sh (default: slurm/ of this project)")
    _add_overrides(submit)
    submit.set_defaults(handler=_lazy("spin_megatron.launch.slurm", "command"))

    status = verbs.add_parser("status", help="show what is done, running and missing")
    status.add_argument("run_dir", type=Path, help="the folder of a started run")
    status.add_argument("--json", action="store_true", help="for programs")
    status.add_argument("--watch", metavar="SECONDS", type=positive, nargs="?", const=5.0, help="keep it live till the run is done (5 s)")
    status.set_defaults(handler=_lazy("spin_megatron.report.status", "command"))

    settings = verbs.add_parser("settings", help="print a config with every setting at its default, and what each means")
    settings.add_argument("section", nargs="?", help="only this section, e.g. train")
    settings.set_defaults(handler=_lazy("spin_megatron.report.settings", "command"))

    report = verbs.add_parser("report", help="draw the run's curves as pictures below RUN_DIR/report")
    report.add_argument("run_dir", type=Path, help="the folder of a started run")
    report.set_defaults(handler=_lazy("spin_megatron.report.curves", "command"))

    for verb, text in _STAGE_VERBS.items():
        stage = verbs.add_parser(verb, help=text)
        stage.add_argument("--run-dir", type=Path, required=True, help="the run, which `run` or `submit` started")
        stage.add_argument("--iteration", type=int, default=0, help="t, from 0 (default 0)")
        if verb in ("generate", "benchmark"):
            stage.add_argument("--shard", type=int, default=0, help="from 0 (default 0)")
        _add_overrides(stage)
        _add_rank_options(stage)
        stage.set_defaults(handler=_run_stage, verb=verb)

    for verb, (module, text) in _OTHER_VERBS.items():
        if verb != called:
            verbs.add_parser(verb, help=text)
            continue
        other = importlib.import_module(module).add_parser(verbs)
        if verb == "score":
            _add_rank_options(other)
            other.set_defaults(handler=_score)
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="override one setting (null: none); repeatable",
    )


def _add_redo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--redo", metavar="STAGE:T[:SHARD]", help="first move this finished stage, and what was made from it, aside")


def _add_rank_options(parser: argparse.ArgumentParser) -> None:
    """Options of verbs that run as ranks."""
    parser.add_argument("--log-file", type=Path, help=argparse.SUPPRESS)


def _lazy(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """A handler that imports its module when it is called."""

    def handler(arguments: argparse.Namespace) -> int:
        code: int = getattr(importlib.import_module(module), function)(arguments)
        return code

    return handler


def _run_stage(arguments: argparse.Namespace) -> int:
    """Be one rank of a stage; or, outside a launch, start the ranks the config asks for."""
    from spin_megatron.launch import loop, started_run
    from spin_megatron.launch.rank import slurm_owner
    from spin_megatron.pipeline import execute
    from spin_megatron.stage_table import STAGES, StageRef, made_in

    is_rank = "RANK" in os.environ
    # A rank is told all that changed; what a person types goes on as the last `run` or `submit` did.
    config, layout = (started_run.open_run if is_rank else started_run.open_as_changed)(arguments.run_dir, arguments.overrides)
    ref = StageRef(arguments.verb, arguments.iteration, getattr(arguments, "shard", None))
    loop.require_in_line(config, ref)
    if not is_rank:
        return loop.run_alone(config, layout, ref)
    rank = int(os.environ["RANK"])
    signalled = _catch_stop_signals(polled=ref.name in _POLLING)
    names = (ref.name, made_in(ref), ref.shard)
    # All ranks follow rank 0's answer.
    stop_requested = _stop_question(signalled, layout.stop_file(*names), layout.heartbeat(*names)) if rank == 0 else lambda: False
    stop_requested()
    owner, wait_seconds = slurm_owner()
    _import_for_good(STAGES[ref.name].module)
    done = execute(config, layout, ref, rank=rank, stop_requested=stop_requested, owner=owner, wait_seconds=wait_seconds)
    gc.freeze()  # what the stage imported itself
    return DONE if done else STOPPED


def _stop_question(signalled: Callable[[], bool], stop_file: Path, heartbeat: Path) -> Callable[[], bool]:
    """What a stage asks between its steps: whether to save and leave, by a signal or by the stop file; each look is a heartbeat.

    Steps may take milliseconds, as those of decoding do, and both files lie on a shared file system: it is asked once a second at most.
    """
    heartbeat.parent.mkdir(parents=True, exist_ok=True)
    looked_at, is_asked = -math.inf, False

    def stop_requested() -> bool:
        nonlocal looked_at, is_asked
        if not is_asked and time.monotonic() - looked_at >= LOOK_SECONDS:
            looked_at = time.monotonic()
            heartbeat.touch()
            is_asked = stop_file.exists()
        return is_asked or signalled()

    return stop_requested


def _import_for_good(module: str) -> None:
    """Import what this process was started for and keep the garbage collector out of it: a third of a rank's start and end.

    It would search thousands of modules, none of which is ever garbage, again and again while they come in, and at the exit.
    """
    gc.disable()
    importlib.import_module(module)
    gc.enable()
    gc.freeze()


def _score(arguments: argparse.Namespace) -> int:
    """Be one rank of `score`; or, outside a launch, start tensor x pipeline ranks."""
    from spin_megatron.stages import score

    if "RANK" in os.environ:
        score.run(arguments)
        return DONE
    with tempfile.TemporaryDirectory() as folder, Launcher() as launcher:
        code = launcher.launch(
            arguments.argv, world_size=arguments.tensor * arguments.pipeline, threads=_threads(), log_folder=Path(folder)
        )
        if code not in (DONE, BAD_INPUT, INCOMPLETE):  # these rank 0 has explained
            for log_file in sorted(Path(folder).glob("attempt_*/rank_*.log")):
                last_lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-20:]
                sys.stderr.write(f"--- {log_file.name}, last lines\n" + "".join(last_lines))
        return code


def _threads() -> int:
    """Threads of a rank outside a run: OMP_NUM_THREADS where it is set, of a list for nested regions the first."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return max(1, int(first)) if first.isdigit() else 1


def _catch_stop_signals(*, polled: bool) -> Callable[[], bool]:
    """A stop signal asks a polling stage to save and leave, and ends any other; returns whether one came."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        del frame
        if not polled:
            sys.exit(STOPPED)

    for number in stop_signals():
        signal.signal(number, note)
    return lambda: bool(received)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    end_with_parent()
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = build_parser(argv[0] if argv else None).parse_args(argv)
    arguments.argv = argv
    from spin_megatron.run.telemetry import configure_logging

    rank = int(os.environ.get("RANK", "0"))
    configure_logging(getattr(arguments, "log_file", None), show=rank == 0)
    logger = logging.getLogger("spin_megatron")
    try:
        code: int = arguments.handler(arguments)
        sys.stdout.flush()
        return code
    except (ValueError, StaleStage) as error:
        logger.debug("refused here", exc_info=error)  # in the log file alone: the message is meant to suffice
        logger.error("%s", error)
        return BAD_INPUT
    except StageIncomplete as error:
        logger.error("%s", error)
        return INCOMPLETE
    except BrokenPipeError:  # whoever reads the answer, such as head, has read enough; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except PermissionError as error:
        logger.error("%s: %s. Give what belongs to you, or have its owner let you in.", error.filename, error.strerror)
        return BAD_INPUT
    except OSError as error:
        if not is_disk_full(error):
            logger.exception("failed")
            return DEFECT
        logger.error("The disk is full (%s). Free space, then run the same command again: it goes on from the last whole file.", error)
        return INCOMPLETE
    except KeyboardInterrupt:  # of what runs in this process; a stage's ranks are asked to save first
        logger.error("stopped by Ctrl-C")
        return STOPPED
    except Exception as error:
        logger.exception("failed")
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here; the last line is what `status` shows
            logger.error("%s", _OUT_OF_MEMORY)
        return DEFECT


if __name__ == "__main__":
    sys.exit(main())
