"""These tests need Transformer Engine, which imports without a GPU: tools/cuda_environment.sh makes such an environment."""

from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_megatron.mcore.runtime import Runtime, running
from spin_megatron.plan.shape import ParallelLayout
from tests.parity.tiny_models import EXPERT_MODELS, MODELS, make_tiny_model

# Its compiled part for torch is loaded from a place of its own: only the metadata tells without importing it.
IS_THERE = any(found.name in {"transformer_engine_torch", "transformer-engine-torch"} for found in distributions())
# FP8 multiplies multiples of 16: 32, 48 and 2 x 24 of the tiny models do not all.
ALIGNED = {"hidden_size": 64, "intermediate_size": 96}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests, and skip them with the reason where Transformer Engine is missing."""
    reason = "Transformer Engine is not installed (tools/cuda_environment.sh makes an environment with it)"
    for item in items:
        if "tests/te/" in item.path.as_posix():
            item.add_marker(pytest.mark.te)
            if not IS_THERE:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from tests.te.standins import install

    # Megatron Core compiles its fused activations; the functions themselves are what is looked at here.
    with torch.compiler.set_stance("force_eager"):
        yield install(monkeypatch)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_tiny_model(name, root / name, **ALIGNED) for name in (*MODELS, *EXPERT_MODELS)}


@pytest.fixture
def runtime(calls: Any) -> Iterator[Runtime]:
    with running(ParallelLayout(), device="cpu", seed=1) as started:
        yield started
