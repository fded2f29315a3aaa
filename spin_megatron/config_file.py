"""Read a run's settings: one TOML file, `--set section.key=value` as the only override, every problem reported with its key."""

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spin_megatron.config import RunConfig
from spin_megatron.config_sections import SlurmSection, SlurmStageSection


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file, apply `section.key=value` overrides and check it.

    model.path and data.source are taken relative to the file's folder when something is there, and become absolute.

    Raises:
        ValueError: the file is missing or not TOML, a key is unknown, a value has the wrong type or breaks a rule.
            The message names the file, the key and what to do.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors of Windows begin a file with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give the path of a TOML config, e.g. one below examples/.") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}.") from error
    for override in overrides:
        apply_override(values, override)
    for section, key in (("model", "path"), ("data", "source"), ("evaluate", "lm_eval_include")):
        make_absolute(values, section, key, path.parent)
    return validate_config(values, origin=str(path))


def read_frozen(path: Path, changes: Path | None = None) -> RunConfig:
    """The config of a started run from its run.json, with sections of another JSON file over it.

    Raises:
        ValueError: a file is damaged, or of a version whose settings were others.
    """
    values: dict[str, Any] = {}
    for part in (path, changes):
        if part is None:
            continue
        try:
            values |= json.loads(part.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{part} is damaged ({error}); restore it from a copy, or start the run anew in another folder.") from error
    return validate_config(values, origin=str(changes or path))


def validate_config(values: dict[str, Any], *, origin: str) -> RunConfig:
    """Check plain values against the schema; every problem is reported, with its key.

    Raises:
        ValueError: as `load_config`.
    """
    try:
        # JSON mode: strict types, but lists and paths need no Python-specific classes. No setting is a date or a time: what TOML takes
        # for one, as in `time = 04:00:00` without quotes, is meant as the text it is.
        return RunConfig.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ValueError(f"{origin} is not a valid config:\n" + "\n".join(_describe(problem) for problem in error.errors())) from error


def _describe(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        section: Any = RunConfig
        for part in location[:-1]:
            section = (
                SlurmStageSection if section is SlurmSection.model_fields["stages"].annotation else section.model_fields[part].annotation
            )
        close = difflib.get_close_matches(location[-1], section.model_fields, n=1)
        hint = f"did you mean {close[0]}? The" if close else "the"
        return f"  {key}: unknown key; {hint} keys here are {', '.join(section.model_fields)}."
    if problem["type"] == "missing":
        return f"  {key}: missing; add it to the config or give --set {key}=VALUE."
    if problem["type"] == "value_error":
        return f"  {problem['ctx']['error']}"
    return f"  {key}: {problem['msg']} (found {problem['input']!r})."


def apply_override(values: dict[str, Any], override: str) -> None:
    """`section.key=value`; value is TOML (0.1, true, [1, 2]), null for none, and otherwise a plain string."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or len(parts) < 2:
        raise ValueError(f"--set {override!r} is not of the form section.key=value, e.g. --set parallel.tensor=2.")
    try:
        value = None if text.strip() == "null" else tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = values
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set {override!r}: {part!r} is a value, not a section.")
    table[parts[-1]] = value


def as_override(key: str, value: Any) -> str:
    """The text that `apply_override` reads as this setting."""
    return f"{key}={_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # JSON escapes a character beyond 16 bits as two halves, which TOML refuses


def make_absolute(values: dict[str, Any], section: str, key: str, folder: Path) -> None:
    """Take a setting that may be a path as relative to a folder, where something is there or nothing else can be meant."""
    table = values.get(section)
    if not isinstance(table, dict) or not isinstance(table.get(key), str):
        return
    local = (folder / Path(table[key]).expanduser()).resolve()
    if local.exists() or table[key].startswith((".", "/", "~")):
        table[key] = str(local)
