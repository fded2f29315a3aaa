"""The repository's sources as the rules see them: parsed modules, and the text files that people read."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "spin_megatron"
TEXT_SUFFIXES = {".py", ".sh", ".md", ".toml", ".txt", ".json", ".jsonl", ".yaml", ".yml", ".cfg", ".sbatch", ""}
SKIPPED_FOLDERS = {"__pycache__", "build", "dist", "runs", "assets", "node_modules"}
KEPT_HIDDEN = {".ci", ".gitignore"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One Python file. path is relative to the repository; module is its dotted name, of a package without __init__."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        parts = self.path.with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def at(self, node: ast.AST) -> str:
        """Where a node is, as editors and terminals make it a link."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}"


@cache
def package_sources() -> tuple[Source, ...]:
    """Every Python file of the package, in path order."""
    return tuple(_read(path) for path in sorted(PACKAGE.rglob("*.py")))


@cache
def all_sources() -> tuple[Source, ...]:
    """Every Python file that is not a test: the package, tools, examples and setup.py."""
    others = [path for folder in ("tools", "examples") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return (*package_sources(), *(_read(path) for path in (*others, REPOSITORY / "setup.py")))


def _read(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    return Source(path.relative_to(REPOSITORY), text, ast.parse(text, filename=str(path)))


def text_files() -> Iterator[Path]:
    """Every text file of the repository: no hidden or generated ones."""
    for path in sorted(REPOSITORY.rglob("*")):
        parts = path.relative_to(REPOSITORY).parts
        hidden = any(part.startswith(".") and part not in KEPT_HIDDEN for part in parts)
        generated = any(part in SKIPPED_FOLDERS or part.endswith(".egg-info") for part in parts)
        if path.is_file() and not hidden and not generated and path.suffix in TEXT_SUFFIXES:
            yield path


def imports(source: Source) -> Iterator[tuple[str, ast.AST]]:
    """Dotted names of all imports of a file, those inside functions too; `from a import b` gives a.b."""
    package = source.module if source.path.name == "__init__.py" else source.module.rpartition(".")[0]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield f"{base}.{alias.name}", node


def docstring_nodes(tree: ast.Module) -> set[int]:
    """Ids of the string nodes that are docstrings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node, clean=False) is not None:
            statement = node.body[0]
            assert isinstance(statement, ast.Expr)
            found.add(id(statement.value))
    return found


def strings(source: Source) -> Iterator[tuple[str, ast.AST]]:
    """Text of every string literal and of the fixed parts of f-strings; docstrings are prose and left out."""
    prose = docstring_nodes(source.tree)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value, node


def dotted_name(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain; empty where it does not start with a plain name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def report(offenders: list[str]) -> str:
    """The message of a broken rule: one offender a line."""
    return "\n  " + "\n  ".join(offenders)
