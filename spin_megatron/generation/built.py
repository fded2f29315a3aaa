"""Engines that are built: one build an iteration, a cache keyed by all that decides an engine, and no stale engine, ever.

An engine's identity is a flat dictionary of what it was made from: the digest of theta_t's weights and config, limits,
settings, library versions and hardware. It is written into the engine's folder last; whoever loads the folder computes the
identity it expects and compares the two. The cache maps the digest of an identity to a folder; files are hard links where
the file system allows, so a cached engine costs no second copy while an iteration still has it.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spin_megatron.generation.engine import EngineSpec
from spin_megatron.run.manifest import digest_file, digest_values, fsync, fsync_tree, read_manifest, write_json

logger = logging.getLogger(__name__)

IDENTITY_NAME = "identity.json"
# Logs, jobs and calibration text of a build lie here, and are no part of the engine.
WORK_NAME = "work"
CACHE_OPTION = "cache"


def weights_digest(model: Path) -> str:
    """Digest of a Hugging Face folder's weights and config.json; taken from its manifest where it is a finished export.

    Raises:
        ValueError: there are no safetensors files.
    """
    manifest = read_manifest(model)
    if manifest is not None:
        digests = {output.path: output.sha256 for output in manifest.outputs if _decides_the_model(output.path)}
    else:
        digests = {path.name: digest_file(path) for path in model.iterdir() if _decides_the_model(path.name)}
    if not any(name.endswith(".safetensors") for name in digests):
        raise ValueError(f"{model} holds no .safetensors file; give the folder of a complete Hugging Face model.")
    return digest_values(digests)


def _decides_the_model(name: str) -> bool:
    return name.endswith(".safetensors") or name == "config.json"


def engine_identity(spec: EngineSpec, *, engine: str, runtime: Mapping[str, Any], run_options: frozenset[str]) -> dict[str, Any]:
    """What a built engine is made from.

    Args:
        runtime: versions and hardware it is tied to, and what was chosen because of them.
        run_options: options that only say how the engine is run; they, and the cache's place, do not make another engine.
    """
    settings = {f"options.{name}": value for name, value in sorted(spec.options.items()) if name not in run_options | {CACHE_OPTION}}
    limits = {name: getattr(spec, name) for name in ("dtype", "max_prompt_tokens", "max_new_tokens")}
    return {"engine": engine, "weights": weights_digest(spec.model), **limits, **settings, **runtime}


def build_once(spec: EngineSpec, folder: Path, identity: Mapping[str, Any], make: Callable[[Path], None]) -> bool:
    """Fill `folder` with the engine of this identity, from the cache or by `make`; returns whether it came from the cache.

    The folder's identity file is written last: without it the folder is garbage.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cached = _cache_folder(spec, identity)
    from_cache = cached is not None and cached.exists()
    if from_cache:
        assert cached is not None
        logger.info("engine found in the cache: %s", cached)
        _link_tree(cached, folder)
    else:
        make(folder)
    fsync_tree(folder)  # builders do not
    write_json(folder / IDENTITY_NAME, identity)
    if cached is not None and not from_cache:
        _store(folder, cached)
    return from_cache


def _cache_folder(spec: EngineSpec, identity: Mapping[str, Any]) -> Path | None:
    root = spec.options.get(CACHE_OPTION)  # "", the default that is listed, is no folder
    return None if not root else Path(str(root)) / digest_values(dict(identity))


def _store(folder: Path, cached: Path) -> None:
    """Put a copy aside and rename it: a cached folder is whole or not there. Another run may be faster."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".storing_", dir=cached.parent))
    try:
        _link_tree(folder, aside)
        fsync_tree(aside)
        aside.rename(cached)
        fsync(cached.parent)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        if not cached.exists():
            raise
    logger.info("engine stored in the cache: %s", cached)


def _link_tree(source: Path, target: Path) -> None:
    """Hard links of every file of an engine, copies where links are not possible."""
    for path in sorted(source.rglob("*")):
        if path.relative_to(source).parts[0] == WORK_NAME:
            continue
        destination = target / path.relative_to(source)
        if path.is_dir():
            destination.mkdir(exist_ok=True)
            continue
        try:
            os.link(path, destination)
        except FileExistsError:
            continue
        except OSError:
            shutil.copyfile(path, destination)


def require_identity(folder: Path, expected: Mapping[str, Any]) -> None:
    """Refuse an engine that was made from anything else than what is there now.

    Raises:
        ValueError: the engine is unfinished or differs; the message lists every field that does.
    """
    path = folder / IDENTITY_NAME
    if not path.exists():
        raise ValueError(f"{folder} holds no finished engine; run build-engine of this iteration first.")
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        f"{name}: built with {found.get(name)!r}, now {expected.get(name)!r}"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    if lines:
        listed = "\n  ".join(lines)
        raise ValueError(f"{folder} holds an engine of something else:\n  {listed}\nMake build-engine of this iteration anew.")
