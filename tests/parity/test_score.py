"""`spin-megatron score` as outsiders run it: the file it writes agrees with transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.parity.tiny_models import huggingface_logits, make_pairs, make_tiny_model, response_logps


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
    pairs.write_text("".join(json.dumps({"prompt_ids": prompt, "response_ids": response}) + "\n" for prompt, response in sequences))

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


def test_a_refused_line_exits_with_2_and_writes_nothing(tmp_path: Path) -> None:
    folder = make_tiny_model("llama2", tmp_path / "model")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt_ids": [1], "response_ids": [259]}\n')
    finished = _score(folder, pairs, tmp_path / "scores.npz")
    assert finished.returncode == 2, finished.stderr
    assert "has token 259" in finished.stderr
    assert not (tmp_path / "scores.npz").exists()
