"""Tiny fast tokenizers with the chat templates of known families, saved as folders that AutoTokenizer loads.

Ids can be worked out by hand: first the special tokens of the template in the order of SPECIAL_TOKENS, then, for the kind
"characters", newline and the printable ASCII characters from space on. "byte_bpe" is byte-level BPE, as Llama 3 and Qwen
have it, and "metaspace" writes spaces as "▁" and puts one before each text, as Llama 2 does; both with a few merges.
"""

from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TemplateName = Literal["chatml", "zephyr", "llama2", "llama3"]
Kind = Literal["characters", "byte_bpe", "metaspace"]

CHARACTERS = ["\n", *map(chr, range(32, 127))]

# BOS, EOS, unknown, then what else the template writes.
SPECIAL_TOKENS: dict[TemplateName, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>", "<unk>"),
    "zephyr": ("<s>", "</s>", "<unk>"),
    "llama2": ("<s>", "</s>", "<unk>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|unk|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
}

# Written for these tests; each gives the text its family is documented to give.
CHAT_TEMPLATES: dict[TemplateName, str] = {
    # No BOS; a newline after each turn's end.
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # No BOS; EOS ends user turns too; a newline after EOS.
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    # BOS before each exchange; no text of its own as generation prompt; refuses a system turn.
    "llama2": (
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('this model knows no system turn') }}"
        "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # BOS once; content is trimmed; nothing after the end of a turn.
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}

# "Ġ" is the byte-level alphabet's space and "Ċ" its newline.
_BYTE_MERGES = [("Ċ", "Ċ"), ("Ġ", "h"), ("h", "i"), ("Ġ", "y"), ("y", "e"), ("ye", "s"), ("Ġ", "yes")]
_METASPACE_MERGES = [("▁", "h"), ("h", "i"), ("▁h", "i"), ("▁", "y"), ("y", "e"), ("ye", "s"), ("▁", "yes")]


def save_tiny_tokenizer(
    folder: Path,
    *,
    template: TemplateName | None = "chatml",
    kind: Kind = "characters",
    adds_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """Build a tokenizer, save it and return it.

    Args:
        template: decides chat template and special tokens; None: chatml's special tokens and no chat template.
        adds_bos: the tokenizer itself puts BOS before a text (add_special_tokens), whatever the template does.
    """
    specials = SPECIAL_TOKENS[template or "chatml"]
    tokenizer = Tokenizer(_model(kind, specials))
    tokenizer.add_special_tokens(list(specials))
    if kind == "byte_bpe":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
        tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    else:
        tokenizer.decoder = decoders.Fuse()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{specials[0]} $A", special_tokens=[(specials[0], 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=specials[0],
        eos_token=specials[1],
        unk_token=specials[2],
        pad_token=specials[1],  # as SmolLM2 has it: nothing may take padding for EOS or EOS for padding
        chat_template=CHAT_TEMPLATES[template] if template else None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    return fast


def _model(kind: Kind, specials: tuple[str, ...]) -> models.BPE:
    if kind == "characters":
        alphabet, merges = CHARACTERS, []
    elif kind == "byte_bpe":
        alphabet, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), _BYTE_MERGES
    else:
        alphabet, merges = ["▁", *CHARACTERS], _METASPACE_MERGES
    tokens = [*specials, *alphabet, *("".join(merge) for merge in merges)]
    return models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges, unk_token=specials[2])
