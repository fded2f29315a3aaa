"""The memory allocator of ranks on a CPU: tcmalloc where the machine has it.

glibc before 2.38 cannot hand an aligned block that was freed to a tensor of the same size (its bug 14581): large tensors are either
mapped anew each time (mcore/runtime.py sees to that), page by page, or the heap grows to twice what lives in it. tcmalloc does hand it
on. Which one is there changes no result. torch's own launcher (torch.backends.xeon.run_cpu) preloads it in the same way.
"""

import ctypes.util
import functools
import os
import sys

from spin_megatron.launch.gpus import visible_gpus

_NAMES = ("tcmalloc_minimal", "tcmalloc")
ADVICE = "a training step on a CPU takes a sixth less time with it, and more: apt-get install libtcmalloc-minimal4"


@functools.cache
def find_tcmalloc() -> str | None:
    """The name under which the dynamic linker finds it; None where it is not installed, and off Linux."""
    found = (ctypes.util.find_library(name) for name in _NAMES) if sys.platform.startswith("linux") else ()
    return next((name for name in found if name is not None), None)


def allocator_variables() -> dict[str, str]:
    """Environment variables that give a process tcmalloc; none with a GPU, without tcmalloc, or where the user has chosen."""
    chosen = {"LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys()
    library = None if chosen else find_tcmalloc()
    if library is None or visible_gpus():  # in this order: asking for GPUs starts a process
        return {}
    # It would report each tensor of more than a gigabyte.
    return {"LD_PRELOAD": library, "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(2**60)}
