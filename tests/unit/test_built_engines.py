"""Built engines: identity, cache, and that nothing stale is ever loaded. With onnxruntime-genai, for real."""

import json
import os
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_megatron.generation.built import build_once, engine_identity, require_identity, weights_digest
from spin_megatron.generation.engine import EngineSpec, Prompt, Sampling, provider
from spin_megatron.run.manifest import Manifest, output_file, write_manifest
from tests.tiny_tokenizer import save_tiny_tokenizer
from tests.unit.tiny_models import TINY, write_model

needs_onnx = pytest.mark.skipif(find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is not installed")


def make_spec(model: Path, **options: str | int) -> EngineSpec:
    return EngineSpec(model, "float32", batch_size=4, max_prompt_tokens=16, max_new_tokens=8, options=options)


def identity_of(spec: EngineSpec, **runtime: str) -> dict[str, Any]:
    return engine_identity(spec, engine="e", runtime={"version": "1", **runtime}, run_options=frozenset({"speed"}))


def make(folder: Path) -> None:
    (folder / "rank0.engine").write_bytes(b"engine")
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text("{}")


def must_not_build(_folder: Path) -> None:
    raise AssertionError("built although the cache has it")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", TINY, dtype=torch.float32)
    return tmp_path / "model"


def test_the_weights_digest_is_the_same_with_and_without_a_manifest(model: Path) -> None:
    bare = weights_digest(model)
    files = tuple(output_file(model, path) for path in sorted(model.iterdir()))
    write_manifest(model, Manifest("export", 1, None, "key", {}, {}, files))
    assert weights_digest(model) == bare


def test_the_weights_digest_follows_the_weights_and_the_config_alone(model: Path) -> None:
    before = weights_digest(model)
    (model / "README.md").write_text("other words")
    assert weights_digest(model) == before
    write_model(model, TINY, dtype=torch.float32, seed=8)
    assert weights_digest(model) != before


def test_a_folder_without_weights_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="safetensors"):
        weights_digest(tmp_path)


def test_an_engine_of_equal_weights_and_settings_comes_from_the_cache(model: Path, tmp_path: Path) -> None:
    spec = make_spec(model, cache=str(tmp_path / "cache"))
    first, second = tmp_path / "first", tmp_path / "second"
    assert not build_once(spec, first, identity_of(spec), make)
    assert build_once(spec, second, identity_of(spec), must_not_build)
    assert (second / "rank0.engine").read_bytes() == b"engine"
    assert (second / "sub" / "config.json").read_text() == "{}"
    assert os.path.samefile(first / "rank0.engine", second / "rank0.engine")  # no second copy on disk
    require_identity(second, identity_of(spec))


def test_an_empty_cache_setting_is_no_cache(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert not build_once(make_spec(model, cache=""), tmp_path / "engine", identity_of(make_spec(model)), make)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "engine"]), "nothing in the current folder"


@pytest.mark.parametrize("change", ["weights", "limits", "option", "version"])
def test_the_cache_misses_when_anything_that_decides_the_engine_changes(change: str, model: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    spec = make_spec(model, cache=cache)
    build_once(spec, tmp_path / "first", identity_of(spec), make)
    identity = identity_of(spec)
    if change == "weights":
        write_model(model, TINY, dtype=torch.float32, seed=9)
        identity = identity_of(spec)
    elif change == "limits":
        identity = identity_of(replace(spec, max_new_tokens=9))
    elif change == "option":
        identity = identity_of(make_spec(model, cache=cache, quantization="fp8"))
    else:
        identity = identity_of(spec, version="2")
    assert not build_once(spec, tmp_path / "second", identity, make)
    with pytest.raises(ValueError, match="holds an engine of something else"):
        require_identity(tmp_path / "first", identity)


def test_options_that_only_say_how_an_engine_runs_make_no_other_engine(model: Path, tmp_path: Path) -> None:
    plain = identity_of(make_spec(model))
    assert identity_of(make_spec(model, speed=3, cache=str(tmp_path))) == plain


def test_a_stale_engine_is_refused_field_by_field(model: Path, tmp_path: Path) -> None:
    spec = make_spec(model)
    build_once(spec, tmp_path / "engine", identity_of(spec), make)
    with pytest.raises(ValueError, match="version: built with '1', now '2'") as caught:
        require_identity(tmp_path / "engine", identity_of(spec, version="2"))
    assert "weights" not in str(caught.value)


def test_an_unfinished_engine_is_refused(model: Path, tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        make(folder)
        raise MemoryError

    with pytest.raises(MemoryError):
        build_once(make_spec(model), tmp_path / "engine", {}, fails)
    with pytest.raises(ValueError, match="no finished engine"):
        require_identity(tmp_path / "engine", {})


def test_an_engine_is_on_the_disk_before_it_is_called_finished(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk: set[Path] = set()
    names: list[set[Path]] = []
    fsync, replace_file = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        on_disk.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        if target.name == "identity.json":
            names.append(set(on_disk))
        replace_file(source, target)

    monkeypatch.setattr("os.fsync", note_fsync)
    monkeypatch.setattr("os.replace", note_replace)
    engine, cache = tmp_path / "engine", tmp_path / "cache"
    build_once(make_spec(model, cache=str(cache)), engine, identity_of(make_spec(model)), make)
    assert {engine, engine / "rank0.engine", engine / "sub", engine / "sub" / "config.json"} <= names[0]
    assert cache in on_disk, "the name under which the cached engine is found"


def test_a_build_that_fails_leaves_nothing_in_the_cache(model: Path, tmp_path: Path) -> None:
    spec = make_spec(model, cache=str(tmp_path / "cache"))

    def fails(_folder: Path) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        build_once(spec, tmp_path / "engine", identity_of(spec), fails)
    assert not build_once(spec, tmp_path / "again", identity_of(spec), make)


@needs_onnx
def test_a_compiled_engine_is_rebuilt_when_the_weights_change_and_answers_with_the_new_ones(model: Path, tmp_path: Path) -> None:
    shape = replace(TINY, head_dim=16)
    spec = make_spec(model, cache=str(tmp_path / "cache"))
    onnx, sampling = provider("onnxruntime-genai"), Sampling(0.0, 0, 1.0, 8, (2, 3))
    answers, facts = [], []
    for number, seed in enumerate((7, 8, 7)):
        write_model(model, shape, dtype=torch.float32, seed=seed)
        save_tiny_tokenizer(model)
        folder = tmp_path / f"engine_{number}"
        facts.append(onnx.build(spec, folder))
        with closing(onnx.load(spec, folder, tmp_path)) as engine:
            answers.append([row.token_ids for row in engine.generate([Prompt("a", (5, 6, 7, 8), 1)], sampling)])
    assert answers[0] == answers[2] != answers[1]
    assert [fact["from_cache"] for fact in facts] == [False, False, True]
    # The engine of the other weights is refused, whatever its folder is called.
    with pytest.raises(ValueError, match="weights: built with"):
        onnx.load(spec, tmp_path / "engine_1", tmp_path)


@needs_onnx
def test_the_compiled_engine_refuses_bfloat16_by_name(model: Path, tmp_path: Path) -> None:
    write_model(model, replace(TINY, head_dim=16), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"generate\.dtype"):
        provider("onnxruntime-genai").build(replace(make_spec(model), dtype="bfloat16"), tmp_path)


@needs_onnx
def test_the_compiled_engine_refuses_heads_it_cannot_compute(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="head size 6"):
        provider("onnxruntime-genai").build(make_spec(model), tmp_path)


@needs_onnx
def test_an_export_that_fails_says_why(model: Path, tmp_path: Path) -> None:
    write_model(model, replace(TINY, head_dim=16), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"exporting .* to ONNX failed"):
        provider("onnxruntime-genai").build(make_spec(model), tmp_path / "engine")  # its tokenizer.json is no tokenizer
    assert "identity.json" not in os.listdir(tmp_path / "engine")


@pytest.mark.skipif(find_spec("onnxruntime_genai") is not None, reason="onnxruntime-genai is installed")
def test_an_engine_that_is_not_installed_says_how_to_get_it(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pip install"):
        provider("onnxruntime-genai").build(make_spec(model), tmp_path)


def test_the_identity_file_is_plain_json(model: Path, tmp_path: Path) -> None:
    spec = make_spec(model)
    build_once(spec, tmp_path / "engine", identity_of(spec), make)
    found = json.loads((tmp_path / "engine" / "identity.json").read_text())
    assert found["weights"] == weights_digest(model)
    assert (found["max_new_tokens"], found["dtype"]) == (8, "float32")
