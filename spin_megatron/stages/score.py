"""`spin-megatron score`: log-probabilities of given responses under a Hugging Face model, on any tensor x pipeline layout.

Input: one JSON object a line, {"prompt_ids": [...], "response_ids": [...]}; other keys are ignored. Output: an npz file, one row a line:
    logp_sum     float32 [N]     sum over the response's tokens, nats; 0 for an empty response
    logp_tokens  float32 [N, L]  each response token's log-probability given all before it, 0 behind its end
    mask         bool    [N, L]  where logp_tokens holds a token
    num_tokens   int64   [N]     length of the response
It runs the path that training and its reference take: packs, branches, sharded head.
"""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spin_megatron.plan.shape import ModelShape, ParallelLayout
from spin_megatron.run.manifest import atomic_path
from spin_megatron.run.option_types import count
from spin_megatron.run.telemetry import Advance, progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from spin_megatron.data.batches import ScoringSequence
    from spin_megatron.mcore.runtime import Runtime

logger = logging.getLogger(__name__)

DEFAULT_PACK_TOKENS = 4096
_PACKS_A_ROUND = 64  # bounds the memory of packs laid out ahead


@dataclass(frozen=True)
class ScoreRequest:
    """What to score: pairs is the JSONL file, out the npz file."""

    model: Path
    pairs: Path
    out: Path
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    dtype: Literal["float32", "bfloat16"] = "float32"


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line's subparsers."""
    parser: argparse.ArgumentParser = verbs.add_parser("score", help="log-probabilities of given pairs under a Hugging Face model")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model folder")
    parser.add_argument("--pairs", type=Path, required=True, help='JSON lines {"prompt_ids": [...], "response_ids": [...]}')
    parser.add_argument("--out", type=Path, required=True, help="npz file to write: logp_sum, logp_tokens, mask, num_tokens")
    parser.add_argument("--tensor", type=count, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pipeline", type=count, default=1, help="pipeline stages")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights; log-probs are fp32")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Be one rank of the verb; RANK and WORLD_SIZE are in the environment. Raises ValueError as run_score does."""
    layout = ParallelLayout(tensor=arguments.tensor, pipeline=arguments.pipeline)
    run_score(ScoreRequest(arguments.model, arguments.pairs, arguments.out, layout, arguments.dtype))


def run_score(request: ScoreRequest) -> None:
    """Score the file with this rank's part of the model; rank 0 writes `out`, whole or not at all.

    Raises:
        ValueError: a bad line (named by file and number), a token outside the vocabulary, a sequence longer than the model's
            maximum, a layout that does not divide the model, an incomplete model folder.
    """
    import torch

    from spin_megatron.mcore.runtime import default_device, running

    shape = ModelShape.from_huggingface(request.model)
    request.layout.check(shape)
    sequences = read_sequences(request.pairs, shape)
    with running(request.layout, device=default_device(), seed=0) as runtime:
        from spin_megatron.mcore.model import build_model, load_huggingface

        show = runtime.rank == 0
        chunks = build_model(shape, runtime, dtype=getattr(torch, request.dtype))
        load_huggingface(chunks, request.model, shape, runtime, show=show)
        with progress_bar("score (responses)", len(sequences), show=show) as advance:
            logps = score_sequences(chunks, sequences, runtime, advance=advance)
        if logps is not None:
            write_scores(request.out, [logps[sequence.sequence_id] for sequence in sequences])
            logger.info("%s: log-probabilities of %d responses", request.out, len(sequences))


def read_sequences(path: Path, shape: ModelShape) -> "list[ScoringSequence]":
    """Read and check every line; sequence_id is the line's number from 1.

    Raises:
        ValueError: no such file or no line in it, or a line that is no valid request; the message names file and line.
    """
    from spin_megatron.data.batches import ScoringSequence

    try:
        lines = path.read_bytes().rstrip().splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give a JSON lines file.") from error
    sequences = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error}); write one object a line.") from error
        if not isinstance(entry, dict):
            raise ValueError(f'{where} holds {type(entry).__name__}, expected {{"prompt_ids": [...], "response_ids": [...]}}.')
        prompt_ids, response_ids = (_token_ids(entry, name, where, shape.vocab_size) for name in ("prompt_ids", "response_ids"))
        if not prompt_ids:
            raise ValueError(f"{where}: prompt_ids is empty; at least one token (usually BOS) must stand before the response.")
        length = len(prompt_ids) + len(response_ids)
        if length > shape.max_positions:
            raise ValueError(f"{where} has {length} tokens, the model's max_position_embeddings is {shape.max_positions}; shorten it.")
        sequences.append(ScoringSequence(str(number), prompt_ids, response_ids))
    if not sequences:
        raise ValueError(f"{path} is empty; write one object a line.")
    return sequences


def _token_ids(entry: Mapping[str, Any], name: str, where: str, vocab_size: int) -> tuple[int, ...]:
    ids = entry.get(name)
    if not isinstance(ids, list) or any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise ValueError(f"{where}: {name}={_short(ids)}, expected a list of token ids (integers).")
    for token in ids:
        if not 0 <= token < vocab_size:
            known = f"the model's vocabulary is 0 to {vocab_size - 1}"
            raise ValueError(f"{where}: {name} has token {token}, {known}; was the file made for another model?")
    return tuple(ids)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def score_sequences(
    chunks: Sequence[Any], sequences: "Sequence[ScoringSequence]", runtime: "Runtime", *, advance: Advance
) -> "dict[str, Tensor] | None":
    """Score sequences in packs on all ranks of one model copy (parallel.data = 1).

    Returns:
        On rank 0: sequence_id -> fp32 log-probs of its response tokens, on the CPU. Elsewhere None.
    """
    from spin_megatron.data.batches import make_scoring_batch, sequence_tokens
    from spin_megatron.data.packing import plan_packs
    from spin_megatron.mcore.steps import gather_over_data, score_packs

    by_id = {sequence.sequence_id: sequence for sequence in sequences}
    lengths = [(sequence.sequence_id, sequence_tokens(sequence)) for sequence in sequences]
    longest, total = max(length for _, length in lengths), sum(length for _, length in lengths)
    pack_tokens = max(longest, min(total, DEFAULT_PACK_TOKENS))
    packs = plan_packs(lengths, pack_tokens=pack_tokens, max_pairs_per_pack=None, seed=0)
    logps: dict[str, Tensor] | None = {} if runtime.rank == 0 else None
    for start in range(0, len(packs), _PACKS_A_ROUND):
        round_packs = packs[start : start + _PACKS_A_ROUND]
        batches = [make_scoring_batch([by_id[name] for name in pack.pair_ids], pack_tokens=pack_tokens, pad_id=0) for pack in round_packs]
        pack_sizes = iter([len(pack.pair_ids) for pack in round_packs])
        scored = score_packs(chunks, batches, runtime, advance=lambda amount=1, note=None, sizes=pack_sizes: advance(next(sizes), note))
        on_cpu = [logp_R.cpu() for logp_R in scored]
        gathered = gather_over_data(on_cpu, runtime)
        if logps is None or gathered is None:
            continue
        for batch, logp_R in zip(batches, gathered[0], strict=True):
            logps.update(zip(batch.pair_ids, logp_R.split(batch.lengths_Q.tolist()), strict=True))
    return logps


def write_scores(path: Path, logps: "Sequence[Tensor]") -> None:
    """Write the npz file from each response's token log-probs (fp32), in order."""
    import numpy as np
    import torch

    from spin_megatron.objective.logprobs import sequence_sums

    lengths_N = torch.tensor([logp_L.shape[0] for logp_L in logps], dtype=torch.int64)
    tokens_NL = torch.nn.utils.rnn.pad_sequence(list(logps), batch_first=True)
    mask_NL = torch.arange(tokens_NL.shape[1])[None, :] < lengths_N[:, None]
    sums_N = sequence_sums(torch.cat(list(logps)), lengths_N)
    with atomic_path(path) as aside, open(aside, "wb") as file:
        np.savez(file, logp_sum=sums_N.numpy(), logp_tokens=tokens_NL.numpy(), mask=mask_NL.numpy(), num_tokens=lengths_N.numpy())
