"""Log-prob sums of pairs under fixed weights, and their cache: the opponent theta_t without a second model.

`score_pairs` runs packs forward-only through the modules that are about to be trained. `cached_scores` does so once: it
writes whole parts as it goes and goes on where a killed run stopped. A cache belongs to one identity (weights, packs,
precision, layout, library versions, hardware); any other identity empties it, because only bits that the same computation
would give again make step-0 margins exactly 0.

Packs are walked step by step as the first epoch trains them. With experts spread over data-parallel ranks an expert multiplies the
tokens of several ranks' packs at once, and the last bits of its product depend on which packs meet there.
"""

import itertools
import json
import logging
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from spin_megatron.data.batches import PackBatch, attention_cost, make_batch, to_device
from spin_megatron.data.packing import assign_ranks
from spin_megatron.mcore.precision import Fp8
from spin_megatron.mcore.runtime import Runtime
from spin_megatron.mcore.steps import gather_over_data, score_packs
from spin_megatron.mcore.training import agreed_by_first_rank
from spin_megatron.objective.logprobs import sequence_sums
from spin_megatron.run.manifest import digest_values, installed_versions, write_json
from spin_megatron.run.records import Pack, ReferenceScore, SpinPair, read_all, read_rows, write_rows
from spin_megatron.run.telemetry import Advance, progress_bar

logger = logging.getLogger(__name__)

PACKS_PER_PART = 128  # about: a part holds whole steps
_IDENTITY_NAME = "IDENTITY.json"


@dataclass(frozen=True)
class PackedPairs:
    """Pairs and the frozen plan that packs them.

    pairs: pair_id -> pair, of all packs. pack_tokens, share_prompt: as the plan was made with.
    """

    pairs: Mapping[str, SpinPair]
    packs: tuple[Pack, ...]
    pack_tokens: int
    share_prompt: bool

    @classmethod
    def read(cls, pairs_path: Path, packs_path: Path, *, pack_tokens: int, share_prompt: bool) -> "PackedPairs":
        """Read the merge stage's files.

        Raises:
            ValueError: a file is damaged, or the plan does not hold exactly the pairs of the file.
        """
        pairs = {pair.pair_id: pair for pair in read_rows(pairs_path, SpinPair)}
        packs = tuple(read_rows(packs_path, Pack))
        planned = [pair_id for pack in packs for pair_id in pack.pair_ids]
        if sorted(planned) != sorted(pairs):
            found = f"{packs_path} plans {len(planned)} pairs that are not the {len(pairs)} of {pairs_path}"
            raise ValueError(f"{found}; redo the merge stage.")
        return cls(pairs, packs, pack_tokens, share_prompt)

    def batch(self, pack: Pack) -> PackBatch:
        """Lay a pack out as a micro-batch. Padding is token 0, which no branch attends to."""
        pairs = [self.pairs[pair_id] for pair_id in pack.pair_ids]
        return make_batch(pairs, pack_tokens=self.pack_tokens, pad_id=0, share_prompt=self.share_prompt)

    def share_of(self, packs: Sequence[Pack], data_parallel: int, data_rank: int) -> list[Pack]:
        """A data-parallel rank's packs of these: equally many to each rank, attention cost as even as it gets."""
        costs = {
            pack.pack_id: sum(attention_cost(self.pairs[pair_id], share_prompt=self.share_prompt) for pair_id in pack.pair_ids)
            for pack in packs
        }
        return assign_ranks(packs, data_parallel, costs=costs)[data_rank]


def numerics(runtime: Runtime, dtype: torch.dtype, fp8: Fp8 | None = None, *, steps: Sequence[Sequence[Pack]]) -> dict[str, Any]:
    """What decides a log-prob's last bits besides weights and packs.

    Data parallelism and the order of packs decide nothing where a pack is computed by one copy of the model, as all are without
    experts over ranks.

    Args:
        steps: the steps that the packs are scored by.
    """
    layout = runtime.layout
    facts = {
        "dtype": str(dtype).removeprefix("torch."),
        "fp8": None if fp8 is None else asdict(fp8),
        "layout": [layout.tensor, layout.pipeline, layout.virtual_pipeline, layout.sequence, layout.context, layout.expert],
        "versions": installed_versions(),
    }
    if layout.expert > 1:
        facts["meetings"] = digest_values([layout.data, *([pack.pack_id for pack in step] for step in steps)])
    if runtime.device.type == "cuda":
        return facts | {"hardware": torch.cuda.get_device_name(runtime.device), "cuda": torch.version.cuda}
    return facts | {"hardware": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}", "threads": torch.get_num_threads()}


def score_pairs(
    chunks: Sequence[nn.Module],
    packed: PackedPairs,
    steps: Sequence[Sequence[Pack]],
    runtime: Runtime,
    *,
    advance: Advance | None = None,
) -> list[ReferenceScore] | None:
    """Log-prob sums of the packs' pairs, in the packs' order, on rank 0; None on other ranks. Collective.

    Args:
        steps: of packed.packs; those of a step are dealt to the data-parallel ranks as an update deals them.
        advance: called on each rank once for each pack it computes.
    """
    mine = [pack for step in steps for pack in packed.share_of(step, runtime.layout.data, runtime.data_rank)]
    batches = [packed.batch(pack) for pack in mine]
    logps = score_packs(chunks, batches, runtime, advance=advance)
    gathered = gather_over_data(_scores(batches, logps) if logps else [], runtime)
    if gathered is None:
        return None
    by_id = {score.pair_id: score for scores in gathered for score in scores}
    return [by_id[pair_id] for step in steps for pack in step for pair_id in pack.pair_ids]


def _scores(batches: Sequence[PackBatch], logps: Sequence[torch.Tensor]) -> list[ReferenceScore]:
    """Summed pack by pack, as a step does: the order of a sum may depend on where it begins. Read by the host once."""
    sums = [sequence_sums(logp_R, to_device(batch.lengths_Q, logp_R.device)) for batch, logp_R in zip(batches, logps, strict=True)]
    sums_P2 = torch.cat(sums).view(-1, 2).tolist()
    lengths_P2 = torch.cat([batch.lengths_Q for batch in batches]).view(-1, 2).tolist()
    pair_ids = [pair_id for batch in batches for pair_id in batch.pair_ids]
    return [ReferenceScore(pair_id, *both, *sizes) for pair_id, both, sizes in zip(pair_ids, sums_P2, lengths_P2, strict=True)]


def claim_cache(folder: Path, identity: Mapping[str, Any], runtime: Runtime) -> None:
    """Make the folder a cache of this identity; scores of any other are dropped. Collective."""
    if runtime.rank == 0:
        path = folder / _IDENTITY_NAME
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        wanted = json.loads(json.dumps(identity))
        if found != wanted:
            if found is not None:
                changed = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
                logger.warning("the reference cache was made with other %s; it is made anew", ", ".join(changed))
            if folder.exists():
                shutil.rmtree(folder)
            write_json(path, wanted)
    dist.barrier()


def cached_scores(
    path: Path,
    packed: PackedPairs,
    steps: Sequence[Sequence[Pack]],
    chunks: Sequence[nn.Module],
    runtime: Runtime,
    *,
    description: str,
    show: bool,
    stop_requested: Callable[[], bool],
) -> list[ReferenceScore] | None:
    """Scores of all pairs, from `path` or computed and written there; the same list on all ranks. Collective.

    Args:
        path: the finished file, in a folder that `claim_cache` claimed; its rows are in the order of packed.packs.
        steps: all of packed.packs, see `score_pairs`.
        stop_requested: polled on rank 0 after each part.

    Returns:
        None when it was stopped; the parts that are done are kept.
    """
    steps_per_part = max(1, PACKS_PER_PART // max((len(step) for step in steps), default=1))
    parts = [steps[start : start + steps_per_part] for start in range(0, len(steps), steps_per_part)]
    # Named by what they hold: a run that goes on at another data-parallel size has other steps.
    held = [digest_values([pack.pack_id for step in part for pack in step]) for part in parts]
    files = [path.with_name(f"{path.stem}_{digest[:16]}.parquet") for digest in held]
    is_whole, *is_done = _known_to_first_rank([path, *files], runtime)
    if not is_whole:
        own_packs = [sum(-(-len(step) // runtime.layout.data) for step in part) for part in parts]
        num_done = sum(itertools.compress(own_packs, is_done))
        with progress_bar(description, sum(own_packs), done=num_done, show=show) as advance:
            for file, part, done in zip(files, parts, is_done, strict=True):
                if done:
                    continue
                scores = score_pairs(chunks, packed, part, runtime, advance=advance)
                if scores is not None:
                    write_rows(file, scores, ReferenceScore)
                if agreed_by_first_rank(stop_requested(), runtime):
                    return None
        if runtime.rank == 0:
            by_id = {score.pair_id: score for score in read_all(files, ReferenceScore)}
            write_rows(path, [by_id[pair_id] for pack in packed.packs for pair_id in pack.pair_ids], ReferenceScore)
            for file in path.parent.glob(f"{path.stem}_*.parquet"):
                file.unlink()
        dist.barrier()
    return read_rows(path, ReferenceScore)


def _known_to_first_rank(paths: Sequence[Path], runtime: Runtime) -> list[bool]:
    """Which files are there, as rank 0 sees it: file systems may show a new file later to other machines."""
    there = torch.tensor([int(path.exists()) for path in paths], dtype=torch.int32, device=runtime.device)
    dist.broadcast(there, src=0)
    return [bool(value) for value in there.tolist()]
