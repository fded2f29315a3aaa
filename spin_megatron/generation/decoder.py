"""The forward pass of the built-in engine: the supported families' decoder over the weights of a transformers model.

transformers reads the folder (names, dtypes, tied weights, rotary frequencies); the pass itself is written out here because
generation on CPU is bound by what surrounds the products. Against the model's own forward, a decode step of 16 rows makes 4
products a layer instead of 7, from weights packed for oneDNN, concatenates no cache, builds no mask and computes no padding.

Every operation either works on each token alone, or is a product over all tokens; see hf_loop.py for why that matters.

Shape suffixes: T tokens of a pass, H hidden size, Q query heads, K key/value heads, D head size, G query heads a key head,
L positions a slot holds, S slots, V vocabulary, E chosen experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spin_megatron.plan.shape import ModelShape

Linear = Callable[[Tensor], Tensor]
_PACKED_FOR_ROWS = 16  # one constant: the block order, and with it the last bit, depends on it
_SMALLEST_GROUP = 8


def make_linear(weight_OI: Tensor, bias_O: Tensor | None = None) -> Linear:
    """The function x -> x W^T + b; on CPU its weight is copied into the block order oneDNN computes in.

    Measured on a Zen 4 core in fp32 at 16 rows: 1.4 times the speed of MKL's product for 576 x 1536, 2.3 times for
    576 x 49152, since the weight is not rearranged in each call; and all numbers of rows from 2 on give the same bits.
    """
    if weight_OI.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return lambda input_TI: F.linear(input_TI, weight_OI, bias_O)
    # The operators torch's own compiler freezes CPU models with; they have no public name (there from 2.1 to 2.13).
    pack, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
    packed = pack(weight_OI.contiguous(), _PACKED_FOR_ROWS)
    return lambda input_TI: multiply(input_TI, packed, bias_O, "none", [], "")


@dataclass(frozen=True)
class _Layer:
    """One decoder layer. query_norm, key_norm: weights of Qwen3's norms over a head, else None."""

    input_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    mlp: Linear


class KvSlots:
    """Keys and values of S rows, [S, K, L, D] a layer.

    Memory is reserved for every slot's full length, but the system provides it only where rows reach.
    """

    def __init__(self, shape: ModelShape, num_slots: int, length: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.num_slots = num_slots
        size = (num_slots, shape.num_kv_heads, length, shape.head_dim)
        self._buffers = [[torch.empty(size, dtype=dtype, device=device) for _ in ("keys", "values")] for _ in range(shape.num_layers)]
        self._slots = [[buffer.split(1) for buffer in pair] for pair in self._buffers]
        self._head_offsets_K = torch.arange(shape.num_kv_heads, device=device) * length
        self._slot_stride = shape.num_kv_heads * length

    def places(self, slots_T: Tensor, positions_T: Tensor) -> Tensor:
        """Where `write` puts tokens of these slots and positions, int64 [T*K]."""
        return ((slots_T * self._slot_stride + positions_T)[:, None] + self._head_offsets_K).flatten()

    def write(self, layer: int, places_TK: Tensor, key_TKD: Tensor, value_TKD: Tensor) -> None:
        """Store the new tokens' keys and values of one layer."""
        for buffer, new_TKD in zip(self._buffers[layer], (key_TKD, value_TKD), strict=True):
            head_dim = new_TKD.shape[-1]
            buffer.view(-1, head_dim).index_copy_(0, places_TK, new_TKD.reshape(-1, head_dim))

    def attend(self, layer: int, query_TQD: Tensor, rows: Sequence[tuple[int, int]], window: int | None) -> Tensor:
        """Attention of one token a row over the row's own slot; [T, Q*D].

        Rows are computed one by one, over exactly their own length, so no row's bits depend on another's length.

        Args:
            rows: (slot, length) of the first tokens, length counting the new token; the tokens behind are padding, their output 0.
            window: a token sees this many positions, itself included; None is all.
        """
        keys, values = self._slots[layer]
        # Query heads that share a key head become queries of one product: nothing is repeated in memory.
        grouped_TKGD = query_TQD.reshape(query_TQD.shape[0], keys[0].shape[1], -1, query_TQD.shape[-1])
        outputs = []
        for query_1KGD, (slot, length) in zip(grouped_TKGD.split(1), rows, strict=False):
            seen = length if window is None else min(length, window)
            key_1KLD, value_1KLD = keys[slot].narrow(2, length - seen, seen), values[slot].narrow(2, length - seen, seen)
            outputs.append(F.scaled_dot_product_attention(query_1KGD, key_1KLD, value_1KLD))
        if len(rows) < len(grouped_TKGD):
            outputs.append(torch.zeros_like(grouped_TKGD[len(rows) :]))
        return torch.cat(outputs).flatten(1)


def attend_prompt(query_TQD: Tensor, key_TKD: Tensor, value_TKD: Tensor, window: int | None) -> Tensor:
    """Causal attention within one prompt; [T, Q*D]."""
    length = query_TQD.shape[0]
    mask_TT = None
    if window is not None and window < length:
        ones_TT = torch.ones(length, length, dtype=torch.bool, device=query_TQD.device)
        mask_TT = ones_TT.tril() & ones_TT.triu(1 - window)
    query_QTD, key_KTD, value_KTD = (tensor.transpose(0, 1)[None] for tensor in (query_TQD, key_TKD, value_TKD))
    output = F.scaled_dot_product_attention(query_QTD, key_KTD, value_KTD, attn_mask=mask_TT, is_causal=mask_TT is None, enable_gqa=True)
    return output[0].transpose(0, 1).flatten(1)


def dense_mlp(gate_up: Linear, down: Linear) -> Linear:
    """The gated feed-forward layer from its fused first product."""

    def forward(hidden_TH: Tensor) -> Tensor:
        gate_TI, up_TI = gate_up(hidden_TH).chunk(2, -1)
        return down(F.silu(gate_TI) * up_TI)

    return forward


def expert_mlp(router: Linear, experts: Sequence[Linear], num_chosen: int) -> Linear:
    """A mixture of experts: softmax over all, the largest num_chosen renormalised (Mixtral; Qwen3-MoE with norm_topk_prob).

    Products run over groups padded to 8, 16, 32, ... rows: how many rows an expert gets depends on what else is in the
    batch, and a product's last bit may depend on that number. A token's experts are added in ascending order.
    """

    def forward(hidden_TH: Tensor) -> Tensor:
        probabilities_TE, chosen_TE = torch.softmax(router(hidden_TH), -1, dtype=torch.float32).topk(num_chosen, -1)
        weights_TE = (probabilities_TE / probabilities_TE.sum(-1, keepdim=True)).to(hidden_TH.dtype)
        output_TH = torch.zeros_like(hidden_TH)
        for expert in chosen_TE.unique().tolist():
            token_G, choice_G = torch.where(chosen_TE == expert)
            num_rows = token_G.shape[0]
            group = hidden_TH.new_zeros(max(_SMALLEST_GROUP, 1 << (num_rows - 1).bit_length()), hidden_TH.shape[1])
            group[:num_rows] = hidden_TH[token_G]
            output_TH.index_add_(0, token_G, experts[expert](group)[:num_rows] * weights_TE[token_G, choice_G, None])
        return output_TH

    return forward


class Decoder:
    """A decoder-only model that prefills one prompt, or decodes one token of many rows, in slots of a KV cache."""

    def __init__(self, model: Any, shape: ModelShape, *, num_slots: int, slot_length: int) -> None:
        """Take the weights of a transformers model; the model's layers are emptied on the way, so that memory holds one copy."""
        body = model.model
        self._shape = shape
        self._device = body.embed_tokens.weight.device
        self._embedding_VH: Tensor = body.embed_tokens.weight
        # A multiple of 16 positions keeps every slot 64-byte aligned: a kernel's path may depend on alignment.
        slot_length = -(-slot_length // 16) * 16
        self._slots = KvSlots(shape, num_slots, slot_length, dtype=self._embedding_VH.dtype, device=self._device)
        self._cos_LD, self._sin_LD = _rotary_tables(body.rotary_emb, slot_length, self._embedding_VH.dtype)
        self._final_norm_H: Tensor = body.norm.weight
        self._head = make_linear(model.lm_head.weight)
        self._layers = []
        for number in range(shape.num_layers):
            self._layers.append(_make_layer(body.layers[number], shape))
            body.layers[number] = None

    @torch.inference_mode()
    def prefill(self, token_ids: Sequence[int], slot: int) -> Tensor:
        """Fill a slot with a prompt; logits of the next token, [1, V]."""
        tokens_T = torch.tensor(token_ids, device=self._device)
        positions_T = torch.arange(len(token_ids), device=self._device)
        places = self._slots.places(torch.full_like(positions_T, slot), positions_T)
        hidden_TH = self._run(tokens_T, positions_T, places, None)
        return self._logits(hidden_TH[-1:])

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], *, width: int) -> Tensor:
        """Put one token a row at its slot's position; logits of the rows' next tokens, [N, V].

        The pass runs over `width` >= N tokens; the padding is token 0 at position 0 of the last slot, which no row uses.
        """
        padding = [0] * (width - len(tokens))
        spare = [self._slots.num_slots - 1] * len(padding)
        tokens_T = torch.tensor([*tokens, *padding], device=self._device)
        positions_T = torch.tensor([*positions, *padding], device=self._device)
        places = self._slots.places(torch.tensor([*slots, *spare], device=self._device), positions_T)
        rows = [(slot, position + 1) for slot, position in zip(slots, positions, strict=True)]
        return self._logits(self._run(tokens_T, positions_T, places, rows))[: len(tokens)]

    def _logits(self, hidden_TH: Tensor) -> Tensor:
        return self._head(self._norm(hidden_TH, self._final_norm_H))

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self._shape.norm_epsilon)

    def _run(self, tokens_T: Tensor, positions_T: Tensor, places_TK: Tensor, rows: Sequence[tuple[int, int]] | None) -> Tensor:
        """Hidden states before the final norm, [T, H]. rows None: the tokens are one prompt, from position 0."""
        shape, window = self._shape, self._shape.sliding_window
        hidden_TH = self._embedding_VH[tokens_T]
        cos_T1D, sin_T1D = self._cos_LD[positions_T, None], self._sin_LD[positions_T, None]
        sizes = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        for number, layer in enumerate(self._layers):
            heads_TND = layer.qkv(self._norm(hidden_TH, layer.input_norm)).unflatten(-1, (-1, shape.head_dim))
            query_TQD, key_TKD, value_TKD = heads_TND.split(sizes, 1)
            if layer.query_norm is not None and layer.key_norm is not None:
                query_TQD, key_TKD = self._norm(query_TQD, layer.query_norm), self._norm(key_TKD, layer.key_norm)
            query_TQD, key_TKD = _rotate(query_TQD, cos_T1D, sin_T1D), _rotate(key_TKD, cos_T1D, sin_T1D)
            self._slots.write(number, places_TK, key_TKD, value_TKD)
            if rows is None:
                attended = attend_prompt(query_TQD, key_TKD, value_TKD, window)
            else:
                attended = self._slots.attend(number, query_TQD, rows, window)
            hidden_TH = hidden_TH + layer.output(attended)
            hidden_TH = hidden_TH + layer.mlp(self._norm(hidden_TH, layer.mlp_norm))
        return hidden_TH


def _rotate(heads_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotary embedding in halves: (a, b) -> (a cos - b sin, b cos + a sin); the sine's table carries the sign."""
    return torch.addcmul(heads_TND * cos_T1D, heads_TND.roll(heads_TND.shape[-1] // 2, -1), sin_T1D)


def _rotary_tables(rotary: Any, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cos and signed sin of every position, [L, D], from the model's own frequencies (scaling included)."""
    angles_LF = torch.arange(length, device=rotary.inv_freq.device).float()[:, None] * rotary.inv_freq.float()
    cos_LF, sin_LF = angles_LF.cos() * rotary.attention_scaling, angles_LF.sin() * rotary.attention_scaling
    return torch.cat([cos_LF, cos_LF], -1).to(dtype), torch.cat([-sin_LF, sin_LF], -1).to(dtype)


def _make_layer(layer: Any, shape: ModelShape) -> _Layer:
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    bias = torch.cat([projection.bias for projection in projections]) if shape.qkv_bias else None
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=make_linear(torch.cat([projection.weight for projection in projections]), bias),
        query_norm=attention.q_norm.weight if shape.qk_norm else None,
        key_norm=attention.k_norm.weight if shape.qk_norm else None,
        output=make_linear(attention.o_proj.weight),
        mlp_norm=layer.post_attention_layernorm.weight,
        mlp=_make_mlp(layer.mlp, shape),
    )


def _make_mlp(mlp: Any, shape: ModelShape) -> Linear:
    if shape.num_experts is None:
        return dense_mlp(make_linear(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])), make_linear(mlp.down_proj.weight))
    assert shape.experts_per_token is not None
    pairs = zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True)
    experts = [dense_mlp(make_linear(gate_up), make_linear(down)) for gate_up, down in pairs]
    return expert_mlp(make_linear(mlp.gate.weight), experts, shape.experts_per_token)
