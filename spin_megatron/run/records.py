"""Row schemas of the files between stages, and their parquet form.

Each record is a frozen dataclass; its arrow schema follows from its field types, so a file and its reader cannot
drift apart. Files are written aside, fsynced and renamed: a parquet file that exists under its name is whole.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spin_megatron.run.manifest import atomic_path

TokenIds = tuple[int, ...]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. role: system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class SftExample:
    """A conversation that ends with the human answer. Lives in memory only: prepare turns it into a PromptRow."""

    example_id: str
    messages: tuple[Message, ...]
    source: str
    revision: str | None


@dataclass(frozen=True)
class PromptRow:
    """A rendered prompt x and its human answer y.

    prompt_ids ends with the template's generation prompt; real_ids ends with EOS unless `truncated` cut it off.
    """

    example_id: str
    prompt_ids: TokenIds
    real_ids: TokenIds
    truncated: bool


@dataclass(frozen=True)
class GeneratedRow:
    """The opponent's answer y' to one prompt. token_ids ends with EOS exactly when finish_reason is "stop"."""

    example_id: str
    token_ids: TokenIds
    finish_reason: FinishReason
    seed: int


@dataclass(frozen=True)
class SpinPair:
    """(x, y, y'): a prompt, the human answer and the answer of the opponent of `made_in_iteration`."""

    pair_id: str
    prompt_ids: TokenIds
    real_ids: TokenIds
    generated_ids: TokenIds
    made_in_iteration: int


@dataclass(frozen=True)
class Pack:
    """Whole pairs that are computed as one micro-batch of num_tokens tokens, in this order."""

    pack_id: int
    pair_ids: tuple[str, ...]
    num_tokens: int


@dataclass(frozen=True)
class ReferenceScore:
    """Log-probabilities (nats, fp32 sums over response tokens) of a pair under the reference theta_t."""

    pair_id: str
    logp_real: float
    logp_generated: float
    num_real: int
    num_generated: int


# Rows whose items exist one by one at a time, before they are shared.
_BATCH_ROWS = 256
# Rows that are read together, or not at all by who wants others: 10 MB of prompts of 600 tokens.
_GROUP_ROWS = 4096

Row = TypeVar("Row", PromptRow, GeneratedRow, SpinPair, Pack, ReferenceScore)

_ARROW_TYPES: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    bool: pa.bool_(),
    float: pa.float32(),
    TokenIds: pa.list_(pa.int32()),
    tuple[str, ...]: pa.list_(pa.string()),
    FinishReason: pa.string(),
}


def arrow_schema(row_type: type) -> pa.Schema:
    """The arrow schema of a record type. float is stored as float32, exactly the precision of a log-prob sum."""
    hints = get_type_hints(row_type)
    return pa.schema([pa.field(field.name, _ARROW_TYPES[hints[field.name]], nullable=False) for field in fields(row_type)])


def write_rows(path: Path, rows: Sequence[Row], row_type: type[Row]) -> None:
    """Write rows to a parquet file atomically. An empty sequence makes a valid file with no rows."""
    columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(row_type)}
    table = pa.table(columns, schema=arrow_schema(row_type))
    with atomic_path(path) as aside:
        pq.write_table(table, aside, row_group_size=_GROUP_ROWS)


def read_rows(path: Path, row_type: type[Row], wanted: range | None = None) -> list[Row]:
    """Read every row of a parquet file, or those of a range of row numbers.

    Raises:
        ValueError: the file is corrupt, or its columns are not those of row_type; the message names the file.
    """
    make: Callable[..., Row] = row_type
    expected = arrow_schema(row_type).names
    one_object: dict[Any, Any] = {}
    rows: list[Row] = []
    with _damage_is_named(path), pq.ParquetFile(path) as file:
        if file.schema_arrow.names != expected:
            raise ValueError(f"{path} has columns {file.schema_arrow.names}, expected {expected} ({row_type.__name__}).")
        for batch in _batches(file, range(file.metadata.num_rows) if wanted is None else wanted):
            columns = [_values(column, one_object) for column in batch.columns]
            rows += [make(*values) for values in zip(*columns, strict=True)]
    return rows


@contextmanager
def _damage_is_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet ({error}); remove it and rerun the stage that makes it.") from error


def _batches(file: pq.ParquetFile, wanted: range) -> Iterator[pa.RecordBatch]:
    """The rows of a range of row numbers; row groups that hold none of them are not read."""
    first = 0
    for group in range(file.num_row_groups):
        num_rows = file.metadata.row_group(group).num_rows
        start, stop = max(wanted.start - first, 0), min(wanted.stop - first, num_rows)
        if start < stop:
            yield from file.read_row_group(group).slice(start, stop - start).to_batches(max_chunksize=_BATCH_ROWS)
        first += num_rows


def _values(column: pa.Array, one_object: dict[Any, Any]) -> list[Any]:
    """A column's values; lists as tuples that share one object an item: 8 bytes a token instead of 36."""
    values: list[Any] = column.to_pylist()
    if not pa.types.is_list(column.type):
        return values
    return [tuple(map(one_object.setdefault, items, items)) for items in values]


def read_all(paths: Iterable[Path], row_type: type[Row], wanted: range | None = None) -> list[Row]:
    """Rows of several parquet files, in the order of the paths; or those of a range of row numbers, which count through all files.

    Raises:
        ValueError: as `read_rows`.
    """
    rows: list[Row] = []
    first = 0
    for path in paths:
        here = None if wanted is None else range(max(wanted.start - first, 0), max(wanted.stop - first, 0))
        rows += read_rows(path, row_type, here)
        first += num_rows(path)
    return rows


def longest_list(paths: Iterable[Path], column: str) -> int:
    """Items of the longest list in a column of several parquet files; 0 where there are no rows. ValueError: as `read_rows`."""
    longest = 0
    for path in paths:
        with _damage_is_named(path):
            lengths = pc.list_value_length(pq.read_table(path, columns=[column])[column])
            longest = max(longest, pc.max(lengths).as_py() or 0)
    return longest


def num_rows(path: Path) -> int:
    """Rows of a parquet file, from its footer. ValueError: as `read_rows`."""
    with _damage_is_named(path):
        status = path.stat()
        return _num_rows_of_unchanged(path, status.st_size, status.st_mtime_ns)


def num_rows_so_far(path: Path) -> int:
    """`num_rows` for a display of progress: 0 where the file is damaged or gone, which whoever reads it will say."""
    try:
        return num_rows(path)
    except ValueError:
        return 0


@functools.lru_cache(maxsize=2**16)
def _num_rows_of_unchanged(path: Path, num_bytes: int, changed_at_ns: int) -> int:
    """Of a file of this size and time: progress is asked for every second, over all parts there are."""
    del num_bytes, changed_at_ns
    return int(pq.read_metadata(path).num_rows)
