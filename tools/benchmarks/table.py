#!/usr/bin/env python3
"""The tables of README.md and docs/performance.md, from the JSON files of docs/benchmarks/.

    python -m tools.benchmarks.table            # print them
    python -m tools.benchmarks.table --write    # put them where they stand

A table stands between `<!-- table NAME -->` and `<!-- end of table -->`; NAME is `summary` or the name of a JSON file without its suffix,
which begins with the benchmark's: head_cpu.json is one of head.py. A test compares the text with the files.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from tools.benchmarks import attention, generate, head, profile_step, train_step

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "docs" / "benchmarks"
PAGES = (REPOSITORY / "README.md", REPOSITORY / "docs" / "performance.md")
BLOCK = re.compile(r"(<!-- table ([\w.-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
GPU = ("head_h4096_cuda", "head_h8192_cuda", "attention_cuda", "train_step_llama-1b_cuda")


def result(name: str) -> dict[str, Any]:
    """A benchmark's report."""
    report: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return report


def table_of(name: str) -> str:
    """One benchmark's own table, and under it where it was measured."""
    report = result(name)
    if name.startswith("head_"):
        text = head.table(report["methods"])
    elif name.startswith("attention_"):
        text = attention.table(report["methods"])
    elif name.startswith("generate_"):
        text = generate.table(report["methods"])
    elif name.startswith("train_step_"):
        text = train_step.table(report["methods"], report["problem"]["peak_tflops"])
    else:
        text = profile_step.table(report)
    problem = ", ".join(f"{key} {value}" for key, value in report["problem"].items() if key not in UNTOLD and value is not None)
    return f"{text}\n\n({report['device_name']}, torch {report['torch']}: {problem})\n"


UNTOLD = {"out", "trl_python", "timeout", "methods", "memory_of", "trl_pairs", "recompute", "error_rows", "shorten", "modes"}


def summary() -> str:
    """A line a comparison: the peer, this project, the ratio."""
    lines = ["| measured on one CPU | peer | this project | ratio |", "|---|---|---|---|"]
    for model in ("smollm2-135m", "tiny"):
        report = result(f"train_step_{model}_cpu")
        rows, trl = report["methods"], f"TRL {report['versions']['trl']}"
        ours = rows[train_step.OURS]
        for peer in (train_step.fastest_peer(rows, with_tcmalloc=has_tcmalloc) for has_tcmalloc in (False, True)):
            if peer is None:
                continue
            cells = [f"{row['pairs_per_second']:.3g} pairs/s, {row['peak_bytes'] / 2**30:.2f} GiB" for row in (rows[peer], ours)]
            ratios = [ours[number] / rows[peer][number] for number in ("pairs_per_second", "peak_bytes")]
            ratio = f"{ratios[0]:.2f}x pairs/s, {ratios[1]:.2f}x memory"
            lines.append(f"| train step, {model}, fp32 | {peer.replace('TRL', trl, 1)}: {cells[0]} | {cells[1]} | {ratio} |")
    for name in sorted(path.stem for path in RESULTS.glob("generate_*.json")):
        report = result(name)
        row = report["methods"]["sampled"]
        rates = [f"{row[side]:.0f} tokens/CPU s" for side in (generate.THEIRS, generate.OURS)]
        what = f"{report['problem']['model']}, {'UltraChat-like' if report['problem']['mix'] else 'equal'} lengths, a seed a row"
        lines.append(f"| generate, {what} | transformers: {rates[0]} | {rates[1]} | {row['ratio']:.2f}x |")
    rows = result("head_cpu")["methods"]
    for mode, label in (("score", "forward only"), ("train", "forward and backward")):
        cells = [
            f"{rows[name][mode]['seconds']:.3g} s, {rows[name][mode]['extra_bytes'] / 2**20:.0f} MiB" for name in (head.BASELINE, head.OURS)
        ]
        ours = rows[head.OURS][mode]
        ratio = f"{ours['time_ratio']:.2f}x time, {ours['memory_ratio']:.3f}x memory"
        lines.append(f"| head, {label} | logits, log_softmax, gather: {cells[0]} | {cells[1]} | {ratio} |")
    rows = result("attention_cpu")["methods"]
    cells = [
        f"{1e3 * rows[name]['train']['seconds']:.0f} ms, {rows[name]['train']['extra_bytes'] / 2**20:.0f} MiB"
        for name in (attention.BASELINE, attention.OURS)
    ]
    ratio = f"{rows[attention.OURS]['train']['time_ratio']:.3f}x time"
    lines.append(f"| attention of a pack, forward and backward | {attention.BASELINE}: {cells[0]} | {cells[1]} | {ratio} |")
    missing = [name for name in GPU if not (RESULTS / f"{name}.json").exists()]
    if missing:
        lines.append("| everything on a GPU (`tools/benchmarks/gpu.sh`) | not measured | not measured | |")
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """A page with its tables made anew."""
    return BLOCK.sub(lambda found: found[1] + (summary() if found[2] == "summary" else table_of(found[2])) + found[4], text)


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into the pages")
    if parser.parse_args().write:
        for page in PAGES:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    print(summary())
    for path in sorted(RESULTS.glob("*.json")):
        print(f"{path.stem}\n\n{table_of(path.stem)}")


if __name__ == "__main__":
    main()
