"""Results of this folder's tests as they come, one JSON line each: a process that dies loses the test it was in, and no other."""

import json
import os
from pathlib import Path
from typing import Any

import pytest


def _write(**entry: Any) -> None:
    """Append a line to the file that tools/gpu_check.sh names; tools/gpu_summary.py reads the last line of each test."""
    path = os.environ.get("SPIN_MEGATRON_GPU_RESULTS")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    """All tests that are to come: those that a time limit does not let begin stay so."""
    for item in session.items:
        _write(name=item.nodeid, outcome="not begun")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Until there is a result, this test is the one that did not finish."""
    _write(name=nodeid, outcome="unfinished")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The test's own outcome, or that of what stands around it where this went wrong."""
    if report.when != "call" and report.passed:
        return
    entry: dict[str, Any] = {"name": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
    if report.user_properties:
        entry["numbers"] = dict(report.user_properties)
    if not report.passed:
        crash = getattr(report.longrepr, "reprcrash", None)
        entry["message"] = crash.message if crash else str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    _write(**entry)
