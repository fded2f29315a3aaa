"""`spin-megatron settings`: a config with every setting at its default, and what each means, from the sections of `config`."""

import argparse
import json
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from spin_megatron.config import PER_ITERATION, RunConfig
from spin_megatron.config_sections import Section

_COMMENT_COLUMN = 36


def command(arguments: argparse.Namespace) -> int:
    """Handle the verb.

    Raises:
        ValueError: there is no such section.
    """
    chosen: str | None = arguments.section
    if chosen is not None and chosen not in RunConfig.model_fields:
        raise ValueError(f"there is no section [{chosen}]; use one of: {', '.join(RunConfig.model_fields)}.")
    print(template(chosen), end="")  # noqa: T201
    return 0


def template(chosen: str | None = None) -> str:
    """The settings of all sections, or of one, as TOML. What is absent by default, or required, is a comment."""
    found = {name: _section_in(field.annotation) for name, field in RunConfig.model_fields.items() if chosen in (None, name)}
    return "\n".join("".join(_section_lines(name, section)) for name, section in found.items() if section is not None)


def _section_lines(path: str, section: type[Section], mark: str = "") -> Iterator[str]:
    """A section's header and settings, then the sections in it; `mark` makes a comment of what stands for any number of sections."""
    about = " ".join((section.__doc__ or "").split("\n\n")[0].partition("]")[2].lstrip(": ").split())
    yield f"{mark}[{path}]" + (f"  # {about}\n" if about else "\n")
    inner = {name: _section_in(field.annotation) for name, field in section.model_fields.items()}
    for name, field in section.model_fields.items():
        if inner[name] is None:
            yield mark + _setting_line(f"{path}.{name}", field)
    for name, found in inner.items():
        if found is not None:
            many = get_origin(section.model_fields[name].annotation) is dict
            yield "\n"
            yield from _section_lines(f"{path}.{name}.NAME" if many else f"{path}.{name}", found, "# " if many else mark)


def _setting_line(path: str, field: FieldInfo) -> str:
    name = path.rpartition(".")[2]
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    text = f"# {name} =" if default is None else f"{name} = {json.dumps(default)}"
    notes = ["required"] if field.is_required() else []
    notes += [_type(field.annotation), *([field.description] if field.description else [])]
    if path in PER_ITERATION and "per iteration" not in notes[-1]:
        notes.append("per iteration")
    return f"{text:{_COMMENT_COLUMN}}# {'; '.join(notes)}\n"


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds, by itself or as the values of a table."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _type(annotation: Any) -> str:
    """A type in words; that a setting may be absent shows in its default."""
    origin, parts = get_origin(annotation), [part for part in get_args(annotation) if part is not types.NoneType]
    if origin is Literal:
        return " | ".join(json.dumps(part) for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_type, parts))
    if origin in (list, tuple):
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return f"table of {_type(parts[1])}"
    return {int: "integer", str: "text", bool: "true | false", float: "number"}[annotation]
