"""Start a run from a config, and open one that was started: its frozen settings, and those of them that may change.

run.json is written once. What a later `run` or `submit` changes of CHANGEABLE stands in changes.json, for what comes after; the processes
of a stage are told by --set options, so that all of them see the same.
"""

import argparse
import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spin_megatron.config import CHANGEABLE, RunConfig, flat_settings
from spin_megatron.config_file import apply_override, as_override, load_config, make_absolute, read_frozen, validate_config
from spin_megatron.launch.check import check_config, check_num_rows, check_started
from spin_megatron.run import manifest as manifests
from spin_megatron.run.layout import RunLayout

logger = logging.getLogger(__name__)


def open_run(run_dir: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, RunLayout]:
    """The frozen config and the paths of a started run. `overrides` may change only how it runs, not what it computes.

    Raises:
        ValueError: no run was started there, or an override would change its result.
    """
    layout = RunLayout(run_dir.resolve())
    if not layout.run_json.exists():
        start = f"spin-megatron run CONFIG --run-dir {shlex.quote(str(run_dir))}"
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
        ValueError: the config is refused, or differs from that of the started run in what may not change, or there can be no run directory.
    """
    if arguments.target.is_dir():
        if arguments.run_dir is not None:
            raise ValueError(f"{arguments.target} is a folder, so it is the run; leave --run-dir out, or give a config file beside it.")
        config, layout = open_as_changed(arguments.target, arguments.overrides)
        check_started(config, layout)
        return config, layout
    config = load_config(arguments.target, arguments.overrides)
    root = arguments.run_dir or Path("runs") / config.run.name
    layout = RunLayout(root.resolve())
    if layout.run_json.exists():
        config = _same_run(open_run(root)[0], config, layout)
        check_started(config, layout)
        return config, layout
    check_config(config)
    check_num_rows(config)
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
    differing = manifests.difference(*(flat_settings(either, tuple(RunConfig.model_fields)) for either in (frozen, config)))
    lines = "\n  ".join(f"{name}: {change}" for name, change in differing.items() if not _is_changeable(name))
    if lines:
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
