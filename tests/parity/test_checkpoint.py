"""Checkpoints: bit-exact at the layout that saved, equal numbers at any other, and nothing half-written taken for whole."""

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from spin_megatron.convert.saved_checkpoint import is_vouched_for
from spin_megatron.data.progress import Progress
from spin_megatron.mcore.checkpoint import (
    COMPLETE_NAME,
    is_complete,
    load_training,
    newest_training,
    require_recipe,
    save_training,
    save_weights,
)
from spin_megatron.mcore.model import build_model
from spin_megatron.mcore.optimizer import UpdateRule
from spin_megatron.mcore.runtime import Runtime, running
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from tests.parity.gloo import meeting_ports, run_ranks
from tests.parity.tiny_models import MODELS, make_tiny_model
from tests.parity.updates import Bench, load_weights, make_bench, make_steps, numbers_of, weight_bits

ADAMW, RMSPROP = UpdateRule("adamw", weight_decay=0.1), UpdateRule("rmsprop")
RECIPE = {"optimizer.learning_rate": 1e-3, "input.pairs": "abc"}
WORLD = 4


@dataclass(frozen=True)
class Case:
    """What is saved after two updates, and the rule, precision and layout that saved it."""

    model: str
    rule: UpdateRule
    layout: ParallelLayout
    dtype: torch.dtype = torch.float32


CASES = {
    "adamw, dp, distributed": Case("llama2", replace(ADAMW, is_distributed=True), ParallelLayout(data=4)),
    "rmsprop, tp and uneven pp": Case("qwen3_tied", RMSPROP, ParallelLayout(tensor=2, pipeline=2, stage_layers=(3, 1))),
    "rmsprop, tp, distributed, bf16": Case(
        "llama2", replace(RMSPROP, is_distributed=True), ParallelLayout(tensor=2, data=2), torch.bfloat16
    ),
    "adamw, virtual pp, tied": Case("qwen3_tied", ADAMW, ParallelLayout(pipeline=2, data=2, virtual_pipeline=2)),
    "rmsprop, experts, distributed": Case("mixtral", replace(RMSPROP, is_distributed=True), ParallelLayout(data=4, expert=2)),
}
# Where each fp32 case is loaded again: (case, layout, with the distributed optimizer).
ELSEWHERE = (
    ("adamw, dp, distributed", ParallelLayout(tensor=2, pipeline=2, stage_layers=(1, 3)), False),
    ("adamw, dp, distributed", ParallelLayout(tensor=4), False),
    ("rmsprop, tp and uneven pp", ParallelLayout(data=4), True),
    ("adamw, virtual pp, tied", ParallelLayout(tensor=2, data=2, sequence=True), True),
    ("rmsprop, experts, distributed", ParallelLayout(pipeline=2, data=2), False),
)


def _forget(bench: Bench) -> None:
    """Spoil weights and main parameters, so that only what is loaded can bring them back."""
    with torch.no_grad():
        for chunk in bench.trainer.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(0.5)
    bench.trainer.optimizer.reload_model_params()


def _bench(case: Case, models: dict[str, Path], runtime: Runtime) -> Bench:
    return make_bench(models[case.model], case.rule, runtime, dtype=case.dtype)


def _save_and_go_on(models: dict[str, Path], root: Path, ports: list[int]) -> dict[str, Any]:
    """Two updates, save, two more; then load in a spoilt trainer and make the last two again."""
    found = {}
    for (name, case), port in zip(CASES.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with running(case.layout, device="cpu", seed=1) as runtime:
            bench = _bench(case, models, runtime)
            make_steps(bench, (0, 1))
            folder = save_training(root / name, bench.trainer, Progress(step=2, packs_consumed=8), runtime, recipe=RECIPE, keep=2)
            undisturbed = numbers_of(make_steps(bench, (2, 3))), weight_bits(bench.trainer)
            again = _bench(case, models, runtime)
            _forget(again)
            progress = load_training(folder, again.trainer, runtime, recipe=RECIPE)
            resumed = numbers_of(make_steps(again, (2, 3))), weight_bits(again.trainer)
            found[name] = (undisturbed, resumed, progress)
    return found


def _go_on_elsewhere(models: dict[str, Path], root: Path, ports: list[int]) -> list[list[tuple[float, float]]]:
    found = []
    for (name, layout, is_distributed), port in zip(ELSEWHERE, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        case = CASES[name]
        with running(layout, device="cpu", seed=1) as runtime:
            moved = replace(case, rule=replace(case.rule, is_distributed=is_distributed))
            bench = _bench(moved, models, runtime)
            _forget(bench)
            newest = newest_training(root / name, runtime)
            assert newest is not None
            load_training(newest, bench.trainer, runtime, recipe=RECIPE)
            found.append(numbers_of(make_steps(bench, (2, 3))))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_tiny_model(name, tmp_path_factory.mktemp(name)) for name in {case.model for case in CASES.values()}}


@pytest.fixture(scope="module")
def saved(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder with every case's checkpoint, and what each rank saw."""
    root = tmp_path_factory.mktemp("saved")
    with meeting_ports(len(CASES)) as ports:
        return root, run_ranks(_save_and_go_on, WORLD, models, root, ports, timeout=500)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_a_reload_at_the_same_layout_goes_on_bit_for_bit(name: str, saved: tuple[Path, list[dict[str, Any]]]) -> None:
    for by_case in saved[1]:
        (numbers, bits), (resumed_numbers, resumed_bits), progress = by_case[name]
        assert resumed_numbers == numbers
        assert resumed_bits == bits
        assert progress == Progress(step=2, packs_consumed=8)


@pytest.mark.timeout(600)
def test_a_reload_at_another_layout_goes_on_with_the_same_numbers(
    models: dict[str, Path], saved: tuple[Path, list[dict[str, Any]]]
) -> None:
    root, by_rank = saved
    with meeting_ports(len(ELSEWHERE)) as ports:
        found = run_ranks(_go_on_elsewhere, WORLD, models, root, ports, timeout=500)[0]
    for (name, layout, _), steps in zip(ELSEWHERE, found, strict=True):
        wanted = by_rank[0][name][0][0]
        for step, expected in zip(steps, wanted, strict=True):
            assert step == pytest.approx(expected, rel=1e-5), f"{name} on {layout}"  # fp32 sums in another order


def test_the_optimizers_state_matters_for_what_these_tests_compare(
    models: dict[str, Path], saved: tuple[Path, list[dict[str, Any]]], runtime: Runtime
) -> None:
    """With the weights alone, the second update after the reload differs by far more than the tolerance above."""
    root, by_rank = saved
    name = "adamw, dp, distributed"
    bench = make_bench(models["llama2"], ADAMW, runtime)
    newest = newest_training(root / name, runtime)
    assert newest is not None
    load_weights(newest, [chunk.module for chunk in bench.trainer.chunks])
    steps, wanted = numbers_of(make_steps(bench, (2, 3))), by_rank[0][name][0][0]
    assert steps[0] == pytest.approx(wanted[0], rel=1e-5)
    assert steps[1][0] != pytest.approx(wanted[1][0], rel=1e-4)


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with running(ParallelLayout(), device="cpu", seed=1) as started:
        yield started


@pytest.fixture
def bench(models: dict[str, Path], runtime: Runtime) -> Bench:
    return make_bench(models["llama2"], ADAMW, runtime)


def _save(bench: Bench, root: Path, step: int, *, keep: int = 2) -> Path:
    return save_training(root, bench.trainer, Progress(step=step, num_skipped=step), bench.runtime, recipe=RECIPE, keep=keep)


def test_a_half_written_checkpoint_is_removed_and_the_one_before_it_found(bench: Bench, tmp_path: Path) -> None:
    whole, half = _save(bench, tmp_path, 2), _save(bench, tmp_path, 4)
    (half / COMPLETE_NAME).unlink()  # what a kill before the last write leaves
    assert newest_training(tmp_path, bench.runtime) == whole
    assert not half.exists()


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(bench: Bench, tmp_path: Path) -> None:
    assert newest_training(tmp_path / "none", bench.runtime) is None
    (_save(bench, tmp_path, 2) / COMPLETE_NAME).unlink()
    assert newest_training(tmp_path, bench.runtime) is None


def test_only_the_newest_checkpoints_are_kept_in_the_order_of_their_steps(bench: Bench, tmp_path: Path) -> None:
    for step in (99_999_998, 99_999_999, 100_000_000, 100_000_001):
        newest = _save(bench, tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_100000000", "step_100000001"]
    assert newest_training(tmp_path, bench.runtime) == newest


def test_other_settings_are_refused_with_their_difference(bench: Bench, tmp_path: Path) -> None:
    folder = _save(bench, tmp_path, 2)
    changed = RECIPE | {"optimizer.learning_rate": 2e-3}
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate: 0\.001 -> 0\.002"):
        load_training(folder, bench.trainer, bench.runtime, recipe=changed)
    require_recipe(folder, dict(RECIPE))
    later = {"optimizer.momentum": 0.0} | {name: value for name, value in RECIPE.items() if name != "optimizer.learning_rate"}
    require_recipe(folder, later, defaults={"optimizer.momentum": 0.0})  # of a version that adds one setting and drops another
    with pytest.raises(ValueError, match=r"optimizer\.momentum: absent -> 0\.0"):
        require_recipe(folder, later, defaults={"optimizer.momentum": 0.9})


def test_a_truncated_file_is_refused_by_name(bench: Bench, tmp_path: Path) -> None:
    folder = _save(bench, tmp_path, 2)
    (data,) = folder.glob("*.distcp")
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"{folder.name} cannot be loaded.*remove the folder"):
        load_training(folder, bench.trainer, bench.runtime, recipe=RECIPE)


def test_a_pickle_that_changed_is_never_opened(bench: Bench, tmp_path: Path) -> None:
    folder = _save(bench, tmp_path, 2)
    assert is_vouched_for(folder)  # export and convert need no --trust for a run's own checkpoints
    index = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(index + b"x")
    assert not is_vouched_for(folder)
    with pytest.raises(ValueError, match=r"\.metadata or common\.pt changed since .* is not unpickled"):
        load_training(folder, bench.trainer, bench.runtime, recipe=RECIPE)
    (folder / ".metadata").write_bytes(index)
    (folder / "common.pt").write_bytes(b"another's")
    with pytest.raises(ValueError, match="is not unpickled"):
        load_training(folder, bench.trainer, bench.runtime, recipe=RECIPE)


def test_a_full_disk_is_an_os_error_and_leaves_no_checkpoint(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _save(bench, tmp_path, 2)

    def no_space(*_args: Any, **_kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(FileSystemWriter, "write_data", no_space)
        with pytest.raises(OSError, match="No space left") as caught:
            _save(bench, tmp_path, 4)
    assert caught.value.errno == errno.ENOSPC
    assert newest_training(tmp_path, bench.runtime) == before


def test_a_weights_checkpoint_is_no_training_checkpoint(bench: Bench, tmp_path: Path) -> None:
    save_weights(tmp_path / "weights", [chunk.module for chunk in bench.trainer.chunks], bench.runtime, recipe=RECIPE)
    assert json.loads((tmp_path / "weights" / COMPLETE_NAME).read_text(encoding="utf-8"))["kind"] == "weights"
    with pytest.raises(ValueError, match="is a weights checkpoint, expected a training checkpoint"):
        load_training(tmp_path / "weights", bench.trainer, bench.runtime, recipe=RECIPE)


def test_weights_lie_under_the_keys_that_export_reads(bench: Bench, tmp_path: Path) -> None:
    save_weights(tmp_path / "weights", [chunk.module for chunk in bench.trainer.chunks], bench.runtime, recipe=RECIPE)
    index = FileSystemReader(tmp_path / "weights").read_metadata().state_dict_metadata
    layers, hidden, heads, kv_heads, feed_forward = 4, 32, 4, MODELS["llama2"][1]["num_key_value_heads"], 48
    head = hidden // heads
    # Megatron Core 0.19 keeps its "common state" beside the tensors, 0.16 in a file of its own.
    assert {key: tuple(entry.size) for key, entry in index.items() if isinstance(entry, TensorStorageMetadata)} == {
        "embedding.word_embeddings.weight": (259, hidden),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (layers, hidden),
        "decoder.layers.self_attention.linear_qkv.weight": (layers, (heads + 2 * kv_heads) * head, hidden),
        "decoder.layers.self_attention.linear_proj.weight": (layers, hidden, hidden),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (layers, hidden),
        "decoder.layers.mlp.linear_fc1.weight": (layers, 2 * feed_forward, hidden),
        "decoder.layers.mlp.linear_fc2.weight": (layers, hidden, feed_forward),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (259, hidden),
    }


def test_weights_load_into_a_fresh_model_bit_for_bit(models: dict[str, Path], bench: Bench, tmp_path: Path) -> None:
    make_steps(bench, (0,))
    chunks = [chunk.module for chunk in bench.trainer.chunks]
    save_weights(tmp_path / "weights", chunks, bench.runtime, recipe=RECIPE)
    fresh = build_model(ModelShape.from_huggingface(models["llama2"]), bench.runtime, dtype=torch.float32)
    load_weights(tmp_path / "weights", fresh)
    loaded = dict(fresh[0].named_parameters())
    assert all(torch.equal(parameter, loaded[name]) for name, parameter in chunks[0].named_parameters())
    assert is_complete(tmp_path / "weights")
