"""Kernels of the small operations on tokens: no further from float64 than the plain forms, values and gradients."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import wan.ops.dispatch
from arl2.hybrid_attention import l2_norm
from arl2.lora import with_adapter
from wan.model import RMSNorm
from wan.ops.modulation import layer_norm, modulate, plus_gated
from wan.ops.rope import rotary_angles, rotate
from wan.utils.device import HALF

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
    kernel = getattr(wan.ops.dispatch, name)

    def spy(*arguments: object) -> Tensor | None:
        out: Tensor | None = kernel(*arguments)
        used.extend([] if out is None else [name])
        return out

    places = ("wan.model", "wan.ops.rope", "arl2.hybrid_attention")
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
@pytest.mark.parametrize("dtype", HALF)
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
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(2, 77, 3, 64), (1, 1563, 12, 128), (1, 5, 2, 12)])
def test_norms_of_heads(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(monkeypatch, l2_norm, l2_norm, torch.randn(shape, device=GPU, dtype=dtype), "norm_by_kernel")


@pytest.mark.gpu
@pytest.mark.usefixtures("_unwritten_is_nan")
@pytest.mark.parametrize("dtype", HALF)
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


def half_and_exact(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradients of a function in bfloat16, and of the same in float64."""
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out.double().cos().sum(), leaves)])
    return found[0], found[1]


def assert_near(found: tuple[list[Tensor], list[Tensor]], most: float = 0.01) -> None:
    for mine, exact in zip(*found, strict=True):
        assert (mine.double() - exact).norm() < most * exact.norm()


def test_modulation_is_the_formula_frame_by_frame() -> None:
    x, shift, scale = torch.randn(2, 12, 5), torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    wide = [part.repeat_interleave(4, dim=1) for part in (shift, scale)]
    torch.testing.assert_close(modulate(x, shift, scale), x * (1 + wide[1]) + wide[0])
    added = torch.randn(2, 12, 5)
    torch.testing.assert_close(plus_gated(x, added, scale), x + added * wide[1])
    assert_near(half_and_exact(modulate, x, shift, scale))
    assert_near(half_and_exact(plus_gated, x, added, scale))


def test_an_adapter_adds_its_two_products() -> None:
    projected, x = torch.randn(2, 14, 6)[:, ::2], torch.randn(2, 7, 5)  # the first does not lie together
    a, b = torch.randn(5, 3), torch.randn(3, 6)
    torch.testing.assert_close(with_adapter(projected, x, a, b, 0.5), projected + 0.5 * x @ a @ b)
    assert_near(half_and_exact(lambda *parts: with_adapter(*parts, 0.5), projected, x, a, b))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = with_adapter(projected.bfloat16(), x.bfloat16(), a, b, 0.5)
    assert mixed.dtype is torch.bfloat16
    assert_near(([mixed], [(projected + 0.5 * x @ a @ b).double()]))


@pytest.mark.parametrize("affine", [False, True])
def test_layer_norms_keep_the_type_of_their_weights(affine: bool) -> None:
    """The CPU's autocast leaves layer norms alone, so what it would do on a GPU is told by whether it is on."""
    norm, on = torch.nn.LayerNorm(8, elementwise_affine=affine).bfloat16(), []
    norm.register_forward_hook(lambda *arguments: on.append(torch.is_autocast_enabled("cpu")))
    x = torch.randn(2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer_norm(norm, x.bfloat16(), torch.bfloat16)
        layer_norm(norm.float(), x, torch.bfloat16)
        layer_norm(norm, x, torch.float32)
        assert torch.is_autocast_enabled("cpu")
    assert on == [False, True, False] and half.dtype is torch.bfloat16
    assert_near(([half], [torch.nn.functional.layer_norm(x.double(), (8,))]))


def test_elsewhere_the_plain_forms_compute() -> None:
    assert not wan.ops.dispatch.kernels_run(torch.zeros(2, dtype=torch.bfloat16))
    assert wan.ops.dispatch.norm_by_kernel(torch.zeros(2, 4), None, 1.0, 1e-6) is None
    assert wan.ops.dispatch.rotation_by_kernel(torch.zeros(1, 2, 1, 4), torch.zeros(2, 2), torch.zeros(2, 2)) is None


@pytest.mark.gpu
def test_what_kernels_cannot_do_is_left_to_the_plain_forms() -> None:
    half = torch.zeros(2, 8, device=GPU, dtype=torch.bfloat16)
    assert not wan.ops.dispatch.kernels_run(half.float())
    learning = torch.ones(8, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    assert wan.ops.dispatch.norm_by_kernel(half, learning, 1.0, 1e-6) is None
    assert wan.ops.dispatch.norm_by_kernel(half, learning.detach().float(), 1.0, 1e-6) is None
    angles = torch.zeros(2, 3, device=GPU)
    assert wan.ops.dispatch.rotation_by_kernel(half[None, :, None, :6], angles, angles) is None, "no power of two"
