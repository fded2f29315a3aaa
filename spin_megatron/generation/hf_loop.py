"""The built-in engine: a decode loop over a Hugging Face model, with a KV cache of slots that are refilled as rows finish.

Rows do not depend on each other, bit for bit, so one shard equals N shards whatever the batch size and order:

- a prompt is computed alone, in its own shape;
- attention of a decode step is computed row by row over exactly the row's own length, straight from its slot;
- the matrix products of a decode step run over all rows at once, padded to one of a few fixed numbers of rows ("widths").
  A product's last bit can depend on the number of rows and on a row's place among them (MKL on AVX-512: 1, 2-3 and 4 or
  more rows differ in fp32, and with two threads 5, 6 and 7 rows differ by place). So `load` measures it: it decodes equal
  rows at each width and keeps the widths at which every place gives the same bits as every other width. What was found is
  in `describe()["rows_independent"]`; the promise is for one kind of machine, one torch and one number of threads.
- a draw takes one uniform of the row's own generator (sampling.py).

Shape suffixes: B rows of a step (padded), P prompt tokens, H query heads, K key/value heads, D head size, V vocabulary,
S slots, L positions a slot holds.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spin_megatron.generation.engine import EngineSpec, Prompt, Sampling, check_prompts
from spin_megatron.generation.sampling import draw_tokens, row_uniforms
from spin_megatron.plan.shape import ModelShape
from spin_megatron.run.records import FinishReason, GeneratedRow

logger = logging.getLogger(__name__)

ATTENTION_NAME = "spin_rows"
EXPERTS_NAME = "spin_padded_groups"
_SMALLEST_WIDTH = 8
_CHECK_STEPS = 4
_PACKED_FOR_ROWS = 16  # one constant: the block order, and with it the last bit, depends on it
_OPTIONS = ("device",)


def build(spec: EngineSpec, _folder: Path) -> dict[str, Any]:
    """Nothing is built: the loop runs theta_t's weights as they are. Checks that it can, and says what will run."""
    ModelShape.from_huggingface(spec.model)
    return {"engine": "builtin", "model": str(spec.model), "torch": torch.__version__, "device": str(_device(spec)), "needs_build": False}


def load(spec: EngineSpec, _folder: Path) -> "HfLoop":
    """Load theta_t with transformers and find the widths at which its rows are independent.

    Raises:
        ValueError: the model is of a kind the loop does not compute, or an option is unknown.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.moe import ExpertsInterface
    from transformers.modeling_utils import AttentionInterface

    shape = ModelShape.from_huggingface(spec.model)
    AttentionInterface.register(ATTENTION_NAME, row_attention)
    ExpertsInterface.register(EXPERTS_NAME, padded_experts)
    model = AutoModelForCausalLM.from_pretrained(
        spec.model,
        dtype=getattr(torch, spec.dtype),
        attn_implementation=ATTENTION_NAME,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        **({"experts_implementation": EXPERTS_NAME} if shape.num_experts else {}),
    )
    device = _device(spec)
    model = model.to(device).eval().requires_grad_(False)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        pack_linears(model)
    return HfLoop(model, shape, spec, device)


def _device(spec: EngineSpec) -> torch.device:
    unknown = sorted(set(spec.options) - set(_OPTIONS))
    if unknown:
        raise ValueError(f"generate.options {unknown} (config.toml [generate.options]) are none of engine 'builtin', which has: device.")
    name = spec.options.get("device", "auto")
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator() or torch.device("cpu")


@dataclass
class _Row:
    """A response in the making. Its slot holds prompt + tokens[:-1]; the last token is the next step's input."""

    prompt: Prompt
    slot: int
    uniforms: Sequence[float]
    tokens: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Position of the last token."""
        return len(self.prompt.token_ids) + len(self.tokens) - 1


class SlotCache:
    """Keys and values of S rows, [S, K, L, D] a layer; stands where transformers expects its cache.

    `place` says where the next forward pass writes. A prefill reads nothing, so `update` hands its own keys on; a decode
    step gets every slot's whole keys, of which `row_attention` reads each row's part. Memory is reserved for every slot's
    full length, but the system provides it only where rows reach.
    """

    def __init__(self, shape: ModelShape, num_slots: int, length: int, *, dtype: torch.dtype, device: torch.device) -> None:
        size = (num_slots, shape.num_kv_heads, length, shape.head_dim)
        self._buffers = [[torch.empty(size, dtype=dtype, device=device) for _ in ("keys", "values")] for _ in range(shape.num_layers)]
        self._slots = [[buffer.split(1) for buffer in pair] for pair in self._buffers]
        self._first_K = torch.arange(shape.num_kv_heads, device=device) * length
        self._slot_stride = shape.num_kv_heads * length
        self._index_W = torch.empty(0, dtype=torch.int64, device=device)
        self._is_prefill = False

    def place(self, slots: Sequence[int], positions: Sequence[int], *, is_prefill: bool) -> None:
        """Write token i of the next pass at (slots[i], positions[i]); of a prefill all slots are one row's."""
        tokens_T = torch.tensor([slot * self._slot_stride + position for slot, position in zip(slots, positions, strict=True)])
        tokens_T = tokens_T.to(self._first_K.device)
        # New keys come as [B, K, Q, D]: heads outside the tokens of a prefill, inside those of a step.
        outer, inner = (self._first_K, tokens_T) if is_prefill else (tokens_T, self._first_K)
        self._index_W = (outer[:, None] + inner).flatten()
        self._is_prefill = is_prefill

    def update(self, key_BKQD: Tensor, value_BKQD: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Write the new keys and values of a layer; called by the model's attention."""
        for buffer, new in zip(self._buffers[layer], (key_BKQD, value_BKQD), strict=True):
            head_dim = new.shape[-1]
            buffer.view(-1, head_dim).index_copy_(0, self._index_W, new.reshape(-1, head_dim))
        if self._is_prefill:
            return key_BKQD, value_BKQD
        keys, values = self._slots[layer]
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """What transformers counts positions from where it is given none; it always is."""
        raise AssertionError("position_ids must be given")


def row_attention(
    _module: torch.nn.Module,
    query_BHQD: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    rows: Sequence[tuple[int, int]] | None = None,
    sliding_window: int | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Attention of one prompt (rows None) or of one token of many rows; registered with transformers.

    Args:
        key, value: [1, K, P, D] of a prompt, else every slot's [1, K, L, D].
        rows: (slot, length) of each computed row, length counting the new token; further rows of B are padding.
        sliding_window: a token sees this many positions, itself included.

    Returns:
        [B, Q, H, D] and None, as transformers expects. Padding rows are zeros.
    """
    assert attention_mask is None, "rows have no padding inside"
    if rows is None:
        return _prompt_attention(query_BHQD, key, value, scaling, sliding_window), None
    # Query heads that share a key head become queries of one product: nothing is repeated in memory.
    grouped_BKGD = query_BHQD.view(query_BHQD.shape[0], key[0].shape[1], -1, query_BHQD.shape[-1])
    outputs = []
    for query_1KGD, (slot, length) in zip(grouped_BKGD.split(1), rows, strict=False):
        seen = length if sliding_window is None else min(length, sliding_window)
        key_1KLD, value_1KLD = key[slot].narrow(2, length - seen, seen), value[slot].narrow(2, length - seen, seen)
        outputs.append(F.scaled_dot_product_attention(query_1KGD, key_1KLD, value_1KLD, scale=scaling))
    if len(rows) < query_BHQD.shape[0]:
        outputs.append(torch.zeros_like(grouped_BKGD[len(rows) :]))
    return torch.cat(outputs).view_as(query_BHQD).transpose(1, 2), None


def _prompt_attention(query_1HPD: Tensor, key_1KPD: Tensor, value_1KPD: Tensor, scaling: float, sliding_window: int | None) -> Tensor:
    """Causal attention of one prompt, [1, P, H, D]."""
    length = query_1HPD.shape[2]
    mask_PP = None
    if sliding_window is not None and sliding_window < length:
        ones_PP = torch.ones(length, length, dtype=torch.bool, device=query_1HPD.device)
        mask_PP = ones_PP.tril() & ones_PP.triu(1 - sliding_window)
    output = F.scaled_dot_product_attention(
        query_1HPD, key_1KPD, value_1KPD, attn_mask=mask_PP, is_causal=mask_PP is None, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2)


class PackedLinear(torch.nn.Module):
    """A Linear layer on CPU whose weight lies in the block order oneDNN computes in.

    Measured on a Zen 4 core in fp32 at 16 rows: 1.4 times the speed of MKL's product for 576 x 1536, 2.3 times for
    576 x 49152, since the weight is not rearranged in each call. All numbers of rows from 2 on gave the same bits.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        # The operators torch's own compiler freezes CPU models with; they have no public name (present from 2.1 to 2.13).
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _PACKED_FOR_ROWS)  # noqa: SLF001
        bias: Tensor | None = linear.bias
        self._bias = None if bias is None else bias.detach()

    def forward(self, input_BQI: Tensor) -> Tensor:
        """[B, Q, in] -> [B, Q, out], in the weight's dtype."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(input_BQI, self._weight, self._bias, "none", [], "")  # noqa: SLF001
        return output


def pack_linears(model: torch.nn.Module) -> None:
    """Replace every Linear layer of a model in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, PackedLinear(child))


def padded_experts(module: Any, hidden_TH: Tensor, experts_TX: Tensor, weights_TX: Tensor) -> Tensor:
    """Mixture-of-experts layer whose products run over groups padded to 8, 16, 32, ... rows; registered with transformers.

    The number of rows an expert gets depends on what else is in the batch, and a product's last bit on that number;
    padded, it takes only the widths that `load` found to agree. X: experts a token. A token's experts are added in
    ascending order, as in transformers' own loop.
    """
    output_TH = torch.zeros_like(hidden_TH)
    for expert in experts_TX.unique().tolist():
        token_G, choice_G = torch.where(experts_TX == expert)
        num_rows = token_G.shape[0]
        group = hidden_TH.new_zeros(_power_of_two_width(num_rows), hidden_TH.shape[1])
        group[:num_rows] = hidden_TH[token_G]
        gate, up = F.linear(group, module.gate_up_proj[expert]).chunk(2, dim=-1)
        result = F.linear(module.act_fn(gate) * up, module.down_proj[expert])[:num_rows]
        output_TH.index_add_(0, token_G, (result * weights_TX[token_G, choice_G, None]).to(output_TH.dtype))
    return output_TH


def _power_of_two_width(num_rows: int) -> int:
    return max(_SMALLEST_WIDTH, 1 << (num_rows - 1).bit_length())


class HfLoop:
    """Answers prompts with one model in this process. See the module's docstring for what is promised."""

    def __init__(self, model: Any, shape: ModelShape, spec: EngineSpec, device: torch.device) -> None:
        self._model = model
        self._spec = spec
        self._device = device
        self._shape = shape
        # A multiple of 16 positions keeps every slot 64-byte aligned: a kernel's path may depend on alignment.
        self._slot_length = -(-(spec.max_prompt_tokens + spec.max_new_tokens) // 16) * 16
        # One slot more than rows: padding writes there.
        self._cache = SlotCache(shape, spec.batch_size + 1, self._slot_length, dtype=model.dtype, device=device)
        self._widths, self._rows_independent = self._find_widths()
        self._num_steps = 0
        self._num_step_rows = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[GeneratedRow]:
        """Answer every prompt; rows come as they finish. See Engine.generate."""
        check_prompts(prompts, spec=self._spec, sampling=sampling, shape=self._shape)
        return self._generate(prompts, sampling)

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[GeneratedRow]:
        waiting = iter(prompts)
        free_slots = list(reversed(range(self._spec.batch_size)))
        active: list[_Row] = []
        while True:
            while free_slots and (prompt := next(waiting, None)) is not None:
                row = _Row(prompt, free_slots.pop(), row_uniforms(prompt.seed, sampling.max_new_tokens).tolist())
                self._append([row], self._prefill(row), sampling)
                active.append(row)
            if not active:
                return
            running = [row for row in active if _finish_reason(row, sampling) is None]
            if running:
                self._append(running, self._decode(running), sampling)
            for row in active:
                reason = _finish_reason(row, sampling)
                if reason is not None:
                    free_slots.append(row.slot)
                    yield GeneratedRow(row.prompt.example_id, tuple(row.tokens), reason, row.prompt.seed)
            active = [row for row in active if _finish_reason(row, sampling) is None]

    def _append(self, rows: Sequence[_Row], logits_NV: Tensor, sampling: Sampling) -> None:
        """Draw each row's next token."""
        uniforms_N = torch.tensor([row.uniforms[len(row.tokens)] for row in rows], dtype=torch.float64, device=self._device)
        for row, token in zip(rows, draw_tokens(logits_NV, uniforms_N, sampling).tolist(), strict=True):
            row.tokens.append(token)

    @torch.inference_mode()
    def _prefill(self, row: _Row) -> Tensor:
        """Fill a row's slot with its prompt; logits of the first new token, [1, V]."""
        tokens_1P = torch.tensor([row.prompt.token_ids], device=self._device)
        positions_1P = torch.arange(tokens_1P.shape[1], device=self._device)[None]
        length = len(row.prompt.token_ids)
        self._cache.place([row.slot] * length, range(length), is_prefill=True)
        return self._forward(tokens_1P, positions_1P, rows=None)

    def _decode(self, rows: Sequence[_Row]) -> Tensor:
        """Logits of each row's next token, [N, V]."""
        self._num_steps += 1
        self._num_step_rows += len(rows)
        width = next(width for width in self._widths if width >= len(rows))
        tokens, positions, slots = ([row.tokens[-1] for row in rows], [row.position for row in rows], [row.slot for row in rows])
        return self._decode_width(tokens, positions, slots, width=width)

    @torch.inference_mode()
    def _decode_width(self, tokens: list[int], positions: list[int], slots: list[int], *, width: int) -> Tensor:
        """One step of N rows padded to `width`; logits [N, V]."""
        num_rows, padding = len(tokens), width - len(tokens)
        padded_positions = positions + [0] * padding
        self._cache.place(slots + [self._spec.batch_size] * padding, padded_positions, is_prefill=False)
        tokens_B1 = torch.tensor(tokens + [0] * padding, device=self._device)[:, None]
        positions_B1 = torch.tensor(padded_positions, device=self._device)[:, None]
        rows = [(slot, position + 1) for slot, position in zip(slots, positions, strict=True)]
        return self._forward(tokens_B1, positions_B1, rows=rows)[:num_rows]

    def _forward(self, tokens_BQ: Tensor, positions_BQ: Tensor, *, rows: Sequence[tuple[int, int]] | None) -> Tensor:
        """Logits of the last token, [B, V]."""
        output = self._model(
            input_ids=tokens_BQ, position_ids=positions_BQ, past_key_values=self._cache, use_cache=True, logits_to_keep=1, rows=rows
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def _find_widths(self) -> tuple[list[int], bool]:
        """Widths at which a decode step may run, ascending, and whether they were found to agree bit for bit."""
        batch_size = self._spec.batch_size
        # Multiples of 32 rows also keep every row of an elementwise kernel inside whole vectors.
        for widest in (-(-batch_size // 8) * 8, -(-batch_size // 32) * 32):
            reference = self._equal_rows_logits(widest)
            if reference is not None:
                break
        else:
            logger.warning(
                "decode steps of %d equal rows give different bits by row (%d threads): responses may depend on how they are sharded; "
                "set launch.threads_per_process = 1 for responses that do not.",
                widest,
                torch.get_num_threads(),
            )
            return [-(-batch_size // 8) * 8], False
        widths = [widest]
        narrower = _SMALLEST_WIDTH
        while narrower < widest:
            logits = self._equal_rows_logits(narrower)
            if logits is not None and torch.equal(logits, reference):
                widths.append(narrower)
            narrower *= 2
        return sorted(widths), True

    def _equal_rows_logits(self, width: int) -> Tensor | None:
        """Logits [steps, V] of a few decode steps of `width` equal rows, or None when the rows differ in any bit."""
        slots = [min(row, self._spec.batch_size) for row in range(width)]
        steps = min(_CHECK_STEPS, self._slot_length)
        first_rows = []
        for step in range(steps):
            token = (step * 7919 + 1) % self._shape.vocab_size
            logits_BV = self._decode_width([token] * width, [step] * width, slots, width=width)
            if not bool((logits_BV == logits_BV[:1]).all()):
                return None
            first_rows.append(logits_BV[0])
        return torch.stack(first_rows)

    def describe(self) -> dict[str, Any]:
        """What ran, on what, and whether rows are independent bit for bit."""
        return {
            "engine": "builtin",
            "device": str(self._device),
            "threads": torch.get_num_threads(),
            "dtype": self._spec.dtype,
            "widths": self._widths,
            "rows_independent": self._rows_independent,
            "rows_in_flight": self._num_step_rows / self._num_steps if self._num_steps else 0.0,
        }

    def close(self) -> None:
        """Nothing is held beyond this process's memory."""


def _finish_reason(row: _Row, sampling: Sampling) -> FinishReason | None:
    if row.tokens[-1] in sampling.eos_ids:
        return "stop"
    return "length" if len(row.tokens) >= sampling.max_new_tokens else None
