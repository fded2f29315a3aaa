"""Drawing tokens: one uniform a step, inverted through the CDF in token order.

A row's uniforms come from a counter-based generator (Philox4x64-10, Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011) keyed by the row's seed; step i uses the i-th. What a row draws therefore does not depend on which rows
are computed beside it, and costs one number a step instead of noise over the vocabulary.

Shape suffixes: N rows, V vocabulary, C blocks of B tokens.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from spin_megatron.generation.engine import Sampling

_BLOCK = 256


def row_uniforms(seed: int, num_steps: int) -> NDArray[np.float64]:
    """num_steps uniforms in [0, 1) of 53 bits, the same for every prefix length.

    Raw 64-bit outputs are used, which numpy keeps stable across releases (its Generator's floats are not promised).
    """
    raw = np.random.Philox(key=seed).random_raw(num_steps)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_tokens(logits_NV: Tensor, uniforms_N: Tensor, sampling: Sampling) -> Tensor:
    """One token id a row, int64 [N].

    Every step works on each row alone, so that the result of a row does not depend on N.

    Args:
        logits_NV: any float dtype; probabilities are fp32.
        uniforms_N: float64 in [0, 1); ignored when sampling is greedy.

    Raises:
        ValueError: a row has NaN or infinite logits.
    """
    logits_NV = logits_NV.float()  # bf16 has 8 bits: probabilities of neighbours would merge
    if sampling.temperature == 0:
        largest_N, tokens_N = logits_NV.max(-1)
        _check_finite(largest_N)
        return tokens_N
    if sampling.temperature != 1:
        # The peak goes first, so that no temperature can overflow.
        logits_NV = (logits_NV - logits_NV.amax(-1, keepdim=True)).div_(sampling.temperature)
    probabilities_NV = torch.softmax(keep_top_k(logits_NV, sampling.top_k), -1)
    _check_finite(probabilities_NV[:, 0])  # one NaN or infinity makes its whole row NaN
    return invert_cdf(keep_top_p(probabilities_NV, sampling.top_p), uniforms_N)


def _check_finite(values_N: Tensor) -> None:
    if not torch.isfinite(values_N).all():
        raise ValueError("the model's logits hold NaN or infinity; its weights are broken (a diverged training step?).")


def keep_top_k(logits_NV: Tensor, top_k: int) -> Tensor:
    """Set all but each row's top_k largest logits to -inf; ties with the last of them stay. 0 is off."""
    if top_k == 0 or top_k >= logits_NV.shape[-1]:
        return logits_NV
    floor_N1 = logits_NV.topk(top_k, -1).values[:, -1:]
    return logits_NV.masked_fill(logits_NV < floor_N1, -torch.inf)


def keep_top_p(probabilities_NV: Tensor, top_p: float) -> Tensor:
    """Zero all but the nucleus: the fewest most probable tokens whose mass reaches top_p; ties with the last stay. 1 is off.

    The result is not normalised; `invert_cdf` does not need it to be.
    """
    if top_p >= 1:
        return probabilities_NV
    falling_NV = _sorted(probabilities_NV).flip(-1)
    reached_N1 = (falling_NV.cumsum(-1, dtype=torch.float64) < top_p).sum(-1, keepdim=True)
    # Where rounding keeps the whole mass below top_p, everything is in the nucleus.
    floors_N1 = falling_NV.gather(1, reached_N1.clamp(max=falling_NV.shape[1] - 1))
    return probabilities_NV.masked_fill(probabilities_NV < floors_N1, 0.0)


def _sorted(values_NV: Tensor) -> Tensor:
    """Each row's values, ascending."""
    if values_NV.device.type == "cpu":  # numpy sorts with vector instructions: 20 times as fast as torch 2.13 for 49152 tokens
        return torch.from_numpy(np.sort(values_NV.numpy(), -1))
    return values_NV.sort(-1).values


def invert_cdf(weights_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """The first token, in token order, whose cumulative weight exceeds u times the total; int64 [N].

    Weights are summed in their own dtype over blocks of tokens, the sums in float64, and so are the weights of the one block that the
    target falls into. A token of weight 0 is never returned: the cumulative weight does not rise there.
    """
    missing = -weights_NV.shape[1] % _BLOCK
    padded_NV = F.pad(weights_NV, (0, missing)) if missing else weights_NV  # fresh megabytes cost more than the sums
    blocks_NCB = padded_NV.unflatten(1, (-1, _BLOCK))
    cumulative_NC = blocks_NCB.sum(-1).cumsum(-1, dtype=torch.float64)
    # u <= 1 - 2^-53, so the product is at least half a unit in the last place below the total and cannot round up to it.
    target_N1 = (uniforms_N * cumulative_NC[:, -1])[:, None]
    block_N1 = torch.searchsorted(cumulative_NC, target_N1, right=True)
    before_N1 = F.pad(cumulative_NC, (1, 0)).gather(1, block_N1)
    rows_N = torch.arange(len(weights_NV), device=weights_NV.device)
    within_NB = before_N1 + blocks_NCB[rows_N, block_N1[:, 0]].cumsum(-1, dtype=torch.float64)
    # The block's own sum may be rounded up; a target beyond its cumulative weights belongs to its last token of a weight.
    last_N1 = (within_NB < within_NB[:, -1:]).sum(-1, keepdim=True)
    place_N1 = torch.minimum(torch.searchsorted(within_NB, target_N1, right=True), last_N1)
    return (block_N1 * _BLOCK + place_N1)[:, 0]
