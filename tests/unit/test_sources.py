"""Files, folders and hub names: the right rows in the right order, and errors that name file and line."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin_megatron.data.sources import load_examples, open_rows
from spin_megatron.run.records import SftExample

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def qa(number: int) -> dict[str, str]:
    return {"prompt": f"question {number}", "response": f"answer {number}"}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def prompts(examples: list[SftExample]) -> list[str]:
    return [example.messages[0].content for example in examples]


def test_jsonl_json_and_parquet_files_give_the_same_examples(tmp_path: Path) -> None:
    rows = [qa(number) for number in range(3)]
    arrays = [tmp_path / "array.json", tmp_path / "array.jsonl"]
    for path in arrays:
        path.write_text("\n " + json.dumps(rows, indent=1), encoding="utf-8")
    paths = [write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.json", rows), write_parquet(tmp_path / "c.parquet", rows)]
    loaded = [load_examples(str(path)) for path in [*paths, *arrays]]
    for examples in loaded:
        assert [(example.example_id, example.messages) for example in examples] == [
            (example.example_id, example.messages) for example in loaded[0]
        ]
        assert prompts(examples) == ["question 0", "question 1", "question 2"]
    assert loaded[0][0].source == str(paths[0])
    assert loaded[0][0].revision is None


def test_rows_are_counted_whatever_the_line_breaks_of_a_file(tmp_path: Path) -> None:
    rows = [qa(number) for number in range(3)]
    (tmp_path / "array.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "apart.jsonl").write_text("\n\r\n" + "\r\n  \n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8", newline="")
    for path in tmp_path.iterdir():
        assert open_rows(str(path), split="train", subset=None, revision=None).num_rows == 3


def test_blank_lines_a_byte_order_mark_and_unusual_separators_inside_text_are_no_errors(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    # U+2028 ends a line for str.splitlines, but not in JSON lines.
    text = '\ufeff{"prompt": "a\u2028b", "response": "c"}\r\n\n{"prompt": "d", "response": "e"}'
    path.write_bytes(text.encode("utf-8"))
    assert prompts(load_examples(str(path))) == ["a\u2028b", "d"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "response"', "not JSON"),
        (b'{"prompt": "a"}', "column 'response' is missing"),
        (b'{"prompt": "a", "response": 3}', "column 'response' is 3, expected text"),
        (b'["a", "b"]', "expected a JSON object with columns, found list"),
        (b'{"prompt": "\xff", "response": "b"}', "byte 13 is not UTF-8"),
    ],
)
def test_a_line_that_breaks_is_named_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps(qa(0)).encode()
    path.write_bytes(b"\n".join([good, b"", line, good]) + b"\n")
    with pytest.raises(ValueError, match=rf"data\.jsonl line 3: {message}"):
        load_examples(str(path))


def test_a_row_of_a_parquet_file_or_of_an_array_is_named_by_its_number(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data.parquet", [qa(0), {"prompt": "a", "response": None}])
    with pytest.raises(ValueError, match=r"data\.parquet row 2: column 'response' is null"):
        load_examples(str(tmp_path / "data.parquet"))
    (tmp_path / "data.json").write_text(json.dumps([qa(0), {"prompt": "a"}]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"data\.json row 2: column 'response' is missing"):
        load_examples(str(tmp_path / "data.json"))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "data.parquet", [qa(number) for number in range(100)])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"data\.parquet is not a readable parquet file"):
        load_examples(str(path))


def test_the_files_of_a_split_are_found_by_their_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-00001.jsonl", [qa(1)])
    write_jsonl(tmp_path / "train-00000.jsonl", [qa(0)])
    write_jsonl(tmp_path / "test.jsonl", [qa(2)])
    assert prompts(load_examples(str(tmp_path))) == ["question 0", "question 1"]
    assert prompts(load_examples(str(tmp_path), split="test")) == ["question 2"]
    with pytest.raises(ValueError, match=r"data.split='validation' is not in .*, which has train, test; use one of these"):
        load_examples(str(tmp_path), split="validation")


def test_a_broken_line_in_a_folder_is_named_by_its_own_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-00000.jsonl", [qa(0)])
    write_jsonl(tmp_path / "train-00001.jsonl", [qa(1), {"prompt": "a"}])
    with pytest.raises(ValueError, match=r"train-00001\.jsonl line 2: column 'response' is missing"):
        load_examples(str(tmp_path))


def test_subsets_follow_the_dataset_card(tmp_path: Path) -> None:
    card = "configs:\n- config_name: small\n  data_files: small.parquet\n- config_name: big\n  data_files: big.parquet\n"
    (tmp_path / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
    write_parquet(tmp_path / "small.parquet", [qa(0)])
    write_parquet(tmp_path / "big.parquet", [qa(0), qa(1)])
    assert len(load_examples(str(tmp_path), subset="small")) == 1
    assert len(load_examples(str(tmp_path), subset="big")) == 2
    with pytest.raises(ValueError, match=r"'huge' not found. Available: \['small', 'big'\]"):
        load_examples(str(tmp_path), subset="huge")


def test_a_folder_of_another_type_is_read_by_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "csv"
    folder.mkdir()
    (folder / "train.csv").write_text("prompt,response\nq,a\nq2,\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"csv split 'train' row 2: column 'response' is null"):
        load_examples(str(folder))
    (folder / "train.csv").write_text("prompt,response\nq,a\n", encoding="utf-8")
    assert prompts(load_examples(str(folder))) == ["q"]


def test_a_folder_of_mixed_types_is_refused_unless_its_card_names_the_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [qa(0)])
    write_jsonl(tmp_path / "b.json", [qa(1)])
    assert prompts(load_examples(str(tmp_path))) == ["question 0", "question 1"]
    write_parquet(tmp_path / "c.parquet", [qa(2)])
    with pytest.raises(ValueError, match=r"mixes file types: .* would be read and .* left out"):
        load_examples(str(tmp_path))
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: c.parquet\n---\n", encoding="utf-8")
    assert prompts(load_examples(str(tmp_path))) == ["question 2"]


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:8]])
def test_a_hub_name_without_a_commit_is_refused_with_the_cure(revision: str | None) -> None:
    with pytest.raises(ValueError, match=r"data.revision=.* does not pin it.*Set data.revision to a commit of 40 hex digits.*dataset_info"):
        load_examples("someone/some-data", revision=revision)


def test_a_hub_name_is_loaded_at_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*arguments: Any, **options: Any) -> datasets.Dataset:
        calls.append((arguments, options))
        return datasets.Dataset.from_list([qa(0), {"prompt": "a", "response": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = load_examples("someone/some-data", split="train_sft", subset="small", revision=COMMIT)
    assert calls == [(("someone/some-data",), {"name": "small", "split": "train_sft", "revision": COMMIT})]
    assert prompts(examples) == ["question 0", "a"]
    assert {example.revision for example in examples} == {COMMIT}


def test_a_commit_that_is_not_there_says_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: Any, **options: Any) -> datasets.Dataset:
        raise datasets.exceptions.DatasetNotFoundError(f"Revision '{COMMIT}' doesn't exist for dataset 'someone/some-data' on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=rf"data.revision={COMMIT} .*Revision '{COMMIT}' doesn't exist.*Check the four"):
        load_examples("someone/some-data", revision=COMMIT)


@pytest.mark.parametrize("source", ["./missing", "/missing/data.jsonl", "data.jsonl", "folder/data.parquet", "~/missing"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_name(source: str) -> None:
    with pytest.raises(ValueError, match="there is no such file or folder"):
        load_examples(source)


def test_a_revision_of_a_local_path_and_an_unknown_file_type_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [qa(0)])
    with pytest.raises(ValueError, match="belongs to datasets of the hub"):
        load_examples(str(path), revision=COMMIT)
    with pytest.raises(ValueError, match=r"notes\.txt: \.txt is no known file type; use one of \.jsonl, \.json, \.parquet"):
        load_examples(str(path.rename(tmp_path / "notes.txt")))


def test_an_empty_source_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no rows"):
        load_examples(str(write_jsonl(tmp_path / "data.jsonl", [])))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="doesn't contain any data files"):
        load_examples(str(tmp_path / "empty"))


def test_a_limit_reads_the_first_rows_only(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [qa(0), qa(1), {"prompt": "broken"}])
    assert prompts(load_examples(str(path), limit=2)) == ["question 0", "question 1"]
    with pytest.raises(ValueError, match="line 3"):
        load_examples(str(path), limit=3)


def test_an_id_column_must_not_name_two_conversations(tmp_path: Path) -> None:
    rows = [{"uid": "x", **qa(0)}, {"uid": "x", **qa(0)}, {"uid": "x", **qa(1)}]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(ValueError, match=r"line 3: id 'x' was given to another conversation before \(.*data\.jsonl line 1\)"):
        load_examples(str(path), columns={"id": "uid"})
    assert [example.example_id for example in load_examples(str(write_jsonl(path, rows[:2])), columns={"id": "uid"})] == ["x", "x"]
