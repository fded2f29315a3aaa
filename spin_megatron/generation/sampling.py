"""Drawing tokens: one uniform a step, inverted through the CDF in token order.

A row's uniforms come from a counter-based generator (Philox4x64-10, Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011) keyed by the row's seed; step i uses the i-th. What a row draws therefore does not depend on which rows
are computed beside it, and costs one number a step instead of noise over the vocabulary.

Shape suffixes: N rows, V vocabulary, C blocks of B tokens, K candidates.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from spin_megatron.generation.engine import Sampling

# The nucleus is nearly always found among this many tokens; a full sort of the vocabulary costs 10 times as much.
_NUCLEUS_CANDIDATES = 1024
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
        logits_NV: any float dtype; probabilities are fp32, their sums float64.
        uniforms_N: float64 in [0, 1); ignored when sampling is greedy.

    Raises:
        ValueError: a row has NaN or infinite logits.
    """
    logits_NV = logits_NV.float()  # bf16 has 8 bits: probabilities of neighbours would merge
    peak_N1 = logits_NV.amax(-1, keepdim=True)
    if not torch.isfinite(peak_N1).all():
        raise ValueError("the model's logits hold NaN or infinity; its weights are broken (a diverged training step?).")
    if sampling.temperature == 0:
        return logits_NV.argmax(-1)
    # The peak goes first, so that no temperature can overflow.
    scaled_NV = (logits_NV - peak_N1).div_(sampling.temperature)
    probabilities_NV = torch.softmax(keep_top_k(scaled_NV, sampling.top_k), -1)
    return invert_cdf(keep_top_p(probabilities_NV, sampling.top_p), uniforms_N)


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
    floors_N1 = torch.stack([_nucleus_floor(row_V, top_p) for row_V in probabilities_NV])[:, None]
    return probabilities_NV.masked_fill(probabilities_NV < floors_N1, 0.0)


def _nucleus_floor(probabilities_V: Tensor, top_p: float) -> Tensor:
    """The probability of the least probable token of the nucleus, a scalar."""
    vocab_size = probabilities_V.shape[0]
    for num_candidates in sorted({min(_NUCLEUS_CANDIDATES, vocab_size), vocab_size}):
        values_K = probabilities_V.topk(num_candidates).values
        mass_K = values_K.cumsum(0, dtype=torch.float64)
        reached = int(torch.searchsorted(mass_K, top_p))
        if reached < num_candidates:
            return values_K[reached]
    return values_K[-1]  # rounding kept the whole mass below top_p: everything is in the nucleus


def invert_cdf(weights_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """The first token, in token order, whose cumulative weight exceeds u times the total; int64 [N].

    Cumulative weights are float64, first over blocks of tokens and then within the block the target falls into: 6 times as
    fast as one sum along 49152 tokens. A token of weight 0 is never returned: the cumulative weight does not rise there.
    """
    missing = -weights_NV.shape[1] % _BLOCK
    padded_NV = F.pad(weights_NV, (0, missing)) if missing else weights_NV  # fresh megabytes cost more than the sums
    blocks_NCB = padded_NV.unflatten(1, (-1, _BLOCK))
    cumulative_NC = blocks_NCB.sum(-1, dtype=torch.float64).cumsum(-1)
    # u <= 1 - 2^-53, so the product is at least half a unit in the last place below the total and cannot round up to it.
    target_N1 = (uniforms_N * cumulative_NC[:, -1])[:, None]
    block_N1 = torch.searchsorted(cumulative_NC, target_N1, right=True)
    before_N1 = F.pad(cumulative_NC, (1, 0)).gather(1, block_N1)
    rows_N = torch.arange(len(weights_NV), device=weights_NV.device)
    within_NB = before_N1 + blocks_NCB[rows_N, block_N1[:, 0]].cumsum(-1, dtype=torch.float64)
    # The block's own sum may round below its cumulative weights' last; a target between the two belongs to its last token.
    last_N1 = (within_NB < within_NB[:, -1:]).sum(-1, keepdim=True)
    place_N1 = torch.minimum(torch.searchsorted(within_NB, target_N1, right=True), last_N1)
    return (block_N1 * _BLOCK + place_N1)[:, 0]
