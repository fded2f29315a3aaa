"""What the links do when Slurm refuses, answers late, or leaves half a chain; scripted answers stand in for Slurm's programs."""

import os
import subprocess
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from spin_megatron.config import RunConfig
from spin_megatron.config_sections import StopSection
from spin_megatron.launch import slurm, supervise
from spin_megatron.launch.failures import MAX_SUBMISSION_FAILURES, read_events, record_failure, stop_reason
from spin_megatron.launch.slurm import active_jobs, read_jobs, submit
from spin_megatron.launch.started_run import open_as_changed
from spin_megatron.launch.supervise import Element, advance
from spin_megatron.run import manifest as manifests
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import StageIncomplete, StaleStage
from spin_megatron.stage_table import StageRef
from tests.slurm.test_commands import finish, make_config


@dataclass
class Scripted:
    """Slurm's programs as a list of what was called. refusals: sbatch calls, counted from 0, that fail with this text."""

    layout: RunLayout
    refusals: dict[int, str] = field(default_factory=dict)
    queue: list[str] = field(default_factory=list)
    late: set[int] = field(default_factory=set)
    calls: list[list[str]] = field(default_factory=list)
    num_sbatch: int = 0

    def __call__(self, words: Sequence[str], **_options: bool) -> subprocess.CompletedProcess[str]:
        self.calls.append(list(words))
        if words[0] == "sbatch":
            number = self.num_sbatch
            self.num_sbatch += 1
            name = next(word.partition("=")[2] for word in words if word.startswith("--job-name="))
            if number not in self.refusals or number in self.late:
                self.queue.append(f"{100 + number}|{100 + number}_0|PENDING|{name}")
            if number in self.refusals:
                return subprocess.CompletedProcess(words, 1, "", self.refusals[number])
            return subprocess.CompletedProcess(words, 0, f"{100 + number}\n", "")
        if words[0] == "squeue":
            rows = [row.split("|") for row in self.queue]
            if "--format=%F|%K|%j|%Z" in words:
                return subprocess.CompletedProcess(words, 0, "".join(f"{r[0]}|0-0|{r[3]}|{self.layout.root}\n" for r in rows), "")
            return subprocess.CompletedProcess(words, 0, "".join("|".join(r[1:3]) + "\n" for r in rows), "")
        if words[0] == "scancel":
            self.queue = [row for row in self.queue if row.split("|")[0] not in words]
        return subprocess.CompletedProcess(words, 0, "", "")

    def called(self, program: str) -> list[list[str]]:
        return [words for words in self.calls if words[0] == program]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunConfig, RunLayout, Scripted]:
    """A run whose data, engine and shards are there: merge, train, export, evaluate and advance are missing."""
    config, layout = make_config(run={"name": "r", "iterations": 1}), RunLayout(tmp_path / "a run")
    done = [StageRef("export", 0), StageRef("prepare"), StageRef("build-engine", 0), *(StageRef("generate", 0, k) for k in range(3))]
    finish(layout, *done, config=config, is_current=True)
    programs = Scripted(layout)
    monkeypatch.setattr(slurm, "run_slurm", programs)
    monkeypatch.setattr(supervise, "run_slurm", programs)
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    return config, layout, programs


FIRST_SLOT, SECOND_SLOT = Element("90", "90", 0, 0), Element("91", "90", 1, 0)


def links_of(layout: RunLayout) -> list[str]:
    return [job.link for job in read_jobs(layout.slurm_jobs(0))]


def test_a_refused_job_takes_the_rest_of_its_chain_out_of_the_queue(started: tuple[RunConfig, RunLayout, Scripted]) -> None:
    config, layout, programs = started
    programs.refusals = {2: "Job violates accounting/QOS policy (job submit limit)"}
    with pytest.raises(ValueError, match=r"sbatch refused export 1: Job violates .* no job of this chain is left in the queue"):
        submit(config, layout)
    assert programs.called("scancel") == [["scancel", "100", "101"]]
    assert programs.queue == []
    programs.refusals = {}
    assert [job.link for job in submit(config, layout)] == ["merge", "train", "export", "evaluate", "advance"]


def test_the_link_that_goes_on_tries_a_refused_job_again(started: tuple[RunConfig, RunLayout, Scripted]) -> None:
    config, layout, programs = started
    programs.refusals = {1: "Socket timed out on send/recv operation", 2: "Socket timed out on send/recv operation"}
    layout.slurm.mkdir()
    assert advance(config, layout, FIRST_SLOT) == 0
    assert links_of(layout) == ["merge", "train", "export", "evaluate", "advance"]
    assert programs.num_sbatch == 5 + 2


def test_a_job_that_was_accepted_without_an_answer_is_not_submitted_twice(started: tuple[RunConfig, RunLayout, Scripted]) -> None:
    config, layout, programs = started
    programs.refusals, programs.late = {1: "Socket timed out on send/recv operation"}, {1}
    layout.slurm.mkdir()
    assert advance(config, layout, FIRST_SLOT) == 0
    assert [job.job_id for job in read_jobs(layout.slurm_jobs(0))] == ["100", "101", "102", "103", "104"]
    assert "--dependency=afterany:101" in programs.called("sbatch")[2], "export waits for the train job that was found"


def test_a_queue_that_stays_full_requeues_the_link_and_in_the_end_stops_the_run(
    started: tuple[RunConfig, RunLayout, Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, layout, programs = started
    programs.refusals = dict.fromkeys(range(1000), "job submit limit")
    layout.slurm.mkdir()
    assert advance(config, layout, FIRST_SLOT) == 75
    assert programs.called("scontrol") == [["scontrol", "requeue", "90_0"]]
    assert stop_reason(config, layout) is None
    for _ in range(MAX_SUBMISSION_FAILURES - 1):
        record_failure(layout, "advance 0", job="90_0", restart=0, reason="job submit limit")
    reason = stop_reason(config, layout)
    assert reason is not None
    assert reason.startswith(f"advance 0 failed {MAX_SUBMISSION_FAILURES} times in a row, last: job submit limit")


def test_half_a_chain_gets_the_link_that_goes_on_and_nothing_else(started: tuple[RunConfig, RunLayout, Scripted]) -> None:
    config, layout, programs = started
    submit(config, layout)
    programs.queue = [row for row in programs.queue if row.split("|")[0] in ("101", "102")]  # train and export alone are left
    assert [(job.link, job.job_id) for job in submit(config, layout)] == [("advance", "105")]
    assert "--dependency=afterany:101:102" in programs.called("sbatch")[-1]
    assert submit(config, layout) == [], "a link that goes on is queued now"


@pytest.mark.parametrize(
    ("num_recorded", "then"),
    [(0, ["advance"]), (2, ["advance"]), (4, [])],  # cut off behind the sbatch of merge, of export, of advance
)
def test_a_submission_that_is_killed_before_it_recorded_a_job_leaves_none_to_be_submitted_twice(
    num_recorded: int, then: list[str], started: tuple[RunConfig, RunLayout, Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, layout, programs = started
    record, records = slurm._record, []

    def killed(*arguments: object) -> None:
        if len(records) == num_recorded:
            raise KeyboardInterrupt
        records.append(arguments)
        record(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(slurm, "_record", killed)
        submit(config, layout)
    programs.queue += ["7|7_0|RUNNING|spin-r-stranger-0", "8|8_0|RUNNING|spin-other-merge-0"]
    assert [job.link for job in submit(config, layout)] == then
    assert links_of(layout) == ["merge", "train", "export", "evaluate", "advance"][: num_recorded + 1] + then
    before = [f"{100 + number}" for number in range(num_recorded + 1)]
    assert not then or f"--dependency=afterany:{':'.join(before)}" in programs.called("sbatch")[-1]
    assert submit(config, layout) == []


def test_a_stage_is_made_anew_by_jobs_once_none_is_left_that_counts_on_it(started: tuple[RunConfig, RunLayout, Scripted]) -> None:
    config, layout, programs = started
    submit(config, layout)
    finish(layout, StageRef("merge", 0), StageRef("train", 0), config=config, is_current=True)
    shard = StageRef("generate", 0, 1)
    with pytest.raises(StageIncomplete, match=r"count on; end them first \(scancel 100 101 102 103 104\)"):
        submit(config, layout, redone=shard)
    assert not layout.root.joinpath("redone").exists()
    programs.queue = []
    assert shard.redo_command(layout).split("'")[0::2] == ["spin-megatron submit ", " --redo generate:0:1"], "as the run went on so far"
    chained = submit(config, layout, redone=StageRef.parse("generate:0:1"))
    assert [(job.link, job.array) for job in chained[:3]] == [("generate", "1%8"), ("merge", "0-0"), ("train", "0-3%1")]
    moved = [path.parent.name for path in layout.root.joinpath("redone").rglob("MANIFEST.json")]
    assert sorted(moved) == ["pairs", "shard_00001", "train"]


def test_what_run_would_refuse_of_the_finished_stages_a_person_cannot_submit_either(started: tuple[RunConfig, RunLayout, Scripted]) -> None:
    config, layout, programs = started
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 7})})
    with pytest.raises(StaleStage, match=r"prepare 0 was finished with other settings or inputs:\s+run\.seed: 42 -> 7"):
        submit(other, layout)
    layout.run_json.write_text(other.model_dump_json(), encoding="utf-8")
    trial = Namespace(target=layout.root, run_dir=None, overrides=[], redo=None, dry_run=True)
    with pytest.raises(StaleStage, match=r"prepare 0 was finished with other settings or inputs:\s+run\.seed: 42 -> 7"):
        slurm.command(trial)
    assert programs.num_sbatch == 0
    layout.slurm.mkdir(exist_ok=True)
    assert advance(other, layout, FIRST_SLOT) == 0, "a chain that is under way goes on with what it has"


def test_squeue_is_asked_for_the_jobs_of_who_submitted_the_run_alone(started: tuple[RunConfig, RunLayout, Scripted]) -> None:
    config, layout, programs = started
    submit(config, layout)
    assert active_jobs(layout), "what was submitted is queued"
    assert programs.called("squeue")[-1] == ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i|%T"]
    colleague, earlier = ({**asdict(job), "user": user} for job, user in zip(read_jobs(layout.slurm_jobs(0)), ("4711", ""), strict=False))
    manifests.write_json(layout.slurm_jobs(1), [colleague])
    active_jobs(layout)
    assert f"--user={','.join(sorted((str(os.getuid()), '4711')))}" in programs.called("squeue")[-1]
    manifests.write_json(layout.slurm_jobs(1), [{name: value for name, value in earlier.items() if name != "user"}])
    active_jobs(layout)
    assert not [word for word in programs.called("squeue")[-1] if "--user" in word], "who submitted it is not known"


def test_while_jobs_are_under_way_the_run_s_end_may_change_and_their_resources_may_not(
    started: tuple[RunConfig, RunLayout, Scripted],
) -> None:
    config, layout, _ = started
    submit(config, layout)
    manifests.write_text(layout.run_json, config.model_dump_json())
    longer = config.run.model_copy(update={"iterations": 5})
    other = config.slurm.model_copy(update={"signal_seconds": 7})
    assert submit(config.model_copy(update={"run": longer, "slurm": other, "stop": StopSection(max_logp_drop=9.0)}), layout) == []
    now, _ = open_as_changed(layout.root)
    assert (now.run.iterations, now.stop.max_logp_drop, now.slurm.signal_seconds) == (5, 9.0, config.slurm.signal_seconds)


def test_a_job_of_an_iteration_that_the_run_no_longer_has_ends_well(
    started: tuple[RunConfig, RunLayout, Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, layout, programs = started
    manifests.write_text(layout.run_json, config.model_dump_json())
    monkeypatch.setenv("SLURM_JOB_ID", "90")
    assert supervise.main([str(layout.root), "train", "1"]) == 0
    assert not programs.calls


def test_the_second_slot_leaves_a_requeued_first_one_its_work_and_replaces_a_killed_one(
    started: tuple[RunConfig, RunLayout, Scripted],
) -> None:
    config, layout, programs = started
    layout.slurm.mkdir()
    layout.iteration(0).mkdir(exist_ok=True)
    slurm.manifests.write_json(layout.slurm_jobs(0), [{"job_id": "90", "link": "advance", "iteration": 0, "array": "0-1%1"}])
    programs.queue = ["90|90_0|PENDING|x", "90|90_1|RUNNING|x"]
    assert advance(config, layout, SECOND_SLOT) == 0
    assert programs.num_sbatch == 0
    programs.queue = ["90|90_1|RUNNING|x"]
    assert advance(config, layout, SECOND_SLOT) == 0
    assert links_of(layout)[1:] == ["merge", "train", "export", "evaluate", "advance"]


def only_the_last_link(layout: RunLayout, programs: Scripted) -> Element:
    """What a chain leaves when all else has ended: its last link's first slot, and the second one that is queued behind it."""
    job = read_jobs(layout.slurm_jobs(0))[-1]
    assert job.link == "advance"
    programs.queue = [f"{job.job_id}|{job.job_id}_0|RUNNING|x", f"{job.job_id}|{job.job_id}_1|PENDING|x"]
    return Element(job.job_id, job.job_id, 0, 0)


def test_chains_that_made_a_checkpoint_are_not_barren_and_others_end_the_run(started: tuple[RunConfig, RunLayout, Scripted]) -> None:
    config, layout, programs = started
    submit(config, layout)
    for step in range(4):
        (layout.checkpoints(0) / f"step_{step}").mkdir(parents=True)
        assert advance(config, layout, only_the_last_link(layout, programs)) == 0
    codes = [advance(config, layout, only_the_last_link(layout, programs)) for _ in range(config.slurm.max_failures)]
    assert codes == [0, 0, 1]
    reason = stop_reason(config, layout)
    assert reason is not None
    assert reason.startswith("3 chains of jobs in a row got nothing further")
    programs.queue = [programs.queue[1]]
    assert advance(config, layout, SECOND_SLOT) == 1, "its second slot does not go on either"


def test_a_last_link_that_comes_back_to_a_full_queue_counts_its_chain_once(started: tuple[RunConfig, RunLayout, Scripted]) -> None:
    config, layout, programs = started
    submit(config, layout)
    programs.refusals = dict.fromkeys(range(1000), "job submit limit")
    element = only_the_last_link(layout, programs)
    assert [advance(config, layout, element) for _ in range(config.slurm.max_failures + 2)] == [75] * 5
    programs.refusals = {}
    assert advance(config, layout, element) == 0


def test_a_stage_at_its_failure_cap_is_not_submitted_again(started: tuple[RunConfig, RunLayout, Scripted]) -> None:
    config, layout, programs = started
    submit(config, layout)
    for restart in range(config.slurm.max_failures):
        record_failure(layout, StageRef("merge", 0), job="100_0", restart=restart, reason="no room")
    num_sbatch = programs.num_sbatch
    assert advance(config, layout, only_the_last_link(layout, programs)) == 1
    assert programs.num_sbatch == num_sbatch


@pytest.mark.parametrize(
    ("is_told", "is_kept", "code", "event"),
    [
        (True, True, 75, ("stopped", "")),
        (True, True, 137, ("stopped", "")),  # srun ended a rank that left after the first
        (False, False, 75, ("stopped", "")),  # a person's SIGTERM
        (True, False, 75, ("failed", "its time limit came before it had kept anything new; raise slurm.stages.train.time")),
        (True, False, 1, ("failed", "exit code 1: no error was logged")),
        (False, True, 1, ("failed", "exit code 1: no error was logged")),
    ],
)
def test_a_life_that_was_told_to_leave_is_no_failure_if_it_kept_something(
    is_told: bool,
    is_kept: bool,
    code: int,
    event: tuple[str, str],
    started: tuple[RunConfig, RunLayout, Scripted],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, layout, programs = started
    finish(layout, StageRef("merge", 0), config=config)
    script = ["kill -USR1 $PPID"] * is_told + ['mkdir -p "$0"'] * is_kept + [f"exit {code}"]
    monkeypatch.setattr(supervise, "step_command", lambda *_: ["sh", "-c", "; ".join(script), str(layout.checkpoints(0) / "step_1")])
    monkeypatch.setattr(supervise, "_first_host", lambda: "n1")
    assert supervise.supervise(config, layout, StageRef("train", 0), FIRST_SLOT) == 75
    assert programs.called("scontrol")[-1] == ["scontrol", "requeue", "90_0"]
    (found,) = read_events(layout)
    assert found["event"] == event[0]
    assert found.get("reason", "").startswith(event[1])


@pytest.mark.parametrize(
    ("hang_seconds", "script", "reason"),
    [(60, "sleep 0.2; exit 7", "exit code 7"), (1, "exec sleep 60", "no progress for 1 s: the step was ended")],
)
def test_a_step_is_hung_when_its_heartbeat_stands_still_whatever_the_file_server_s_clock_says(
    hang_seconds: int, script: str, reason: str, started: tuple[RunConfig, RunLayout, Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, layout, _ = started
    finish(layout, StageRef("merge", 0), config=config)
    config = config.model_copy(update={"slurm": config.slurm.model_copy(update={"hang_seconds": hang_seconds})})
    heartbeat = layout.heartbeat("train", 0, None)
    monkeypatch.setattr(supervise, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(supervise, "step_command", lambda *_: ["sh", "-c", f'touch -d @0 "$0"; {script}', str(heartbeat)])
    monkeypatch.setattr(supervise, "_first_host", lambda: "n1")
    assert supervise.supervise(config, layout, StageRef("train", 0), FIRST_SLOT) == 75
    assert read_events(layout)[-1]["reason"].startswith(reason)
