"""One table a family: which Hugging Face tensors make a Megatron Core parameter, and how it is split over tensor ranks.

A row of a table reads: Megatron Core's name (as Megatron's own layer spec has it, layers and experts counted over the whole
model), the kind of layout, and the Hugging Face tensors it is made of with their shapes. Kinds:

    replicated  every tensor rank holds all of it
    vocab       rows are the vocabulary; split over rows, padded with zero rows to a multiple of the ranks
    input       split over columns, the layer's input (Megatron's RowParallelLinear)
    qkv         rows interleaved per key-value group: [its query heads, its key head, its value head]; split over rows
    gate_up     gate rows, then up rows; each half split over rows, so that a rank's gate meets its own up

No rotary permutation is needed: both sides rotate half-split heads. `docs/checkpoints.md` shows how to add a family.
Shapes: V vocabulary, H hidden, A all query heads, K all key heads, D one head, F FFN, G one expert's FFN, E experts.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from spin_megatron.plan.model_config import Family
from spin_megatron.plan.parameters import padded_vocab
from spin_megatron.plan.shape import ModelShape

Kind = Literal["replicated", "vocab", "input", "qkv", "gate_up"]
# (name, dim, start, stop) -> that slice of a Hugging Face tensor.
Fetch = Callable[[str, int, int, int], Tensor]


@dataclass(frozen=True)
class Rule:
    """A row of a family's table. Names hold {layer} and {expert}; sources are (Hugging Face name, shape in letters).

    saved: keys of a torch_dist checkpoint when they are not the name without its numbers; the first is what a local-spec
        model asks for, a second what a Transformer Engine model asks for.
    """

    megatron: str
    kind: Kind
    sources: tuple[tuple[str, str], ...]
    saved: tuple[str, ...] = ()


def _layer(megatron: str, kind: Kind, *sources: tuple[str, str], saved: tuple[str, ...] = ()) -> Rule:
    """A rule inside the decoder's layers, where both sides' names have a prefix."""
    named = tuple((f"model.layers.{{layer}}.{name}", dims) for name, dims in sources)
    return Rule(f"decoder.layers.{{layer}}.{megatron}", kind, named, tuple(f"decoder.layers.{key}" for key in saved))


_ENDS = (
    Rule("embedding.word_embeddings.weight", "vocab", (("model.embed_tokens.weight", "VH"),)),
    Rule("decoder.final_layernorm.weight", "replicated", (("model.norm.weight", "H"),)),
    Rule("output_layer.weight", "vocab", (("lm_head.weight", "VH"),)),
)
_ATTENTION = (
    _layer("input_layernorm.weight", "replicated", ("input_layernorm.weight", "H"), saved=("self_attention.linear_qkv.layer_norm_weight",)),
    _layer(
        "self_attention.linear_qkv.weight",
        "qkv",
        ("self_attn.q_proj.weight", "AH"),
        ("self_attn.k_proj.weight", "KH"),
        ("self_attn.v_proj.weight", "KH"),
    ),
    _layer("self_attention.linear_proj.weight", "input", ("self_attn.o_proj.weight", "HA")),
)
_QKV_BIAS = (
    _layer(
        "self_attention.linear_qkv.bias",
        "qkv",
        ("self_attn.q_proj.bias", "A"),
        ("self_attn.k_proj.bias", "K"),
        ("self_attn.v_proj.bias", "K"),
    ),
)
_QK_NORM = (
    _layer("self_attention.q_layernorm.weight", "replicated", ("self_attn.q_norm.weight", "D")),
    _layer("self_attention.k_layernorm.weight", "replicated", ("self_attn.k_norm.weight", "D")),
)
_DENSE_MLP = (
    _layer("pre_mlp_layernorm.weight", "replicated", ("post_attention_layernorm.weight", "H"), saved=("mlp.linear_fc1.layer_norm_weight",)),
    _layer("mlp.linear_fc1.weight", "gate_up", ("mlp.gate_proj.weight", "FH"), ("mlp.up_proj.weight", "FH")),
    _layer("mlp.linear_fc2.weight", "input", ("mlp.down_proj.weight", "HF")),
)


def _expert_mlp(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """A router and its experts; `block` is Hugging Face's name of the module that holds both."""
    # Megatron Core renames the norm as if it were fused into linear_fc1, which only a dense Transformer Engine layer does:
    # of an expert layer the two specs save the norm under different keys.
    saved = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    expert, source = "mlp.experts.local_experts.{expert}", f"{block}.experts.{{expert}}"
    return (
        _layer("pre_mlp_layernorm.weight", "replicated", ("post_attention_layernorm.weight", "H"), saved=saved),
        _layer("mlp.router.weight", "replicated", (f"{block}.gate.weight", "EH")),
        _layer(f"{expert}.linear_fc1.weight", "gate_up", (f"{source}.{gate}.weight", "GH"), (f"{source}.{up}.weight", "GH")),
        _layer(f"{expert}.linear_fc2.weight", "input", (f"{source}.{down}.weight", "HG")),
    )


LLAMA = (*_ENDS, *_ATTENTION, *_DENSE_MLP)
MISTRAL = LLAMA  # its sliding window has no parameters
QWEN2 = (*_ENDS, *_ATTENTION, *_QKV_BIAS, *_DENSE_MLP)
QWEN3 = (*_ENDS, *_ATTENTION, *_QK_NORM, *_DENSE_MLP)
MIXTRAL = (*_ENDS, *_ATTENTION, *_expert_mlp("block_sparse_moe", "w1", "w3", "w2"))
QWEN3_MOE = (*_ENDS, *_ATTENTION, *_QK_NORM, *_expert_mlp("mlp", "gate_proj", "up_proj", "down_proj"))

FAMILIES: dict[Family, tuple[Rule, ...]] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
}

# Parameter names of the Transformer Engine layer spec -> those of Megatron's own, which the tables use.
_TRANSFORMER_ENGINE_NAMES = (
    (re.compile(r"\.self_attention\.linear_qkv\.layer_norm_weight$"), ".input_layernorm.weight"),
    (re.compile(r"\.mlp\.linear_fc1\.layer_norm_weight$"), ".pre_mlp_layernorm.weight"),
    (re.compile(r"\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$"), r".mlp.experts.local_experts.\2.\1.weight"),
)
_LAYER_NUMBER = re.compile(r"(?<=^decoder\.layers\.)\d+")
_EXPERT_NUMBER = re.compile(r"(?<=\.local_experts\.)\d+")


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor that a parameter is made of."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WholeParameter:
    """One Megatron parameter of the whole model: a rule with its numbers filled in.

    shape: of the whole parameter, not split, vocabulary not padded. saved: its keys in a torch_dist checkpoint, where
    `indices` (layer; layer and expert; or nothing) are its place in the leading dimensions.
    """

    name: str
    kind: Kind
    sources: tuple[Source, ...]
    saved: tuple[str, ...]
    indices: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(source.shape[0] for source in self.sources), *self.sources[0].shape[1:])


@dataclass(frozen=True)
class RowBlock:
    """Rows [start, stop) of sources[source]; blocks in a row make a parameter's dimension 0."""

    source: int
    start: int
    stop: int


def normalised_name(name: str) -> str | None:
    """A parameter's name as the tables have it, from either layer spec and below any wrappers; None for `_extra_state`."""
    name = re.sub(r"^(module\.)+", "", name)
    if name.endswith("_extra_state"):
        return None
    for pattern, replacement in _TRANSFORMER_ENGINE_NAMES:
        name = pattern.sub(replacement, name)
    return name


def global_name(local_name: str, *, layers: Sequence[int], first_expert: int = 0) -> str | None:
    """The tables' name of a parameter of one pipeline stage.

    Args:
        local_name: as `named_parameters()` of a model chunk gives it, numbers counted within the chunk and the rank.
        layers: for each of the chunk's layers its number in the whole model, from 0 (`layer.layer_number - 1`).
        first_expert: number, in the whole model, of the rank's first expert.
    """
    name = normalised_name(local_name)
    if name is None:
        return None
    name = _LAYER_NUMBER.sub(lambda found: str(layers[int(found.group())]), name)
    return _EXPERT_NUMBER.sub(lambda found: str(first_expert + int(found.group())), name)


@lru_cache(maxsize=8)
def _table(shape: ModelShape) -> dict[str, Rule]:
    """A shape's rules by name; with tied embeddings the head reads the embedding, which Hugging Face stores once."""
    rules = {rule.megatron: rule for rule in FAMILIES[shape.family]}
    if shape.tied_embeddings:
        rules["output_layer.weight"] = replace(rules["output_layer.weight"], sources=rules["embedding.word_embeddings.weight"].sources)
    return rules


def _dimensions(shape: ModelShape, letters: str) -> tuple[int, ...]:
    sizes = {
        "V": shape.vocab_size,
        "H": shape.hidden_size,
        "A": shape.num_heads * shape.head_dim,
        "K": shape.num_kv_heads * shape.head_dim,
        "D": shape.head_dim,
        "F": shape.ffn_hidden_size,
        "G": shape.expert_ffn_hidden_size or 0,
        "E": shape.num_experts or 0,
    }
    return tuple(sizes[letter] for letter in letters)


def _filled(rule: Rule, shape: ModelShape, layer: int | None, expert: int | None) -> WholeParameter:
    sources = tuple(Source(name.format(layer=layer, expert=expert), _dimensions(shape, letters)) for name, letters in rule.sources)
    key = rule.megatron.replace("layers.{layer}.", "layers.").replace("local_experts.{expert}.", "experts.")
    indices = tuple(number for number in (layer, expert) if number is not None)
    return WholeParameter(rule.megatron.format(layer=layer, expert=expert), rule.kind, sources, rule.saved or (key,), indices)


def parameters(shape: ModelShape) -> Iterator[WholeParameter]:
    """Every Megatron parameter of the whole model; of tied embeddings only the embedding, not the head's copy of it."""
    for rule in _table(shape).values():
        if rule.megatron == "output_layer.weight" and shape.tied_embeddings:
            continue
        for layer in range(shape.num_layers) if "{layer}" in rule.megatron else [None]:
            for expert in range(shape.num_experts or 0) if "{expert}" in rule.megatron else [None]:
                yield _filled(rule, shape, layer, expert)


def parameter(name: str, shape: ModelShape) -> WholeParameter:
    """Look up one Megatron parameter by its global name (see `global_name`).

    Raises:
        ValueError: the family's table has no such parameter, or the model no such layer or expert.
    """
    layer, expert = _LAYER_NUMBER.search(name), _EXPERT_NUMBER.search(name)
    rule = _table(shape).get(_EXPERT_NUMBER.sub("{expert}", _LAYER_NUMBER.sub("{layer}", name)))
    numbers = [(found and int(found.group()), count) for found, count in ((layer, shape.num_layers), (expert, shape.num_experts or 0))]
    if rule is None or any(number is not None and number >= count for number, count in numbers):
        raise ValueError(
            f"Megatron parameter {name!r} is not in the table of family {shape.family} ({shape.num_layers} layers, "
            f"{shape.num_experts or 'no'} experts); see docs/checkpoints.md."
        )
    return _filled(rule, shape, numbers[0][0], numbers[1][0])


def expected_huggingface_names(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor a Hugging Face folder of this shape holds (no lm_head.weight when it is tied)."""
    return {source.name: source.shape for entry in parameters(shape) for source in entry.sources}


def row_blocks(entry: WholeParameter, shape: ModelShape) -> list[RowBlock]:
    """How dimension 0 of a whole parameter is put together from its sources' rows, in order."""
    if entry.kind != "qkv":
        return [RowBlock(index, 0, source.shape[0]) for index, source in enumerate(entry.sources)]
    query_rows = shape.num_heads // shape.num_kv_heads * shape.head_dim
    blocks = []
    for group in range(shape.num_kv_heads):
        for index, rows in enumerate((query_rows, shape.head_dim, shape.head_dim)):
            blocks.append(RowBlock(index, group * rows, (group + 1) * rows))
    return blocks


def cut_rows(blocks: Sequence[RowBlock], start: int, stop: int) -> list[RowBlock]:
    """The part of a sequence of blocks that is rows [start, stop) of what they make together."""
    found, position = [], 0
    for block in blocks:
        first, last = max(start - position, 0), min(stop - position, block.stop - block.start)
        if first < last:
            found.append(RowBlock(block.source, block.start + first, block.start + last))
        position += block.stop - block.start
    return found


def megatron_shape(name: str, shape: ModelShape, tensor_parallel: int) -> tuple[int, ...]:
    """Shape of one tensor rank's part of a Megatron parameter, vocabulary padded.

    Raises:
        ValueError: an unknown name, or a size that tensor_parallel does not divide.
    """
    entry = parameter(name, shape)
    rows, columns = entry.shape[0], entry.shape[1:]
    if entry.kind == "replicated":
        return entry.shape
    if entry.kind == "vocab":
        return (padded_vocab(rows, tensor_parallel) // tensor_parallel, *columns)
    # A gate_up half must divide by itself: 2 x 3 rows do not make two ranks' [gate, up].
    split = {"input": columns[-1] if columns else rows, "gate_up": rows // 2}.get(entry.kind, rows)
    if split % tensor_parallel:
        raise ValueError(f"parallel.tensor={tensor_parallel} does not divide the {split} of {name}; choose a divisor.")
    return (rows, columns[0] // tensor_parallel) if entry.kind == "input" else (rows // tensor_parallel, *columns)


def megatron_shard(name: str, shape: ModelShape, fetch: Fetch, tensor_parallel: int = 1, tensor_rank: int = 0) -> Tensor:
    """Build one tensor rank's part of a Megatron parameter, reading no more of the Hugging Face tensors than it holds.

    Args:
        name: the parameter's global name, see `global_name`.
        fetch: gives slices of Hugging Face tensors, e.g. `HfFolder.get_slice`.
        tensor_parallel, tensor_rank: for an expert's parameters those of the expert-tensor group.

    Returns:
        A tensor of `megatron_shape`, in the dtype read. It may share memory with what `fetch` gave: copy it, do not change it.

    Raises:
        ValueError: as `megatron_shape` does.
    """
    entry = parameter(name, shape)
    local = megatron_shape(name, shape, tensor_parallel)
    if entry.kind == "input":
        return fetch(entry.sources[0].name, 1, tensor_rank * local[1], (tensor_rank + 1) * local[1])
    blocks = _shard_rows(entry, shape, local, tensor_rank)
    pieces = [fetch(entry.sources[block.source].name, 0, block.start, block.stop) for block in blocks]
    missing = local[0] - sum(piece.shape[0] for piece in pieces)
    if missing:  # padded vocabulary: its rows are never a target and are masked out of every softmax
        like = pieces[0] if pieces else fetch(entry.sources[0].name, 0, 0, 1)
        pieces.append(torch.zeros(missing, *local[1:], dtype=like.dtype))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _shard_rows(entry: WholeParameter, shape: ModelShape, local: tuple[int, ...], tensor_rank: int) -> list[RowBlock]:
    blocks = row_blocks(entry, shape)
    if entry.kind == "replicated":
        return blocks
    if entry.kind == "gate_up":
        half = local[0] // 2
        return [piece for block in blocks for piece in cut_rows([block], tensor_rank * half, (tensor_rank + 1) * half)]
    return cut_rows(blocks, tensor_rank * local[0], (tensor_rank + 1) * local[0])
