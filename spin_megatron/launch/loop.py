"""`spin-megatron run` and `check`: the whole loop on one machine, stage after stage, each in processes of its own."""

import argparse
import importlib
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from spin_megatron.config import CHANGEABLE, RunConfig, flat_settings
from spin_megatron.config_file import apply_override, as_override, load_config, make_absolute, read_frozen, validate_config
from spin_megatron.config_sections import StageName
from spin_megatron.data.sources import FILE_TYPES, is_commit
from spin_megatron.generation.engine import EXTERNAL, Environment, provider
from spin_megatron.launch.gpus import pool_for
from spin_megatron.launch.local import BAD_INPUT, DONE, INCOMPLETE, STOPPED, Launcher
from spin_megatron.pipeline import early_stop, missing_stages, redo, require_current
from spin_megatron.plan.command import check_config_fits, check_model, shape_on_this_machine
from spin_megatron.plan.hardware import find_gpu
from spin_megatron.plan.precision import PRECISIONS, check_capability
from spin_megatron.run import manifest as manifests
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.telemetry import progress_bar
from spin_megatron.stage_table import STAGES, StageRef, folder_of, line, log_folder, made_in

logger = logging.getLogger(__name__)

BAR_SECONDS = 1.0
_OUTCOMES = {BAD_INPUT: "was refused", INCOMPLETE: "lacks an input", STOPPED: "was stopped, and the same command goes on with it"}


def check(arguments: argparse.Namespace) -> int:
    """Check everything that can be known before a stage runs, and print the line."""
    from spin_megatron.report.overview import print_example, print_line

    config = load_config(arguments.config, arguments.overrides)
    check_config(config)
    if Path(config.model.path).is_dir():
        importlib.import_module("spin_megatron.stages.export").check_folder(Path(config.model.path))
    examine_engine(config)
    if config.evaluate.lm_eval_tasks and not config.slurm.stages:  # the Python of a cluster's ranks is another
        _check_harness()
    is_here = Path(config.model.path).is_dir() and Path(config.data.source).exists()
    example = importlib.import_module("spin_megatron.stages.prepare").preview(config) if is_here else None
    print_line(config)
    if example is not None:
        print_example(*example)
    else:
        logger.info("the data's first row and its template are checked by prepare: the model or the data is not on this machine yet")
    return DONE


def examine_engine(config: RunConfig) -> None:
    """Say what would answer, where the engine has an environment of its own that can be started here.

    Raises:
        ValueError: its options are wrong, its interpreter or package is missing, or its release does not fit.
    """
    chosen, settings = provider(config.generate.engine), config.generate.environment
    if config.generate.engine in EXTERNAL and config.slurm.stages and not settings.launcher:
        logger.info("engine %s is started by Slurm's jobs (slurm/env.sh): build-engine says what it finds there", config.generate.engine)
        return
    environment = Environment(settings.python, tuple(settings.prefix), tuple(settings.launcher), tuple(settings.variables))
    with tempfile.TemporaryDirectory(prefix="spin-check-") as folder:
        found = chosen.examine(config.generate.options, environment, Path(folder))
    if found:
        logger.info("engine %s: %s", config.generate.engine, found)


def _check_harness() -> None:
    """Find out now, and not when the first iteration is trained. Raises ValueError when lm-evaluation-harness is not installed."""
    importlib.import_module("spin_megatron.stages.benchmark").harness_version()


def check_config(config: RunConfig) -> None:
    """Check the base model's config against the parallel layout and the lengths, where the model is on this machine.

    Raises:
        ValueError: the model is not one we compute, or the layout does not divide it, or a length is beyond its context.
    """
    _check_addresses(config)
    _check_device(config)
    shape = shape_on_this_machine(config)
    if shape is None:
        logger.info("model.path=%s is a hub name: its shape is checked when export 0 has fetched it", config.model.path)
        return
    check_model(config, shape)
    if config.slurm.gpu is not None:
        check_config_fits(config, config.slurm.gpu)


def _check_device(config: RunConfig) -> None:
    """What needs a GPU: of the cluster where one is named, else of this machine. Imports torch for a config that needs one.

    Raises:
        ValueError: FP8 without its tensor cores, or an optimizer that is to be offloaded from no GPU.
    """
    precision, fraction = config.train.precision, config.optimizer.offload_fraction
    if PRECISIONS[precision].fp8_recipe is None and not fraction:
        return
    if config.slurm.gpu is not None:
        check_capability(precision, find_gpu(config.slurm.gpu).capability, where=f"slurm.gpu={config.slurm.gpu}")
        return
    device, _ = importlib.import_module("spin_megatron.report.doctor").examine_device()
    check_capability(precision, device and device.capability, where="this machine")
    if fraction and (device is None or not device.names):
        raise ValueError(
            f"optimizer.offload_fraction={fraction:g}: this machine has no GPU, and on a CPU the optimizer is in the host's memory as it "
            "is; use 0, or for a cluster name its GPU in slurm.gpu."
        )


def _check_addresses(config: RunConfig) -> None:
    """A hub name needs a pinned revision; anything that looks like a path must be there, and be absolute by now (config_file)."""
    model, data = config.model, config.data
    for name, address, revision in (("model.path", model.path, model.revision), ("data.source", data.source, data.revision)):
        path, rule = Path(address), "relative paths count from the config file's folder"
        section = name.partition(".")[0]
        if path.is_absolute() and path.exists():
            if section == "model" and not path.is_dir():
                raise ValueError(f"model.path={address} is a file; give the Hugging Face folder that it is in.")
            continue
        if path.exists():
            raise ValueError(f"{name}={address} is there in the current folder only, and {rule}; give {str(path.resolve())!r}.")
        if path.is_absolute() or path.suffix in FILE_TYPES:
            raise ValueError(f"{name}={address} does not exist ({rule}); give an existing path, or a hub name with {section}.revision.")
        if revision is None or not is_commit(revision):
            raise ValueError(
                f"{name}={address} is no path here, so it is a hub name, and {section}.revision={revision!r} does not pin it: a name or a "
                "branch may point to something else tomorrow. Give a commit of 40 hex digits, or an existing path."
            )


def run(arguments: argparse.Namespace) -> int:
    """Start a run, or go on with it, until every stage is done or a rule of [stop] ends it."""
    config, layout = open_or_start(arguments)
    remember_changes(config, layout)
    if arguments.redo:
        for ref in redo(config, layout, _parse_ref(arguments.redo)):
            logger.info("moved aside: %s", ref)
    if any(ref.name == "benchmark" for ref in missing_stages(config, layout)):
        _check_harness()
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
    missing = []
    for ref in group:
        manifest = manifests.read_manifest(folder_of(layout, ref))
        if manifest is None:
            missing.append(ref)
        else:
            require_current(config, layout, ref, manifest)
    if not missing:
        logger.info("%s %s: done before", position, group[0])
        return DONE
    logger.info("%s %s", position, ", ".join(str(ref) for ref in missing))
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
    from spin_megatron.run.records import num_rows

    iteration = missing[0].iteration
    gpus = pool_for(config, layout, iteration)

    def run_shard(ref: StageRef) -> int:
        with gpus.group() as variables:
            return launch_stage(launcher, config, layout, ref, variables=variables, has_terminal=False)

    done = num_answered(config, layout, iteration)
    total = sum(num_rows(path) for path in (layout.prompts, layout.held_out))
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
    from spin_megatron.run.records import num_rows

    shards = range(config.generate.num_shards)
    return sum(num_rows(path) for shard in shards for path in sorted(layout.shard(iteration, shard).glob("part_*.parquet")))


def run_alone(config: RunConfig, layout: RunLayout, ref: StageRef) -> int:
    """Run one stage on this machine, unless it is done; its exit code.

    Raises:
        StaleStage, ValueError: it was finished with other settings or inputs, or files of it are missing.
    """
    manifest = manifests.read_manifest(folder_of(layout, ref))
    if manifest is not None:
        require_current(config, layout, ref, manifest)
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


def open_run(run_dir: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, RunLayout]:
    """The frozen config and the paths of a started run. `overrides` may change only how it runs, not what it computes.

    Raises:
        ValueError: no run was started there, or an override would change its result.
    """
    layout = RunLayout(run_dir.resolve())
    if not layout.run_json.exists():
        start = f"spin-megatron run CONFIG --run-dir {str(run_dir)!r}"
        raise ValueError(f"{run_dir} is not a run directory (no run.json); start one with: {start}")
    return _with_changes(read_frozen(layout.run_json), overrides), layout


def changes(config: RunConfig, layout: RunLayout) -> list[str]:
    """The --set options that make a stage's process see this layout; jobs and the run's end do not concern it."""
    frozen, _ = open_run(layout.root)
    then, now = _changeable_settings(frozen), _changeable_settings(config)
    return [as_override(name, value) for name, value in now.items() if value != then[name]]


def _changeable_settings(config: RunConfig) -> dict[str, Any]:
    """What may change and a stage's process has to know, by name; [slurm] and [stop] are no concern of a stage."""
    flat = flat_settings(config, [section for section in _changeable_sections() if section not in ("slurm", "stop")])
    return {name: value for name, value in flat.items() if _is_changeable(name)}


def _changeable_sections() -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in CHANGEABLE))


def _is_changeable(name: str) -> bool:
    return any(name == changeable or name.startswith(f"{changeable}.") for changeable in CHANGEABLE)


def remember_changes(config: RunConfig, layout: RunLayout, *, sections: Sequence[str] | None = None) -> None:
    """Keep the sections that may change, or some of them, as this `run` or `submit` has them: for its jobs and for what comes later."""
    values = config.model_dump(mode="json")
    before = json.loads(layout.changes_json.read_text(encoding="utf-8")) if layout.changes_json.exists() else {}
    now = before | {section: values[section] for section in sections or _changeable_sections()}
    if now != before:
        manifests.write_json(layout.changes_json, now)


def open_as_changed(run_dir: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, RunLayout]:
    """A started run with the changeable sections of the last `run` or `submit`, and `overrides` on top as in `open_run`.

    Raises:
        ValueError: as `open_run`.
    """
    config, layout = open_run(run_dir)
    if layout.changes_json.exists():
        config = read_frozen(layout.run_json, layout.changes_json)
    return _with_changes(config, overrides), layout


def open_or_start(arguments: argparse.Namespace, *, is_trial: bool = False) -> tuple[RunConfig, RunLayout]:
    """The run that `run` and `submit` mean: a run directory, or a config whose run is started if it was not yet.

    Args:
        is_trial: write nothing, so that the config may still change.

    Raises:
        ValueError: the config is refused, or differs from that of the started run, or there can be no run directory.
    """
    if arguments.target.is_dir():
        if arguments.run_dir is not None:
            raise ValueError(f"{arguments.target} is a folder, so it is the run; leave --run-dir out, or give a config file beside it.")
        return open_as_changed(arguments.target, arguments.overrides)
    config = load_config(arguments.target, arguments.overrides)
    root = arguments.run_dir or Path("runs") / config.run.name
    layout = RunLayout(root.resolve())
    if layout.run_json.exists():
        frozen, _ = open_run(root)
        return _same_run(frozen, config, layout), layout
    check_config(config)
    if is_trial:
        return config, layout
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if manifests.is_disk_full(error):
            raise
        raise ValueError(f"the run directory {layout.root} cannot be made ({error.strerror}); give another --run-dir.") from error
    manifests.write_text(layout.config_toml, arguments.target.read_text(encoding="utf-8"))
    manifests.write_text(layout.run_json, config.model_dump_json(indent=2) + "\n")
    logger.info("started the run %s", layout.root)
    return config, layout


def _same_run(frozen: RunConfig, config: RunConfig, layout: RunLayout) -> RunConfig:
    """The frozen config with this call's layout; anything else that differs is refused."""
    then, now = frozen.model_dump(mode="json"), config.model_dump(mode="json")
    differing = [
        f"{section}.{key}: {then[section][key]!r} -> {now[section][key]!r}"
        for section in now
        for key in now[section]
        if not _is_changeable(f"{section}.{key}") and then[section].get(key) != now[section][key]
    ]
    if differing:
        lines = "\n  ".join(differing)
        raise ValueError(f"{layout.root} was started with other settings:\n  {lines}\nUse another --run-dir, or restore the settings.")
    changed: dict[str, Any] = {}
    for name in CHANGEABLE:
        section, _, key = name.partition(".")
        given, kept = getattr(config, section), changed.get(section, getattr(frozen, section))
        changed[section] = kept.model_copy(update={key: getattr(given, key)}) if key else given
    return frozen.model_copy(update=changed)


def _with_changes(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Apply --set to a started run: only how it runs may change."""
    if not overrides:
        return config
    values = config.model_dump(mode="json")
    for override in overrides:
        if not _is_changeable(override.partition("=")[0].strip()):
            raise ValueError(f"--set {override!r}: a started run keeps its settings; only {', '.join(CHANGEABLE)} may change.")
        apply_override(values, override)
    make_absolute(values, "evaluate", "lm_eval_include", Path.cwd())
    return validate_config(values, origin="the started run with --set")


def _parse_ref(text: str) -> StageRef:
    name, *numbers = text.split(":")
    if name not in STAGES or not 1 <= len(numbers) <= 2 or not all(number.isdigit() for number in numbers):
        raise ValueError(f"--redo {text!r} is not STAGE:ITERATION[:SHARD] with a stage of {', '.join(STAGES)}; for example train:1.")
    stage: StageName = name  # type: ignore[assignment]  # checked against STAGES above
    return StageRef(stage, *(int(number) for number in numbers))


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
