"""On a GPU Megatron Core compiles its experts' activation, and each pack gives an expert another number of rows.

torch.compile compiles a function at most `recompile_limit` times in a process and runs it uncompiled for whatever comes then. Uncompiled,
bf16 is rounded between the operators: if the reference were scored compiled and a step not, margins would not start at 0. Compiled, each
number of the forward is computed from its own row alone, so other sizes change no bit. Of the backward the sum over a row, which is the
gradient of a token's weight, may be added in another order by the kernel of another size.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

# Of an expert rank's tokens: usual packs, none, one, and a size that was not seen when a function was compiled.
ROWS = (100, 120, 0, 1, 16, 300)


def test_experts_of_any_number_of_rows_stay_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.fusions import fused_bias_swiglu as fusions

    compiled: Counter[str] = Counter()

    def compile_counted(name: str) -> None:
        def count(graph: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
            compiled[name] += 1
            return graph.forward

        monkeypatch.setattr(fusions, name, torch.compile(getattr(fusions, name), backend=count))

    for name in ("weighted_swiglu", "weighted_swiglu_back"):
        compile_counted(name)

    def run(num_rows: int, *, has_gradients: bool) -> None:
        gate_up = torch.ones(num_rows, 32, dtype=torch.bfloat16, requires_grad=has_gradients)
        weights = torch.ones(num_rows, 1, requires_grad=has_gradients)
        with torch.set_grad_enabled(has_gradients):
            activated = fusions.weighted_bias_swiglu_impl(gate_up, None, weights)
        if has_gradients:
            activated.sum().backward()

    torch.compiler.reset()
    counts = []
    for has_gradients in (False, True, False, True):  # the reference, an epoch, and both again
        for num_rows in ROWS:
            run(num_rows, has_gradients=has_gradients)
        counts.append(compiled.total())
    assert counts[0] < counts[1] == counts[2] == counts[3]
    limit = torch._dynamo.config.recompile_limit
    assert 2 <= max(compiled.values()) < limit, compiled
