"""Drawing tokens: filters by hand, the CDF inverted at chosen uniforms, Philox against its own paper."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from spin_megatron.generation.engine import Sampling
from spin_megatron.generation.sampling import draw_tokens, invert_cdf, keep_top_k, keep_top_p, row_uniforms

MASK = 2**64 - 1


def sampling(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    return Sampling(temperature, top_k, top_p, max_new_tokens=8, eos_ids=(0,))


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 in plain integers, after Salmon et al. (SC 2011), section 4.3."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(product1 >> 64) ^ c[1] ^ k[0], product1 & MASK, (product0 >> 64) ^ c[3] ^ k[1], product0 & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def test_the_plain_philox_gives_the_published_known_answer() -> None:
    # Random123's kat_vectors: philox4x64 10 rounds, counter 0, key 0.
    assert philox4x64([0] * 4, [0] * 2) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


@pytest.mark.parametrize("seed", [0, 12345, 2**63 - 1])
def test_row_uniforms_are_philox_keyed_by_the_seed(seed: int) -> None:
    # numpy counts up before each block of four, so the first block is that of counter 1.
    raw = philox4x64([1, 0, 0, 0], [seed, 0]) + philox4x64([2, 0, 0, 0], [seed, 0])
    assert row_uniforms(seed, 7).tolist() == [(value >> 11) / 2**53 for value in raw[:7]]


def test_row_uniforms_do_not_depend_on_how_many_are_asked_for() -> None:
    assert row_uniforms(5, 3).tolist() == row_uniforms(5, 100)[:3].tolist()
    assert np.all((row_uniforms(5, 1000) >= 0) & (row_uniforms(5, 1000) < 1))


# p = (0.1, 0.2, 0.3, 0.4): cumulative 0.1, 0.3, 0.6, 1.
LOGITS = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 2), (0.5999, 2), (0.6001, 3), (1 - 2**-53, 3)],
)
def test_a_uniform_picks_the_token_whose_part_of_the_cdf_it_falls_into(uniform: float, token: int) -> None:
    assert draw_tokens(LOGITS[None], torch.tensor([uniform], dtype=torch.float64), sampling()).tolist() == [token]


def test_temperature_one_half_squares_the_probabilities() -> None:
    # p^2 = (1, 4, 9, 16) / 30: cumulative 1/30, 5/30, 14/30.
    edges = [1 / 30, 5 / 30, 14 / 30]
    uniforms = torch.tensor([edge + sign * 1e-6 for edge in edges for sign in (-1, 1)], dtype=torch.float64)
    tokens = draw_tokens(LOGITS.expand(6, 4), uniforms, sampling(temperature=0.5))
    assert tokens.tolist() == [0, 1, 1, 2, 2, 3]


def test_top_k_keeps_the_largest_and_renormalises() -> None:
    # Of (0.1, 0.2, 0.3, 0.4) the two largest: 3/7 and 4/7 in token order.
    uniforms = torch.tensor([0.0, 3 / 7 - 1e-6, 3 / 7 + 1e-6], dtype=torch.float64)
    assert draw_tokens(LOGITS.expand(3, 4), uniforms, sampling(top_k=2)).tolist() == [2, 2, 3]


def test_top_k_keeps_ties_with_the_last() -> None:
    kept = keep_top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]]), 2)
    assert kept.tolist() == [[-math.inf, 3.0, 2.0, 2.0, -math.inf]]


def test_top_k_zero_is_off() -> None:
    logits = torch.tensor([[1.0, 3.0]])
    assert keep_top_k(logits, 0) is logits
    assert keep_top_k(logits, 5) is logits


@pytest.mark.parametrize(("top_p", "kept"), [(0.39, [3]), (0.41, [2, 3]), (0.69, [2, 3]), (0.71, [1, 2, 3]), (0.95, [0, 1, 2, 3])])
def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass(top_p: float, kept: list[int]) -> None:
    # Descending 0.4, 0.3, 0.2, 0.1: cumulative 0.4, 0.7, 0.9, 1.
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    assert keep_top_p(probabilities, top_p)[0].nonzero()[:, 0].tolist() == kept


def test_top_p_after_top_k_measures_the_mass_among_what_top_k_kept() -> None:
    # Top 3: 2/9, 3/9, 4/9. Nucleus of 0.5 needs 4/9 + 3/9; without top_k it would need 0.4 + 0.3 as well, of 0.75 not.
    uniforms = torch.tensor([0.0, 3 / 7 - 1e-6, 3 / 7 + 1e-6], dtype=torch.float64)
    assert draw_tokens(LOGITS.expand(3, 4), uniforms, sampling(top_k=3, top_p=0.75)).tolist() == [2, 2, 3]
    assert draw_tokens(LOGITS[None], uniforms[:1], sampling(top_p=0.75)).tolist() == [1]


def test_a_nucleus_may_be_as_wide_as_the_vocabulary() -> None:
    # 3000 equal tokens: the nucleus of 0.5 reaches 1500 tokens by mass, and ties keep them all.
    flat = torch.full((1, 3000), 1 / 3000, dtype=torch.float64)
    assert int((keep_top_p(flat, 0.5) > 0).sum()) == 3000
    # Falling probabilities without ties: exactly the head of the needed length stays.
    weights = torch.linspace(2, 1, 3000, dtype=torch.float64)
    probabilities = (weights / weights.sum())[None]
    needed = int((probabilities[0].cumsum(0) < 0.9).sum()) + 1
    assert keep_top_p(probabilities, 0.9)[0].nonzero()[:, 0].tolist() == list(range(needed))


def test_filters_agree_with_the_warpers_of_transformers() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(20, 500, generator=torch.Generator().manual_seed(1))
    ours = keep_top_p(torch.softmax(keep_top_k(logits / 0.7, 50), -1, dtype=torch.float64), 0.9) > 0
    theirs = logits
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(50), TopPLogitsWarper(0.9)):
        theirs = warper(None, theirs)
    assert torch.equal(ours, theirs > -math.inf)
    assert 20 < int(ours.sum()) < 20 * 50


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64).expand(4, 5)
    uniforms = torch.tensor([0.0, 0.4999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert invert_cdf(weights, uniforms).tolist() == [1, 1, 3, 3]


def test_the_largest_uniform_never_falls_past_the_end() -> None:
    # Totals of every size and mantissa, powers of two and their neighbours among them.
    totals = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(40).sub(20).exp2()
    powers = torch.tensor([2.0**-3, 1.0, 2.0], dtype=torch.float64)
    totals = torch.cat([totals, powers, torch.nextafter(powers, powers * 2), torch.nextafter(powers, powers / 2)])
    largest = torch.full_like(totals, 1 - 2**-53)
    assert set(invert_cdf(totals[:, None], largest).tolist()) == {0}


def test_temperature_zero_is_greedy_and_takes_no_uniform() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 4.9]])
    assert draw_tokens(logits, torch.tensor([0.99, 0.99], dtype=torch.float64), sampling(temperature=0.0)).tolist() == [1, 0]


def test_a_tiny_temperature_does_not_overflow() -> None:
    logits = torch.tensor([[0.0, 80.0, 79.0]])
    assert draw_tokens(logits, torch.tensor([0.999], dtype=torch.float64), sampling(temperature=1e-30)).tolist() == [1]


def test_draws_over_a_grid_of_uniforms_have_exactly_the_model_s_frequencies() -> None:
    # Midpoints of 1000 equal cells: each token is drawn 1000 p times, up to the one cell its edges cut.
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = torch.bincount(draw_tokens(LOGITS.expand(1000, 4), uniforms, sampling()), minlength=4)
    assert counts.tolist() == [100, 200, 300, 400]


@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (0.8, 50, 0.9), (1.3, 0, 0.95)])
def test_a_row_s_draw_does_not_depend_on_the_rows_beside_it(settings: tuple[float, int, float]) -> None:
    # 1009 tokens: prime, so that rows do not start at a whole vector of any instruction set.
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(13, 1009, generator=generator)
    uniforms = torch.rand(13, generator=generator, dtype=torch.float64)
    together = draw_tokens(logits, uniforms, sampling(*settings))
    alone = [int(draw_tokens(logits[row : row + 1], uniforms[row : row + 1], sampling(*settings))) for row in range(13)]
    assert together.tolist() == alone
    probabilities = torch.softmax(logits, -1, dtype=torch.float64)
    assert all(torch.equal(probabilities[row], torch.softmax(logits[row : row + 1], -1, dtype=torch.float64)[0]) for row in range(13))


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# The vocabularies of SmolLM2 and GPT-2; the second is prime.
@pytest.mark.parametrize("vocab_size", [49152, 50257])
@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (0.8, 500, 0.9), (1.3, 0, 0.95)])
def test_draws_are_those_of_float64_with_any_number_of_threads(
    settings: tuple[float, int, float], vocab_size: int, restored_threads: None
) -> None:
    temperature, top_k, top_p = settings
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(24, vocab_size, generator=generator)
    uniforms = torch.rand(24, generator=generator, dtype=torch.float64)
    found = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        found.append(draw_tokens(logits, uniforms, sampling(*settings)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    # The same in float64 and straight: sort, filter, one cumulative sum along the vocabulary.
    falling, order = torch.softmax(logits.double() / temperature, -1).sort(-1, descending=True)
    falling[:, top_k or vocab_size :] = 0
    falling /= falling.sum(-1, keepdim=True)
    falling[falling.cumsum(-1) - falling >= top_p] = 0
    kept = torch.zeros_like(falling).scatter(1, order, falling)
    cdf = (kept / kept.sum(-1, keepdim=True)).cumsum(-1)
    drawn = found[0][:, None]
    above, below = cdf.gather(1, drawn)[:, 0], (cdf - kept / kept.sum(-1, keepdim=True)).gather(1, drawn)[:, 0]
    assert bool((kept.gather(1, drawn) > 0).all())
    # Probabilities in fp32 are right to 1e-7 of themselves; the uniform may lie as far outside the token's part of the CDF.
    assert float(torch.maximum(below - uniforms, uniforms - above).max()) < 3e-7


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (0.7, 1, 0.9), (0.0, 0, 1.0)])
def test_broken_logits_are_refused(settings: tuple[float, int, float], broken: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, broken]])
    with pytest.raises(ValueError, match="NaN or infinity"):
        draw_tokens(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), sampling(*settings))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"eos_ids": ()}, "eos_ids"),
    ],
)
def test_sampling_settings_out_of_range_are_refused_by_name(settings: dict[str, object], name: str) -> None:
    usual = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 4, "eos_ids": (2,)}
    with pytest.raises(ValueError, match=name):
        Sampling(**(usual | settings))  # type: ignore[arg-type]
