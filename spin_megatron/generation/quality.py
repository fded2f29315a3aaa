"""How usable an iteration's answers are, from their token ids alone: rates a collapsing opponent shows first.

SPIN trains on these answers; a loss against empty or looping text is small and teaches nothing.
"""

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from spin_megatron.run.records import GeneratedRow

logger = logging.getLogger(__name__)

_LONGEST_PERIOD = 16
_SHORTEST_LOOP = 24
_FEWEST_COPIES = 4
# Below this many answers a rate says little: of 20, one empty answer is 5%.
MIN_ANSWERS = 50


@dataclass(frozen=True)
class AnswerQuality:
    """Shares of answers, 0 to 1.

    empty: nothing before EOS. repeated: ends in a loop. truncated: ran into the token limit, so it has no EOS.
    identical: word for word the answer of another prompt.
    """

    empty: float
    repeated: float
    truncated: float
    identical: float


def ends_in_a_loop(token_ids: Sequence[int]) -> bool:
    """Whether the text ends in at least 4 copies of a block of 1 to 16 tokens, 24 tokens or more in all."""
    for period in range(1, _LONGEST_PERIOD + 1):
        span = max(_FEWEST_COPIES * period, _SHORTEST_LOOP)
        tail = token_ids[-span:]
        if len(tail) == span and tail[period:] == tail[:-period]:
            return True
    return False


def answer_quality(rows: Sequence[GeneratedRow], eos_ids: Collection[int]) -> AnswerQuality:
    """The rates over these answers; all 0 where there are none."""
    texts = [row.token_ids[:-1] if row.token_ids and row.token_ids[-1] in eos_ids else row.token_ids for row in rows]
    counts = Counter(texts)
    num_rows = max(1, len(rows))
    return AnswerQuality(
        empty=sum(not text for text in texts) / num_rows,
        repeated=sum(ends_in_a_loop(text) for text in texts) / num_rows,
        truncated=sum(row.finish_reason == "length" for row in rows) / num_rows,
        identical=sum(counts[text] > 1 for text in texts if text) / num_rows,
    )


def excesses(quality: AnswerQuality, limits: AnswerQuality) -> list[str]:
    """One line for each rate above its limit, naming the setting."""
    return [
        f"{value:.1%} of the answers are {name}, more than quality.max_{name}={getattr(limits, name):g}"
        for name, value in vars(quality).items()
        if value > getattr(limits, name)
    ]


def judge_answers(
    rows: Sequence[GeneratedRow], eos_ids: Collection[int], limits: AnswerQuality, *, stop: bool, where: Path
) -> AnswerQuality:
    """The rates of these answers; warns of those above their limit. Fewer than MIN_ANSWERS are not judged.

    Args:
        where: the folder a person finds the answers in.

    Raises:
        ValueError: a rate is above its limit, and `stop` asks for that; the answers are kept.
    """
    quality = answer_quality(rows, eos_ids)
    found = excesses(quality, limits) if len(rows) >= MIN_ANSWERS else []
    for line in found:
        logger.warning("%s", line)
    if found and stop:
        raise ValueError(
            f"{'; '.join(found)}. Read the answers in {where}; if they are as they should be, go on with --set quality.on_excess=warn, "
            "else train the model before with a smaller learning rate or fewer epochs."
        )
    return quality
