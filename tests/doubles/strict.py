"""Helpers of the doubles: objects that accept exactly the fields of the table in spin_megatron/generation/trtllm_surface.py."""

import ast
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

TABLE = Path(__file__).parents[2] / "spin_megatron" / "generation" / "trtllm_surface.py"


def load_release_line(version: str) -> Any:
    """The table's line of a version, from the file itself: the worker's environment has no spin_megatron."""
    module = sys.modules["table"] = types.ModuleType("table")
    exec(compile(TABLE.read_text(encoding="utf-8"), str(TABLE), "exec"), module.__dict__)
    return module.__dict__["release_line"](version)


class Strict:
    """Keeps keywords as attributes; unknown ones are refused, missing ones take the table's default."""

    FIELDS: ClassVar[dict[str, str | None]] = {}

    def __init__(self, **keywords: Any) -> None:
        unknown = sorted(set(keywords) - set(self.FIELDS))
        if unknown:
            raise TypeError(f"{type(self).__name__}: extra fields not permitted: {unknown}")
        for name, default in self.FIELDS.items():
            setattr(self, name, keywords.get(name, None if default is None else ast.literal_eval(default)))
