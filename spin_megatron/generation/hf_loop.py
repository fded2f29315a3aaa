"""The built-in engine: a decode loop with a KV cache of slots that are refilled as rows finish.

Rows do not depend on each other, bit for bit, so one shard equals N shards whatever the batch size and order:

- a prompt is computed alone, in its own shape;
- attention of a decode step is computed row by row over exactly the row's own length, straight from its slot;
- the matrix products of a decode step run over all rows at once, padded to one of a few fixed numbers of rows ("widths").
  A product's last bit can depend on the number of rows and on a row's place among them (in fp32 on AVX-512, MKL gives
  different bits for 1, 2-3 and 4 or more rows, and with two threads for some of 5, 6 and 7 rows; oneDNN for 1 and for 2
  or more). So `load` measures it: it decodes equal rows at each width and keeps the widths at which every place gives the
  same bits as every other width. What was found is in `describe()["rows_independent"]`; the promise is for one kind of
  machine, one torch and one number of threads;
- a draw takes one uniform of the row's own generator (sampling.py).

Shape suffixes: N rows in flight, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spin_megatron.generation.decoder import Decoder
from spin_megatron.generation.engine import EngineSpec, Prompt, Provider, Sampling, check_options, check_prompts, never
from spin_megatron.generation.sampling import draw_tokens, row_uniforms
from spin_megatron.plan.shape import ModelShape
from spin_megatron.run.records import FinishReason, GeneratedRow

logger = logging.getLogger(__name__)

NAME = "builtin"
_SMALLEST_WIDTH = 8
_CHECK_STEPS = 4


def build(spec: EngineSpec, _folder: Path) -> dict[str, Any]:
    """Nothing is built: the loop runs theta_t's weights as they are. Checks that it can, and says what will run."""
    ModelShape.from_huggingface(spec.model)
    return {"engine": NAME, "model": str(spec.model), "torch": torch.__version__, "device": str(_device(spec)), "needs_build": False}


def load(spec: EngineSpec, _folder: Path, _work: Path, *, decoder_type: type[Decoder] = Decoder) -> "HfLoop":
    """Read theta_t with transformers and find the widths at which its rows are independent.

    Args:
        decoder_type: what runs the model; measurements plan where responses end by one of their own.

    Raises:
        ValueError: the model is of a kind the loop does not compute, or an option is unknown.
    """
    from transformers import AutoModelForCausalLM

    shape, device = ModelShape.from_huggingface(spec.model), _device(spec)
    with no_weight_bar():
        model = AutoModelForCausalLM.from_pretrained(
            spec.model, dtype=getattr(torch, spec.dtype), local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    model = model.to(device).eval().requires_grad_(False)
    # One slot more than rows: padding writes there.
    slot_length = spec.max_prompt_tokens + spec.max_new_tokens
    decoder = decoder_type(model, shape, num_slots=spec.batch_size + 1, slot_length=slot_length)
    return HfLoop(decoder, shape, spec, device)


@contextmanager
def no_weight_bar() -> Iterator[None]:
    """Keep transformers' bar over weight tensors off the terminal, where the stage has its own."""
    from transformers.utils import logging as transformers_logging

    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def _device(spec: EngineSpec) -> torch.device:
    check_options(spec.options, NAME, known=("device",))
    name = spec.options.get("device", "auto")
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


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


class HfLoop:
    """Answers prompts with one model in this process. See the module's docstring for what is promised."""

    def __init__(self, decoder: Decoder, shape: ModelShape, spec: EngineSpec, device: torch.device) -> None:
        self._decoder = decoder
        self._shape = shape
        self._spec = spec
        self._device = device
        self._widths, self._rows_independent = self._find_widths()
        self._num_steps = 0
        self._num_step_rows = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, stop: Callable[[], bool] = never) -> Iterator[GeneratedRow]:
        """Answer every prompt; rows come as they finish. See Engine.generate."""
        check_prompts(prompts, spec=self._spec, sampling=sampling, shape=self._shape)
        return self._generate(prompts, sampling, stop)

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling, stop: Callable[[], bool]) -> Iterator[GeneratedRow]:
        waiting = iter(prompts)
        free_slots = list(reversed(range(self._spec.batch_size)))
        active: list[_Row] = []
        while not stop():
            while free_slots and (prompt := next(waiting, None)) is not None:
                row = _Row(prompt, free_slots.pop(), row_uniforms(prompt.seed, sampling.max_new_tokens).tolist())
                self._append([row], self._decoder.prefill(prompt.token_ids, row.slot), sampling)
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

    def _decode(self, rows: Sequence[_Row]) -> Tensor:
        """Logits of each row's next token, [N, V]."""
        self._num_steps += 1
        self._num_step_rows += len(rows)
        width = next(width for width in self._widths if width >= len(rows))
        tokens, positions, slots = ([row.tokens[-1] for row in rows], [row.position for row in rows], [row.slot for row in rows])
        return self._decoder.step(tokens, positions, slots, width=width)

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
        steps = min(_CHECK_STEPS, self._spec.max_prompt_tokens + self._spec.max_new_tokens)
        first_rows = []
        for step in range(steps):
            token = (step * 7919 + 1) % self._shape.vocab_size
            logits_BV = self._decoder.step([token] * width, [step] * width, slots, width=width)
            if not bool((logits_BV == logits_BV[:1]).all()):
                return None
            first_rows.append(logits_BV[0])
        return torch.stack(first_rows)

    def describe(self) -> dict[str, Any]:
        """What ran, on what, and whether rows are independent bit for bit."""
        return {
            "engine": NAME,
            "device": str(self._device),
            "threads": torch.get_num_threads(),
            "dtype": self._spec.dtype,
            "widths": self._widths,
            "rows_independent": self._rows_independent,
            "in_flight_use": self._num_step_rows / self._num_steps / self._spec.batch_size if self._num_steps else 0.0,
        }

    def close(self) -> None:
        """Nothing is held beyond this process's memory."""


def _finish_reason(row: _Row, sampling: Sampling) -> FinishReason | None:
    if row.tokens[-1] in sampling.eos_ids:
        return "stop"
    return "length" if len(row.tokens) >= sampling.max_new_tokens else None


PROVIDER = Provider(build, load)
