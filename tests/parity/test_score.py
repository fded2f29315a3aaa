"""`spin-megatron score` as outsiders run it: the file it writes agrees with transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spin_megatron.plan.shape import ParallelLayout
from spin_megatron.stages.score import ScoreRequest, run_score
from tests.parity.gloo import meeting_ports, run_ranks
from tests.parity.tiny_models import MODELS, huggingface_logits, make_pairs, make_tiny_model, response_logps

LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# name -> (tiny model, what differs from it)
FAMILIES = {name: (name, {}) for name in MODELS} | {"llama2_linear_rope": ("llama2", {"rope_parameters": LINEAR_ROPE})}
LAYOUTS = [ParallelLayout(tensor=tensor, pipeline=pipeline) for tensor, pipeline in ((2, 1), (4, 1), (1, 2), (2, 2))]
CASES = [(ParallelLayout(), "llama3")] + [(layout, name) for layout in LAYOUTS for name in FAMILIES]
SEQUENCES = [(pair.prompt_ids, response) for pair in make_pairs(num_pairs=4) for response in (pair.real_ids, pair.generated_ids)]


def _write_pairs(path: Path, sequences: list) -> None:
    path.write_text("".join(json.dumps({"prompt_ids": prompt, "response_ids": response}) + "\n" for prompt, response in sequences))


def _score(folder: Path, pairs: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "spin_megatron.cli", "score", "--model", str(folder), "--pairs", str(pairs), "--out", str(out)]
    command.extend(options)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250, check=False)


def test_scores_on_two_by_two_ranks_agree_with_transformers(tmp_path: Path) -> None:
    folder = make_tiny_model("qwen3_tied", tmp_path / "model")
    sequences = [(pair.prompt_ids, response) for pair in make_pairs(num_pairs=5) for response in (pair.real_ids, pair.generated_ids)]
    sequences.insert(3, ((5, 6, 7), ()))
    pairs = tmp_path / "pairs.jsonl"
    _write_pairs(pairs, sequences)

    finished = _score(folder, pairs, tmp_path / "scores.npz", "--tensor", "2", "--pipeline", "2")

    assert finished.returncode == 0, finished.stderr
    expected = [
        response_logps(logits, *sequence).numpy() if sequence[1] else np.zeros(0)
        for logits, sequence in zip(huggingface_logits(folder, sequences), sequences, strict=True)
    ]
    with np.load(tmp_path / "scores.npz") as scores:
        assert scores["num_tokens"].tolist() == [len(response) for _, response in sequences]
        np.testing.assert_allclose(scores["logp_sum"], [logps.sum() for logps in expected], atol=1e-4, rtol=0)
        for row, mask, logps in zip(scores["logp_tokens"], scores["mask"], expected, strict=True):
            np.testing.assert_allclose(row[mask], logps, atol=2e-5, rtol=0)
            assert not row[~mask].any()


def _score_on_all_layouts(root: Path, ports: list[int]) -> None:
    """For each case as many of the ranks as its layout has; the others are not there."""
    for number, ((layout, name), port) in enumerate(zip(CASES, ports, strict=True)):
        if int(os.environ["RANK"]) < layout.world_size:
            os.environ.update(WORLD_SIZE=str(layout.world_size), MASTER_PORT=str(port))
            run_score(ScoreRequest(root / name, root / "pairs.jsonl", root / f"{number}.npz", layout))


@pytest.mark.timeout(400)
def test_sums_of_every_family_agree_with_transformers_on_every_layout(tmp_path: Path) -> None:
    expected = {}
    for name, (model, changes) in FAMILIES.items():
        folder = make_tiny_model(model, tmp_path / name, **changes)
        logits = huggingface_logits(folder, SEQUENCES)
        expected[name] = [float(response_logps(part, *sequence).sum()) for part, sequence in zip(logits, SEQUENCES, strict=True)]
    _write_pairs(tmp_path / "pairs.jsonl", SEQUENCES)
    plain, scaled = expected["llama2"], expected["llama2_linear_rope"]
    assert max(abs(a - b) for a, b in zip(plain, scaled, strict=True)) > 0.1, "the scaling must move what is compared"

    with meeting_ports(len(CASES)) as ports:
        run_ranks(_score_on_all_layouts, 4, tmp_path, ports, timeout=300)

    for number, (layout, name) in enumerate(CASES):
        with np.load(tmp_path / f"{number}.npz") as scores:
            np.testing.assert_allclose(scores["logp_sum"], expected[name], atol=1e-4, rtol=0, err_msg=f"{name} on {layout}")


def test_bfloat16_weights_move_the_sums_by_their_rounding_alone(tmp_path: Path) -> None:
    folder = make_tiny_model("qwen2_tied", tmp_path / "model")
    _write_pairs(tmp_path / "pairs.jsonl", SEQUENCES)
    found = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.npz"
        run_score(ScoreRequest(folder, tmp_path / "pairs.jsonl", out, dtype=dtype))
        with np.load(out) as scores:
            found[dtype] = scores["logp_tokens"][scores["mask"]]
    difference = np.abs(found["bfloat16"] - found["float32"])
    assert difference.max() > 1e-4, "the weights were not rounded"
    # 8 bits of mantissa round by up to 1/256; logits of order 3 after four layers move by some hundredths.
    assert difference.mean() < 0.05


def test_a_refused_line_exits_with_2_and_writes_nothing(tmp_path: Path) -> None:
    folder = make_tiny_model("llama2", tmp_path / "model")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt_ids": [1], "response_ids": [259]}\n')
    finished = _score(folder, pairs, tmp_path / "scores.npz")
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.count("has token 259") == 1, "said once, not again from each rank's log"
    assert not (tmp_path / "scores.npz").exists()
