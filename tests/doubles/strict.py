"""Helpers of the doubles: objects that accept exactly the fields of the table in spin_megatron/generation/trtllm_surface.py.

Whoever installs a double writes the table's line of its version beside its metadata (tests/doubles/installation.py): the interpreter
that runs the double may be older than the project's, and has none of its packages.
"""

import ast
import json
from importlib.metadata import distribution
from typing import Any, ClassVar

LINE_NAME = "release_line.json"


class Line:
    """A release line: class -> field -> default as source text, inherited fields included."""

    def __init__(self, package: str) -> None:
        with open(str(distribution(package).locate_file(LINE_NAME)), encoding="utf-8") as handle:
            values = json.load(handle)
        self.has_engines: bool = values["has_engines"]
        self._classes: dict[str, dict[str, str | None]] = values["classes"]

    def fields(self, name: str) -> dict[str, "str | None"]:
        return self._classes[name]


class Strict:
    """Keeps keywords as attributes; unknown ones are refused, missing ones take the table's default."""

    FIELDS: ClassVar[dict[str, "str | None"]] = {}

    def __init__(self, **keywords: Any) -> None:
        unknown = sorted(set(keywords) - set(self.FIELDS))
        if unknown:
            raise TypeError(f"{type(self).__name__}: extra fields not permitted: {unknown}")
        for name, default in self.FIELDS.items():
            setattr(self, name, keywords.get(name, None if default is None else ast.literal_eval(default)))
