"""Kernels of the small operations on tokens: no further from float64 than the plain forms, values and gradients."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import wan.tokens
from arl2.hybrid_attention import l2_norm
from wan.model import RMSNorm
from wan.rope import rotary_angles, rotate

GPU = torch.device("cuda")


@pytest.fixture
def _unwritten_is_nan() -> Iterator[None]:
    """What is allocated holds NaN: what a kernel does not write, shows."""
    pytest.importorskip("triton")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def errors(
    function: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor
) -> list[float]:
    """Relative errors of the value and of the gradient of x."""
    found = []
    for run, dtype in ((function, x.dtype), (exact, torch.float64)):
        leaf = x.detach().to(dtype).requires_grad_()
        y = run(leaf)
        y.backward(gradient.to(y.dtype))
        assert leaf.grad is not None
        found.append((y.detach().double(), leaf.grad.double()))
    return [float((mine - theirs).norm() / theirs.norm()) for mine, theirs in zip(*found, strict=True)]


def compare(
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[[Tensor], Tensor],
    exact: Callable[[Tensor], Tensor],
    x: Tensor,
    name: str,
) -> None:
    """A function that takes the kernel called `name`, and the same without."""
    gradient = torch.randn_like(x)
    used: list[str] = []
    kernel = getattr(wan.tokens, name)

    def spy(*arguments: object) -> Tensor | None:
        out: Tensor | None = kernel(*arguments)
        used.extend([] if out is None else [name])
        return out

    places = ("wan.model", "wan.rope", "arl2.hybrid_attention")
    for place in places:
        monkeypatch.setattr(f"{place}.{name}", spy, raising=False)
    by_kernel = errors(function, exact, x, gradient)
    assert used, "the plain form ran"
    for place in places:
        monkeypatch.setattr(f"{place}.{name}", lambda *arguments: None, raising=False)
    plain = errors(function, exact, x, gradient)
    assert all(mine <= 1.05 * theirs for mine, theirs in zip(by_kernel, plain, strict=True)), (by_kernel, plain)


@pytest.mark.gpu
@pytest.mark.usefixtures("_unwritten_is_nan")
@pytest.mark.parametrize("dtype", wan.tokens.HALF)
@pytest.mark.parametrize("shape", [(2, 77, 192), (1, 35, 1536), (3, 1, 24), (1, 4681, 5120)])
def test_root_mean_square_norms(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = RMSNorm(shape[-1], 1e-6).to(GPU, dtype).requires_grad_(False)
    norm.weight += 0.3 * torch.randn_like(norm.weight)
    exact = RMSNorm(shape[-1], 1e-6).to(GPU, torch.float64)
    exact.load_state_dict(norm.state_dict())
    x = torch.randn(shape, device=GPU, dtype=dtype) * torch.logspace(-2, 2, shape[1], device=GPU, dtype=dtype)[:, None]
    compare(monkeypatch, norm, exact, x, "norm_by_kernel")


@pytest.mark.gpu
@pytest.mark.usefixtures("_unwritten_is_nan")
@pytest.mark.parametrize("dtype", wan.tokens.HALF)
@pytest.mark.parametrize("shape", [(2, 77, 3, 64), (1, 1563, 12, 128), (1, 5, 2, 12)])
def test_norms_of_heads(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(monkeypatch, l2_norm, l2_norm, torch.randn(shape, device=GPU, dtype=dtype), "norm_by_kernel")


@pytest.mark.gpu
@pytest.mark.usefixtures("_unwritten_is_nan")
@pytest.mark.parametrize("dtype", wan.tokens.HALF)
@pytest.mark.parametrize(("batch", "heads", "size"), [(2, 3, 64), (1, 12, 128), (3, 1, 2)])
@pytest.mark.parametrize("by_head", [False, True])
def test_rotations(
    monkeypatch: pytest.MonkeyPatch, batch: int, heads: int, size: int, by_head: bool, dtype: torch.dtype
) -> None:
    rotary = rotary_angles(torch.arange(7, 10, device=GPU), 5, 9, size)
    x = torch.randn(batch, 135, heads, size, device=GPU, dtype=dtype)
    if by_head:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    compare(monkeypatch, lambda x: rotate(x, rotary), lambda x: rotate(x, rotary), x, "rotation_by_kernel")


def test_elsewhere_the_plain_forms_compute() -> None:
    assert not wan.tokens.kernels_run(torch.zeros(2, dtype=torch.bfloat16))
    assert wan.tokens.norm_by_kernel(torch.zeros(2, 4), None, 1.0, 1e-6) is None
    assert wan.tokens.rotation_by_kernel(torch.zeros(1, 2, 1, 4), torch.zeros(2, 2), torch.zeros(2, 2)) is None


@pytest.mark.gpu
def test_what_kernels_cannot_do_is_left_to_the_plain_forms() -> None:
    half = torch.zeros(2, 8, device=GPU, dtype=torch.bfloat16)
    assert not wan.tokens.kernels_run(half.float())
    learning = torch.ones(8, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    assert wan.tokens.norm_by_kernel(half, learning, 1.0, 1e-6) is None
    assert wan.tokens.norm_by_kernel(half, learning.detach().float(), 1.0, 1e-6) is None
    angles = torch.zeros(2, 3, device=GPU)
    assert wan.tokens.rotation_by_kernel(half[None, :, None, :6], angles, angles) is None, "no power of two"
