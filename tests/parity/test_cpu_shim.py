"""Each patch of the CPU shim is still needed: the work that needs it fails without it, and passes with it.

When one of these fails, a newer Megatron Core no longer needs that patch: remove it.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch as replaced

import pytest
import torch

from spin_megatron.data.batches import make_batch
from spin_megatron.mcore import runtime as runtime_module
from spin_megatron.mcore.cpu_shim import PATCHES, megatron_on_cpu
from spin_megatron.mcore.runtime import Runtime, running
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from tests.parity.gloo import meeting_ports, run_ranks
from tests.parity.tiny_models import make_pairs, make_tiny_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="where a GPU is at hand, nothing fails without the patches")

MEGATRON_CORE = tuple(int(part) for part in version("megatron-core").split(".")[:2])
# What a torch without CUDA, or without a driver, raises.
NO_CUDA = (AssertionError, RuntimeError, NameError, TypeError)
Work = Callable[[Runtime, Path], None]


def _start_only(_runtime: Runtime, _folder: Path) -> None:
    """Seeding the random number trackers happens in start_runtime."""


def _score(runtime: Runtime, folder: Path) -> None:
    from spin_megatron.mcore.model import build_model, load_huggingface
    from spin_megatron.mcore.steps import score_packs

    shape = ModelShape.from_huggingface(folder)
    chunks = build_model(shape, runtime, dtype=torch.float32)
    load_huggingface(chunks, folder, shape, runtime, show=False)
    batch = make_batch(make_pairs(), pack_tokens=192, pad_id=0, share_prompt=True)
    score_packs(chunks, [batch], runtime)


def _wrap_for_training(runtime: Runtime, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    from spin_megatron.mcore.model import build_model, load_huggingface
    from spin_megatron.mcore.optimizer import UpdateRule, apply_gradients, build_trainer

    shape = ModelShape.from_huggingface(folder)
    chunks = build_model(shape, runtime, dtype=dtype)
    load_huggingface(chunks, folder, shape, runtime, show=False)
    trainer = build_trainer(chunks, UpdateRule("adamw", max_grad_norm=1.0))
    for chunk in trainer.chunks:
        chunk.finish_grad_sync()
    apply_gradients(trainer, learning_rate=0.0)


def _go_backward(runtime: Runtime, folder: Path) -> None:
    from spin_megatron.mcore.model import build_model, load_huggingface
    from spin_megatron.mcore.optimizer import UpdateRule, build_trainer
    from spin_megatron.mcore.steps import forward_step, run_schedule

    shape = ModelShape.from_huggingface(folder)
    chunks = build_model(shape, runtime, dtype=torch.float32)
    load_huggingface(chunks, folder, shape, runtime, show=False)
    trainer = build_trainer(chunks, UpdateRule("adamw"))
    batch = make_batch(make_pairs(), pack_tokens=192, pad_id=0, share_prompt=True)
    step = forward_step(lambda _batch, logp_R: (logp_R.sum(), torch.zeros(())))
    run_schedule(step, trainer.chunks, [batch], runtime, forward_only=False)


def _wrap_bfloat16_for_training(runtime: Runtime, folder: Path) -> None:
    _wrap_for_training(runtime, folder, dtype=torch.bfloat16)


def _dispatch_experts_over_streams(runtime: Runtime, folder: Path) -> None:
    """0.19 reduces gradients over streams; 0.16 only dispatches experts over them."""
    if MEGATRON_CORE >= (0, 19):
        _wrap_for_training(runtime, folder)
        return
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from spin_megatron.mcore.model import transformer_config

    shape = ModelShape.from_huggingface(folder)
    config = transformer_config(shape, runtime, dtype=torch.float32, recompute="none", spec="local")
    config.moe_token_dispatcher_type = "alltoall"
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = None  # kept in the class: another test may have made one
    MoEAlltoAllTokenDispatcher(4, [0, 1, 2, 3], config, runtime.groups.megatron)


def _without(name: str, work: Work, folder: Path, layout: ParallelLayout) -> None:
    """Do the work with every patch but one."""
    kept = [patch for patch in PATCHES if patch.name != name]
    assert len(kept) == len(PATCHES) - 1, name
    with (
        replaced.object(runtime_module, "megatron_on_cpu", lambda: megatron_on_cpu(kept)),
        running(layout, device="cpu", seed=1) as runtime,
    ):
        work(runtime, folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_tiny_model(name, tmp_path_factory.mktemp(name)) for name in ("llama3", "mixtral")}


@pytest.mark.parametrize(
    ("name", "work", "model"),
    [
        ("device arguments", _score, "llama3"),
        ("current device", _wrap_for_training, "llama3"),
        ("Tensor.type", _wrap_bfloat16_for_training, "llama3"),
        ("weight gradient kernel", _go_backward, "llama3"),
        ("random state", _start_only, "llama3"),
        ("streams", _dispatch_experts_over_streams, "mixtral"),
        pytest.param(
            "expert router",
            _score,
            "mixtral",
            marks=pytest.mark.skipif(MEGATRON_CORE >= (0, 19), reason="0.19 defines the name itself"),
        ),
    ],
)
def test_a_patch_is_needed(name: str, work: Work, model: str, folders: dict[str, Path]) -> None:
    with pytest.raises(NO_CUDA):
        _without(name, work, folders[model], ParallelLayout())
    with running(ParallelLayout(), device="cpu", seed=1) as runtime:
        work(runtime, folders[model])


def _needs_two_stages(folder: Path, ports: list[int]) -> dict[str, str]:
    """The patches that only a pipeline needs: name -> the error without it, "" where there was none."""
    found = {}
    for name, port in zip(("Tensor.cuda", "synchronize", "none"), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            if name == "none":
                with running(ParallelLayout(pipeline=2), device="cpu", seed=1) as runtime:
                    _score(runtime, folder)
            else:
                _without(name, _score, folder, ParallelLayout(pipeline=2))
        except NO_CUDA as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = ""
    return found


def test_a_pipeline_with_tied_embeddings_needs_the_other_two(tmp_path: Path) -> None:
    folder = make_tiny_model("qwen2_tied", tmp_path / "model")
    with meeting_ports(3) as ports:
        found = run_ranks(_needs_two_stages, 2, folder, ports, timeout=200)
    for by_name in found:
        assert by_name["Tensor.cuda"]
        assert by_name["synchronize"]
        assert by_name["none"] == ""


def test_every_patch_has_a_test_and_names_what_needs_it() -> None:
    tested = {"device arguments", "current device", "Tensor.type", "random state", "streams", "expert router", "Tensor.cuda", "synchronize"}
    tested |= {"weight gradient kernel"}
    # The fused kernels are Transformer Engine's and apex's: tests/te leaves that patch out.
    assert {patch.name for patch in PATCHES} == tested | {"fused kernels"}
    assert all(patch.needed_by for patch in PATCHES)


def test_importing_the_model_imports_no_compiler_and_puts_it_back() -> None:
    found = _printed(
        "import sys, torch\n"
        "compile = torch.compile\n"
        "import spin_megatron.mcore.model\n"
        "from megatron.core.jit import jit_fuser\n"
        "print('torch._dynamo' in sys.modules, torch.compile is compile, jit_fuser(print) is print)\n"
    )
    assert found == ["False", "True", "True"]


@pytest.mark.skipif(MEGATRON_CORE >= (0, 19), reason="0.19 cannot be imported without Triton")
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_neither_megatron_core_nor_an_optimizer_brings_triton_and_it_can_still_be_imported() -> None:
    found = _printed(
        "import sys, torch\n"
        "import spin_megatron.mcore.optimizer as optimizer\n"
        "print('megatron.core' in sys.modules, 'triton' in sys.modules)\n"
        "with optimizer.without_triton():\n"
        "    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])\n"
        "print('torch._dynamo' in sys.modules, 'triton' in sys.modules)\n"
        "import triton.language\n"
    )
    assert found == ["True", "False", "True", "False"]


def _printed(script: str) -> list[str]:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()
