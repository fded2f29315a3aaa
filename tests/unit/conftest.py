"""Fixtures of the tests of engines in another environment."""

from pathlib import Path

import pytest
import torch

from spin_megatron.generation import external
from tests.doubles.installation import Site
from tests.tiny_tokenizer import save_tiny_tokenizer
from tests.unit.tiny_models import TINY, write_model


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doubles answer at once: most of a test would be the driver's wait for its next look."""
    monkeypatch.setattr(external, "_POLL_SECONDS", 0.02)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "theta", TINY, dtype=torch.float32)
    save_tiny_tokenizer(tmp_path / "theta")
    return tmp_path / "theta"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")
