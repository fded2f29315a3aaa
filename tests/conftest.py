"""How the suite is spread over processes (`make test`): by file, the real Slurm's tests together, the long folders first."""

from pathlib import Path
from typing import Any

import pytest

LONGEST_FIRST = ("slurm", "loop", "parity")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the long folders first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: LONGEST_FIRST.index(_folder(item)) if _folder(item) in LONGEST_FIRST else len(LONGEST_FIRST))


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is one process
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give out whole files, whose tests share fixtures, and tests/slurm as if it were one file: its tests share a cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        # xdist's own groups (--dist loadgroup) are lost under pytest 9.2, which does not take the marked node id over.
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/slurm" if file.startswith("tests/slurm/") else file

    return ByFile(config, log)
