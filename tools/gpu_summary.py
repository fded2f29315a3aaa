#!/usr/bin/env python3
"""The results of tools/gpu_check.sh as one file: python tools/gpu_summary.py OUT reads OUT/tests.xml, doctor.json, benchmarks/*.json.

Writes OUT/summary.json: device, versions, each test with its outcome, seconds and recorded numbers, and the benchmarks as they are.
Exit code 1 when a test failed, none passed, or a file is missing.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET


def read_tests(path: Path) -> list[dict[str, Any]]:
    """Each test of a JUnit file, in order."""
    # This file was written by pytest a moment ago: no foreign XML is read.
    root = ET.parse(path).getroot()  # noqa: S314
    return [_test(case) for case in root.iter("testcase")]


def _test(case: ET.Element) -> dict[str, Any]:
    problems = {child.tag: child.get("message", "") for child in case if child.tag in ("failure", "error", "skipped")}
    outcome, message = next(iter(problems.items()), ("passed", ""))
    numbers = {entry.get("name", ""): _value(entry.get("value", "")) for entry in case.iter("property")}
    name, seconds = f"{case.get('classname')}::{case.get('name')}", float(case.get("time", 0))
    found: dict[str, Any] = {"name": name, "outcome": outcome, "seconds": seconds}
    return found | ({"message": message} if message else {}) | ({"numbers": numbers} if numbers else {})


def _value(text: str) -> Any:
    """Numbers and lists as such; True and False are what Python writes."""
    try:
        return json.loads({"True": "true", "False": "false"}.get(text, text))
    except ValueError:
        return text


def summarise(folder: Path) -> dict[str, Any]:
    """Everything of one check.

    Raises:
        FileNotFoundError: the doctor or the tests did not get to write their file.
    """
    findings = {entry["topic"]: entry["found"] for entry in json.loads((folder / "doctor.json").read_text(encoding="utf-8"))["findings"]}
    tests = read_tests(folder / "tests.xml")
    benchmarks = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "benchmarks").glob("*.json"))}
    return {"environment": findings, "outcomes": Counter(test["outcome"] for test in tests), "tests": tests, "benchmarks": benchmarks}


def main(arguments: list[str]) -> int:
    """Write and print the summary."""
    folder = Path(arguments[0])
    try:
        summary = summarise(folder)
    except FileNotFoundError as error:
        print(f"{error.filename} is missing: that part did not run to its end; see {folder / 'log.txt'}", file=sys.stderr)
        return 1
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for test in summary["tests"]:
        shown = json.dumps(test["numbers"]) if "numbers" in test else test.get("message", "")
        print(f"{test['outcome']:8} {test['seconds']:6.1f} s  {test['name'].rpartition('.')[2]}  {shown[:160]}")
    counts = summary["outcomes"]
    print(f"{folder / 'summary.json'}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 0 if counts["passed"] and not counts["failure"] and not counts["error"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
