"""Bad lines of a score file are named by file and line; nothing is written for them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from spin_megatron.cli import main
from spin_megatron.plan.shape import ModelShape
from spin_megatron.stages.score import read_sequences, write_scores

SHAPE = ModelShape(
    family="llama",
    num_layers=1,
    hidden_size=8,
    ffn_hidden_size=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=10,
    max_positions=6,
    norm_epsilon=1e-5,
    rope_theta=1e4,
)
GOOD = '{"prompt_ids": [1, 2], "response_ids": [3], "note": "other keys are ignored"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2 is not JSON"),
        ("", r":2 is not JSON"),
        ("[1, 2]", r":2 holds list, expected"),
        ('{"prompt_ids": [1]}', r":2: response_ids=None, expected a list of token ids"),
        ('{"prompt_ids": [1], "response_ids": [1.0]}', r":2: response_ids=\[1\.0\], expected a list"),
        ('{"prompt_ids": [true], "response_ids": []}', r":2: prompt_ids=\[True\], expected a list"),
        ('{"prompt_ids": [1], "response_ids": "text"}', r":2: response_ids='text', expected a list"),
        ('{"prompt_ids": [1], "response_ids": [3, 10]}', r":2: response_ids has token 10, the model's vocabulary is 0 to 9"),
        ('{"prompt_ids": [-1], "response_ids": [3]}', r":2: prompt_ids has token -1"),
        ('{"prompt_ids": [], "response_ids": [3]}', r":2: prompt_ids is empty"),
        ('{"prompt_ids": [1, 2, 3], "response_ids": [4, 5, 6, 7]}', r":2 has 7 tokens, the model's max_position_embeddings is 6"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl" + message):
        read_sequences(path, SHAPE)


def test_no_rank_at_all_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["score", "--model", "m", "--pairs", "p", "--out", "o", "--tensor", "0"])
    assert caught.value.code == 2
    assert "argument --tensor: '0' is no whole number of at least 1" in capsys.readouterr().err


def test_a_missing_and_an_empty_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read \(No such file"):
        read_sequences(tmp_path / "none.jsonl", SHAPE)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        read_sequences(tmp_path / "empty.jsonl", SHAPE)


def test_good_lines_are_numbered_from_one_and_the_longest_allowed_passes(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{GOOD}\n{{"prompt_ids": [1, 2, 3], "response_ids": [4, 5, 9]}}\n{{"prompt_ids": [0], "response_ids": []}}\n\r\n \n')
    found = [(sequence.sequence_id, sequence.prompt_ids, sequence.response_ids) for sequence in read_sequences(path, SHAPE)]
    assert found == [("1", (1, 2), (3,)), ("2", (1, 2, 3), (4, 5, 9)), ("3", (0,), ())]


def test_scores_are_padded_and_masked(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores.npz", [torch.tensor([-1.0, -2.0]), torch.tensor([]), torch.tensor([-0.5])])
    with np.load(tmp_path / "scores.npz") as scores:
        assert scores["logp_sum"].dtype == np.float32
        assert scores["logp_sum"].tolist() == [-3.0, 0.0, -0.5]
        assert scores["logp_tokens"].tolist() == [[-1.0, -2.0], [0.0, 0.0], [-0.5, 0.0]]
        assert scores["mask"].tolist() == [[True, True], [False, False], [True, False]]
        assert scores["num_tokens"].tolist() == [2, 0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npz"]


def test_responses_that_are_all_empty_make_a_file(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores.npz", [torch.zeros(0), torch.zeros(0)])
    with np.load(tmp_path / "scores.npz") as scores:
        assert scores["logp_sum"].tolist() == [0.0, 0.0]
        assert scores["logp_tokens"].shape == (2, 0)
