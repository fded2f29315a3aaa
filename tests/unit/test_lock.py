"""The lock: one living owner, and a dead one's lock is taken over."""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from spin_megatron.run import lock
from spin_megatron.run.lock import Owner, held, is_held, read_owner
from spin_megatron.run.manifest import StageIncomplete


def test_a_living_owner_on_this_host_is_respected_however_old_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held(path, Owner.this_process(), what="train 0", stale_seconds=60):
        os.utime(path, (0, 0))
        with (
            pytest.raises(StageIncomplete, match=r"train 0 is being run by another process \(pid \d+ on"),
            held(path, Owner.this_process(), what="train 0", stale_seconds=60),
        ):
            raise AssertionError("two owners")
    assert not path.exists()


def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    dead = replace(Owner.this_process(), token="dead", pid=int(child.stdout))
    path.write_text(json.dumps(asdict(dead)), encoding="utf-8")
    assert not is_held(path, stale_seconds=60)
    mine = Owner.this_process()
    with held(path, mine, what="train 0", stale_seconds=60):
        assert read_owner(path) == mine


def test_another_hosts_lock_is_stale_only_when_it_was_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps(asdict(replace(Owner.this_process(), host="elsewhere"))), encoding="utf-8")
    assert is_held(path, stale_seconds=60)
    old = time.time() - 61
    os.utime(path, (old, old))
    assert not is_held(path, stale_seconds=60)


@pytest.mark.parametrize("ahead_seconds", [-3600, 3600])
def test_a_clock_that_is_not_the_file_server_s_makes_no_lock_stale_or_fresh(
    ahead_seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, server_time = tmp_path / "lock", time.time
    monkeypatch.setattr(time, "time", lambda: server_time() + ahead_seconds)
    path.write_text(json.dumps(asdict(replace(Owner.this_process(), host="elsewhere"))), encoding="utf-8")
    assert is_held(path, stale_seconds=60)
    with pytest.raises(StageIncomplete), held(path, Owner.this_process(), what="train 0", stale_seconds=60):
        raise AssertionError("two owners")
    old = server_time() - 61
    os.utime(path, (old, old))
    assert not is_held(path, stale_seconds=60)
    with held(path, Owner.this_process(), what="train 0", stale_seconds=60):
        assert list(tmp_path.iterdir()) == [path]


def test_who_may_write_nothing_beside_a_lock_still_sees_whether_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(path)

    path = tmp_path / "lock"
    path.write_text(json.dumps(asdict(replace(Owner.this_process(), host="elsewhere"))), encoding="utf-8")
    monkeypatch.setattr(Path, "touch", refuse)
    assert is_held(path, stale_seconds=60)
    os.utime(path, (0, 0))
    assert not is_held(path, stale_seconds=60)


def test_a_lock_that_could_not_be_touched_for_a_while_is_touched_again(tmp_path: Path) -> None:
    path, away = tmp_path / "lock", tmp_path / "away"
    with held(path, Owner.this_process(), what="train 0", stale_seconds=0.06):
        os.rename(path, away)  # as `_take` does for a moment, or a file server for minutes
        time.sleep(0.1)
        os.utime(away, (0, 0))
        os.rename(away, path)
        deadline = time.monotonic() + 20
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 0


def test_a_full_disk_leaves_nothing_of_a_lock_behind(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"), held(tmp_path / "lock", Owner.this_process(), what="train 0", stale_seconds=60):
            raise AssertionError("a lock of 10 bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_life_of_the_same_job_is_over(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    earlier = replace(Owner.this_process("7_0", restart=0), host="elsewhere")
    path.write_text(json.dumps(asdict(earlier)), encoding="utf-8")
    assert not is_held(path, stale_seconds=60, by=Owner.this_process("7_0", restart=1))
    assert is_held(path, stale_seconds=60, by=Owner.this_process("7_1", restart=1))


def test_who_waits_for_a_lock_is_told_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, mine, told = tmp_path / "lock", Owner.this_process(), []
    path.write_text(json.dumps(asdict(replace(mine, token="other", host="elsewhere"))), encoding="utf-8")
    monkeypatch.setattr(lock.logger, "info", lambda text, *values: told.append(text % values))
    with held(path, mine, what="the submission", stale_seconds=0.5, wait_seconds=60):
        assert read_owner(path) == mine
    assert told == [f"waiting for the submission, which another process has (pid {mine.pid} on elsewhere; lock {path})"]
