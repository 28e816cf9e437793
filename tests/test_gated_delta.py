"""The writers of the recurrent memory against the formula, values and gradients, on odd lengths."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arl2.gated_delta import (
    UnitLowerInverse,
    WriteBackend,
    fla_installed,
    gated_delta_write,
    states_between,
    write_chunked,
    write_fla,
    write_recurrent,
)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(
    tokens: int, dtype: torch.dtype = torch.float64, device: str = "cpu", heads: int = 2, dim: int = 16
) -> Inputs:
    """State, keys, values, log decays from slow to fast, write strengths in (0, 2)."""
    like = {"dtype": dtype, "device": device}
    state = torch.randn(2, heads, dim, dim, **like)
    k = F.normalize(torch.randn(2, tokens, heads, dim, **like), dim=-1)
    v = torch.randn(2, tokens, heads, dim, **like)
    rate = torch.logspace(-3, 0.5, heads, **like)
    log_decay = -rate * F.softplus(torch.randn(2, tokens, heads, **like))
    beta = 2 * torch.rand(2, tokens, heads, **like)
    return state, k, v, log_decay, beta


@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 65, 200])
def test_chunked_equals_recurrent_in_float64(tokens: int) -> None:
    arguments = inputs(tokens)
    torch.testing.assert_close(write_chunked(*arguments), write_recurrent(*arguments), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 5, 32])
def test_the_chunk_size_does_not_matter(chunk: int) -> None:
    arguments = inputs(37)
    torch.testing.assert_close(
        write_chunked(*arguments, chunk=chunk), write_recurrent(*arguments), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("tokens", [70, 200])  # two chunks, and so many that the backward pass computes them again
def test_chunked_gradients_equal_recurrent_ones(tokens: int) -> None:
    gradients = []
    for writer in (write_recurrent, write_chunked):
        torch.manual_seed(1)
        arguments = tuple(x.requires_grad_() for x in inputs(tokens))
        weight = torch.randn_like(arguments[0])
        (writer(*arguments) * weight).sum().backward()
        gradients.append([x.grad for x in arguments])
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-8, atol=1e-10)


def test_float32_stays_close_to_float64_over_a_whole_block() -> None:
    # A block of the 1.3B model has 4680 tokens.
    arguments = inputs(4680, heads=3, dim=32)
    exact = write_recurrent(*arguments)
    single = write_chunked(*(x.float() for x in arguments))
    error = (single.double() - exact).norm() / exact.norm()
    assert error < 2e-6, error


def test_fast_decay_neither_overflows_nor_leaves_anything() -> None:
    state, k, v, log_decay, beta = inputs(100)
    out = write_chunked(state, k, v, torch.full_like(log_decay, -80.0), beta)
    expected = beta[:, -1, :, None, None] * k[:, -1, :, :, None] * v[:, -1, :, None, :]
    torch.testing.assert_close(out, expected)


def test_writing_in_two_parts_equals_writing_at_once() -> None:
    state, *tokens = inputs(90)
    first, second = [x[:, :41] for x in tokens], [x[:, 41:] for x in tokens]
    torch.testing.assert_close(write_chunked(write_chunked(state, *first), *second), write_chunked(state, *tokens))


@pytest.mark.parametrize("blocks", [0, 1, 5])
def test_states_between_blocks_are_those_of_writing_block_after_block(blocks: int) -> None:
    state, *tokens = inputs(15 * blocks)
    cut = [x.unflatten(1, (blocks, 15)) for x in tokens]
    expected = [state]
    for block in range(blocks):
        expected.append(write_recurrent(expected[-1], *(x[:, block] for x in cut)))
    torch.testing.assert_close(states_between(state, *cut), torch.stack(expected, 1), rtol=1e-10, atol=1e-12)


def test_the_inverse_looks_below_the_diagonal_only_and_has_its_gradient() -> None:
    lower = torch.randn(2, 5, 5, dtype=torch.float64)
    full = torch.eye(5, dtype=torch.float64) + lower.tril(-1)
    torch.testing.assert_close(UnitLowerInverse.apply(lower) @ full, torch.eye(5, dtype=torch.float64).expand(2, 5, 5))
    assert torch.autograd.gradcheck(UnitLowerInverse.apply, lower.requires_grad_())


def test_the_given_state_is_not_changed() -> None:
    arguments = inputs(10)
    before = arguments[0].clone()
    for backend in (WriteBackend.AUTO, WriteBackend.RECURRENT, WriteBackend.CHUNKED):
        gated_delta_write(*arguments, backend=backend)
    assert torch.equal(arguments[0], before)


@pytest.mark.gpu
@pytest.mark.skipif(not fla_installed(), reason="needs flash-linear-attention")
@pytest.mark.parametrize("tokens", [100, 4680])
def test_fla_equals_the_reference(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state, *rest = inputs(tokens, torch.float32, "cuda", heads=12, dim=128)
    half = [x.bfloat16() for x in rest[:2]] + rest[2:]
    plain, fast = write_chunked(state, *half), write_fla(state, *half)
    error = ((fast - plain).norm() / plain.norm()).item()
    # bfloat16 rounds to 2⁻⁹; the kernel rounds intermediate products too.
    assert error < 0.02, error
    # Without the output it is the same state: same kernels, same order.
    monkeypatch.setattr("arl2.gated_delta.fla_parts_known", lambda: False)
    torch.testing.assert_close(fast, write_fla(state, *half), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not fla_installed(), reason="needs flash-linear-attention")
@pytest.mark.parametrize("tokens", [100, 4680])
def test_the_default_writer_has_the_gradients_of_the_reference(tokens: int) -> None:
    state, *rest = inputs(tokens, torch.float32, "cuda", heads=12, dim=128)
    half = [x.bfloat16() for x in rest[:2]] + rest[2:]
    results = []
    for writer in (write_chunked, gated_delta_write):
        arguments = [state.clone().requires_grad_(), *(x.clone().requires_grad_() for x in half)]
        torch.manual_seed(1)
        out = writer(*arguments)
        (out * torch.randn_like(out)).sum().backward()
        results.append([x.grad.float() for x in arguments])
    for name, plain, fast in zip(("state", "k", "v", "log decay", "beta"), *results, strict=True):
        error = ((fast - plain).norm() / plain.norm()).item()
        assert error < 0.02, (name, error)


@pytest.mark.gpu
def test_chunked_on_the_gpu_equals_float64() -> None:
    arguments = inputs(4680, torch.float64, "cuda", heads=4, dim=128)
    exact = write_chunked(*arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    error = (write_chunked(*(x.float() for x in arguments)).double() - exact).norm() / exact.norm()
    assert error < 2e-6, error.item()
