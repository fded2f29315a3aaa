"""The tool of the multi-process tests: results in rank order, every traceback, no hang."""

import os
import time
from pathlib import Path

import pytest

from tests.parity.gloo import RankFailure, run_ranks


def _rank_and_sum(offset: int) -> tuple[int, int]:
    return int(os.environ["RANK"]), offset + int(os.environ["WORLD_SIZE"])


def _fail_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank one breaks")
    time.sleep(600)


def _die() -> None:
    os._exit(7)


def _write_pid_and_hang(folder: str) -> None:
    Path(folder, os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)


def test_results_come_back_in_rank_order() -> None:
    assert run_ranks(_rank_and_sum, 2, 10) == [(0, 12), (1, 12)]


def test_one_failing_rank_shows_its_traceback_and_ends_the_waiting_one() -> None:
    with pytest.raises(RankFailure, match=r"(?s)failed on 2 of 2 ranks.*rank 0.*killed.*rank 1.*rank one breaks"):
        run_ranks(_fail_on_rank_one, 2)


def test_a_rank_that_dies_is_named_with_its_exit_code() -> None:
    with pytest.raises(RankFailure, match="exit code 7"):
        run_ranks(_die, 1)


def test_a_rank_that_hangs_is_killed_at_the_limit(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="did not return"):
        run_ranks(_write_pid_and_hang, 1, str(tmp_path), timeout=6)
    pid = int((tmp_path / "0").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
