"""Core attention over branches: causal within a branch, and before that all of the branch's prefix.

This module stands in Megatron Core's layer where its DotProductAttention would, and reads the pack's `branches_B4`
(data.batches) where the attention mask would be, because a tensor in that place passes through activation recompute.
A pair laid out as [x | y | y'] is three branches x, x->y, x->y'; no mask over the whole pack is ever made.

Backends, chosen by `choose_backend` with a reason that is logged:
- cpu_flash: torch's CPU flash kernel. A branch with a prefix meets it and itself in two calls, merged by their log-sum-exp; branches
  that share a prefix meet it in one. The flash backward of each call is exact when given the merged output and log-sum-exp.
  Keys and values are neither copied nor repeated for grouped queries. SmolLM2's heads, three pairs of 690 tokens, one thread,
  forward and backward: 94 ms and 12 MiB kept; `sdpa` 105 ms and 18 MiB; Megatron Core's local attention under a block mask, which
  cannot share the prompt, 1588 ms and 219 MiB.
- flash_attn, torch_varlen, transformer_engine: one variable-length call; keys of a prefix are gathered once a branch, and the
  bottom-right alignment of the causal mask lets every query see its whole prefix.
- sdpa: torch's scaled_dot_product_attention branch by branch, for everything the others do not compute.

Shapes: T tokens of the pack, B branches, N query heads, G key-value groups, D head size (local: N/TP, G/TP).
"""

import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from spin_megatron.mcore.context import ContextPlan, gather_pack, plan_context
from spin_megatron.mcore.rotary import rotate
from spin_megatron.mcore.sdpa import attend_by_branch, attend_with_cpu_flash
from spin_megatron.mcore.varlen import PlanCache, VarlenPlan, branch_keys, gather_keys, with_padding

BackendName = Literal["cpu_flash", "flash_attn", "transformer_engine", "torch_varlen", "sdpa"]
_VARLEN: tuple[BackendName, ...] = ("flash_attn", "torch_varlen", "transformer_engine")


@dataclass(frozen=True)
class Backend:
    """The chosen backend and why."""

    name: BackendName
    reason: str


def choose_backend(device: torch.device, dtype: torch.dtype, *, head_dim: int, sliding_window: int | None) -> Backend:
    """The fastest backend that computes this attention here, and the reason to log."""
    if device.type == "cpu":
        if hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
            return Backend("cpu_flash", "torch's CPU flash kernel")
        return Backend("sdpa", f"torch {torch.__version__} has no CPU flash kernel")
    if device.type != "cuda":
        return Backend("sdpa", f"no variable-length kernel for {device.type} tensors")
    if dtype not in (torch.bfloat16, torch.float16):
        return Backend("sdpa", f"variable-length kernels compute bfloat16 and float16, not {dtype}")
    if head_dim > 256 or head_dim % 8:
        return Backend("sdpa", f"variable-length kernels need a head size that is a multiple of 8 and at most 256, not {head_dim}")
    if is_installed("flash_attn"):
        return Backend("flash_attn", "flash-attn is installed")
    # Transformer Engine last: cuDNN's deterministic backward on Hopper wants a workspace of pack x heads x longest query x longest keys,
    # hundreds of GB for a pack of 8192 (cudnn-frontend #398; above 2**30 Transformer Engine 2.20 makes the scores instead), and a plan of
    # its own for each pack's longest branches. Torch's kernel asks for neither.
    lack = _lack_of_torch(sliding_window)
    if lack is None:
        return Backend("torch_varlen", "torch's varlen_attn; flash-attn is not installed")
    if is_installed("transformer_engine"):
        return Backend("transformer_engine", f"Transformer Engine is installed, no flash-attn, and {lack}")
    return Backend("sdpa", f"no flash-attn, no Transformer Engine, and {lack}")


def _lack_of_torch(sliding_window: int | None) -> str | None:
    """Why torch's variable-length attention does not compute this; None where it does."""
    if not is_installed("torch.nn.attention.varlen"):
        return f"torch {torch.__version__} has no varlen_attn"
    from torch.nn.attention.varlen import varlen_attn

    if sliding_window is not None and "window_size" not in inspect.signature(varlen_attn).parameters:
        return f"varlen_attn of torch {torch.__version__} has no sliding window"
    return None


def is_installed(module: str) -> bool:
    """Whether a module can be found; its parents are imported, the module is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


class BranchAttention(torch.nn.Module):
    """Megatron Core's `core_attention` (its CoreAttentionBuilder and CoreAttention protocols), over branches.

    The sliding window is Megatron Core's config.window_size = (W - 1, 0): a token sees itself and the W - 1 before it,
    counted in positions of its own sequence, prefix included.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,  # noqa: ARG002 (Megatron Core names it; branches decide instead)
        attention_type: str,
        cp_comm_type: str | None = None,  # noqa: ARG002 (mcore.context gathers keys)
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        *,
        backend: Backend,
        plans: PlanCache[VarlenPlan],
        shares: PlanCache[ContextPlan] | None = None,
        rotary: PlanCache[Tensor] | None = None,
    ) -> None:
        super().__init__()
        assert attention_type == "self", "branches describe self-attention"
        assert config.attention_dropout == 0.0, "dropout would make reference and policy differ"
        self.layer_number = layer_number
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.window: int | None = None if config.window_size is None else config.window_size[0] + 1
        self.backend = backend
        self.plans = plans
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.shares = shares or PlanCache(make=plan_context)
        self.rotary = rotary  # None: queries and keys come rotated
        self._te_modules: dict[tuple[int, int], Any] = {}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        /,
        *,
        attn_mask_type: Any = None,  # noqa: ARG002
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_unused: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: [T, 1, N, D]; key, value: [T, 1, G, D] (local: T/C tokens of the pack with context parallelism).
            attention_mask: branches_B4 of the whole pack, int64 on the CPU.

        Returns:
            [T, 1, N * D] in query's dtype. Softmax and sums are fp32. Padding, the tokens of no branch, gets 0, or from a variable-length
            kernel what it sees of itself.
        """
        assert attention_bias is None
        assert packed_seq_params is None
        assert query.shape[1] == 1, "a micro-batch is one pack"
        branches_B4 = attention_mask
        query_TND, key_TGD, value_TGD = (tensor.squeeze(1) for tensor in (query, key, value))
        size, rank = (1, 0) if self.context_group is None else (self.context_group.size(), self.context_group.rank())
        if self.rotary is not None:
            table_2T1D = self.rotary.get(branches_B4, query.device, query.shape[0] * size, size, rank)
            # The values' copy lets go of the projection's whole output, of which they are a part.
            query_TND, key_TGD, value_TGD = rotate(query_TND, table_2T1D), rotate(key_TGD, table_2T1D), value_TGD.contiguous()
        if self.backend.name in _VARLEN:
            branches_B4 = with_padding(branches_B4, query.shape[0] * size)
        if self.context_group is not None:
            key_TGD, value_TGD, branches_B4 = self._share(key_TGD, value_TGD, branches_B4, self.context_group)
        if branches_B4.shape[0] == 0:
            # A pack of padding: no attention, but every parameter before it still gets its (zero) gradient.
            context_TND = query_TND * 0 + (key_TGD.sum() + value_TGD.sum()) * 0
        elif self.backend.name in _VARLEN:
            context_TND = self._varlen(query_TND, key_TGD, value_TGD, self.plans.get(branches_B4, query.device))
        else:
            branches = [(prefix_start, prefix, start, length) for prefix_start, prefix, start, length in branches_B4.tolist()]
            attend = attend_with_cpu_flash if self.backend.name == "cpu_flash" else attend_by_branch
            context_TND = attend(query_TND, key_TGD, value_TGD, branches, scale=self.scale, window=self.window)
        return context_TND.reshape(query.shape[0], 1, -1)

    def _share(
        self, key_TGD: Tensor, value_TGD: Tensor, branches_B4: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and branches of this context rank's queries. Collective, whatever is in the pack."""
        num_tokens = key_TGD.shape[0] * group.size()
        plan = self.shares.get(branches_B4, key_TGD.device, num_tokens, group.size(), group.rank())
        key_TGD, value_TGD = gather_pack(torch.stack((key_TGD, value_TGD), dim=1), group).unbind(1)
        if plan.branches_S4.shape[0]:
            key_TGD, value_TGD = gather_keys(key_TGD, plan.keys), gather_keys(value_TGD, plan.keys)
        return key_TGD, value_TGD, plan.branches_S4

    def _varlen(self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, plan: VarlenPlan) -> Tensor:
        return self._varlen_kernel(plan)(query_TND, branch_keys(key_TGD, plan), branch_keys(value_TGD, plan))

    def _varlen_kernel(self, plan: VarlenPlan) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if self.backend.name == "flash_attn":
            return lambda query, key, value: _flash_attn(query, key, value, plan, scale=self.scale, window=self.window)
        if self.backend.name == "transformer_engine":
            return lambda query, key, value: self._transformer_engine(query, key, value, plan)
        return lambda query, key, value: _torch_varlen(query, key, value, plan, scale=self.scale, window=self.window)

    def _transformer_engine(self, query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan) -> Tensor:
        heads = (query.shape[1], key.shape[1])
        if heads not in self._te_modules:
            from transformer_engine.pytorch import DotProductAttention

            # Kept in a plain dict: as a submodule its extra state would appear in checkpoints, under another key than the CPU model's.
            self._te_modules[heads] = DotProductAttention(
                num_attention_heads=heads[0],
                kv_channels=query.shape[2],
                num_gqa_groups=heads[1],
                attention_dropout=0.0,
                qkv_format="thd",
                attn_mask_type="padding_causal_bottom_right",
                window_size=_window_pair(self.window),
                softmax_scale=self.scale,
                layer_number=self.layer_number,
            )
        context: Tensor = self._te_modules[heads](
            query,
            key,
            value,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            cu_seqlens_q=plan.cu_queries_B1,
            cu_seqlens_kv=plan.cu_keys_B1,
            max_seqlen_q=plan.max_queries,
            max_seqlen_kv=plan.max_keys,
            window_size=_window_pair(self.window),
        )
        return context.reshape(query.shape)


def _window_pair(window: int | None) -> tuple[int, int]:
    """(left, right) as flash kernels count it: how many keys before and after the diagonal are seen, -1 for all."""
    return (-1 if window is None else window - 1, 0)


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, *, scale: float, window: int | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    context: Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        plan.cu_queries_B1,
        plan.cu_keys_B1,
        plan.max_queries,
        plan.max_keys,
        softmax_scale=scale,
        causal=True,
        window_size=_window_pair(window) if window is not None else (-1, -1),
        deterministic=True,
    )
    return context


def _torch_varlen(query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, *, scale: float, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"scale": scale} if "scale" in known else {}
    if "scale" not in known:  # torch 2.10 scales by 1/sqrt(D) only; fold the difference into the queries
        query = query * (scale * math.sqrt(query.shape[-1]))
    # (-1, 0) means causal; older releases have is_causal in its place.
    options |= {"window_size": _window_pair(window)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    context = varlen_attn(query, key, value, plan.cu_queries_B1, plan.cu_keys_B1, plan.max_queries, plan.max_keys, **options)
    assert isinstance(context, Tensor)  # a tuple only where auxiliary outputs are asked for
    if context.grad_fn is not None:
        _add_in_one_order(context.grad_fn)
    return context


def _add_in_one_order(node: Any) -> None:
    """Let a node's backward run with torch's deterministic algorithms, which is all that makes its flash kernel add the queries' gradients
    of a branch in one order. A pack has more branches and heads than a GPU has processors, so none of them waits for that."""
    was: list[tuple[int, bool]] = []
    memory: Any = torch.utils.deterministic

    # Not use_deterministic_algorithms, which also sets how torch.compile chooses kernels, and would end what the environment chose.
    def begin(_grad_outputs: Any) -> None:
        was.append((torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory))
        torch.set_deterministic_debug_mode("error")
        # What the kernel is about to write would be filled first, its fp32 sums twice: half a gigabyte a layer of an 8B model.
        memory.fill_uninitialized_memory = False

    def end(_grad_inputs: Any, _grad_outputs: Any) -> None:
        mode, memory.fill_uninitialized_memory = was.pop()
        torch.set_deterministic_debug_mode(mode)

    node.register_prehook(begin)
    node.register_hook(end)
