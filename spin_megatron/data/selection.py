"""Which examples take part: no empty or repeated ones, a held-out split that stays where it is, nested subsets.

Every example has a place in one order, that of a hash of (run seed, example id). The first `num_held_out` usable examples
are held out, the next `num_examples` are trained on. So neither the order of the source's rows nor `num_examples` moves an
example across the split, and a smaller training set is the beginning of a larger one.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from spin_megatron.data.formats import content_id
from spin_megatron.data.render import Remark, Rendered
from spin_megatron.run.records import PromptRow, SftExample
from spin_megatron.run.seeds import row_seed


@dataclass(frozen=True)
class CleanExamples:
    """What is left of a source, in its order, and what was taken away. Ids are unique."""

    examples: tuple[SftExample, ...]
    num_empty: int
    num_duplicates: int


@dataclass(frozen=True)
class Selection:
    """The two sides of the split and what became of every rendered example.

    remarks: how often each happened; a truncated row is counted and kept.
    num_prompts_in_held_out: rows left out because their prompt is held out (with another answer).
    num_rendered: rows looked at; later ones were not needed.
    """

    train: tuple[PromptRow, ...]
    held_out: tuple[PromptRow, ...]
    remarks: Counter[Remark]
    num_prompts_in_held_out: int
    num_rendered: int


def clean(examples: Sequence[SftExample], *, deduplicate: bool) -> CleanExamples:
    """Drop examples whose question or answer is nothing but white space, and all but the first of equal conversations.

    Without `deduplicate`, repetitions of an id get "#2", "#3", ... so that ids stay unique.
    """
    kept: list[SftExample] = []
    seen_contents: set[str] = set()
    times_seen: Counter[str] = Counter()
    num_empty = num_duplicates = 0
    for example in examples:
        question, answer = example.messages[-2:]
        if not question.content.strip() or not answer.content.strip():
            num_empty += 1
            continue
        content = content_id(example.messages)
        if deduplicate and content in seen_contents:
            num_duplicates += 1
            continue
        seen_contents.add(content)
        times_seen[example.example_id] += 1
        times = times_seen[example.example_id]
        kept.append(example if times == 1 else replace(example, example_id=f"{example.example_id}#{times}"))
    return CleanExamples(tuple(kept), num_empty, num_duplicates)


def in_split_order(examples: Sequence[SftExample], seed: int) -> list[SftExample]:
    """The examples in the order that decides the split: by hash of (seed, example id)."""
    return sorted(examples, key=lambda example: (row_seed(seed, "split", 0, example.example_id), example.example_id))


def select(rendered: Iterable[Rendered], *, num_held_out: int, num_examples: int | None) -> Selection:
    """Fill the held-out split, then the training set, from rendered examples in split order.

    A training example whose prompt is held out is left out: the model would have been trained on a held-out prompt.
    Reads no further than needed.

    Args:
        num_examples: size of the training set; None takes all.

    Raises:
        ValueError: too few usable examples; the message says what became of them.
    """
    train: list[PromptRow] = []
    held_out: list[PromptRow] = []
    held_out_prompts: set[tuple[int, ...]] = set()
    remarks: Counter[Remark] = Counter()
    num_prompts_in_held_out = num_rendered = 0
    for outcome in rendered:
        num_rendered += 1
        remarks.update(outcome.remarks)
        if outcome.row is None:
            continue
        if len(held_out) < num_held_out:
            held_out.append(outcome.row)
            held_out_prompts.add(outcome.row.prompt_ids)
        elif outcome.row.prompt_ids in held_out_prompts:
            num_prompts_in_held_out += 1
        else:
            train.append(outcome.row)
        if num_examples is not None and len(train) == num_examples:
            break
    selection = Selection(tuple(train), tuple(held_out), remarks, num_prompts_in_held_out, num_rendered)
    _check_sizes(selection, num_held_out, num_examples)
    return selection


def _check_sizes(selection: Selection, num_held_out: int, num_examples: int | None) -> None:
    num_train = len(selection.train)
    wanted = 1 if num_examples is None else num_examples
    if len(selection.held_out) == num_held_out and num_train >= wanted:
        return
    skipped = ", ".join(f"{remark} {count}" for remark, count in selection.remarks.items() if not remark.startswith("truncated"))
    asked = f"data.num_held_out={num_held_out} and " + (
        "one training example" if num_examples is None else f"data.num_examples={num_examples}"
    )
    raise ValueError(
        f"the source has too few usable examples for {asked}: of {selection.num_rendered} that are neither empty nor repeated, "
        f"{len(selection.held_out)} could be held out and {num_train} trained on (skipped: {skipped or 'none'}; prompt held out: "
        f"{selection.num_prompts_in_held_out}). Lower these numbers, raise data.max_prompt_tokens or data.max_response_tokens, "
        'or set data.over_long = "truncate".'
    )
