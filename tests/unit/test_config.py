"""The config refuses what it should, by key, with the cure."""

from argparse import Namespace
from pathlib import Path

import pytest

from spin_megatron.config import RunConfig
from spin_megatron.config_file import load_config
from spin_megatron.launch import started_run
from spin_megatron.launch.started_run import changes, open_as_changed, open_or_start, open_run
from spin_megatron.run.layout import RunLayout
from spin_megatron.stage_table import STAGES, StageRef, settings_of

MINIMAL = '[model]\npath = "org/model"\nrevision = "abc"\n[data]\nsource = "org/data"\nrevision = "def"\n[train]\npack_tokens = 4096\n'


def write(tmp_path: Path, text: str = MINIMAL) -> Path:
    path = tmp_path / "run config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_last_value_of_a_list_repeats(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["objective.beta=[0.1, 0.1, 0.1, 5.0]", "train.schedule_epochs=6", "train.stop_epoch=2"])
    assert [config.at(t).beta for t in range(6)] == [0.1, 0.1, 0.1, 5.0, 5.0, 5.0]
    assert (config.at(3).schedule_epochs, config.at(3).stop_epoch) == (6, 2)


def test_stop_epoch_is_the_whole_schedule_unless_given(tmp_path: Path) -> None:
    assert load_config(write(tmp_path), ["train.schedule_epochs=[3, 2]"]).at(0).stop_epoch == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.betta=0.1", r"objective\.betta: unknown key; did you mean beta\?"),
        ("optimiser.name=adamw", r"optimiser: unknown key; did you mean optimizer\?"),
        ("train.pack_tokens=512", r"train\.pack_tokens=512 cannot hold the longest pair \(3072 tokens"),
        ("lora.dropout=0.1", r"lora\.dropout=0\.1 is refused: .*no margin could be 0; use 0"),
        ('lora.targets=["qkv", "qkv"]', "names a layer twice"),
        ('lora.targets=["q_proj"]', r"lora\.targets\.0: Input should be 'qkv', 'proj', 'fc1' or 'fc2'"),
        ("lora.targets=[]", r"lora\.targets: List should have at least 1 item"),
        ("train.precision=fp16", r"train\.precision: .*'fp32', 'bf16', 'fp8-blockwise', 'fp8-tensorwise' or 'mxfp8'"),
        ("train.precision=fp8-delayed", r'train\.precision="fp8-delayed": .*scales from earlier passes.*margins would not start at 0'),
        ("train.precision=fp8", r'train\.precision="fp8": it names no recipe; use "fp8-blockwise" on Hopper'),
        ("train.recompute_layers=2", r'train\.recompute_layers=2 with train\.recompute="none": only "full" can be limited'),
        ("train.num_bf16_end_layers=1", r'train\.num_bf16_end_layers=1 with train\.precision="bf16": no layer is FP8 there'),
        ("train.global_batch_pairs=0", r"train\.global_batch_pairs: .*greater than 0"),
        ("train.global_batch_pairs=2.5", r"train\.global_batch_pairs"),
        ("objective.beta=[]", r"objective\.beta is an empty list"),
        ("objective.beta=-1.0", r"objective\.beta=-1\.0 must be positive"),
        ("objective.beta=nan", r"objective\.beta\.float: Input should be a finite number"),
        ("optimizer.epsilon=inf", r"optimizer\.epsilon: Input should be a finite number"),
        ("train.stop_epoch=9", r"train\.stop_epoch=9 is beyond train\.schedule_epochs=2 in iteration 0"),
        ("run.seed=18446744073709551616", r"run\.seed: Input should be less than 4294967296"),
        ("run.name=my/run", r"run\.name='my/run' must be 1 to 60 letters.*where the run lives is said by --run-dir"),
        ("run.name=..", r"run\.name='\.\.' must be"),
        ("run.name=a,b", r"run\.name='a,b' must be"),
        ("run.name=a[/b]", r"run\.name='a\[/b\]' must be"),
        ("run.name=", r"run\.name='' must be"),
        ("parallel", r"'parallel' is not of the form section\.key=value"),
        ("model.path.x=1", r"'path' is a value, not a section"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path), [override])


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)run\.seeed.*data\.source: missing") as caught:
        load_config(write(tmp_path, '[run]\nseeed = 1\n[model]\npath = "m"\n[data]\n'))
    assert str(tmp_path / "run config.toml") in str(caught.value)


def test_a_missing_file_and_broken_toml_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.toml cannot be read"):
        load_config(tmp_path / "nothing.toml")
    with pytest.raises(ValueError, match=r"is not TOML"):
        load_config(write(tmp_path, "[run\n"))


def test_a_file_of_another_encoding_is_named_and_a_mark_of_utf_8_is_no_part_of_it(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeff" + MINIMAL)
    assert load_config(path).model.path == "org/model"
    path.write_bytes(MINIMAL.encode() + "# caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"run config\.toml: byte {len(MINIMAL) + 6} is not UTF-8; save the file as UTF-8"):
        load_config(path)


def test_what_toml_takes_for_a_date_or_a_time_is_the_text_it_is_written_as(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "[run]\nname = 2026-05-01\n[slurm.stages.train]\ntime = 04:00:00\n")
    config = load_config(path, ["slurm.stages.generate.time=12:30:00"])
    assert config.run.name == "2026-05-01"
    assert load_config(path, ["run.name=2. Versuch"]).run.name == "2. Versuch"
    assert (config.slurm.of("train").time, config.slurm.of("generate").time) == ("04:00:00", "12:30:00")


def test_sharing_the_prompt_decides_what_a_pack_must_hold(tmp_path: Path) -> None:
    load_config(write(tmp_path), ["train.pack_tokens=3072"])
    with pytest.raises(ValueError, match=r"4096 tokens"):
        load_config(write(tmp_path), ["train.pack_tokens=3072", "train.share_prompt=false"])


def test_paths_are_relative_to_the_config_and_may_hold_spaces_and_quotes(tmp_path: Path) -> None:
    data = tmp_path / 'it\'s "data".jsonl'
    data.write_text("{}\n", encoding="utf-8")
    config = load_config(write(tmp_path, MINIMAL.replace('"org/data"', "'''it's \"data\".jsonl'''")))
    assert config.data.source == str(data)
    assert config.model.path == "org/model"


def test_the_frozen_form_gives_the_same_config(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["objective.beta=[0.1, 5.0]", "data.columns.id='row id'"])
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_a_damaged_run_json_and_one_of_another_version_are_named(tmp_path: Path) -> None:
    config, layout = load_config(write(tmp_path)), RunLayout(tmp_path)
    layout.run_json.write_text(config.model_dump_json()[:50])
    with pytest.raises(ValueError, match=r"run\.json is damaged \(Unterminated string"):
        open_run(tmp_path)
    layout.run_json.write_text(config.model_dump_json().replace('"seed"', '"sead"'))
    with pytest.raises(ValueError, match=r"run\.json is not a valid config:\n  run\.sead: unknown key; did you mean seed\?"):
        open_run(tmp_path)
    layout.run_json.write_text(config.model_dump_json())
    layout.changes_json.write_text("{")
    with pytest.raises(ValueError, match=r"changes\.json is damaged"):
        open_as_changed(tmp_path)


def test_where_an_engine_is_started_and_how_much_at_a_time_may_change_in_a_started_run_and_its_engine_may_not(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["generate.engine=vllm"])
    layout = RunLayout(tmp_path)
    layout.run_json.write_text(config.model_dump_json())
    moved, _ = open_run(tmp_path, ['generate.environment.prefix=["apptainer", "exec", "it\'s.sif"]'])
    assert moved.generate.environment.prefix == ["apptainer", "exec", "it's.sif"]
    moved, _ = open_run(tmp_path, ["generate.batch_size=3", *changes(moved, layout)])
    # A stage's process is told by options, and no finished stage becomes stale.
    assert open_run(tmp_path, changes(moved, layout))[0] == moved
    for ref in (StageRef("build-engine", 0), StageRef("generate", 0, 0)):
        assert settings_of(moved, ref) == settings_of(config, ref)
    with pytest.raises(ValueError, match="a started run keeps its settings"):
        open_run(tmp_path, ["generate.engine=builtin"])


def test_what_training_takes_of_memory_and_time_may_change_in_a_started_run_and_makes_nothing_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(started_run, "check_started", lambda config, layout: None)  # there is no model, and no GPU to offload from
    path = write(tmp_path)
    config, layout = load_config(path), RunLayout(tmp_path)
    layout.run_json.write_text(config.model_dump_json())
    asked = ["train.recompute=full", "train.kept_logit_bytes=0", "train.save_every_steps=7", "train.keep_checkpoints=1"]
    asked += ["optimizer.offload_fraction=0.5"]
    changed, _ = open_run(tmp_path, asked)
    assert changed.optimizer.offload_fraction == 0.5
    assert (changed.train.recompute, changed.train.kept_logit_bytes, changed.train.save_every_steps) == ("full", 0, 7)
    # The same in the config file of a run that was started before.
    assert open_or_start(Namespace(target=path, run_dir=tmp_path, overrides=asked))[0] == changed
    assert open_run(tmp_path, changes(changed, layout))[0] == changed, "what a stage's process is told"
    for stage in STAGES.keys() - {"benchmark"}:  # of which this run has none
        assert settings_of(changed, StageRef(stage, 0, 0)) == settings_of(config, StageRef(stage, 0, 0))
    with pytest.raises(ValueError, match="a started run keeps its settings"):
        open_run(tmp_path, ["train.pack_tokens=8192"])
    with pytest.raises(ValueError, match="a started run keeps its settings"):
        open_run(tmp_path, ["optimizer.epsilon=1e-6"])


def test_a_stage_s_process_is_told_of_tables_of_nothing_and_of_any_character(tmp_path: Path) -> None:
    path, layout = write(tmp_path), RunLayout(tmp_path)
    started = load_config(path, ["train.recompute=full", "train.recompute_layers=2"])
    layout.run_json.write_text(started.model_dump_json(), encoding="utf-8")
    asked = ["train.recompute_layers=null", "guard.max_margin=null", 'generate.environment.prefix=["run", "it\'s \\"\U0001f680\\".sif"]']
    changed, _ = open_run(tmp_path, asked)
    assert (changed.train.recompute_layers, changed.guard.max_margin) == (None, None)
    assert changed.generate.environment.prefix == ["run", 'it\'s "\U0001f680".sif']
    assert open_run(tmp_path, changes(changed, layout))[0] == changed


def test_a_variable_of_the_environment_is_name_and_value(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'NCCL DEBUG' is not of the form NAME=VALUE"):
        load_config(write(tmp_path), ['generate.environment.variables=["NCCL DEBUG"]'])


def test_adapters_are_off_unless_they_have_a_rank(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert load_config(path).lora.shape() is None
    shape = load_config(path, ["lora.rank=8", 'lora.targets=["qkv", "fc2"]']).lora.shape()
    assert shape is not None
    assert (shape.rank, shape.targets) == (8, ("qkv", "fc2"))
