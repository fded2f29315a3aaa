"""Manifests: a stage is done when, and only when, its manifest exists.

A manifest names what a stage read and wrote, with digests. It is written last, so whatever has no manifest is
unfinished work. Every file of a run is written aside, fsynced and renamed by `atomic_path`.
"""

import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA = 1
MANIFEST_NAME = "MANIFEST.json"
MEBIBYTE = 1 << 20
_DIGEST = re.compile('"[0-9a-f]{64}"')
_SHOWN_CHARACTERS = 60
_RECORDED_PACKAGES = (
    "spin-megatron",
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "tokenizers",
    "datasets",
    "tensorrt-llm",
)


class StageIncomplete(Exception):
    """An input is not there yet. The message names the command that completes it."""


class StaleStage(Exception):
    """A finished stage was made from other settings or inputs. The message is the difference, field by field."""


@dataclass(frozen=True)
class OutputFile:
    """One file of a finished stage; path is relative to the stage's folder."""

    path: str
    num_bytes: int
    sha256: str
    num_rows: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What a finished stage read, wrote and ran with.

    key: digest over `settings` and `inputs`; two runs with equal keys give equal outputs.
    settings: the config values that decide the result, flat: {"objective.beta": 0.1, ...}.
    inputs: name -> key or content digest of what was read.
    stamps: name of such an input -> `stamp_tree` of the files it stood in, so that they need not be read to know that they are the same.
    summary: numbers for people (rows, rates, losses); never part of the key.
    """

    stage: str
    iteration: int | None
    shard: int | None
    key: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    outputs: tuple[OutputFile, ...]
    stamps: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git: str | None = None
    host: str = ""
    started_at: str = ""
    finished_at: str = ""
    schema: int = SCHEMA


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success fsync it and rename it to `path`, on failure remove it.

    The rename is atomic on POSIX file systems, so a reader sees the old file, the new file or none, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        fsync(aside)
        os.replace(aside, path)
        fsync(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space, quota or file size."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, keys in the order given, numbers as `plain` has them."""
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """The value with NaN and infinities as texts, since JSON has no number for them; float() reads both."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def fsync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk: from then on a crash of the machine loses none of them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """`fsync` of all that a program which does not do it itself has left in a folder."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():  # nobody writes to a left pipe, so opening it would wait for ever
            fsync(path)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a short exclusive file lock, waiting for it: for read-decide-write steps that last seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def digest_file(path: Path, tell: Callable[[], object] = lambda: None) -> str:
    """sha256 of a file's bytes, hex; `tell` is called for each of its mebibytes, the last of which may be a part of one."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(MEBIBYTE))
    with open(path, "rb") as handle:
        while num_bytes := handle.readinto(piece):
            digest.update(piece[:num_bytes])
            tell()
    return digest.hexdigest()


def digest_tree(path: Path) -> str:
    """Digest of a file's content, or of a folder's file names and contents; hidden files and folders, such as .git, do not count."""
    if path.is_file():
        return _digest_unchanged_file(path, *_size_and_time(path))
    return digest_values([(str(file.relative_to(path)), digest_tree(file)) for file in files_of(path)])


def stamp_tree(path: Path) -> str:
    """Digest of the names, sizes and times of change of the files that `digest_tree` reads: it reads none of them."""
    return digest_values([(str(file.relative_to(path)), *_size_and_time(file)) for file in files_of(path)])


def files_of(path: Path) -> list[Path]:
    """The files that `digest_tree` reads: this one, or those of this folder."""
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if not any(part.startswith(".") for part in file.relative_to(path).parts))
    return [file for file in found if file.is_file()]


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4096)
def _digest_unchanged_file(path: Path, num_bytes: int, changed_at_ns: int) -> str:
    """Of a file of this size and time: `status --watch` looks at the same data set again and again."""
    del num_bytes, changed_at_ns
    return digest_file(path)


def digest_values(values: Any) -> str:
    """sha256 of a JSON-serialisable value, independent of dictionary order, hex."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def stage_key(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The identity of a stage's result: what it is, what decides it, what it reads."""
    return digest_values({"stage": stage, "schema": SCHEMA, "settings": dict(settings), "inputs": dict(inputs)})


def output_file(root: Path, path: Path, num_rows: int | None = None, tell: Callable[[], object] = lambda: None) -> OutputFile:
    """Describe a finished file below `root` for the manifest; `tell` as in `digest_file`."""
    return OutputFile(str(path.relative_to(root)), path.stat().st_size, digest_file(path, tell), num_rows)


def installed_versions() -> dict[str, str]:
    """Python's version and those of the packages that decide numbers, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_revision(file: Path = Path(__file__)) -> str | None:
    """Revision of the source tree this package runs from ("-dirty" when changed); None where git does not track this package's files.

    An installed package may lie in the environment of somebody's own repository, whose revision says nothing of it.
    """
    git = ["git", "-C", str(file.parent)]
    try:
        is_tracked = subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, timeout=10, check=False)
        if is_tracked.returncode:
            return None
        command = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into the stage's folder: from this moment on the stage is done."""
    write_json(folder / MANIFEST_NAME, dataclasses.asdict(manifest))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a stage's folder, or None when the stage is not done.

    Raises:
        ValueError: the file is there but is not a manifest of this schema.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        outputs = tuple(OutputFile(**output) for output in values.pop("outputs"))
        manifest = Manifest(outputs=outputs, **values)
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a readable manifest ({error}); move it aside and rerun the stage.") from error
    if manifest.schema != SCHEMA:
        raise ValueError(f"{path} has manifest schema {manifest.schema}, this version reads {SCHEMA}; use the version that wrote it.")
    return manifest


def verify_outputs(folder: Path, manifest: Manifest, *, digests: bool = False) -> list[str]:
    """What is wrong with the files a manifest vouches for: missing, resized or (with digests) changed. Empty: nothing."""
    problems = []
    for output in manifest.outputs:
        path = folder / output.path
        if not path.exists():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != output.num_bytes:
            problems.append(f"{path} has {path.stat().st_size} bytes, its manifest says {output.num_bytes}")
        elif digests and digest_file(path) != output.sha256:
            problems.append(f"{path} does not match the sha256 in its manifest")
    return problems


def difference(then: Mapping[str, Any], now: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Name -> "then -> now", shortened, of every setting (or input) that was recorded and is another one now.

    Args:
        defaults: of settings. Given, names that one version of this package alone knows are no difference, so that a run outlives an
            upgrade: what was added since does at its default what was done before, what is gone does not decide the result any more.
    """
    if defaults is not None:
        then = {name: value for name, value in then.items() if name in now}
        now = {name: value for name, value in now.items() if name in then or name not in defaults or value != defaults[name]}
    before, after = ({name: _as_hashed(value) for name, value in values.items()} for values in (then, now))
    pairs = {name: (before.get(name, "absent"), after.get(name, "absent")) for name in sorted({*before, *after})}
    return {name: f"{_shortened(old)} -> {_shortened(new)}" for name, (old, new) in pairs.items() if old != new}


def _as_hashed(value: Any) -> str:
    """What a key is made of, but readable: 1 and 1.0 are two values, a list and a tuple one."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _shortened(text: str) -> str:
    """The beginning of a long text; a digest's is enough, two that differ at all differ there."""
    if _DIGEST.fullmatch(text):
        return text[1:13]
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
