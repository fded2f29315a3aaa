"""What `train.precision` may be, and what each choice asks of the model, the packs and the GPU.

With FP8 the linear layers of the decoder (QKV, projection, both of the MLP and the experts) multiply in FP8. Weights, embedding,
norms, attention's core and the head stay bf16, sums of the optimizer, log-probs and losses fp32.

    fp8-blockwise   one scale per 1x128 activations and 128x128 weights: a token's numbers never depend on its neighbours in the
                    pack. Hopper; Blackwell computes it with the scales of MXFP8.
    fp8-tensorwise  one scale a tensor, from the tensor's own maximum in this pass.
    mxfp8           one scale per 32 numbers; Blackwell.

Delayed scaling takes its scales from the maxima of earlier passes. The reference's passes and the policy's come at different times,
so the same weights and the same pack would be quantised differently, and margins would start with that noise instead of at 0.
Sources: transformer_engine/common/recipe, transformer_engine/pytorch/quantization.py (which GPUs), utils.py (assert_dim_for_fp8_exec)
and tensor/*_tensor.py (is_quantizable) of release 2.20.
"""

from dataclasses import dataclass
from typing import Literal

from spin_megatron.plan.shape import ModelShape, ParallelLayout

PrecisionName = Literal["fp32", "bf16", "fp8-blockwise", "fp8-tensorwise", "mxfp8"]


@dataclass(frozen=True)
class Precision:
    """A choice of `train.precision`.

    dtype: of the weights, and of everything that is not multiplied in FP8.
    fp8_recipe, fp8_format: Megatron Core's TransformerConfig.fp8_recipe and .fp8; None: no FP8.
    num_tokens, num_features: what the rows of a rank's activations and the sizes of its matrices must be multiples of.
    capability: least CUDA compute capability.
    """

    name: PrecisionName
    dtype: Literal["float32", "bfloat16"]
    fp8_recipe: str | None = None
    fp8_format: str | None = None
    num_tokens: int = 1
    num_features: int = 1
    capability: tuple[int, int] = (0, 0)


# Formats are those Transformer Engine's recipes default to. Blocks of 128 tokens are scaled for the weights' gradient; with whole
# blocks in every rank's share, sequence-parallel ranks gather FP8 and not bf16.
PRECISIONS: dict[PrecisionName, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp32", "float32"),
        Precision("bf16", "bfloat16"),
        Precision("fp8-blockwise", "bfloat16", "blockwise", "e4m3", num_tokens=128, num_features=16, capability=(9, 0)),
        Precision("fp8-tensorwise", "bfloat16", "tensorwise", "hybrid", num_tokens=16, num_features=16, capability=(8, 9)),
        Precision("mxfp8", "bfloat16", "mxfp8", "e4m3", num_tokens=32, num_features=32, capability=(10, 0)),
    )
}

# What people write, and why it is none of the above.
REFUSED = {
    "fp8-delayed": (
        "delayed scaling takes its scales from earlier passes, so the reference theta_t and the policy would be quantised differently and "
        'margins would not start at 0; use "fp8-blockwise" or "fp8-tensorwise" on Hopper, "mxfp8" on Blackwell'
    ),
    "fp8": 'it names no recipe; use "fp8-blockwise" on Hopper (or "fp8-tensorwise"), "mxfp8" on Blackwell',
}


def check_precision(
    name: PrecisionName, shape: ModelShape, layout: ParallelLayout, *, pack_tokens: int, num_bf16_end_layers: int = 0
) -> None:
    """Refuse what the FP8 kernels cannot multiply. Nothing is asked of fp32 and bf16.

    Raises:
        ValueError: names train.pack_tokens, train.num_bf16_end_layers, parallel.expert or the model's size, and the cure.
    """
    precision = PRECISIONS[name]
    if precision.fp8_recipe is None:
        return
    ranks = layout.context * (layout.tensor if layout.sequence else 1)
    multiple = precision.num_tokens * ranks
    if pack_tokens % multiple:
        raise ValueError(
            f"train.pack_tokens={pack_tokens} is not a multiple of {multiple}: {name} needs a multiple of {precision.num_tokens} tokens on "
            f"each of the {ranks} ranks that share a pack; use {-(-pack_tokens // multiple) * multiple}."
        )
    for what, size in _matrix_sizes(shape, layout).items():
        if size % precision.num_features:
            raise ValueError(
                f'train.precision="{name}" multiplies matrices whose sizes are multiples of {precision.num_features}, and the model has '
                f'{what} {size} on a rank with parallel.tensor={layout.tensor}; use a smaller parallel.tensor, or "bf16".'
            )
    if layout.expert > 1 and name == "fp8-tensorwise":
        raise ValueError(
            f'parallel.expert={layout.expert} with train.precision="{name}": the tokens that meet at an expert share one scale, and from '
            "the second epoch on other packs meet there than in the reference pass, which margins would show; use "
            '"fp8-blockwise", or parallel.expert = 1.'
        )
    most = min(layout.layers_of_rank(shape.num_layers, rank) for rank in (0, layout.pipeline - 1))
    if num_bf16_end_layers > most:
        raise ValueError(
            f"train.num_bf16_end_layers={num_bf16_end_layers} is more than the {most} layers of a pipeline stage (Megatron Core's limit); "
            "use at most that."
        )


def _matrix_sizes(shape: ModelShape, layout: ParallelLayout) -> dict[str, int]:
    """Rows and columns of the decoder's matrices on one rank."""
    tensor = layout.tensor
    sizes = {
        "hidden size": shape.hidden_size,
        "rows of QKV": (shape.num_heads + 2 * max(shape.num_kv_heads, tensor)) * shape.head_dim // tensor,
        "columns of the attention's projection": shape.num_heads * shape.head_dim // tensor,
    }
    if shape.expert_ffn_hidden_size is None:
        return sizes | {"FFN size": shape.ffn_hidden_size // tensor}
    return sizes | {"FFN size of an expert": shape.expert_ffn_hidden_size // tensor}


def check_capability(name: PrecisionName, capability: tuple[int, int] | None, *, where: str) -> None:
    """Refuse a GPU without the tensor cores for it, or a machine without a GPU.

    Args:
        capability: CUDA compute capability; None: no NVIDIA GPU.
        where: the GPU's or the machine's name, for the message.

    Raises:
        ValueError: names train.precision and what to use there.
    """
    least = PRECISIONS[name].capability
    if least == (0, 0) or (capability is not None and capability >= least):
        return
    found = "no NVIDIA GPU" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
    possible = [f'"{other.name}"' for other in PRECISIONS.values() if other.capability <= (capability or (0, 0))]
    cluster = "; for a cluster name its GPU in slurm.gpu" if capability is None else ""
    raise ValueError(
        f'train.precision="{name}" needs a GPU of compute capability {least[0]}.{least[1]} or later and Transformer Engine, '
        f"and {where} has {found}; use {', '.join(possible)}{cluster}."
    )
