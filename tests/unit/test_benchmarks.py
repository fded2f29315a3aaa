"""The benchmarks' text is what their files say, and the GPU script's lines run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.benchmarks import generate, head, table, train_step
from tools.benchmarks.problem import model_folder, pairs_of_a_plan, results_of, ultrachat_like_lengths

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("page", table.PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_measured_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = [found[2] for found in table.BLOCK.finditer(text)]
    assert names, f"{page} holds no table"
    assert table.filled(text) == text, "run: python -m tools.benchmarks.table --write"


def test_every_measured_file_has_its_table_and_names_no_path() -> None:
    shown = {found[2] for page in table.PAGES for found in table.BLOCK.finditer(page.read_text(encoding="utf-8"))}
    for path in table.RESULTS.glob("*.json"):
        assert path.stem in shown
        report = json.loads(path.read_text(encoding="utf-8"))
        assert not [value for value in report["problem"].values() if "/" in str(value)]
        assert report["device_name"]


def test_a_step_is_made_of_whole_packs_that_fit_and_divide_among_the_peer_s_batches() -> None:
    packs = pairs_of_a_plan(2048, num_pairs=5, vocab_size=50, multiples=(1, 4))
    assert sum(map(len, packs)) % 4 == 0
    assert sum(map(len, packs)) >= 5
    for pack in packs:
        assert sum(len(part) for pair in pack for part in pair) <= 2048
        assert {token for pair in pack for part in pair for token in part} <= set(range(1, 50))


def test_flops_of_a_pair_count_its_prompt_once(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 10, "hidden_size": 4, "intermediate_size": 8}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config |= {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    pair = {"prompt": [1] * 5, "real": [1] * 3, "generated": [1] * 2}
    # A layer: queries and output 4x4 each, keys and values 4x2 each, gate, up and down 4x8 each: 16 + 16 + 8 + 8 + 96 = 144 weights.
    # Tokens: 5 of x, 2 of y, 1 of y' (an answer's last token is not computed); rows of the head: 3 + 2.
    # Query-key products: x 15; y 2*5 + 3; y' 1*5 + 1: 34, each 2 heads x 2 numbers, once for scores and once for values.
    by_hand = 6 * (8 * 3 * 144 + 5 * 4 * 10 + 34 * 3 * 2 * 2 * 2)
    assert train_step.needed_flops([pair], tmp_path) == by_hand


def test_both_sides_of_generate_give_responses_of_the_planned_lengths(tmp_path: Path) -> None:
    options = generate.parse(["--model", "micro", "--prompts", "7", "--batch", "3", "--mix", "24", "--rounds", "1"])
    requests = generate.make_requests(options, vocab_size=512)
    planned = [-(-one.generated // 24) for one in ultrachat_like_lengths(7, seed=0)]
    assert list(requests.values()) == planned
    assert len(set(planned)) > 3
    found = generate.measure(options, model_folder("micro", tmp_path))  # which compares both sides' lengths with these
    assert found["greedy_equal"] == 7
    assert found["mean_response_tokens"] == sum(planned) / 7


def test_a_peer_that_fails_is_left_out_and_named_but_nothing_that_is_compared_with(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(name: str) -> int:
        if name == "peer":
            raise RuntimeError("CUDA out of memory")
        return len(name)

    assert results_of(["naive", "peer", "ours"], measure, needed=("naive", "ours")) == {"naive": 5, "ours": 4}
    assert "peer is left out, it does not run here: RuntimeError: CUDA out of memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="out of memory"):
        results_of(["peer"], measure, needed=("peer",))


def test_a_torch_without_linear_cross_entropy_is_compared_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.nn.LinearCrossEntropyOptions", raising=False)
    assert not [name for name in head._available(None, "cpu") if name.startswith("torch")]


@pytest.mark.timeout(300)
def test_the_gpu_script_runs_all_its_lines_on_the_cpu_with_tiny_sizes(tmp_path: Path) -> None:
    command = [
        REPOSITORY / "tools" / "benchmarks" / "gpu.sh",
        "--device",
        "cpu",
        "--out",
        tmp_path / "it's here",
        "--python",
        sys.executable,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "it's here").glob("*.json")}
    assert set(reports) == {"head_h16_cpu", "head_h24_cpu", "attention_cpu", "train_step_micro_cpu"}
    assert reports["attention_cpu"]["methods"]["spin-megatron"]["error"] < 0.03  # bf16
    assert reports["head_h16_cpu"]["methods"]["spin-megatron"]["error"]["logp_nats"] < 0.03
    losses = reports["train_step_micro_cpu"]["methods"]["spin-megatron"]["losses"]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)  # ln 2: the policy before its first step is the reference
    assert losses[1] < losses[0]
