"""How the suite is spread over processes (`make test`): by file, the real Slurm's tests together, the long folders first."""

from pathlib import Path

import pytest

LONGEST_FIRST = ("slurm", "loop", "parity")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share their fixtures, so they stay in one process; all of tests/slurm shares one cluster."""
    items.sort(key=lambda item: LONGEST_FIRST.index(_folder(item)) if _folder(item) in LONGEST_FIRST else len(LONGEST_FIRST))
    for item in items:
        item.add_marker(pytest.mark.xdist_group("slurm" if _folder(item) == "slurm" else str(item.path)))


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]
