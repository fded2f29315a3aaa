# ruff: noqa: N815 (fields carry shape suffixes)
"""Lay pairs out as one packed micro-batch, with the prompt computed once for both answers.

A pair takes [x | y | y'] (share_prompt) or [x | y][x | y']. A *branch* is a run of tokens that attends causally to itself
and, before that, to all of a prefix: with sharing, y and y' are branches with prefix x, and their positions both start
at len(x), so each token sees what it would see in a sequence of its own. The last token of an answer predicts nothing and
is not computed. Only the pack is padded, never a sequence.

Shapes: T tokens of the pack, B branches, R predicted response tokens (rows), Q sequences (two a pair: y, then y').
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from spin_megatron.run.records import SpinPair, TokenIds


@dataclass(frozen=True)
class PackBatch:
    """One micro-batch.

    tokens_T: int64 token ids, padded with pad_id.
    positions_T: int64 rotary positions; 0 on padding.
    branches_B4: int64 on the CPU: (prefix_start, prefix_length, start, length), ascending, covering all tokens but the padding.
    rows_R: int64, the token whose hidden state predicts targets_R; a shared last prompt token appears twice.
    targets_R: int64 response tokens, contiguous by sequence.
    lengths_Q: int64 on the CPU, rows of each sequence: real_0, generated_0, real_1, generated_1, ...
    pair_ids: of the pack, in order; for scoring batches one id a sequence.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    branches_B4: torch.Tensor
    rows_R: torch.Tensor
    targets_R: torch.Tensor
    lengths_Q: torch.Tensor
    pair_ids: tuple[str, ...]

    def to(self, device: torch.device) -> "PackBatch":
        """The batch on a device. Branches and lengths stay on the CPU: they steer the host, and reading them must not wait for the GPU."""
        return replace(
            self,
            tokens_T=to_device(self.tokens_T, device),
            positions_T=to_device(self.positions_T, device),
            rows_R=to_device(self.rows_R, device),
            targets_R=to_device(self.targets_R, device),
            lengths_Q=self.lengths_Q.pin_memory(),  # the loss copies them from there
        )

    def without_padding(self, unit: int) -> "PackBatch":
        """The batch without the padding behind its branches, but for what makes its tokens a multiple of `unit` (at least one of it)."""
        used = int(self.branches_B4[-1, 2:].sum()) if self.branches_B4.shape[0] else 0
        kept = max(1, -(-used // unit)) * unit
        return replace(self, tokens_T=self.tokens_T[:kept], positions_T=self.positions_T[:kept])


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on the device. To an accelerator it goes by way of page-locked memory: any other is copied only after all that the
    device was given before (CUDA's "API synchronization behavior"), for which the host would wait."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class ScoringSequence:
    """A prompt and one response, to be scored. response_ids may be empty, prompt_ids may not: it predicts the first token."""

    sequence_id: str
    prompt_ids: TokenIds
    response_ids: TokenIds


def pair_tokens(pair: SpinPair, *, share_prompt: bool) -> int:
    """How many tokens of a pack the pair takes."""
    answers = _computed(pair.real_ids) + _computed(pair.generated_ids)
    return len(pair.prompt_ids) * (1 if share_prompt else 2) + answers


def sequence_tokens(sequence: ScoringSequence) -> int:
    """How many tokens of a pack the sequence takes."""
    return len(sequence.prompt_ids) + _computed(sequence.response_ids)


def attention_cost(pair: SpinPair, *, share_prompt: bool) -> int:
    """Query-key products of a pair: the part of a pack's cost that depends on what is in it."""
    prompt = len(pair.prompt_ids)
    answers = [_computed(response_ids) for response_ids in (pair.real_ids, pair.generated_ids)]
    own = sum(answer * prompt + answer * (answer + 1) // 2 for answer in answers)
    return own + prompt * (prompt + 1) // 2 * (1 if share_prompt else 2)


def make_batch(pairs: Sequence[SpinPair], *, pack_tokens: int, pad_id: int, share_prompt: bool) -> PackBatch:
    """Lay out whole pairs in order; no pair at all makes a legal batch of padding.

    Raises:
        ValueError: the pairs do not fit into pack_tokens, or a prompt is empty.
    """
    layout = _Layout()
    for pair in pairs:
        prompt = layout.add_prompt(pair.prompt_ids, pair.pair_id) if share_prompt else None
        for response_ids in (pair.real_ids, pair.generated_ids):
            if prompt is None:
                layout.add_sequence(pair.prompt_ids, response_ids, pair.pair_id)
            else:
                layout.add_answer(prompt, response_ids)
    return layout.finish(pack_tokens, pad_id, tuple(pair.pair_id for pair in pairs))


def make_scoring_batch(sequences: Sequence[ScoringSequence], *, pack_tokens: int, pad_id: int) -> PackBatch:
    """Lay out single sequences; Q counts them in order. Raises ValueError as make_batch does."""
    layout = _Layout()
    for sequence in sequences:
        layout.add_sequence(sequence.prompt_ids, sequence.response_ids, sequence.sequence_id)
    return layout.finish(pack_tokens, pad_id, tuple(sequence.sequence_id for sequence in sequences))


def _computed(response_ids: TokenIds) -> int:
    """Tokens of an answer that predict another one: all but the last."""
    return max(len(response_ids) - 1, 0)


@dataclass
class _Layout:
    """A pack being written."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[tuple[int, int, int, int]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add_prompt(self, prompt_ids: TokenIds, name: str) -> tuple[int, int]:
        """Write x as a branch of its own; return (start, length)."""
        if not prompt_ids:
            raise ValueError(f"{name!r} has an empty prompt; at least one token must stand before the response (usually BOS).")
        return self._add_branch((len(self.tokens), 0), prompt_ids), len(prompt_ids)

    def add_answer(self, prompt: tuple[int, int], response_ids: TokenIds) -> None:
        """Write a branch that continues a prompt written before."""
        start = self._add_branch(prompt, response_ids[:-1])
        last_of_prompt = prompt[0] + prompt[1] - 1
        self._add_rows([last_of_prompt, *range(start, start + len(response_ids) - 1)], response_ids)

    def add_sequence(self, prompt_ids: TokenIds, response_ids: TokenIds, name: str) -> None:
        """Write [x | y] as one branch."""
        if not prompt_ids:
            self.add_prompt(prompt_ids, name)
        start = self._add_branch((len(self.tokens), 0), (*prompt_ids, *response_ids[:-1]))
        first_row = start + len(prompt_ids) - 1
        self._add_rows(range(first_row, first_row + len(response_ids)), response_ids)

    def finish(self, pack_tokens: int, pad_id: int, pair_ids: tuple[str, ...]) -> PackBatch:
        padding = pack_tokens - len(self.tokens)
        if padding < 0:
            names = ", ".join(pair_ids[:3])
            raise ValueError(f"pairs {names}... take {len(self.tokens)} tokens but a pack has {pack_tokens}; raise train.pack_tokens.")
        return PackBatch(
            tokens_T=torch.tensor(self.tokens + [pad_id] * padding, dtype=torch.int64),
            positions_T=torch.tensor(self.positions + [0] * padding, dtype=torch.int64),
            branches_B4=torch.tensor(self.branches, dtype=torch.int64).reshape(-1, 4),
            rows_R=torch.tensor(self.rows, dtype=torch.int64),
            targets_R=torch.tensor(self.targets, dtype=torch.int64),
            lengths_Q=torch.tensor(self.lengths, dtype=torch.int64),
            pair_ids=pair_ids,
        )

    def _add_branch(self, prefix: tuple[int, int], token_ids: TokenIds) -> int:
        start = len(self.tokens)
        if token_ids:
            self.tokens.extend(token_ids)
            self.positions.extend(range(prefix[1], prefix[1] + len(token_ids)))
            self.branches.append((*prefix, start, len(token_ids)))
        return start

    def _add_rows(self, rows: Sequence[int], targets: TokenIds) -> None:
        self.rows.extend(rows[: len(targets)])
        self.targets.extend(targets)
        self.lengths.append(len(targets))
