#!/usr/bin/env python3
"""The results of tools/gpu_check.sh as one file: python tools/gpu_summary.py OUT reads OUT/tests.jsonl, doctor.json, benchmarks/*.json.

Writes OUT/summary.json with what is there: device, versions, each test with its outcome, seconds and recorded numbers, and the benchmarks
as they are. Exit code 1 when a test failed, did not finish or did not begin, none passed, or a file is missing.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

BENCHMARKS = ("head", "train_step")
# What becomes of a check with a test of these outcomes: it fails.
FAILED = ("failed", "unfinished", "not begun")


def read_tests(path: Path) -> list[dict[str, Any]]:
    """The last line of each test that tests/gpu wrote, in order; one that was only collected is `not begun`, only begun `unfinished`."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return list({entry["name"]: entry for entry in map(json.loads, lines)}.values())


def summarise(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Everything of one check that is there, and the names of the files that are not."""
    files = [folder / "doctor.json", folder / "tests.jsonl", *(folder / "benchmarks" / f"{name}.json" for name in BENCHMARKS)]
    doctor, *benchmarks = (_read(path) for path in files if path.suffix == ".json")
    tests = read_tests(folder / "tests.jsonl")
    summary = {
        "environment": {entry["topic"]: entry["found"] for entry in doctor["findings"]} if doctor else {},
        "outcomes": Counter(test["outcome"] for test in tests),
        "tests": tests,
        "benchmarks": {name: found for name, found in zip(BENCHMARKS, benchmarks, strict=True) if found},
    }
    return summary, [path.name for path in files if not path.exists() or not path.stat().st_size]


def _read(path: Path) -> Any:
    """The file's content, None where it was not written to its end."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def main(arguments: list[str]) -> int:
    """Write and print the summary."""
    folder = Path(arguments[0])
    summary, missing = summarise(folder)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for test in summary["tests"]:
        shown = json.dumps(test["numbers"]) if "numbers" in test else test.get("message", "")
        print(f"{test['outcome']:10} {test.get('seconds', 0):6.1f} s  {test['name'].rpartition('/')[2]}  {shown[:200]}")
    counts = summary["outcomes"]
    print(f"{folder / 'summary.json'}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    for name in missing:
        print(f"{name} is missing: that part did not run to its end; see {folder / 'log.txt'}", file=sys.stderr)
    return 0 if counts["passed"] and not any(counts[outcome] for outcome in FAILED) and not missing else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
