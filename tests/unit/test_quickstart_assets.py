"""The quickstart's data rules on dialogues made by hand, and that half-made assets are never taken for done."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "assets.py"


@pytest.fixture(scope="module")
def assets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_assets", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dialogue(*turns: list[str]) -> dict[str, Any]:
    """A dialogue in the package's form; speakers alternate."""
    return {
        "messages": [
            [{"text": text, "sender": f"sender-{number % 2}", "timestamp": "2018-05-02T19:38:15Z"} for text in turn]
            for number, turn in enumerate(turns)
        ],
        "ratings": {"witty": 1},
    }


LONG_A = "I have been reading about the sea all day."
LONG_B = "That sounds better than my day at the office, where nobody has read a book in the last year."
LONG_C = "Then take tomorrow off and read with me! There is room for two on the bench, and the sun will shine."


def test_the_first_exchange_with_two_long_enough_turns_is_taken_and_only_that_one(assets: ModuleType) -> None:
    rows = list(assets.exchanges({"x": dialogue(["Hello"], ["hi"], [LONG_A], [LONG_B], [LONG_C])}))
    assert rows == [
        {"id": "dialogue-0000-turn-002", "messages": [{"role": "user", "content": LONG_A}, {"role": "assistant", "content": LONG_B}]}
    ]


def test_several_messages_of_one_turn_become_one_line(assets: ModuleType) -> None:
    (row,) = assets.exchanges({"x": dialogue(["I have been\nreading ", " about the sea."], [LONG_B])})
    assert row["messages"][0]["content"] == "I have been reading about the sea."


def test_dialogues_keep_their_number_when_others_have_no_wanted_exchange(assets: ModuleType) -> None:
    rows = list(assets.exchanges({"x": dialogue(["Hello"], ["hi"]), "y": dialogue([LONG_A], [LONG_B])}))
    assert [row["id"] for row in rows] == ["dialogue-0001-turn-000"]


def test_sender_ids_and_times_are_dropped(assets: ModuleType) -> None:
    text = json.dumps(list(assets.exchanges({"x": dialogue([LONG_A], [LONG_B])})))
    assert "sender" not in text and "2018" not in text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("x" * 19, False),
        ("x" * 20, True),
        ("x" * 160, True),
        ("x" * 161, False),
        ("write to me at someone@example.org", False),
        ("look at https://example.org please", False),
        ("my number is 8015551234, call me", False),
        ("there were 1500 people at the concert", True),
        ("It is never too early <em>I</em> think.", False),
    ],
)
def test_length_and_content_decide_what_is_wanted(assets: ModuleType, text: str, wanted: bool) -> None:
    assert assets.is_wanted(text, (20, 160)) is wanted


def test_a_short_turn_may_be_a_prompt_but_no_answer(assets: ModuleType) -> None:
    # LONG_A has 42 characters: enough for a prompt, too few for an answer.
    assert list(assets.exchanges({"x": dialogue([LONG_B], [LONG_A])})) == []
    assert len(list(assets.exchanges({"x": dialogue([LONG_A], [LONG_B])}))) == 1


def test_a_folder_whose_making_failed_does_not_exist(assets: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(RuntimeError), assets.finished_folder(folder) as aside:
        (aside / "half").write_text("half", encoding="utf-8")
        raise RuntimeError("disk full")
    assert not folder.exists()
    with assets.finished_folder(folder) as aside:
        (aside / "whole").write_text("whole", encoding="utf-8")
    assert [path.name for path in folder.iterdir()] == ["whole"], "what the failed try left behind is not in the finished folder"


def test_finished_assets_are_left_alone(assets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (assets.MODEL_NAME, "chitchat"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(assets, "make_model", lambda folder: pytest.fail("the model was made again"))
    monkeypatch.setattr(assets, "make_conversations", lambda folder: pytest.fail("the data was made again"))
    assert assets.main(["--out", str(tmp_path)]) == 0


def test_a_missing_package_is_named_with_its_cure(
    assets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(assets, "find_spec", lambda package: None)
    assert assets.main(["--out", str(tmp_path)]) == 2
    assert "chitchat-dataset is not installed; run `make install`" in capsys.readouterr().err


def test_a_package_is_found_without_importing_it(assets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package_that_must_not_run"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert assets.package_folder(package.name) == package
    assert package.name not in sys.modules
