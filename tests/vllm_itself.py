"""vLLM itself, for the tests that run it: where SPIN_VLLM_PYTHON names an interpreter that has it. Without a GPU its CPU build does."""

import os

import pytest

from spin_megatron.generation.engine import Environment

VLLM_PYTHON = os.environ.get("SPIN_VLLM_PYTHON", "")
needs_vllm = pytest.mark.skipif(not VLLM_PYTHON, reason="SPIN_VLLM_PYTHON names no interpreter that has vLLM")
# One thread, as everything else in the tests; bound to no core, so that another test can have it.
ENVIRONMENT = Environment(VLLM_PYTHON, variables=("VLLM_CPU_OMP_THREADS_BIND=nobind", "OMP_NUM_THREADS=1"))
OPTIONS = {"eager": True}
