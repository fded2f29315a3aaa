"""The train stage as a whole, on one process: what it leaves behind, stopping, dying, going on, and refusing."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader, load

from spin_megatron.config import RunConfig
from spin_megatron.mcore import reference
from spin_megatron.mcore.model import build_model, load_huggingface
from spin_megatron.mcore.runtime import running
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.records import ReferenceScore, SpinPair, read_rows
from spin_megatron.stages import train
from spin_megatron.stages.context import StageContext, StageOutput
from tests.parity.tiny_models import VOCAB, huggingface_logits, response_logps
from tests.parity.train_run import make_config, make_run


def run_train(layout: RunLayout, config: RunConfig | None = None, *, stop: Callable[[], bool] = lambda: False) -> StageOutput:
    return train.run(StageContext(config or make_config(layout.root), layout, 0, show=False, stop_requested=stop))


def after(polls: int) -> Callable[[], bool]:
    """A stop request that comes with this poll, from 1."""
    count = iter(range(1, 1_000_000))
    return lambda: next(count) >= polls


def final_weights(layout: RunLayout) -> dict[str, torch.Tensor]:
    reader = FileSystemReader(layout.final_weights(0))
    entries = reader.read_metadata().state_dict_metadata
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items() if hasattr(entry, "properties")}
    load(state, storage_reader=reader, no_dist=True)
    return state


def steps_of(layout: RunLayout) -> list[dict[str, Any]]:
    return [json.loads(line) for line in layout.metrics(0).read_text(encoding="utf-8").splitlines()]


def assert_same(first: RunLayout, second: RunLayout) -> None:
    ours, theirs = final_weights(first), final_weights(second)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunLayout:
    layout = make_run(tmp_path_factory.mktemp("undisturbed"))
    output = run_train(layout)
    assert not output.stopped
    assert output.summary["steps"] == len(steps_of(layout)) > 4
    return layout


def test_the_first_step_has_margin_zero_and_loss_ln_2_and_the_loss_falls(undisturbed: RunLayout) -> None:
    steps = steps_of(undisturbed)
    assert [step["step"] for step in steps] == list(range(len(steps)))
    assert steps[0]["margin_abs"] == 0.0
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[-1]["loss"] < 0.6
    assert steps[-1]["learning_rate"] < steps[0]["learning_rate"] == 1e-3


def test_the_reference_is_what_transformers_says_of_theta_t(undisturbed: RunLayout) -> None:
    pairs = {pair.pair_id: pair for pair in read_rows(undisturbed.held_out_pairs(0), SpinPair)}
    scores = read_rows(undisturbed.held_out_reference_scores(0), ReferenceScore)
    assert len(scores) == len(pairs)
    for score in scores:
        pair = pairs[score.pair_id]
        sequences = [(pair.prompt_ids, pair.real_ids), (pair.prompt_ids, pair.generated_ids)]
        logits = huggingface_logits(undisturbed.theta(0), sequences)
        expected = [float(response_logps(part, *sequence).sum()) for part, sequence in zip(logits, sequences, strict=True)]
        assert [score.logp_real, score.logp_generated] == pytest.approx(expected, abs=1e-4)
        assert (score.num_real, score.num_generated) == (len(pair.real_ids), len(pair.generated_ids))


def test_only_what_later_stages_read_is_left(undisturbed: RunLayout) -> None:
    assert list(undisturbed.checkpoints(0).iterdir()) == []
    assert sorted(path.name for path in undisturbed.reference(0).glob("*.parquet")) == ["held_out.parquet", "train.parquet"]
    assert len(read_rows(undisturbed.probe(0), ReferenceScore)) > 0


def test_a_second_call_finds_the_work_done(undisturbed: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a kill between the last file and the manifest."""
    monkeypatch.setattr(train, "build_model", None)
    assert run_train(undisturbed).summary["steps"] == len(steps_of(undisturbed))


# Polled after each reference part (one of held-out packs, three of train packs), then after each update.
@pytest.mark.parametrize(
    ("polls", "num_steps"), [(2, 0), (5, 1), (7, 3)], ids=["during the reference", "after the first update", "between checkpoints"]
)
def test_stopped_and_started_again_it_ends_with_the_same_bits(
    undisturbed: RunLayout, tmp_path: Path, polls: int, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PACKS_PER_PART", 4)
    layout = make_run(tmp_path)
    assert run_train(layout, stop=after(polls)).stopped
    assert (len(steps_of(layout)) if layout.metrics(0).exists() else 0) == num_steps
    assert not run_train(layout).stopped
    assert_same(undisturbed, layout)
    assert [(step["step"], step["loss"]) for step in steps_of(layout)] == [(step["step"], step["loss"]) for step in steps_of(undisturbed)]


def test_killed_between_checkpoints_it_repeats_the_lost_steps_and_ends_with_the_same_bits(
    undisturbed: RunLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, made = make_run(tmp_path), []
    make_step = train._make_step

    def dying(*args: Any) -> Any:
        if len(made) == 3:  # a checkpoint was written after the second
            raise KeyboardInterrupt
        made.append(make_step(*args))
        return made[-1]

    with monkeypatch.context() as patched:
        patched.setattr(train, "_make_step", dying)
        with pytest.raises(KeyboardInterrupt):
            run_train(layout)
    assert len(steps_of(layout)) == 3
    run_train(layout)
    assert_same(undisturbed, layout)
    assert [step["step"] for step in steps_of(layout)] == list(range(len(steps_of(undisturbed))))


def test_a_cache_of_other_packs_is_made_anew(undisturbed: RunLayout, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layout = make_run(tmp_path)
    run_train(layout, stop=after(3))
    identity = layout.reference(0) / "IDENTITY.json"
    identity.write_text(json.dumps(json.loads(identity.read_text(encoding="utf-8")) | {"threads": 64}), encoding="utf-8")
    # Spoilt numbers that only a new computation can put right; taken for whole they would change every loss.
    scores = [ReferenceScore(score.pair_id, 0.0, 0.0, 1, 1) for score in read_rows(layout.reference_scores(0), ReferenceScore)]
    reference.write_rows(layout.reference_scores(0), scores, ReferenceScore)
    run_train(layout)
    assert "made with other threads" in caplog.text
    assert_same(undisturbed, layout)


def test_parts_of_other_steps_are_not_taken_for_parts_of_these(
    undisturbed: RunLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a stop in the reference phase, resumed at another data-parallel size."""
    monkeypatch.setattr(reference, "PACKS_PER_PART", 4)
    layout = make_run(tmp_path)
    assert run_train(layout, make_config(tmp_path, train={"global_batch_pairs": 12}), stop=after(2)).stopped
    assert len(list(layout.reference(0).glob("train_*.parquet"))) == 1
    assert not run_train(layout).stopped
    assert_same(undisturbed, layout)
    assert sorted(path.name for path in layout.reference(0).glob("*.parquet")) == ["held_out.parquet", "train.parquet"]


def test_settings_that_changed_since_the_checkpoint_are_refused(tmp_path: Path) -> None:
    layout = make_run(tmp_path)
    run_train(layout, stop=after(5))
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate: 0\.001 -> 0\.002"):
        run_train(layout, make_config(tmp_path, optimizer={"learning_rate": 2e-3}))


def test_steps_that_fail_in_a_row_stop_the_run_and_keep_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layout = make_run(tmp_path)
    config = make_config(tmp_path, train={"max_skipped_steps": 2})
    build = train.build_trainer

    def build_broken(*args: Any, **options: Any) -> Any:
        trainer = build(*args, **options)
        trainer.chunks[0].module.decoder.final_layernorm.weight.register_hook(lambda gradient: gradient * math.nan)
        return trainer

    with monkeypatch.context() as patched:
        patched.setattr(train, "build_trainer", build_broken)
        with pytest.raises(ValueError, match=r"not finite in 2 steps in a row \(train\.max_skipped_steps\), .*the last is step 1"):
            run_train(layout, config)
    assert "step 0 is skipped" in caplog.text
    assert "packs" in caplog.text
    assert [step["skipped"] for step in steps_of(layout)] == [1.0, 1.0]
    run_train(layout, config)  # without the fault it goes on after the two steps
    assert [step["skipped"] for step in steps_of(layout)[:3]] == [1.0, 1.0, 0.0]


def test_margins_must_start_at_zero_until_an_update_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, asked = make_run(tmp_path), []
    build, make = train.build_trainer, train.train_step

    def build_broken_once(*args: Any, **options: Any) -> Any:
        trainer = build(*args, **options)
        weight = trainer.chunks[0].module.decoder.final_layernorm.weight
        weight.register_hook(lambda gradient: gradient * math.nan if len(asked) == 1 else gradient)
        return trainer

    def asking(*args: Any, **options: Any) -> Any:
        asked.append(options["must_start_at_zero"])
        return make(*args, **options)

    monkeypatch.setattr(train, "build_trainer", build_broken_once)
    monkeypatch.setattr(train, "train_step", asking)
    run_train(layout, stop=lambda: len(asked) == 4)
    run_train(layout)
    assert [step["skipped"] for step in steps_of(layout)[:3]] == [1.0, 0.0, 0.0]
    assert asked == [True, True] + [False] * (len(asked) - 2)


def spoil_token(folder: Path, token: int) -> None:
    """Let one row of a Hugging Face folder's embedding be NaN."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_pairs_whose_log_probs_are_not_finite_are_named_and_their_steps_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout = make_run(tmp_path)
    pairs = read_rows(layout.train_pairs(0), SpinPair)
    held = {pair.pair_id: {*pair.prompt_ids, *pair.real_ids, *pair.generated_ids} for pair in pairs}
    token = next(token for token in range(VOCAB) if sum(token in ids for ids in held.values()) == 1)
    (broken,) = (pair_id for pair_id, ids in held.items() if token in ids)
    spoil_token(layout.theta(0), token)
    run_train(layout)
    assert f"for 1 pairs: {broken}" in caplog.text
    skipped = [step["step"] for step in steps_of(layout) if step["skipped"]]
    named = re.findall(r"step (\d+): the loss is not finite in the packs of the pairs ([^\n]+)", caplog.text)
    assert [int(step) for step, _ids in named] == skipped
    assert len(skipped) == 2, "once an epoch"
    assert all(broken in ids.split(", ") for _step, ids in named)
    assert next(step["margin_abs"] for step in steps_of(layout) if not step["skipped"]) == 0.0


def test_a_model_whose_log_probs_are_nowhere_finite_is_refused(tmp_path: Path) -> None:
    layout = make_run(tmp_path)
    tensors = load_file(layout.theta(0) / "model.safetensors")
    tensors["model.norm.weight"][:] = math.inf
    save_file(tensors, layout.theta(0) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"all 16 pairs under theta_t are not finite: the weights in .*train\.precision"):
        run_train(layout)
    assert not layout.metrics(0).exists()


def test_a_limit_of_guard_stops_the_run_before_the_update_and_another_limit_lets_it_go_on(tmp_path: Path) -> None:
    layout = make_run(tmp_path)
    # The human answers of step 1 lose 0.06 nats by the update of step 0, which saw others.
    strict = make_config(tmp_path, guard={"on_excess": "stop", "max_logp_drop": 0.01})
    told = r"step 1: log p\(y\) of the human answers fell.*\(guard\.max_logp_drop=0\.01\).*not made.*--set guard\.on_excess"
    with pytest.raises(ValueError, match=told):
        run_train(layout, strict)
    assert [(step["skipped"], step.get("guard.max_logp_drop")) for step in steps_of(layout)] == [(0.0, None), (1.0, 1.0)]
    output = run_train(layout, make_config(tmp_path, guard={"max_logp_drop": 0.01}))
    rows = steps_of(layout)
    assert [step["skipped"] for step in rows] == [0.0, 1.0] + [0.0] * (len(rows) - 2)
    num_passed = sum("guard.max_logp_drop" in step for step in rows)
    assert 1 <= num_passed < len(rows)
    assert output.summary["warnings"] == [
        f"guard.max_logp_drop was passed in {num_passed} of {len(rows)} steps, see metrics.jsonl",
        f"1 of {len(rows)} steps were skipped, see the log",
    ]


def test_a_step_that_is_not_finite_is_not_told_to_have_passed_the_limit_of_the_step_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = make_run(tmp_path)
    build = train.build_trainer

    def build_broken_once(*args: Any, **options: Any) -> Any:
        trainer = build(*args, **options)
        weight = trainer.chunks[0].module.decoder.final_layernorm.weight
        weight.register_hook(lambda gradient: gradient * math.nan if len(steps_of(layout)) == 2 else gradient)
        return trainer

    monkeypatch.setattr(train, "build_trainer", build_broken_once)
    run_train(layout, make_config(tmp_path, guard={"max_logp_drop": 0.01}))
    assert [(step["skipped"], "guard.max_logp_drop" in step) for step in steps_of(layout)[:3]] == [(0.0, False), (0.0, True), (1.0, False)]


def test_skips_before_a_stop_count_with_those_after_it(tmp_path: Path) -> None:
    layout = make_run(tmp_path)
    refusing = {"on_excess": "skip", "max_margin": 1e-9, "max_logp_drop": 1e-9}
    config = make_config(tmp_path, guard=refusing, train={"max_skipped_steps": 4})
    # From step 1 on all are refused: any pair whose margin grew or whose human answer lost is too much.
    assert run_train(layout, config, stop=lambda: layout.metrics(0).exists() and len(steps_of(layout)) == 3).stopped
    assert [step["skipped"] for step in steps_of(layout)] == [0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"4 steps in a row \(train\.max_skipped_steps\).*the last is step 4\."):
        run_train(layout, config)
    assert [step["skipped"] for step in steps_of(layout)] == [0.0, 1.0, 1.0, 1.0, 1.0]


def test_the_final_weights_are_those_that_the_probe_was_scored_with(undisturbed: RunLayout) -> None:
    from spin_megatron.mcore.reference import PackedPairs, score_pairs
    from tests.parity.train_run import PACK_TOKENS
    from tests.parity.updates import load_weights

    held_out = PackedPairs.read(
        undisturbed.held_out_pairs(0), undisturbed.held_out_packs(0), pack_tokens=PACK_TOKENS, share_prompt=True
    )
    probe = read_rows(undisturbed.probe(0), ReferenceScore)
    shape = ModelShape.from_huggingface(undisturbed.theta(0))
    with running(ParallelLayout(), device="cpu", seed=1) as runtime:
        chunks = build_model(shape, runtime, dtype=torch.float32)
        load_huggingface(chunks, undisturbed.theta(0), shape, runtime, show=False)
        before = score_pairs(chunks, held_out, [held_out.packs[:1]], runtime)
        load_weights(undisturbed.final_weights(0), chunks)
        after_training = score_pairs(chunks, held_out, [held_out.packs[:1]], runtime)
    assert before is not None
    assert after_training is not None
    assert after_training[: len(probe)] == probe
    assert before[: len(probe)] != probe
