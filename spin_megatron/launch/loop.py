"""`spin-megatron run`: the whole loop on one machine, stage after stage, each in processes of its own."""

import argparse
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait

from spin_megatron.config import RunConfig
from spin_megatron.launch.check import check_harness
from spin_megatron.launch.gpus import pool_for
from spin_megatron.launch.local import BAD_INPUT, DONE, INCOMPLETE, STOPPED, Launcher
from spin_megatron.launch.started_run import changes, open_or_start, remember_changes
from spin_megatron.pipeline import early_stop, missing_stages, redo, require_all_current
from spin_megatron.run import manifest as manifests
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.telemetry import progress_bar
from spin_megatron.stage_table import STAGES, StageRef, folder_of, line, log_folder, made_in

logger = logging.getLogger(__name__)

BAR_SECONDS = 1.0
NUM_NAMED_STAGES = 4
_OUTCOMES = {BAD_INPUT: "was refused", INCOMPLETE: "lacks an input", STOPPED: "was stopped, and the same command goes on with it"}


def run(arguments: argparse.Namespace) -> int:
    """Start a run, or go on with it, until every stage is done or a rule of [stop] ends it."""
    redone = StageRef.parse(arguments.redo) if arguments.redo else None
    config, layout = open_or_start(arguments)
    if any(ref.name == "benchmark" for ref in missing_stages(config, layout)):
        check_harness(config)
    if redone is not None:
        redo(config, layout, redone)
    remember_changes(config, layout)
    refs = line(config)
    with Launcher() as launcher:
        for number, ref in enumerate(refs, start=1):
            if ref.shard:
                continue  # its siblings started with shard 0
            if (stop := early_stop(config, layout)) is not None and made_in(ref) > stop.iteration:
                logger.info("the run is stopped %s", stop.reason)
                break
            group = [other for other in refs if (other.name, other.iteration) == (ref.name, ref.iteration)]
            code = _run_group(launcher, config, layout, group, f"[{number}/{len(refs)}]")
            if code != DONE:
                return code
    from spin_megatron.report.overview import print_iterations

    print_iterations(config, layout)
    return DONE


def _run_group(launcher: Launcher, config: RunConfig, layout: RunLayout, group: list[StageRef], position: str) -> int:
    """Run one stage, all shards of generate (some at a time), or all benchmarks (one at a time)."""
    missing = [ref for ref in group if manifests.read_manifest(folder_of(layout, ref)) is None]
    if len(missing) < len(group):
        require_all_current(config, layout, group)
    if not missing:
        logger.info("%s %s: done before", position, group[0])
        return DONE
    more = f" and {len(missing) - NUM_NAMED_STAGES} more" if len(missing) > NUM_NAMED_STAGES else ""
    logger.info("%s %s%s", position, ", ".join(map(str, missing[:NUM_NAMED_STAGES])), more)
    if len(missing) > 1 and group[0].name == "generate":
        codes = _run_shards(launcher, config, layout, missing)
    else:
        codes = [launch_stage(launcher, config, layout, ref) for ref in missing]
    failed = [(ref, code) for ref, code in zip(missing, codes, strict=True) if code != DONE]
    for ref, code in failed:
        log_file = log_folder(layout, ref) / "latest" / "rank_0.log"
        where = f"; log: {log_file}" if log_file.exists() else ""  # what was not started any more has none
        level = logging.WARNING if code == STOPPED else logging.ERROR
        logger.log(level, "%s %s (exit code %d)%s", ref, _OUTCOMES.get(code, "failed"), code, where)
    return failed[0][1] if failed else DONE


def _run_shards(launcher: Launcher, config: RunConfig, layout: RunLayout, missing: list[StageRef]) -> list[int]:
    """Run shards side by side, each on GPUs of its own where there are any, under one progress bar; their exit codes."""
    from spin_megatron.run.records import num_rows_so_far

    iteration = missing[0].iteration
    gpus = pool_for(config, layout, iteration)

    def run_shard(ref: StageRef) -> int:
        with gpus.group() as variables:
            return launch_stage(launcher, config, layout, ref, variables=variables, has_terminal=False)

    done = num_answered(config, layout, iteration)
    total = sum(num_rows_so_far(path) for path in (layout.prompts, layout.held_out))
    description = f"generate {iteration} (answers of {config.generate.num_shards} shards)"
    with ThreadPoolExecutor(config.launch.shard_processes) as pool, progress_bar(description, total, done=done) as advance:
        running = [pool.submit(run_shard, ref) for ref in missing]
        while True:
            is_last_look = all(future.done() for future in running)
            answered = num_answered(config, layout, iteration)
            finished = sum(future.done() for future in running)
            advance(max(0, answered - done), f"{finished} of {len(missing)} shards ended")
            done = max(done, answered)
            if is_last_look:
                return [future.result() for future in running]
            wait(running, timeout=BAR_SECONDS)


def num_answered(config: RunConfig, layout: RunLayout, iteration: int) -> int:
    """Answers of an iteration in finished part files."""
    from spin_megatron.run.records import num_rows_so_far

    shards = range(config.generate.num_shards)
    return sum(num_rows_so_far(path) for shard in shards for path in sorted(layout.shard(iteration, shard).glob("part_*.parquet")))


def run_alone(config: RunConfig, layout: RunLayout, ref: StageRef) -> int:
    """Run one stage on this machine, unless it is done; its exit code.

    Raises:
        StaleStage, ValueError: it was finished with other settings or inputs, or files of it that are still to be read are missing.
    """
    if manifests.read_manifest(folder_of(layout, ref)) is not None:
        require_all_current(config, layout, [ref])
        logger.info("%s is done; to make it anew: %s", ref, ref.redo_command(layout))
        return DONE
    with Launcher() as launcher:
        return launch_stage(launcher, config, layout, ref)


def launch_stage(
    launcher: Launcher,
    config: RunConfig,
    layout: RunLayout,
    ref: StageRef,
    *,
    variables: Mapping[str, str] | None = None,
    has_terminal: bool = True,
) -> int:
    """Start the ranks of one stage on this machine and wait for them; the last two are of Launcher.launch."""
    # A Slurm job that died between its notice and its end leaves one behind.
    layout.stop_file(ref.name, made_in(ref), ref.shard).unlink(missing_ok=True)
    shard = [] if ref.shard is None else ["--shard", str(ref.shard)]
    options = [option for change in changes(config, layout) for option in ("--set", change)]
    return launcher.launch(
        [ref.name, "--run-dir", str(layout.root), "--iteration", str(ref.iteration), *shard, *options],
        world_size=config.parallel.layout().world_size if STAGES[ref.name].distributed else 1,
        threads=config.launch.threads_per_process,
        log_folder=log_folder(layout, ref),
        variables=variables,
        has_terminal=has_terminal,
    )


def require_in_line(config: RunConfig, ref: StageRef) -> None:
    """Check that a stage belongs to the run.

    Raises:
        ValueError: its iteration or shard is beyond the run's.
    """
    if ref not in line(config):
        same = [other for other in line(config) if other.name == ref.name]
        if not same:
            raise ValueError(f"this run has no {ref.name}: evaluate.lm_eval_tasks is empty.")
        shards = f" and shards 0 to {same[-1].shard}" if same[-1].shard is not None else ""
        raise ValueError(f"this run has no stage {ref}; {ref.name} has iterations {same[0].iteration} to {same[-1].iteration}{shards}.")
