"""Manifests, records and metrics: nothing half-written is taken for done, nothing is lost."""

import io
import itertools
import json
import logging
import os
import resource
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from spin_megatron.run import telemetry
from spin_megatron.run.manifest import (
    Manifest,
    atomic_path,
    difference,
    digest_file,
    digest_tree,
    git_revision,
    is_disk_full,
    output_file,
    read_manifest,
    stage_key,
    verify_outputs,
    write_manifest,
    write_text,
)
from spin_megatron.run.records import (
    GeneratedRow,
    PromptRow,
    ReferenceScore,
    SpinPair,
    longest_list,
    num_rows,
    num_rows_so_far,
    read_all,
    read_rows,
    write_rows,
)
from spin_megatron.run.telemetry import EventWriter, MetricsWriter, configure_logging


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "first")

    def fails_half_way() -> None:
        with atomic_path(path) as aside:
            aside.write_text("half", encoding="utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails_half_way()
    assert path.read_text(encoding="utf-8") == "first"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("row_type", "rows"),
    [
        (PromptRow, [PromptRow("a", (1, 2), (3,), False), PromptRow("b", (), (2**31 - 1,), True)]),
        (GeneratedRow, [GeneratedRow("a", (), "length", 2**63 - 1), GeneratedRow("b", (7,), "stop", 0)]),
        (SpinPair, []),
        (ReferenceScore, [ReferenceScore("a", -0.5, -1.25, 1, 2)]),
    ],
)
def test_rows_come_back_as_they_were_written(tmp_path: Path, row_type: type, rows: list) -> None:
    path = tmp_path / "it's here" / "rows.parquet"
    write_rows(path, rows, row_type)
    assert read_rows(path, row_type) == rows


def test_equal_tokens_of_all_rows_are_one_object_in_memory(tmp_path: Path) -> None:
    rows = [GeneratedRow(str(number), (49_151, number), "length", number) for number in range(1000)]
    write_rows(tmp_path / "rows.parquet", rows, GeneratedRow)
    found = read_rows(tmp_path / "rows.parquet", GeneratedRow)
    assert found == rows
    assert len({id(row.token_ids[0]) for row in found}) == 1, "each int object takes 28 bytes beside the 8 that point to it"


def test_a_corrupt_or_foreign_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_rows(path, [GeneratedRow("a", (1,), "stop", 0)], GeneratedRow)
    with pytest.raises(ValueError, match=r"rows\.parquet has columns .* expected .*SpinPair"):
        read_rows(path, SpinPair)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read as parquet"):
        read_rows(path, GeneratedRow)


def test_a_footer_is_read_again_only_when_its_file_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, looked_at = pq.read_metadata, []
    monkeypatch.setattr(pq, "read_metadata", lambda path: looked_at.append(path) or read(path))
    path, row = tmp_path / "part.parquet", GeneratedRow("a", (7, 2), "stop", 1)
    assert num_rows_so_far(path) == 0
    write_rows(path, [row], GeneratedRow)
    assert [num_rows(path) for _ in range(3)] == [1, 1, 1]
    write_rows(path, [row, row], GeneratedRow)
    assert [num_rows(path) for _ in range(3)] == [2, 2, 2]
    assert looked_at == [path, path]
    path.write_bytes(path.read_bytes()[:-9])
    assert num_rows_so_far(path) == 0
    with pytest.raises(ValueError, match=r"part\.parquet cannot be read as parquet"):
        num_rows(path)


def test_any_range_of_rows_of_several_files_is_read_and_no_group_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spin_megatron.run.records._GROUP_ROWS", 4)
    rows = [PromptRow(f"ex-{i}", tuple(range(i)), (5, 2), False) for i in range(15)]
    paths = [tmp_path / "prompts.parquet", tmp_path / "held_out.parquet"]
    write_rows(paths[0], rows[:10], PromptRow)  # groups of 4, 4, 2
    write_rows(paths[1], rows[10:], PromptRow)  # 4, 1
    read, groups = pq.ParquetFile.read_row_group, []
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda file, group: groups.append(group) or read(file, group))
    assert read_all(paths, PromptRow, range(7, 11)) == rows[7:11]
    assert groups == [1, 2, 0]
    for start in range(16):
        for stop in range(start, 17):
            assert read_all(paths, PromptRow, range(start, stop)) == rows[start:stop]
    assert read_all(paths, PromptRow) == rows
    assert longest_list(paths, "prompt_ids") == 14
    assert longest_list([], "prompt_ids") == 0


def make_manifest(folder: Path) -> Manifest:
    write_text(folder / "data.txt", "12345")
    settings, inputs = {"run.seed": 42}, {"prepare 0": "abc"}
    key = stage_key("merge", settings, inputs)
    return Manifest("merge", 0, None, key, settings, inputs, (output_file(folder, folder / "data.txt", 5),))


def test_a_manifest_round_trips_and_vouches_for_its_files(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    manifest = make_manifest(tmp_path)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    # sha256("12345"), from coreutils' sha256sum
    assert manifest.outputs[0].sha256 == "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5"
    assert verify_outputs(tmp_path, manifest, digests=True) == []
    (tmp_path / "data.txt").write_text("12346", encoding="utf-8")
    assert verify_outputs(tmp_path, manifest) == []
    assert "does not match the sha256" in verify_outputs(tmp_path, manifest, digests=True)[0]
    (tmp_path / "data.txt").write_text("1234", encoding="utf-8")
    assert "has 4 bytes, its manifest says 5" in verify_outputs(tmp_path, manifest)[0]
    (tmp_path / "data.txt").unlink()
    assert "is missing" in verify_outputs(tmp_path, manifest)[0]


def test_a_manifest_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, make_manifest(tmp_path))
    path = tmp_path / "MANIFEST.json"
    path.write_text(path.read_text(encoding="utf-8")[:40], encoding="utf-8")
    with pytest.raises(ValueError, match=r"MANIFEST\.json is not a readable manifest"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, replace(make_manifest(tmp_path), schema=99))
    with pytest.raises(ValueError, match=r"schema 99"):
        read_manifest(tmp_path)


def test_the_key_depends_on_settings_and_inputs_and_not_on_their_order() -> None:
    assert stage_key("train", {"a": 1, "b": 2}, {}) == stage_key("train", {"b": 2, "a": 1}, {})
    assert stage_key("train", {"a": 1}, {}) != stage_key("train", {"a": 2}, {})
    assert stage_key("train", {}, {"x": "1"}) != stage_key("merge", {}, {"x": "1"})


def test_a_difference_is_short_and_tells_what_is_absent() -> None:
    then = {"objective.beta": 0.1, "data.system": "one " * 30, "run.seed": 1, "gone": None, "digest": "a" * 64}
    now = {"objective.beta": 0.25, "data.system": "two " * 30, "run.seed": 1, "lora.targets": ["qkv"], "digest": "b" * 64}
    found = difference(then, now)
    assert found.pop("data.system") == f'"{"one " * 14}one... -> "{"two " * 14}two...'
    assert found == {
        "objective.beta": "0.1 -> 0.25",
        "digest": "aaaaaaaaaaaa -> bbbbbbbbbbbb",
        "gone": "null -> absent",
        "lora.targets": 'absent -> ["qkv"]',
    }


def test_the_digest_of_a_tree_is_that_of_its_names_and_contents(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "one.txt", "1")
    write_text(tmp_path / "a" / "two.txt", "2")
    whole = digest_tree(tmp_path / "a")
    assert digest_tree(tmp_path / "a" / "two.txt") == digest_file(tmp_path / "a" / "two.txt")
    write_text(tmp_path / "a" / ".hidden", "3")
    write_text(tmp_path / "a" / ".git" / "index", "4")  # which changes as often as git looks at the data set
    assert digest_tree(tmp_path / "a") == whole
    os.rename(tmp_path / "a" / "two.txt", tmp_path / "a" / "three.txt")
    assert digest_tree(tmp_path / "a") != whole
    os.rename(tmp_path / "a" / "three.txt", tmp_path / "a" / "two.txt")
    write_text(tmp_path / "a" / "b" / "one.txt", "!")
    assert digest_tree(tmp_path / "a") != whole


def test_the_git_revision_is_that_of_the_repository_which_tracks_the_file_and_of_no_other_around_it(tmp_path: Path) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(tmp_path), *words], capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    git("init", "--quiet")
    write_text(tmp_path / "own.py", "tracked")
    git("add", "own.py")
    git(*who, "commit", "--quiet", "--message", "first")
    write_text(tmp_path / ".venv" / "installed.py", "of an environment inside the repository")
    assert git_revision(tmp_path / "own.py") == git("rev-parse", "HEAD")
    assert git_revision(tmp_path / ".venv" / "installed.py") is None
    write_text(tmp_path / "own.py", "changed")
    assert git_revision(tmp_path / "own.py") == f"{git('rev-parse', 'HEAD')}-dirty"


def test_metrics_of_lost_steps_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, tmp_path / "tensorboard")
    for step in range(4):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with path.open("a", encoding="utf-8") as handle:
        handle.write('{"step": 4, "lo')  # killed in the middle of a line
    writer = MetricsWriter(path, tmp_path / "tensorboard", resume_step=2)
    writer.write(2, {"loss": float("nan")})
    writer.close()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 0.0), (1, 1.0), (2, "nan")]


@pytest.fixture
def a_second_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files are named by the second they were made in; of one second, a tenth one of a process would be read before its ninth."""
    clock = itertools.count(time.time())
    monkeypatch.setattr(time, "time", lambda: next(clock))


@pytest.mark.usefixtures("a_second_a_look")
@pytest.mark.parametrize("resumed_at", [1, 0])  # 0: killed before its first checkpoint, or made anew
def test_tensorboard_shows_the_resumed_values_once(resumed_at: int, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, values in ((0, (1.0, 2.0, 3.0)), (resumed_at, (20.0, 30.0))):
        writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", resume_step=first)
        for step, value in enumerate(values, start=first):
            writer.write(step, {"loss": value})
        writer.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = [(0, 1.0), (1, 20.0), (2, 30.0)] if resumed_at else [(0, 20.0), (1, 30.0)]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected


@pytest.mark.usefixtures("a_second_a_look")
def test_tensorboard_shows_each_iteration_s_evaluation_once_and_a_repeated_one_anew(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for iteration, accuracy in ((0, 0.75), (1, 0.5), (1, 0.25)):
        writer = EventWriter(tmp_path, first_step=iteration)
        writer.write(iteration, {"accuracy": accuracy, "loss": float("nan")})
        writer.close()
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("accuracy")] == [(0, 0.75), (1, 0.25)]


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """A disk that is full: a write that makes a file longer fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("full", ["metrics", "tensorboard"])
def test_a_full_disk_while_metrics_are_written_is_told_as_one(full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    writer.write(0, {"loss": 1.0})
    if full == "tensorboard":
        monkeypatch.setattr(writer, "_file", open(os.devnull, "a", encoding="utf-8"))  # noqa: SIM115 (the writer closes it)
        monkeypatch.setattr("os.fsync", lambda _descriptor: None)

    def write_on() -> None:
        for step in range(1, 50):
            writer.write(step, {"loss": 1.0})

    with files_of_at_most(400), pytest.raises(OSError) as caught:
        write_on()
    assert is_disk_full(caught.value)
    with suppress(OSError):
        writer.close()
    again = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", resume_step=1)
    again.write(1, {"loss": 2.0})
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 1.0), (1, 2.0)]


def test_warnings_of_libraries_go_to_the_log_file_and_not_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        configure_logging(tmp_path / "rank_0.log", show=True)
        warnings.warn("a library's advice", UserWarning, stacklevel=1)
        logging.getLogger("spin_megatron.test").info("our own word")
    finally:
        configure_logging(None)
    log = (tmp_path / "rank_0.log").read_text(encoding="utf-8")
    assert "a library's advice" in log
    assert "our own word" in log
    assert "advice" not in capsys.readouterr().err


def test_without_a_terminal_a_long_message_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    message = "go on with: " + " ".join(f"--set [a]{number}" for number in range(40))
    try:
        configure_logging(None)
        logging.getLogger("spin_megatron.test").warning(message)
    finally:
        configure_logging(None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"WARNING  {message}")


def test_without_a_terminal_progress_is_logged_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    clock = iter([100.0, 110.0, 140.0, 150.0, 151.0])
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(telemetry, "console", Console(file=io.StringIO()))
    monkeypatch.setattr(logging.getLogger("spin_megatron.progress"), "info", lambda text, *values: lines.append(text % values))
    with telemetry.progress_bar("copy (MB)", 100, done=20) as advance:
        advance(5)  # after 10 seconds: too soon for a line
        advance(15, "3/9 tensors, 0.50 GB/s")
        advance(60)
        advance(0, "9/9 tensors, 0.50 GB/s")  # nothing is left to tell
    # 20 of 80 in 40 seconds leave 60 at the same rate: 120 seconds.
    assert lines == ["copy (MB): 40 of 100 (120 s left, 3/9 tensors, 0.50 GB/s)", "copy (MB): 100 of 100"]
