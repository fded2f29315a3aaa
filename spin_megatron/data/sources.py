"""Read a supervised set: a local file, a local folder, or a dataset of the hub at a pinned commit.

Local .jsonl, .json and .parquet files are read row by row here, so that a row that breaks is named by file and line. Which
files of a folder belong to a split (and to a subset) is decided by the `datasets` library, by the same rules as for a
dataset of the hub: names, folders and the dataset card count. Other file types of a folder, and the hub, are read by
`datasets.load_dataset`.
"""

import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from spin_megatron.data.formats import FormatName, RowFormat, Turns, choose_format, content_id, read_conversation, read_id
from spin_megatron.run.manifest import is_disk_full
from spin_megatron.run.records import SftExample
from spin_megatron.run.telemetry import progress_bar

logger = logging.getLogger(__name__)

FILE_TYPES = (".jsonl", ".json", ".parquet")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PARQUET_BATCH_ROWS = 1024

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows of one source, each with where it stands ("train.jsonl line 7"), and how many there are."""

    num_rows: int
    rows: Iterable[tuple[str, Row]]


def load_examples(
    source: str,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    row_format: FormatName | Literal["auto"] = "auto",
    columns: Mapping[str, str] | None = None,
    turns: Turns = "first",
    limit: int | None = None,
    show: bool = False,
) -> list[SftExample]:
    """Every row of a source as a conversation that ends with the human answer, in the source's order.

    Args:
        source: path of a file or folder, or the name of a dataset of the hub. A single file is read whole, whatever `split` says.
        revision: commit of the hub's dataset, 40 hex digits; required there, refused for local paths.
        row_format, columns: see formats.choose_format; the first row decides for all.
        turns: whether the first or the last assistant turn is the human answer.
        limit: read no more than this many rows (to check a source before a run); None reads all.

    Returns:
        Examples with ids that depend on nothing but their content (or on the id column). Equal conversations have equal
        content ids: the caller drops or numbers repetitions.

    Raises:
        ValueError: the source cannot be read, or a row breaks; the message names the file and the line (or row).
    """
    examples: list[SftExample] = []
    chosen: RowFormat | None = None
    seen: dict[str, tuple[str, str]] = {}
    source_rows = open_rows(source, split=split, subset=subset, revision=revision)
    with progress_bar("read (rows)", min(source_rows.num_rows, limit or source_rows.num_rows), show=show) as advance:
        for where, row in islice(source_rows.rows, limit):
            try:
                chosen = chosen or choose_format(row, name=row_format, columns=columns)
                messages = read_conversation(row, chosen, turns=turns)
                example_id = read_id(row, chosen, messages)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            if chosen.id_column is not None:
                _check_id(seen, example_id, content_id(messages), where)
            examples.append(SftExample(example_id, messages, source, revision))
            advance()
    if chosen is None:
        raise ValueError(f"data.source={source!r} (split {split!r}) has no rows; give a source that has some.")
    logger.info("%s: %d rows of format %s, columns %s", source, len(examples), chosen.name, ", ".join(chosen.columns.values()))
    return examples


def _check_id(seen: dict[str, tuple[str, str]], example_id: str, content: str, where: str) -> None:
    earlier_where, earlier_content = seen.setdefault(example_id, (where, content))
    if earlier_content != content:
        raise ValueError(
            f"{where}: id {example_id!r} was given to another conversation before ({earlier_where}); data.columns.id must be unique."
        )


def open_rows(source: str, *, split: str, subset: str | None, revision: str | None) -> Rows:
    """Find a source and count its rows; they are read as they are iterated over.

    Raises:
        ValueError: as `load_examples`.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(
                f"data.revision={revision!r} belongs to datasets of the hub, but data.source={source!r} is a local path; remove it."
            )
        return _folder_rows(path, split, subset) if path.is_dir() else _file_rows([path])
    if not _HUB_NAME.fullmatch(source) or path.suffix in FILE_TYPES:
        raise ValueError(f"data.source={source!r}: there is no such file or folder (relative paths count from the config file's folder).")
    return _hub_rows(source, split, subset, revision)


def _file_rows(paths: list[Path]) -> Rows:
    for path in paths:
        if path.suffix not in FILE_TYPES:
            raise ValueError(f"{path}: {path.suffix or 'no suffix'} is no known file type; use one of {', '.join(FILE_TYPES)}.")
    opened = [_open_file(path) for path in paths]
    return Rows(sum(num_rows for num_rows, _ in opened), (item for _, rows in opened for item in rows))


def _folder_rows(folder: Path, split: str, subset: str | None) -> Rows:
    """The rows of a split of a folder; `datasets` says which files make it up."""
    import datasets

    with tempfile.TemporaryDirectory() as scratch:
        try:
            builder = datasets.load_dataset_builder(str(folder), name=subset, cache_dir=scratch)
        except (ValueError, OSError) as error:
            raise ValueError(f"data.source={str(folder)!r}: {_first_line(error)}. Correct data.source or data.subset.") from error
        files = {str(name): [Path(path) for path in paths] for name, paths in (builder.config.data_files or {}).items()}
    if split not in files:
        raise ValueError(f"data.split={split!r} is not in {folder}, which has {', '.join(files) or 'none'}; use one of these.")
    chosen = files[split]
    _refuse_mixed_types(folder, chosen)
    if all(path.suffix in FILE_TYPES for path in chosen):
        return _file_rows(chosen)
    dataset = datasets.load_dataset(str(folder), name=subset, split=split)
    return Rows(dataset.num_rows, _dataset_rows(dataset, f"{folder} split {split!r}"))


def _refuse_mixed_types(folder: Path, chosen: list[Path]) -> None:
    """Without a card that names files, `datasets` reads a folder's commonest type and leaves the others out without a word."""
    card = folder / "README.md"
    if card.exists() and "data_files:" in card.read_text(encoding="utf-8", errors="replace"):
        return
    types = {path.suffix for path in chosen}
    if types & {".json", ".jsonl"}:
        types |= {".json", ".jsonl"}
    left_out = sorted(path.name for path in folder.rglob("*") if path.suffix in {".jsonl", ".parquet"} - types)
    if left_out:
        raise ValueError(
            f"data.source={str(folder)!r} mixes file types: {chosen[0].name} would be read and {left_out[0]} left out. "
            "Keep one type in the folder, or give a single file."
        )


def is_commit(revision: str) -> bool:
    """Whether a revision names one state of a hub repository for good: 40 hex digits, no branch or tag."""
    return _COMMIT.fullmatch(revision) is not None


def _hub_rows(name: str, split: str, subset: str | None, revision: str | None) -> Rows:
    if revision is None or not is_commit(revision):
        raise ValueError(
            f"data.source={name!r} is no local path, so it is a dataset of the hub, and data.revision={revision!r} does not pin it: "
            "a name or branch may point to other data tomorrow. Set data.revision to a commit of 40 hex digits. The dataset's page "
            f'shows it under "History", as does: python -c "import huggingface_hub as h; print(h.HfApi().dataset_info({name!r}).sha)".'
        )
    import datasets

    try:
        dataset = datasets.load_dataset(name, name=subset, split=split, revision=revision)
    except (ValueError, OSError) as error:  # no such name or commit, no network
        if is_disk_full(error):
            raise
        raise ValueError(
            f"the hub's dataset {name!r} cannot be read at data.revision={revision} (subset {subset!r}, split {split!r}): "
            f"{_first_line(error)}. Check the four, and the network; without one, give data.source the path of a local copy."
        ) from error
    return Rows(dataset.num_rows, _dataset_rows(dataset, f"{name}@{revision[:8]} split {split!r}"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _dataset_rows(dataset: Iterable[Row], name: str) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(dataset, start=1):
        yield f"{name} row {number}", row


def _open_file(path: Path) -> tuple[int, Iterator[tuple[str, Row]]]:
    """The number of a file's rows and the rows."""
    if path.suffix == ".parquet":
        return int(_open_parquet(path).metadata.num_rows), _read_parquet(path)
    if _starts_array(path):  # whatever its name: JSON lines hold no arrays
        rows = _json_array(path)
        return len(rows), _array_rows(path, rows)
    with open(path, "rb") as handle:
        return sum(1 for line in handle if not line.isspace()), _read_json_lines(path)


def _read_json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    """One JSON object a line; blank lines are skipped. Lines end with a newline only: JSON text may hold other separators."""
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            where = f"{path} line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: byte {error.start + 1} is not UTF-8; convert the file to UTF-8.") from error
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: not JSON ({error.msg} at column {error.colno}); a file holds one JSON object a line, or one list of objects."
                ) from error
            yield where, _as_row(row, where)


def _starts_array(path: Path) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace") as handle:
        return next((line.lstrip()[0] for line in handle if line.strip()), "") == "["


def _json_array(path: Path) -> list[Any]:
    try:
        rows: list[Any] = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start + 1} is not UTF-8; convert the file to UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {error.lineno}: not JSON ({error.msg} at column {error.colno}).") from error
    return rows


def _array_rows(path: Path, rows: list[Any]) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(rows, start=1):
        where = f"{path} row {number}"
        yield where, _as_row(row, where)


def _as_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object with columns, found {type(value).__name__}.")
    return value


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa

    number = 0
    try:
        for batch in _open_parquet(path).iter_batches(batch_size=_PARQUET_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} after row {number}: damaged parquet data ({_first_line(error)}); get the file anew.") from error


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({_first_line(error)}); get the file anew.") from error
