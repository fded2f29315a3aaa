"""The stage line: order, keys, and the skip / stale / run decision."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spin_megatron import pipeline
from spin_megatron.config import RunConfig
from spin_megatron.config_file import load_config
from spin_megatron.launch import loop
from spin_megatron.launch.local import Launcher
from spin_megatron.pipeline import early_stop, execute, missing_stages, newest_theta, redo, require_current, stale_because, state_of
from spin_megatron.run import manifest as manifests
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.lock import Owner, held
from spin_megatron.run.manifest import Manifest, StageIncomplete, StaleStage, read_manifest, write_manifest, write_text
from spin_megatron.stage_table import STAGES, StageRef, folder_of, line, made_in, settings_of
from spin_megatron.stages.context import StageContext, StageOutput

CONFIG = '[run]\niterations = 2\n[model]\npath = "org/m"\nrevision = "a"\n[data]\nsource = "org/d"\nrevision = "b"\n'


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return load_config(path, ["generate.num_shards=2", "objective.beta=[0.1, 5.0]"])


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    return RunLayout(tmp_path / "run with 'quotes'")


@pytest.fixture
def stage_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace every stage by one that writes a file; returns the log of what ran."""
    runs: list[str] = []

    def run(context: StageContext) -> StageOutput:
        ref = current["ref"]
        runs.append(str(ref))
        folder = folder_of(context.layout, ref)
        write_text(folder / "made.txt", f"{ref} {content['text']}")
        return StageOutput({folder / "made.txt": 1}, {"number": len(runs)}, stopped=str(ref) in content["stop"])

    current: dict[str, StageRef] = {}
    content: dict = {"text": "", "stop": set()}
    for stage in STAGES.values():
        module = types.ModuleType(stage.module)
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    runs_current.update(current=current, content=content)
    return runs


runs_current: dict = {}


def do(config: RunConfig, layout: RunLayout, ref: StageRef, rank: int = 0) -> bool:
    runs_current["current"]["ref"] = ref
    return execute(config, layout, ref, rank=rank, stop_requested=lambda: False)


def do_all(config: RunConfig, layout: RunLayout) -> None:
    for ref in line(config):
        assert do(config, layout, ref)


def test_the_line_of_two_iterations_is_the_design(config: RunConfig) -> None:
    first = "build-engine 0,generate 0 shard 0,generate 0 shard 1,merge 0,train 0,export 1,evaluate 0"
    second = "build-engine 1,generate 1 shard 0,generate 1 shard 1,merge 1,train 1,export 2,evaluate 1"
    assert ",".join(map(str, line(config))) == f"export 0,prepare 0,{first},{second}"


def test_every_stage_comes_after_what_it_needs(config: RunConfig) -> None:
    seen: list[StageRef] = []
    for ref in line(config):
        assert set(STAGES[ref.name].needs(config, ref.iteration)) <= set(seen), ref
        seen.append(ref)


def test_a_window_of_two_reads_the_pairs_of_the_iteration_before(config: RunConfig) -> None:
    assert StageRef("merge", 0) in STAGES["merge"].needs(config, 1)
    assert not any(need.name == "merge" for need in STAGES["merge"].needs(config, 0))


def test_settings_are_those_of_the_iteration(config: RunConfig) -> None:
    assert settings_of(config, StageRef("train", 0))["objective.beta"] == 0.1
    assert settings_of(config, StageRef("train", 1))["objective.beta"] == 5.0
    assert "train.save_every_steps" not in settings_of(config, StageRef("train", 0))
    assert "model.path" in settings_of(config, StageRef("export", 0))
    assert "model.path" not in settings_of(config, StageRef("export", 1))


NUMBERS = {"ln2_minus_loss": 0.3, "nll_real": 2.0, "nll_real_reference": 1.9, "logp_real_drift": -3.0}


@pytest.mark.parametrize(
    ("rule", "second", "reason"),
    [
        ("stop.min_ln2_minus_loss=0.01", {"ln2_minus_loss": 0.004}, r"ln 2 - held-out loss = 0\.004 is below stop\.min_ln2"),
        ("stop.max_nll_increase=0.15", {"nll_real": 2.1}, r"rose by 0\.2 nats a token, beyond stop\.max_nll_increase=0\.15"),
        ("stop.max_logp_drop=5.0", {"logp_real_drift": -7.5}, r"fell by 7\.5 nats an answer, beyond stop\.max_logp_drop=5\.0"),
        ("stop.max_nll_increase=0.15", {"nll_real": float("nan")}, "nan"),
    ],
)
def test_a_rule_of_stop_ends_the_run_after_the_iteration_that_fires_it(
    rule: str, second: dict, reason: str, tmp_path: Path, layout: RunLayout
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG, encoding="utf-8")
    free, config = (load_config(path, ["run.iterations=3", *rules]) for rules in ([], [rule]))
    for t, numbers in enumerate((NUMBERS, NUMBERS | second)):
        assert early_stop(config, layout) is None
        manifest = Manifest("evaluate", t, None, key="", settings={}, inputs={}, outputs=(), summary=numbers)
        write_manifest(layout.evaluate(t), manifest)
    stop = early_stop(config, layout)
    assert stop is not None
    assert stop.iteration == 1
    assert re.search(rf"^after iteration 1: .*{reason}", stop.reason)
    assert newest_theta(config, layout) == 2
    assert not [ref for ref in missing_stages(config, layout) if made_in(ref) > 1]
    assert StageRef("merge", 1) in missing_stages(config, layout), "what the iteration lacks is still made"
    assert early_stop(free, layout) is None
    assert newest_theta(free, layout) == 3


def test_a_rerun_runs_nothing(config: RunConfig, layout: RunLayout, stage_runs: list[str]) -> None:
    do_all(config, layout)
    assert stage_runs == [str(ref) for ref in line(config)]
    assert {state_of(config, layout, ref) for ref in line(config)} == {"done"}
    do_all(config, layout)
    assert len(stage_runs) == len(line(config))


def test_a_finished_stage_that_is_asked_for_by_hand_says_so_and_starts_no_process(
    config: RunConfig, layout: RunLayout, stage_runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    do_all(config, layout)
    told: list[str] = []
    monkeypatch.setattr(loop.logger, "info", lambda text, *values: told.append(text % values))
    assert loop.run_alone(config, layout, StageRef("generate", 0, 1)) == 0
    assert told == [f"generate 0 shard 1 is done; to make it anew: spin-megatron run {layout.quoted} --redo generate:0:1"]
    assert not layout.logs("generate", 0, 1).exists()


def test_a_stage_without_its_inputs_names_the_command_that_completes_them(
    config: RunConfig, layout: RunLayout, stage_runs: list[str]
) -> None:
    with pytest.raises(StageIncomplete, match=r"train 0 needs merge 0, .* run: spin-megatron merge --run-dir .* --iteration 0"):
        do(config, layout, StageRef("train", 0))
    assert stage_runs == []


def test_changed_settings_are_refused_field_by_field(config: RunConfig, layout: RunLayout, stage_runs: list[str]) -> None:
    do_all(config, layout)
    changed = config.model_copy(update={"run": config.run.model_copy(update={"seed": 7})})
    with pytest.raises(StaleStage, match=r"run\.seed: 42 -> 7[\s\S]*--redo prepare:0"):
        do(changed, layout, StageRef("prepare"))


def test_redo_moves_a_stage_and_what_was_made_from_it_aside(config: RunConfig, layout: RunLayout, stage_runs: list[str]) -> None:
    do_all(config, layout)
    moved = redo(config, layout, StageRef("merge", 1))
    assert [str(ref) for ref in moved] == ["merge 1", "train 1", "export 2", "evaluate 1"]
    assert len(list((layout.root / "redone").rglob("made.txt"))) == 4
    assert state_of(config, layout, StageRef("merge", 1)) == "ready"
    assert state_of(config, layout, StageRef("train", 1)) == "waiting"
    do_all(config, layout)
    assert stage_runs[16:] == ["merge 1", "train 1", "export 2", "evaluate 1"]


def test_redo_tells_of_what_it_moved_and_of_nothing_that_was_not_there(config: RunConfig, layout: RunLayout, stage_runs: list[str]) -> None:
    for ref in line(config)[:-2]:
        assert do(config, layout, ref)
    moved = redo(config, layout, StageRef("merge", 1))
    assert [str(ref) for ref in moved] == ["merge 1", "train 1"]
    assert [(folder / "made.txt").read_text(encoding="utf-8") for folder in moved.values()] == ["merge 1 ", "train 1 "]


def test_a_finished_stage_outlives_an_upgrade_that_changed_which_settings_decide_it(
    config: RunConfig, layout: RunLayout, stage_runs: list[str]
) -> None:
    do_all(config, layout)
    ref, folder = StageRef("train", 0), layout.train(0)
    manifest = read_manifest(folder)
    assert manifest is not None
    earlier = {name: value for name, value in manifest.settings.items() if not name.startswith("lora.")} | {"train.forgotten": 7}
    write_manifest(folder, replace(manifest, settings=earlier, key="of other settings"))
    assert state_of(config, layout, ref) == "done"
    assert do(config, layout, ref)
    adapted = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": 8})})
    found = read_manifest(folder)
    assert found is not None
    assert stale_because(adapted, layout, ref, found) == ["lora.rank: absent -> 8"]


def test_other_contents_of_an_input_make_what_follows_stale(config: RunConfig, layout: RunLayout, stage_runs: list[str]) -> None:
    do_all(config, layout)
    shard = folder_of(layout, StageRef("generate", 0, 1))
    (shard / "MANIFEST.json").unlink()
    runs_current["content"]["text"] = "other answers"
    do(config, layout, StageRef("generate", 0, 1))
    assert state_of(config, layout, StageRef("merge", 0)) == "stale"
    with pytest.raises(StaleStage, match=r"input generate 0 shard 1: [0-9a-f]{12} -> [0-9a-f]{12}, made at 20\d\d-"):
        do(config, layout, StageRef("merge", 0))


@pytest.fixture
def with_local_data(config: RunConfig, tmp_path: Path) -> tuple[RunConfig, Path]:
    """A config whose data.source is a local folder, and the file in it."""
    source = tmp_path / "data set" / "train.jsonl"
    write_text(source, "a row")
    return config.model_copy(update={"data": config.data.model_copy(update={"source": str(source.parent), "revision": None})}), source


def test_an_edited_data_file_makes_prepare_stale(
    with_local_data: tuple[RunConfig, Path], layout: RunLayout, stage_runs: list[str]
) -> None:
    config, source = with_local_data
    do_all(config, layout)
    write_text(source, "a row")  # written anew with the same content
    do_all(config, layout)
    write_text(source, "a ROW")
    with pytest.raises(StaleStage, match=r"prepare 0 was finished with other .*\n  input data\.source \(content\): \w{12} -> \w{12}, "):
        do(config, layout, StageRef("prepare"))
    assert state_of(config, layout, StageRef("prepare")) == "stale"


def test_which_files_of_a_data_set_were_changed_is_said(
    with_local_data: tuple[RunConfig, Path], layout: RunLayout, stage_runs: list[str]
) -> None:
    config, source = with_local_data
    others = [source.with_name(f"{name}.jsonl") for name in ("a", "b", "c", "z")]
    for path in (source, *others):
        write_text(path, "a row")
        os.utime(path, (0, 0))
    do_all(config, layout)
    manifest = read_manifest(layout.data)
    assert manifest is not None

    def changed() -> str:
        (line,) = stale_because(config, layout, StageRef("prepare"), manifest)
        return line.partition(", ")[2]

    write_text(others[1], "a ROW")
    assert changed() == f"changed since: {others[1]}"
    for path in others:
        write_text(path, "a ROW")
    assert changed() == f"changed since: {others[0]}, {others[1]}, {others[2]} and 1 more"
    for path in others:
        write_text(path, "a row")
        os.utime(path, (0, 0))
    source.unlink()
    assert changed() == f"files of {source.parent} were removed or replaced"


def test_the_commands_that_are_advised_are_what_a_shell_takes(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path / "it's \"my\" $RUN" / "50% run")
    ref = StageRef("generate", 1, 2)
    words = ["spin-megatron", "generate", "--run-dir", str(layout.root), "--iteration", "1", "--shard", "2"]
    assert shlex.split(ref.command(layout)) == words
    assert shlex.split(ref.redo_command(layout)) == ["spin-megatron", "run", str(layout.root), "--redo", "generate:1:2"]
    for command in (ref.command(layout), ref.redo_command(layout)):
        spoken = subprocess.run(["sh", "-c", f"printf '%s|' {command}"], capture_output=True, text=True, timeout=10, check=True).stdout
        assert spoken.split("|")[:-1] == shlex.split(command)


def test_a_finished_stage_says_what_it_lacks_now(config: RunConfig, layout: RunLayout, stage_runs: list[str]) -> None:
    do_all(config, layout)
    shutil.rmtree(layout.engine(0))
    manifest = read_manifest(layout.shard(0, 1))
    assert manifest is not None
    (line,) = stale_because(config, layout, StageRef("generate", 0, 1), manifest)
    assert line.startswith("generate 0 shard 1 needs build-engine 0, which is not complete; run: spin-megatron build-engine")


def test_a_data_set_that_was_not_touched_is_not_read_again(
    with_local_data: tuple[RunConfig, Path], layout: RunLayout, stage_runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, source = with_local_data
    do_all(config, layout)
    read: list[Path] = []
    monkeypatch.setattr(manifests, "digest_tree", lambda path: read.append(path) or "read again")
    assert {state_of(config, layout, ref) for ref in line(config)} == {"done"}
    assert read == []
    os.utime(source)
    assert state_of(config, layout, StageRef("prepare")) == "stale"
    assert read == [source.parent]


def test_a_large_model_s_digests_are_counted_on_a_bar(
    config: RunConfig, layout: RunLayout, stage_runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[list[Any]] = []

    @contextmanager
    def bar(description: str, total: int, *, show: bool) -> Iterator[Callable[[], None]]:
        bars.append([description, total, show, 0])

        def advance() -> None:
            bars[-1][3] += 1

        yield advance

    monkeypatch.setattr(pipeline, "progress_bar", bar)
    monkeypatch.setattr(manifests, "MEBIBYTE", 4)
    monkeypatch.setattr(pipeline, "DIGEST_BAR_MEBIBYTES", 4)
    for text in ("", "a model of many bytes"):  # "export 0 " is 9 bytes, pieces of 4, 4 and 1; with the text 30, 8 of them
        runs_current["content"]["text"] = text
        do(config, layout, StageRef("export", 0))
        shutil.rmtree(layout.theta(0))
    assert bars == [["export 0: digests (MiB)", 3, False, 3], ["export 0: digests (MiB)", 8, True, 8]]


def test_a_data_source_that_is_gone_after_prepare_is_missed_by_nobody(
    with_local_data: tuple[RunConfig, Path], layout: RunLayout, stage_runs: list[str]
) -> None:
    config, source = with_local_data
    do_all(config, layout)
    source.rename(layout.root / "elsewhere.jsonl")
    source.parent.rmdir()
    do_all(config, layout)
    assert len(stage_runs) == len(line(config))


def test_a_stopped_stage_has_no_manifest_and_runs_again(config: RunConfig, layout: RunLayout, stage_runs: list[str]) -> None:
    runs_current["content"]["stop"] = {"export 0"}
    assert not do(config, layout, StageRef("export", 0))
    assert read_manifest(layout.theta(0)) is None
    runs_current["content"]["stop"] = set()
    assert do(config, layout, StageRef("export", 0))


def test_garbage_is_removed_where_a_stage_starts_over_and_kept_where_it_resumes(
    config: RunConfig, layout: RunLayout, stage_runs: list[str]
) -> None:
    garbage = {ref: folder_of(layout, ref) / "half" for ref in (StageRef("prepare"), StageRef("generate", 0, 0))}
    for path in garbage.values():
        write_text(path, "half")
    do_all(config, layout)
    assert not garbage[StageRef("prepare")].exists()
    assert garbage[StageRef("generate", 0, 0)].exists()


def test_other_ranks_write_no_manifest_and_wait_for_rank_0_to_write_it(config: RunConfig, layout: RunLayout, stage_runs: list[str]) -> None:
    with ThreadPoolExecutor() as pool:
        other = pool.submit(do, config, layout, StageRef("export", 0), 1)
        while not stage_runs:
            time.sleep(0.01)
        time.sleep(0.3)
        assert not (layout.theta(0) / "MANIFEST.json").exists()
        assert not other.done()
        assert do(config, layout, StageRef("export", 0))
        assert other.result(timeout=60)


def test_redo_refuses_a_stage_the_run_has_not_and_one_that_runs(config: RunConfig, layout: RunLayout, stage_runs: list[str]) -> None:
    do_all(config, layout)
    with pytest.raises(ValueError, match=r"this run has no stage train 9; its stages are export 0, prepare 0"):
        redo(config, layout, StageRef("train", 9))
    owner = Owner.this_process()
    with (
        held(layout.stage_lock("train", 1, None), owner, what="train 1", stale_seconds=60),
        pytest.raises(StageIncomplete, match=r"would move train 1 aside while it runs"),
    ):
        redo(config, layout, StageRef("merge", 1))
    assert read_manifest(layout.pairs(1)) is not None


def test_a_missing_file_of_a_finished_stage_is_named(config: RunConfig, layout: RunLayout, stage_runs: list[str]) -> None:
    do_all(config, layout)
    (layout.data / "made.txt").unlink()
    manifest = read_manifest(layout.data)
    assert manifest is not None
    with pytest.raises(ValueError, match=r"prepare 0 is finished, but .*made\.txt is missing"):
        require_current(config, layout, StageRef("prepare"), manifest)


def test_files_that_nothing_has_to_read_any_more_may_be_deleted(config: RunConfig, layout: RunLayout, stage_runs: list[str]) -> None:
    def go_on() -> None:
        for ref in line(config):
            if read_manifest(folder_of(layout, ref)) is not None:
                assert loop._run_group(Launcher(), config, layout, [ref], "") == 0

    do_all(config, layout)
    newest = StageRef("export", 2)
    for ref in line(config):
        if ref != newest:
            (folder_of(layout, ref) / "made.txt").unlink()
    go_on()
    assert loop.run_alone(config, layout, StageRef("merge", 0)) == 0
    (folder_of(layout, StageRef("evaluate", 1)) / "MANIFEST.json").unlink()  # which reads what train left
    with pytest.raises(ValueError, match=r"merge 1 is finished, but .*made\.txt is missing.*--redo merge:1"):
        go_on()
    do(config, layout, StageRef("evaluate", 1))
    (folder_of(layout, newest) / "made.txt").unlink()
    with pytest.raises(ValueError, match=r"export 2 is finished, but .*made\.txt is missing"):
        go_on()


def test_the_manifest_records_versions_and_times(config: RunConfig, layout: RunLayout, stage_runs: list[str]) -> None:
    do(config, layout, StageRef("export", 0))
    values = json.loads((layout.theta(0) / "MANIFEST.json").read_text(encoding="utf-8"))
    assert values["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert values["finished_at"] >= values["started_at"]
    assert values["outputs"][0]["num_rows"] == 1
