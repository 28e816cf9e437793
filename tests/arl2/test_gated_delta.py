"""The writers of the recurrent memory against the formula, values and gradients, on odd lengths."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from arl2.distillation.trainer import products_in_tf32
from arl2.ops.gated_delta import (
    WriteBackend,
    chunk_size,
    fla_installed,
    gated_delta_write,
    states_between,
    write_chunked,
    write_fla,
    write_recomputed,
    write_recurrent,
)
from arl2.ops.tf32 import TF32_HALF, TF32_MASK, rounded
from arl2.ops.transitions import PlusDiagonal, Transitions, UnitLowerInverse

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


def test_chunks_are_full_where_they_can_be() -> None:
    assert chunk_size(4680, 64) == 72 and chunk_size(72, 64) == 72 and chunk_size(7, 64) == 7
    assert chunk_size(4672, 64) == 64  # 73 chunks
    assert max(-tokens % chunk_size(tokens, 64) for tokens in range(81, 999)) < 48


class ProductsInTF32(TorchDispatchMode):
    """Products as tensor cores of Hopper make them of float32: of the operands' first 19 bits, added in float32."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, args = torch.ops.aten, list(args)
        products = {aten.bmm.default: 0, aten.mm.default: 0, aten.baddbmm.default: 1, aten.baddbmm_.default: 1}
        if function in products:
            for place in range(products[function], products[function] + 2):
                bits = args[place].contiguous().view(torch.int32) & TF32_MASK
                args[place] = bits.view(args[place].shape).view(torch.float32)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products of float32 in TF32, and what is rounded for it."""
    monkeypatch.setattr("arl2.ops.tf32.products_round", lambda x: x.dtype is torch.float32)
    with ProductsInTF32():
        yield


def states_and_gradients(state: Tensor, tokens: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (state, *tokens)]
    out = write_chunked(*leaves)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    out.backward(weight.to(out.device, out.dtype))
    return [out.detach().double(), *(x.grad.double() for x in leaves)]


@pytest.mark.parametrize(("same", "beta"), [(0.0, 1.999), (0.9, 1.0)])
def test_products_in_tf32_cost_less_than_keys_in_bfloat16(same: float, beta: float, request: Any) -> None:
    """Slow decay and strong writes, where each of 20 chunks hands on what it got, over keys that may be much alike."""
    like, heads, size = {"dtype": torch.float64}, 1, 128
    shared, own = torch.randn(size, **like), torch.randn(1, 1440, heads, size, **like)
    k = F.normalize(same * shared + (1 - same**2) ** 0.5 * own, dim=-1)
    v, state = torch.randn(own.shape, **like), torch.randn(1, heads, size, size, **like)
    small = [-1e-4 * torch.rand(own.shape[:3], **like), beta - (2 - beta) * torch.rand(own.shape[:3], **like)]
    small = [x.float().double() for x in small]
    half = [k.bfloat16(), v.bfloat16()]
    exact = states_and_gradients(state, [k, v, *small])
    of_half = states_and_gradients(state, [*(x.double() for x in half), *small])
    request.getfixturevalue("tf32")
    found = states_and_gradients(state.float(), [*half, *(x.float() for x in small)])
    for name, one, two, three in zip(
        ("out", "state", "k", "v", "log decay", "beta"), exact, of_half, found, strict=True
    ):
        by_keys, by_products = (two - one).norm() / one.norm(), (three - two).norm() / two.norm()
        # Gradients of keys and values are rounded to bfloat16 themselves.
        assert by_products < by_keys + (2**-9 if name in "kv" else 0), (name, by_products, by_keys)


def test_what_is_rounded_for_tf32_is_nearest_and_keeps_its_gradient(tf32: None) -> None:
    x = (torch.randn(1000) * 10.0 ** torch.randint(-20, 20, (1000,))).requires_grad_()
    y = rounded(x * 1)
    assert torch.equal(y.detach().view(torch.int32) & ~TF32_MASK, torch.zeros(1000, dtype=torch.int32))
    assert ((y - x) / x).abs().max() <= 2**-11
    assert ((y - x) / x).mean().abs() < 2**-14 and TF32_HALF * 2 == -TF32_MASK
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(1000))


def gradients_by(writer: Any, arguments: Inputs, blocks: int) -> list[Tensor]:
    """Of arguments that are written several times over, each write on the state of the last; states are used twice."""
    state, *tokens = (x.clone().requires_grad_() for x in arguments)
    first, total = state, torch.zeros((), dtype=torch.float64)
    for block in range(blocks):
        state = writer(state.detach() if block == 2 else state, *tokens)
        total = total + (state * (block + 1)).square().sum() + state.sin().sum()
    total.backward()
    return [x.grad for x in (first, *tokens)]


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_write_computed_again_has_the_plain_gradients(blocks: int, checkpointed: bool) -> None:
    """By the kernel's stand-in, chained and cut as training does; in a checkpoint, and under autocast."""
    arguments, calls = inputs(41), []

    def kernel(*given: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        calls.append(0)
        return write_chunked(*given)

    def writer(*given: Tensor) -> Tensor:
        again = partial(write_recomputed, forward=kernel)
        return checkpoint(again, *given, use_reentrant=False) if checkpointed else again(*given)

    expected = gradients_by(write_chunked, arguments, blocks)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients_by(writer, arguments, blocks)
    assert len(calls) == blocks * (1 + checkpointed)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_what_learns_nothing_gets_no_gradient() -> None:
    state, k, v, log_decay, beta = inputs(20)
    write_recomputed(state, k, v.requires_grad_(), log_decay, beta, forward=write_chunked).sum().backward()
    assert v.grad is not None and state.grad is None and k.grad is None


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


@pytest.mark.parametrize("segments", [1, 2, 3, 5, 8, 13])
def test_composed_transitions_are_all_of_them_in_turn(segments: int) -> None:
    factor, added = torch.randn(2, 3, segments, 4, 4), torch.randn(2, 3, segments, 4, 5)
    leaves = [(x.double() / 2).requires_grad_() for x in (factor, added)]
    state, weight = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    found = []
    for one in (Transitions(*leaves), Transitions(*leaves).composed()):
        *_, last = one.states(state)
        found.append([last, *torch.autograd.grad((last * weight).sum(), leaves)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def test_what_is_added_to_a_diagonal_has_its_gradient() -> None:
    x, d = (torch.randn(2, 3, *sizes, dtype=torch.float64, requires_grad=True) for sizes in ((4, 4), (1, 1)))
    assert torch.autograd.gradcheck(lambda x, d: PlusDiagonal.apply(x * 1, d), (x, d))
    torch.testing.assert_close(PlusDiagonal.apply(x * 1, d), x + d * torch.eye(4, dtype=torch.float64))


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
    monkeypatch.setattr("arl2.ops.gated_delta.fla_parts_known", lambda: False)
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
@pytest.mark.skipif(not fla_installed(), reason="needs flash-linear-attention")
@pytest.mark.parametrize("same", [0.0, 0.9])
def test_products_in_tf32_on_a_gpu(same: float) -> None:
    """With slow decay, where a bias of tensor cores would add up; see the test of the same on a CPU."""
    shared, own = torch.randn(128, device="cuda"), torch.randn(1, 4680, 12, 128, device="cuda")
    k = F.normalize(same * shared + (1 - same**2) ** 0.5 * own, dim=-1)
    v, state = torch.randn_like(k), torch.randn(1, 12, 128, 128, device="cuda")
    small = [-1e-4 * torch.rand(own.shape[:3], device="cuda"), 2 - 0.1 * torch.rand(own.shape[:3], device="cuda")]
    half = [k.bfloat16(), v.bfloat16()]
    exact = states_and_gradients(state.double(), [x.double() for x in (k, v, *small)])
    of_half = states_and_gradients(state.double(), [x.double() for x in (*half, *small)])
    with products_in_tf32(True):
        found = states_and_gradients(state, [*half, *small])
    for name, one, two, three in zip(
        ("out", "state", "k", "v", "log decay", "beta"), exact, of_half, found, strict=True
    ):
        by_keys, by_products = (two - one).norm() / one.norm(), (three - two).norm() / two.norm()
        assert by_products < by_keys + (2**-9 if name in "kv" else 0), (name, by_products, by_keys)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.gpu
def test_rounding_by_a_kernel_is_that_by_integers() -> None:
    pytest.importorskip("triton")
    x = torch.randn(5, 1000, device="cuda") * 10.0 ** torch.randint(-30, 30, (5, 1000), device="cuda")
    expected = ((x.view(torch.int32) + TF32_HALF) & TF32_MASK).view(torch.float32)
    with products_in_tf32(True):
        assert torch.equal(rounded(x.clone()), expected)
    assert torch.equal(rounded(x.clone()), x), "float32 products need no rounding"


@pytest.mark.gpu
def test_chunked_on_the_gpu_equals_float64() -> None:
    arguments = inputs(4680, torch.float64, "cuda", heads=4, dim=128)
    exact = write_chunked(*arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    error = (write_chunked(*(x.float() for x in arguments)).double() - exact).norm() / exact.norm()
    assert error < 2e-6, error.item()
