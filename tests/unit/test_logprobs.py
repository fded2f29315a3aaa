"""The vocab-parallel log-probabilities on one process, against float64 log_softmax and autograd."""

import pytest
import torch

from spin_megatron.objective.logprobs import IGNORED, sequence_sums, vocab_parallel_logprobs


def _case(num_rows, hidden_size, vocab, *, dtype=torch.float32, seed=0, shift=0.0):
    """Hidden states, weights, targets (each third row ignored) and a random gradient per row."""
    generator = torch.Generator().manual_seed(seed)
    hidden_RH = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    weight_VH = torch.randn(vocab, hidden_size, generator=generator).to(dtype)
    if shift:  # all logits are shift * (1 + noise): one hidden coordinate is 1 and its weight the shift
        hidden_RH[:, 0], weight_VH[:, 0] = 1.0, shift
    targets_R = torch.randint(0, vocab, (num_rows,), generator=generator)
    targets_R[::3] = IGNORED
    gradient_R = torch.randn(num_rows, generator=generator)
    return hidden_RH, weight_VH, targets_R, gradient_R


def _oracle(hidden_RH, weight_VH, targets_R, gradient_R, *, vocab_size=None, temperature=1.0):
    """Value and gradients by float64 log_softmax over the true vocabulary; nothing of the implementation is used."""
    hidden = hidden_RH.detach().double().requires_grad_()
    weight = weight_VH.detach().double().requires_grad_()
    logp_RV = (hidden @ weight[:vocab_size].t() / temperature).log_softmax(-1)
    logp_R = torch.where(targets_R < 0, 0.0, logp_RV.gather(1, targets_R.clamp(min=0)[:, None])[:, 0])
    logp_R.backward(gradient_R.double())
    return logp_R.detach(), hidden.grad, weight.grad


def _ours(hidden_RH, weight_VH, targets_R, gradient_R, **options):
    hidden, weight = hidden_RH.detach().clone().requires_grad_(), weight_VH.detach().clone().requires_grad_()
    options = {"group": None, "vocab_start": 0, "vocab_size": weight_VH.shape[0]} | options
    logp_R = vocab_parallel_logprobs(hidden, weight, targets_R, **options)
    logp_R.backward(gradient_R.to(logp_R.dtype))
    return logp_R.detach(), hidden.grad, weight.grad


def _assert_close(ours, oracle, relative):
    """Largest difference against the largest entry of the oracle: absolute noise of fp32 sums, not per-element luck."""
    for name, got, expected in zip(("logp", "dHidden", "dWeight"), ours, oracle, strict=True):
        difference = (got.double() - expected).abs().max().item()
        assert difference <= relative * max(expected.abs().max().item(), 1.0), f"{name}: {difference}"


# 1009 is prime, 1025 = 1024 + 1, 16032 = 128256 / 8: none is a multiple of the chunks.
TILES = [(4096, 1024), (256, 5), (1000, 37)]


@pytest.mark.parametrize(("vocab", "vocab_chunk", "row_block"), [(v, *tile) for v in (1009, 1025, 16032) for tile in TILES] + [(7, 1, 37)])
def test_values_and_gradients_equal_float64_for_any_tiling(vocab, vocab_chunk, row_block):
    case = _case(37, 16, vocab)
    ours = _ours(*case, vocab_chunk=vocab_chunk, row_block=row_block)
    _assert_close(ours, _oracle(*case), 2e-6)  # fp32 sums of 16 products and of `vocab` exponentials


def test_gradients_agree_with_finite_differences():
    hidden_RH, weight_VH, targets_R, _ = _case(5, 4, 11, dtype=torch.float64)
    hidden_RH.requires_grad_()
    weight_VH.requires_grad_()

    def function(hidden, weight):
        options = {"group": None, "vocab_start": 0, "vocab_size": 10, "temperature": 0.7, "vocab_chunk": 3, "row_block": 2}
        return vocab_parallel_logprobs(hidden, weight, targets_R, **options)

    assert torch.autograd.gradcheck(function, (hidden_RH, weight_VH))


@pytest.mark.parametrize("shift", [-300.0, -1e4, 300.0])
def test_logits_that_are_all_far_below_or_above_zero_do_not_underflow(shift):
    hidden_RH, weight_VH, targets_R, gradient_R = _case(9, 8, 50, shift=shift)
    logp_R, hidden_grad, weight_grad = _ours(hidden_RH, weight_VH, targets_R, gradient_R, vocab_chunk=16)
    expected = _oracle(hidden_RH, weight_VH, targets_R, gradient_R)
    # A logit of 1e4 has an fp32 spacing of 1e-3, so the logits themselves allow no better than a few of these.
    spacing = max(abs(shift) * 1.2e-7, 1e-6)
    assert (logp_R.double() - expected[0]).abs().max() < 4 * spacing
    assert (hidden_grad[:, 1:].double() - expected[1][:, 1:]).abs().max() < 40 * spacing
    assert (weight_grad.double() - expected[2]).abs().max() < 40 * spacing
    assert torch.isfinite(hidden_grad).all()


def test_the_padded_vocabulary_tail_counts_for_nothing():
    hidden_RH, weight_VH, targets_R, gradient_R = _case(13, 8, 64)
    targets_R = targets_R.clamp(max=49)
    weight_VH[50:] = 100.0  # would win every softmax
    ours = _ours(hidden_RH, weight_VH, targets_R, gradient_R, vocab_size=50, vocab_chunk=16)
    _assert_close(ours, _oracle(hidden_RH, weight_VH, targets_R, gradient_R, vocab_size=50), 2e-6)
    assert ours[2][50:].eq(0).all()


def test_ignored_rows_give_exactly_zero_even_with_a_nan_gradient_from_above():
    hidden_RH, weight_VH, targets_R, gradient_R = _case(12, 8, 40)
    gradient_R[targets_R == IGNORED] = float("nan")
    logp_R, hidden_grad, weight_grad = _ours(hidden_RH, weight_VH, targets_R, gradient_R, vocab_chunk=16)
    assert logp_R[::3].eq(0).all()
    assert hidden_grad[::3].eq(0).all()
    kept = targets_R != IGNORED
    expected = _oracle(hidden_RH[kept], weight_VH, targets_R[kept], gradient_R[kept])
    _assert_close((logp_R[kept], hidden_grad[kept], weight_grad), expected, 2e-6)


def test_a_row_used_twice_with_two_targets_receives_both_gradients():
    hidden_RH, weight_VH, _, gradient_R = _case(2, 8, 40)
    hidden_RH[1] = hidden_RH[0]  # the last prompt token predicts the first token of y and of y'
    targets_R = torch.tensor([3, 17])
    shared = hidden_RH[:1].clone().requires_grad_()
    logp_R = vocab_parallel_logprobs(shared[[0, 0]], weight_VH, targets_R, group=None, vocab_start=0, vocab_size=40)
    logp_R.backward(gradient_R)
    expected = _oracle(hidden_RH, weight_VH, targets_R, gradient_R)[1].sum(0)
    assert (shared.grad[0].double() - expected).abs().max() < 2e-6


def test_temperature_divides_the_logits():
    case = _case(11, 8, 45)
    _assert_close(_ours(*case, temperature=0.3, vocab_chunk=16), _oracle(*case, temperature=0.3), 4e-6)


def test_bf16_inputs_are_scored_from_fp32_logits():
    hidden_RH, weight_VH, targets_R, gradient_R = _case(50, 64, 300, dtype=torch.bfloat16)
    logp_R, hidden_grad, weight_grad = _ours(hidden_RH, weight_VH, targets_R, gradient_R, vocab_chunk=128)
    oracle = _oracle(hidden_RH, weight_VH, targets_R, gradient_R)
    assert logp_R.dtype == torch.float32
    assert (logp_R.double() - oracle[0]).abs().max() < 1e-5  # bf16 logits of size 30 would be off by 0.06
    assert hidden_grad.dtype == weight_grad.dtype == torch.bfloat16
    for got, expected in ((hidden_grad, oracle[1]), (weight_grad, oracle[2])):  # one final rounding to 8 bits
        assert (got.double() - expected).abs().max() < 2**-8 * expected.abs().max()


def test_near_certain_tokens_keep_their_small_log_probability():
    weight_VH = torch.tensor([[1000.0], [990.0]])
    logp_R = vocab_parallel_logprobs(torch.ones(1, 1), weight_VH, torch.tensor([0]), group=None, vocab_start=0, vocab_size=2)
    # -log(1 + exp(-10)); maximum + log(sum) would have rounded it away at 1000 (fp32 spacing 6e-5).
    assert logp_R.item() == pytest.approx(-4.5398899e-05, rel=2e-3)


@pytest.mark.parametrize("main_grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_the_weight_gradient_is_added_to_main_grad(weight_dtype, main_grad_dtype):
    hidden_RH, weight_VH, targets_R, gradient_R = _case(12, 8, 40, dtype=weight_dtype)
    targets_R = targets_R.clamp(max=36)
    weight = torch.nn.Parameter(weight_VH.clone())
    weight.main_grad = torch.ones(40, 8, dtype=main_grad_dtype)
    for _ in range(2):  # two micro-batches add up
        logp_R = vocab_parallel_logprobs(hidden_RH, weight, targets_R, group=None, vocab_start=0, vocab_size=37, vocab_chunk=16)
        logp_R.backward(gradient_R)
    assert weight.grad is None
    expected = 1.0 + 2 * _oracle(hidden_RH, weight_VH, targets_R, gradient_R, vocab_size=37)[2]
    tolerance = 1e-5 if main_grad_dtype == torch.float32 else 2 * 2**-8  # bf16 sums round twice
    assert (weight.main_grad.double() - expected).abs().max() < tolerance * expected.abs().max()


def test_megatrons_ddp_hook_finds_a_dummy_gradient_and_the_flag():
    hidden_RH, weight_VH, targets_R, gradient_R = _case(6, 8, 40)
    weight = torch.nn.Parameter(weight_VH.clone())
    weight.main_grad = torch.zeros(40, 8)
    for lookup_follows in (False, True):  # a lookup of the same weight comes later in the backward, and returns the dummy then
        weight.grad, weight.lookup_follows = None, lookup_follows
        weight.grad_added_to_main_grad = False  # Megatron's DDP sets it on every parameter it wraps
        vocab_parallel_logprobs(hidden_RH, weight, targets_R, group=None, vocab_start=0, vocab_size=40).backward(gradient_R)
        assert weight.grad_added_to_main_grad
        assert (weight.grad is None) == lookup_follows
        if not lookup_follows:  # of the weight's size, and takes none of its memory
            assert weight.grad.shape == weight.shape
            assert weight.grad.is_sparse
            assert weight.grad._nnz() == 0


def test_no_rows_give_an_empty_result_whose_backward_still_runs():
    hidden = torch.zeros(0, 8, requires_grad=True)
    weight = torch.randn(40, 8, requires_grad=True)
    logp_R = vocab_parallel_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64), group=None, vocab_start=0, vocab_size=40)
    logp_R.sum().backward()
    assert logp_R.shape == (0,)
    assert hidden.grad.shape == (0, 8)
    assert weight.grad.eq(0).all()


def test_scoring_without_gradients_gives_the_same_bits_as_training():
    hidden_RH, weight_VH, targets_R, _ = _case(70, 16, 300)
    options = {"group": None, "vocab_start": 0, "vocab_size": 300, "vocab_chunk": 64, "row_block": 32}
    with torch.no_grad():
        scored_R = vocab_parallel_logprobs(hidden_RH, weight_VH, targets_R, **options)
    trained_R = vocab_parallel_logprobs(hidden_RH.clone().requires_grad_(), weight_VH, targets_R, **options)
    assert not scored_R.requires_grad
    assert torch.equal(scored_R, trained_R)


@pytest.mark.parametrize("target", [40, -2])
def test_a_target_outside_the_vocabulary_is_refused(target):
    with pytest.raises(ValueError, match="vocabulary from 0 to 39"):
        targets_R = torch.tensor([0, target])
        vocab_parallel_logprobs(torch.ones(2, 3), torch.ones(64, 3), targets_R, group=None, vocab_start=0, vocab_size=40)


@pytest.mark.parametrize("kept_bytes", [1, 3 * 4 * 32 * 64, 2**30])
def test_keeping_tiles_for_the_backward_changes_no_bit(kept_bytes):
    case = _case(70, 16, 300)
    tiles = {"vocab_chunk": 64, "row_block": 32, "temperature": 0.7}
    for kept, recomputed in zip(_ours(*case, kept_bytes=kept_bytes, **tiles), _ours(*case, kept_bytes=0, **tiles), strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize(("kept_bytes", "num_tiles"), [(0, 0), (3 * 4 * 32 * 64, 7), (2**30, 15)])
def test_no_more_tiles_are_kept_than_their_budget_allows(kept_bytes, num_tiles):
    # 3 row blocks (32, 32, 6) x 5 vocabulary chunks; memory for three full tiles holds two of them and then five of the short ones.
    hidden_RH, weight_VH, targets_R, gradient_R = _case(70, 16, 300)
    options = {"group": None, "vocab_start": 0, "vocab_size": 300, "vocab_chunk": 64, "row_block": 32, "kept_bytes": kept_bytes}
    logp_R = vocab_parallel_logprobs(hidden_RH.requires_grad_(), weight_VH, targets_R, **options)
    kept = list(logp_R.grad_fn.kept.values())
    assert len(kept) == num_tiles
    assert sum(logits_BC.nbytes for logits_BC in kept) <= kept_bytes
    logp_R.backward(gradient_R)
    assert not logp_R.grad_fn.kept


def test_a_second_backward_through_kept_tiles_gives_the_same_gradient():
    hidden_RH, weight_VH, targets_R, gradient_R = _case(20, 8, 100)
    hidden_RH.requires_grad_()
    logp_R = vocab_parallel_logprobs(hidden_RH, weight_VH, targets_R, group=None, vocab_start=0, vocab_size=100)
    first, second = (torch.autograd.grad(logp_R, hidden_RH, gradient_R, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_tensor_of_rows_times_vocabulary_is_ever_made():
    """Every tensor that any operator returns, forward and backward, is measured."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    case = _case(256, 4, 4096)
    with Watch():
        _ours(*case, vocab_chunk=128, row_block=64, kept_bytes=2**16)
    assert largest == 4096 * 4  # the weight and its gradient; a tile is 128 * 64, the logits would be 256 * 4096


def test_sequence_sums_add_contiguous_rows_and_pass_gradients_back():
    logp_R = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0], requires_grad=True)
    sums_Q = sequence_sums(logp_R, torch.tensor([2, 0, 3]))
    assert sums_Q.tolist() == [-3.0, 0.0, -28.0]
    sums_Q.backward(torch.tensor([10.0, 20.0, 30.0]))
    assert logp_R.grad.tolist() == [10.0, 10.0, 30.0, 30.0, 30.0]


def test_sequence_sums_round_a_long_response_only_once():
    logp_R = torch.full((3000,), -0.1)
    assert sequence_sums(logp_R, torch.tensor([3000])).item() == torch.tensor(3000 * logp_R[0].double().item()).float().item()


def test_sequence_sums_of_no_sequences_stay_connected():
    logp_R = torch.zeros(0, requires_grad=True)
    sums_Q = sequence_sums(logp_R, torch.zeros(0, dtype=torch.int64))
    assert sums_Q.shape == (0,)
    assert sums_Q.requires_grad
