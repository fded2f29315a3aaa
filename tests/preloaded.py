"""What the server imports that the tests' processes are forked from (tests/parity/gloo.py), once for all of them."""

import gc

import pytest
import transformers

from spin_megatron.stages import evaluate, export, train

__all__ = ["evaluate", "export", "pytest", "train", "transformers"]

gc.freeze()  # or a collection in a forked process would copy every page of this
