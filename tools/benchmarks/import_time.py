#!/usr/bin/env python3
"""Seconds a fresh interpreter takes to import each part of the command line: median of several runs.

    python tools/benchmarks/import_time.py [--runs 7]

The command line is meant to answer in under a second, and to import no torch (tests/rules holds the latter; a time is no
matter for a test).
"""

import argparse
import statistics
import subprocess
import sys
import time

MODULES = ("spin_megatron.cli", "spin_megatron.config", "spin_megatron.pipeline", "spin_megatron.launch.loop", "spin_megatron.plan.shape")


def seconds(code: str) -> float:
    """Wall time of one fresh interpreter that runs `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    return time.perf_counter() - start


def main() -> None:
    """Print a line a module; the interpreter's own start is shown apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    num_runs: int = parser.parse_args().runs
    for code in ("pass", *(f"import {module}" for module in MODULES)):
        print(f"{statistics.median(seconds(code) for _ in range(num_runs)):6.3f} s  {code}")


if __name__ == "__main__":
    main()
