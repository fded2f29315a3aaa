"""The one room that knows Megatron Core."""

import importlib.util

import torch

from spin_megatron.mcore.cpu_shim import import_without_compilers

if importlib.util.find_spec("megatron") is not None and not torch.cuda.is_available():
    import_without_compilers()
