"""These tests need Transformer Engine, which imports without a GPU: tools/cuda_environment.sh makes such an environment."""

from importlib.metadata import distributions

import pytest

# Its compiled part for torch is loaded from a place of its own: only the metadata tells without importing it.
IS_THERE = any(found.name in {"transformer_engine_torch", "transformer-engine-torch"} for found in distributions())



def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests, and skip them with the reason where Transformer Engine is missing."""
    reason = "Transformer Engine is not installed (tools/cuda_environment.sh makes an environment with it)"
    for item in items:
        if "tests/te/" in item.path.as_posix():
            item.add_marker(pytest.mark.te)
            if not IS_THERE:
                item.add_marker(pytest.mark.skip(reason=reason))
