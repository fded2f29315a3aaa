"""The sbatch lines of `submit --dry-run`, word for word; no Slurm is needed."""

import shlex
from argparse import Namespace
from pathlib import Path

import pytest

from spin_megatron.config import RunConfig
from spin_megatron.launch.resources import check_resources
from spin_megatron.launch.slurm import chain, command, dry_run
from spin_megatron.launch.started_run import open_run
from spin_megatron.launch.supervise import engine_changes, srun_command, step_command
from spin_megatron.pipeline import inputs_of
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import Manifest, stage_key, write_manifest
from spin_megatron.stage_table import StageRef, folder_of, line, made_in, settings_of

NUMBERS = {"ln2_minus_loss": 0.5, "nll_real": 2.0, "nll_real_reference": 2.0, "logp_real_drift": 0.0}
MODEL = {"model": {"path": "model"}, "data": {"source": "data", "max_prompt_tokens": 8, "max_response_tokens": 8}}


def make_config(**sections: dict) -> RunConfig:
    """A run named r of 2 iterations and 3 shards; `sections` are merged over it."""
    values = {**MODEL, "run": {"name": "r", "iterations": 2}, "generate": {"num_shards": 3}, **sections}
    return RunConfig.model_validate(values)


def finish(layout: RunLayout, *refs: StageRef, config: RunConfig, is_current: bool = False, summary: dict | None = None) -> None:
    """Write a manifest for each stage, which is all that the chain looks at; `status` also asks whether its key is current."""
    for ref in refs:
        folder = folder_of(layout, ref)
        folder.mkdir(parents=True, exist_ok=True)
        settings, inputs = (settings_of(config, ref), inputs_of(config, layout, ref)) if is_current else ({}, {})
        manifest = Manifest(
            stage=ref.name,
            iteration=ref.iteration,
            shard=ref.shard,
            key=stage_key(ref.name, settings, inputs) if is_current else "key",
            settings=settings,
            inputs=inputs,
            outputs=(),
            summary=summary or {},
            versions={},
            git=None,
            host="host",
            started_at="2026-01-01T00:00:00+00:00",
            finished_at="2026-01-01T00:00:01+00:00",
        )
        assert ref in line(config)
        write_manifest(folder, manifest)


def golden(link: str, iteration: int, *, array: str, after: str, logs: str, minutes: str = "01:00:00", more: str = "") -> str:
    """The line of a link in the run directory /r with default resources, as the cluster's owner would read it."""
    dependency = f"--dependency={after} " if after else ""
    return (
        f"sbatch --parsable --job-name=spin-r-{link}-{iteration} --array={array} {dependency}"
        "--kill-on-invalid-dep=yes --requeue --open-mode=append --signal=B:USR1@300 "
        f"'--output=/r/{logs}/slurm_%A_%a.log' --chdir=/r --nodes=1 --ntasks-per-node=1 --cpus-per-task=1 --time={minutes}{more} "
        f"/r/slurm/stage.sh /r/slurm /r {link} {iteration}"
    )


def test_a_fresh_run_is_one_chain_in_which_every_link_waits_for_the_one_before() -> None:
    lines = [shlex.join(words) for words in dry_run(make_config(), RunLayout(Path("/r")))]
    expected = [
        golden("export", 0, array="0-0", after="", logs="iter_0/logs/export_base"),
        golden("prepare", 0, array="0-0", after="afterok:<job of export 0>", logs="iter_0/logs/prepare"),
        golden("build-engine", 0, array="0-0", after="afterok:<job of prepare 0>", logs="iter_0/logs/build-engine"),
        golden("generate", 0, array="0-2%8", after="afterok:<job of build-engine 0>", logs="iter_0/logs/generate"),
        golden("merge", 0, array="0-0", after="afterany:<job of generate 0>", logs="iter_0/logs/merge"),
        golden("train", 0, array="0-3%1", after="afterok:<job of merge 0>", logs="iter_0/logs/train"),
        golden("export", 1, array="0-0", after="afterany:<job of train 0>", logs="iter_0/logs/export"),
        golden("evaluate", 0, array="0-0", after="afterok:<job of export 1>", logs="iter_0/logs/evaluate"),
        golden("advance", 0, array="0-1%1", after="afterany:<job of evaluate 0>", logs="iter_0/logs/advance", minutes="00:30:00"),
    ]
    # shlex quotes a word only where a shell would change it: a dependency on a named job holds < and >.
    assert [shlex.split(line) for line in lines] == [shlex.split(line.replace("<", "'<").replace(">", ">'")) for line in expected]


def test_a_trial_that_would_have_to_move_a_stage_is_refused(tmp_path: Path) -> None:
    asked = Namespace(target=tmp_path, run_dir=None, overrides=[], dry_run=True, scripts=None, redo="train:0")
    with pytest.raises(ValueError, match=r"--dry-run moves nothing, .* --redo train:0; leave one of them out"):
        command(asked)
    with pytest.raises(ValueError, match=r"--redo 'train' is not STAGE:ITERATION\[:SHARD\] .*; for example train:1"):
        command(Namespace(**{**vars(asked), "redo": "train"}))


def test_only_the_missing_shards_stand_in_the_array(tmp_path: Path) -> None:
    config, layout = make_config(), RunLayout(tmp_path)
    done = [StageRef("export", 0), StageRef("prepare"), StageRef("build-engine", 0), StageRef("generate", 0, 1)]
    finish(layout, *done, config=config)
    words = dry_run(config, layout)[0]
    assert "--array=0,2%8" in words
    assert words[-2:] == ["generate", "0"]
    assert not [word for word in words if word.startswith("--dependency")]


def test_runs_of_missing_shards_are_written_as_ranges(tmp_path: Path) -> None:
    config, layout = make_config(generate={"num_shards": 12}), RunLayout(tmp_path)
    done = [StageRef("export", 0), StageRef("prepare"), StageRef("build-engine", 0)]
    finish(layout, *done, *(StageRef("generate", 0, shard) for shard in (2, 5, 6)), config=config)
    assert "--array=0-1,3-4,7-11%8" in dry_run(config, layout)[0]


def test_benchmarks_are_an_array_over_the_tasks_that_are_missing(tmp_path: Path) -> None:
    stages = {"benchmark": {"gpus_per_node": 1, "max_parallel": 2}, "train": {"ranks_per_node": 2}}
    tasks = {"lm_eval_tasks": ["arc", "gsm8k", "mmlu"]}
    config = make_config(parallel={"tensor": 2}, evaluate=tasks, slurm={"stages": stages})
    layout = RunLayout(tmp_path)
    words = {words[-2]: words for words in dry_run(config, layout)}
    assert "--array=0-2%2" in words["benchmark"]
    assert {"--ntasks-per-node=1", "--gpus-per-node=1"} <= set(words["benchmark"]), "one process, not the ranks of train"
    # A benchmark needs theta alone: it runs though the evaluation failed. What goes on waits for all of them.
    assert "--dependency=afterany:<job of evaluate 0>" in words["benchmark"]
    assert "--dependency=afterany:<job of benchmark 0>" in words["advance"]
    first = [ref for ref in line(config) if made_in(ref) == 0 and ref != StageRef("benchmark", 0, 1)]
    finish(layout, *first, config=config)
    assert [(words[-2], words[3]) for words in dry_run(config, layout)] == [("benchmark", "--array=1%2"), ("advance", "--array=0-1%1")]


def test_a_rule_of_stop_ends_the_chain_where_it_fired(tmp_path: Path) -> None:
    config, layout = make_config(stop={"min_ln2_minus_loss": 0.01}), RunLayout(tmp_path)
    first = [ref for ref in line(config) if made_in(ref) == 0]
    finish(layout, *first, config=config, summary=NUMBERS | {"ln2_minus_loss": 0.02})
    assert [link.name for link in chain(config, layout)][:2] == ["build-engine", "generate"]
    finish(layout, StageRef("evaluate", 0), config=config, summary=NUMBERS | {"ln2_minus_loss": 0.005})
    assert chain(config, layout) == []


def test_a_chain_holds_one_iteration_and_ends_with_the_link_that_goes_on(tmp_path: Path) -> None:
    config, layout = make_config(), RunLayout(tmp_path)
    first = [ref for ref in line(config) if ref.iteration == 0 or ref == StageRef("export", 1)]
    finish(layout, *first, config=config)
    links = [(link.name, link.iteration) for link in chain(config, layout)]
    assert links == [("build-engine", 1), ("generate", 1), ("merge", 1), ("train", 1), ("export", 2), ("evaluate", 1), ("advance", 1)]


def test_a_finished_run_submits_nothing(tmp_path: Path) -> None:
    config, layout = make_config(), RunLayout(tmp_path)
    finish(layout, *line(config), config=config)
    assert dry_run(config, layout) == []


def test_resources_of_a_stage_reach_its_line_and_no_other() -> None:
    train = {
        "nodes": 2,
        "ranks_per_node": 4,
        "gpus_per_node": 4,
        "cpus_per_rank": 12,
        "memory": "0",
        "time": "08:00:00",
        "partition": "gpu",
        "slots": 12,
        "options": ["--constraint=h100"],
    }
    slurm = {"partition": "main", "account": "lab", "options": ["--exclusive"], "signal_seconds": 600}
    config = make_config(parallel={"tensor": 4, "data": 2}, slurm={**slurm, "stages": {"train": train}})
    lines = {words[-2]: words for words in dry_run(config, RunLayout(Path("/r")))}
    asked = lines["train"][lines["train"].index("--chdir=/r") + 1 : -5]
    expected = "--nodes=2 --ntasks-per-node=4 --cpus-per-task=12 --time=08:00:00 --gpus-per-node=4 --mem=0 --partition=gpu --account=lab"
    assert asked == [*expected.split(), "--exclusive", "--constraint=h100"]
    assert "--array=0-11%1" in lines["train"]
    assert "--signal=B:USR1@600" in lines["train"]
    evaluate = lines["evaluate"][lines["evaluate"].index("--chdir=/r") + 1 : -5]
    assert evaluate == asked, "evaluate runs on the ranks of train unless it has settings of its own"
    merge = lines["merge"][lines["merge"].index("--chdir=/r") + 1 : -5]
    expected = "--nodes=1 --ntasks-per-node=1 --cpus-per-task=1 --time=01:00:00 --partition=main --account=lab --exclusive"
    assert merge == expected.split()


def test_every_link_is_cancelled_when_what_it_waits_for_can_never_end_well(tmp_path: Path) -> None:
    for words in dry_run(make_config(), RunLayout(tmp_path)):
        assert "--kill-on-invalid-dep=yes" in words
        assert "--requeue" in words
        assert "--open-mode=append" in words


def test_paths_with_spaces_and_quotes_stay_one_word(tmp_path: Path) -> None:
    root = tmp_path / 'it\'s a "tiny" run'
    for words in dry_run(make_config(run={"name": "a b", "iterations": 1}), RunLayout(root)):
        assert words[-5:-2] == [str(root / "slurm" / "stage.sh"), str(root / "slurm"), str(root)]
        assert f"--chdir={root}" in words
        assert sum(str(root) in word for word in words) == 5
        assert any(word.startswith("--job-name=spin-a b-") for word in words)


def test_a_percent_sign_in_a_path_is_not_a_pattern_of_slurm(tmp_path: Path) -> None:
    root = tmp_path / "100%a"
    for words in dry_run(make_config(), RunLayout(root)):
        (output,) = (word for word in words if word.startswith("--output="))
        assert output.startswith(f"--output={tmp_path}/100%%a/")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"train": {"nodes": 2, "ranks_per_node": 1}}, r"slurm\.stages\.train: nodes=2 x ranks_per_node=1 must be 4"),
        ({"train": {"ranks_per_node": 4}, "evaluate": {}}, r"slurm\.stages\.evaluate: nodes=1 x ranks_per_node=1 must be 4"),
        ({"merge": {"nodes": 2}}, r"slurm\.stages\.merge: nodes=2 x ranks_per_node=1 must be 1 \(this stage is one process\)"),
        ({"generate": {"time": "soon"}}, r"slurm\.stages\.generate: time='soon' is no time limit of sbatch; write minutes,"),
    ],
)
def test_resources_that_do_not_fit_are_refused(stages: dict, message: str, tmp_path: Path) -> None:
    config = make_config(parallel={"tensor": 2, "data": 2}, slurm={"stages": stages})
    with pytest.raises(ValueError, match=message):
        check_resources(config)
    with pytest.raises(ValueError, match=message):
        dry_run(config, RunLayout(tmp_path))


@pytest.mark.parametrize("time", ["5", "5:30", "00:05:30", "0-00:05", "0-0:5:30"])
def test_a_time_limit_that_is_over_with_the_first_notice_is_refused(time: str) -> None:
    message = (
        r"slurm\.stages\.generate: time=.* leaves no time to work: .* slurm\.signal_seconds=300 before its end, and up to 30 s earlier"
    )
    with pytest.raises(ValueError, match=message):
        check_resources(make_config(slurm={"stages": {"generate": {"time": time}}}))


@pytest.mark.parametrize("time", ["6", "5:31", "00:05:31", "0-1", "1-0", "0-0:6", "0", "UNLIMITED"])
def test_a_longer_time_limit_in_any_form_of_sbatch_is_taken(time: str) -> None:
    check_resources(make_config(slurm={"stages": {"generate": {"time": time}, "merge": {"time": "1"}}}))


def engine_config(**options: object) -> RunConfig:
    stages = {name: {"gpus_per_node": 4} for name in ("build-engine", "generate")}
    return make_config(generate={"engine": "trtllm-engine", "num_shards": 1, "options": options}, slurm={"stages": stages})


def test_an_engine_gets_the_gpus_it_is_told_to_run_on() -> None:
    check_resources(engine_config(tensor_parallel=2, pipeline_parallel=2))
    with pytest.raises(ValueError, match=r"slurm\.stages\.build-engine: gpus_per_node=4, but generate.engine=trtllm-engine runs on 8 GPUs"):
        check_resources(engine_config(tensor_parallel=8))


@pytest.mark.parametrize(
    ("engine", "options", "slurm", "is_taken"),
    [
        ("vllm", {}, {}, True),  # nothing asks for a GPU: its CPU build
        ("trtllm-torch", {}, {}, False),  # which has none
        ("vllm", {"tensor_parallel": 2}, {}, False),
        ("vllm", {}, {"gpu": "h100-80gb"}, False),
        ("vllm", {}, {"stages": {"train": {"gpus_per_node": 1}}}, False),
        ("vllm", {}, {"stages": {"generate": {"gpus_per_node": 1}}}, False),  # the engine would be made for another machine
    ],
)
def test_an_engine_that_computes_on_a_cpu_too_is_taken_where_no_stage_asks_for_gpus(
    engine: str, options: dict, slurm: dict, is_taken: bool
) -> None:
    config = make_config(generate={"engine": engine, "options": options}, slurm=slurm)
    if is_taken:
        check_resources(config)
    else:
        with pytest.raises(ValueError, match=rf"build-engine: gpus_per_node=0, but generate\.engine={engine} runs on [12] GPUs"):
            check_resources(config)


def test_the_driver_of_an_engine_runs_in_the_batch_shell_and_its_step_under_srun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPIN_ENGINE_SRUN_OPTIONS", "--container-image='/my images/trtllm.sqsh'")
    monkeypatch.setenv("SPIN_ENGINE_PYTHON", "apptainer exec 'my image.sif' /usr/bin/python3.12")
    config, layout = engine_config(tensor_parallel=4), RunLayout(tmp_path)
    layout.run_json.write_text(config.model_dump_json())
    words = step_command(config, layout, StageRef("generate", 0, 0), tmp_path / "logs")
    assert words[:4] == ["env", "SLURM_PROCID=0", "SLURM_NTASKS=1", "SLURM_LOCALID=0"]
    # What the stage's process reads of it is the engine's command: srun, the container, its Python.
    environment = open_run(tmp_path, [word for word in words if word.startswith("generate.environment.")])[0].generate.environment
    assert (environment.prefix, environment.python) == (["apptainer", "exec", "my image.sif"], "/usr/bin/python3.12")
    assert environment.launcher[:2] == ["srun", "--mpi=pmix"]
    assert {"--nodes=1", "--ntasks={ranks}", "--container-image=/my images/trtllm.sqsh"} <= set(environment.launcher)
    assert step_command(config, layout, StageRef("merge", 0), tmp_path / "logs")[0] == "srun"


def test_a_launcher_in_the_config_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIN_ENGINE_PYTHON", raising=False)
    config = make_config(generate={"engine": "vllm", "environment": {"launcher": ["mpirun", "-n", "{ranks}"]}})
    assert engine_changes(config) == []


def test_ranks_start_in_the_container_that_env_sh_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIN_SRUN_OPTIONS", "--container-image='/images/a b.sqsh' --no-container-mount-home")
    monkeypatch.setenv("SPIN_RANK_PYTHON", "apptainer exec --nv '/images/a b.sif' python3")
    config, layout = make_config(), RunLayout(tmp_path / "it's a run")
    layout.root.mkdir()
    layout.run_json.write_text(config.model_dump_json(), encoding="utf-8")
    words = srun_command(config, layout, StageRef("generate", 1, 2), tmp_path / "logs")
    step = ["srun", "--kill-on-bad-exit=1", "--wait=60", "--label", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1"]
    container = ["--container-image=/images/a b.sqsh", "--no-container-mount-home", "apptainer", "exec", "--nv", "/images/a b.sif"]
    verb = ["generate", "--run-dir", str(layout.root), "--iteration", "1", "--shard", "2"]
    assert words == [*step, *container, "python3", "-m", "spin_megatron.launch.rank", str(tmp_path / "logs"), *verb]
