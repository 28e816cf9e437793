"""The inference path's kernels against the plain ops in float64, on sizes that do not divide, over unwritten NaN.

A kernel rounds what it returns once, and what it multiplies by tensor cores: it must be no further from float64 than
the plain ops in the same half precision are.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arl2.hybrid_attention import HybridAttention
from arl2.inference.fused_ops import DeferredResidual, FusedOps, StateRead
from arl2.inference.linear import FP8, quantized
from wan.model import Block
from wan.ops.rope import rotary_angles

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
BATCH, FRAMES, HEIGHT, WIDTH = 2, 3, 5, 7
TOKENS = FRAMES * HEIGHT * WIDTH
HALVES = [torch.bfloat16, torch.float16]
HEADS = 3


@pytest.fixture(autouse=True)
def _unwritten_is_nan() -> Iterator[None]:
    """What is allocated holds NaN: what a kernel does not write, shows."""
    pytest.importorskip("triton")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def kernel_ops(fp8: bool = False) -> FusedOps:
    from arl2.inference.fused_ops_triton import TritonFusedOps

    return TritonFusedOps(fp8)


def exact(x: Any) -> Any:
    """The same in float64."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, tuple):
        parts = (exact(part) for part in x)
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return deepcopy(x).double() if isinstance(x, torch.nn.Module) else x


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and torch.isfinite(found.float()).all()
    return float((found.double() - expected).norm() / expected.norm())


def near(found: Tensor, plain: Tensor, expected: Tensor, slack: float = 1.02) -> None:
    """No further from float64 than the plain ops are, nowhere wrong, and of their type."""
    assert found.dtype == plain.dtype
    assert error(found, expected) <= slack * error(plain, expected) + 1e-7
    step = torch.finfo(found.dtype).eps
    torch.testing.assert_close(
        found.double(), expected, rtol=4 * step, atol=4 * step * float(expected.square().mean().sqrt())
    )


def perturbed(module: torch.nn.Module, dtype: torch.dtype) -> Any:
    """A module whose every parameter matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.to(DEVICE, dtype).requires_grad_(False)


def block_of(dim: int, dtype: torch.dtype) -> Block:
    return perturbed(Block(dim, 2 * dim, HEADS, qk_norm=True, cross_attn_norm=True, eps=1e-6), dtype)


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def rotary() -> tuple[Tensor, Tensor]:
    return rotary_angles(torch.arange(4, 4 + FRAMES, device=DEVICE), HEIGHT, WIDTH, 64)


def sliced(dtype: torch.dtype, parts: int, dim: int) -> list[Tensor]:
    """Slices of one product's output, as `FusedLinear` returns them, with a little between."""
    whole = random(dtype, BATCH, TOKENS, parts * dim + 16)
    whole *= 1 + 3 * torch.rand(BATCH, TOKENS, 1, device=DEVICE).to(dtype)
    return list(whole[..., : 2 * dim].split(dim, -1)) + list(whole[..., 2 * dim + 16 :].split(dim, -1))


def norms(
    ops: FusedOps, block: Block, stream: DeferredResidual, added: Tensor, time: Tensor
) -> Iterator[tuple[Tensor, Any]]:
    """All three norms of a block, the first of a sum and of tokens alone."""
    yield ops.before_self_attention(block, stream, time)
    yield ops.before_self_attention(block, DeferredResidual(stream.x_BLD, None, None), time)
    yield ops.before_cross_attention(block, stream.x_BLD, added, time)
    yield ops.before_feed_forward(block, stream.x_BLD, added, time)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [192, 1536, 3 * 1024])
def test_norms(dim: int, dtype: torch.dtype) -> None:
    block, other = block_of(dim, dtype), block_of(dim, dtype)
    # A mean that is not small, as the tokens of a deep layer have.
    x, added = random(dtype, BATCH, TOKENS, dim) * 2 + 1, random(dtype, BATCH, TOKENS, dim)
    stream = DeferredResidual(x, random(dtype, BATCH, TOKENS, dim), other.modulation)
    arguments = (block, stream, added, random(dtype, BATCH, FRAMES, 6, dim) / 2)
    expected = norms(FusedOps(fp8=False), *(exact(x) for x in arguments))
    for found, plain, truth in zip(
        norms(kernel_ops(), *arguments), norms(FusedOps(fp8=False), *arguments), expected, strict=True
    ):
        for parts in zip(found, plain, truth, strict=True):
            near(*parts)


@pytest.mark.parametrize("dim", [192, 1536])
def test_norms_in_fp8(dim: int) -> None:
    dtype = torch.bfloat16
    block = block_of(dim, dtype)
    x, added = random(dtype, BATCH, TOKENS, dim) + 1, random(dtype, BATCH, TOKENS, dim)
    arguments = (block, DeferredResidual(x, added, block.modulation), added, random(dtype, BATCH, FRAMES, 6, dim))
    expected = norms(FusedOps(fp8=False), *(exact(x) for x in arguments))
    for (total, rows), (plain, plain_rows), (truth, tokens) in zip(
        norms(kernel_ops(True), *arguments), norms(FusedOps(fp8=True), *arguments), expected, strict=True
    ):
        near(total, plain, truth)
        largest = tokens.abs().amax(-1, keepdim=True)
        torch.testing.assert_close(rows.scales.double(), largest / torch.finfo(FP8).max, rtol=1e-5, atol=0)
        wide, usual = (each.values.double() * each.scales for each in (rows, plain_rows))
        assert error(wide, tokens) <= 1.01 * error(usual, tokens)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("channels", [16, 240, 1536, 8960])
def test_quantising(channels: int, dtype: torch.dtype) -> None:
    from arl2.inference.row_triton import quantize

    x = random(dtype, 2, 35, channels + 16)[..., :channels] * torch.logspace(-6, 2, 35, device=DEVICE)[:, None].to(
        dtype
    )
    x[0, 3] = 0
    values, scales = quantize(x, gelu=False)
    plain = quantized(x)
    torch.testing.assert_close(scales, plain.scales, rtol=1e-6, atol=0)
    apart = values.float() != plain.values.float()
    # A quotient that lies between two values may go either way, and no other.
    assert apart.float().mean() < 1e-3
    torch.testing.assert_close(values.float(), plain.values.float(), rtol=1 / 8 + 1e-3, atol=2**-9)
    x = random(dtype, 2, 35, channels) * 3
    expected = F.gelu(x.double(), approximate="tanh")
    (values, scales), usual = quantize(x, gelu=True), quantized(F.gelu(x, approximate="tanh"))
    wide, plain_wide = (v.double() * s for v, s in ((values, scales), usual))
    assert error(wide, expected) <= 1.01 * error(plain_wide, expected)
    x[1, 2, 5] = torch.nan
    assert quantize(x, gelu=False)[0][1, 2, 5].isnan() and quantize(x, gelu=True)[0][1, 2, 5].isnan(), (
        "errors are not hidden"
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_gelu_is_the_one_of_tanh(dtype: torch.dtype) -> None:
    from arl2.inference.row_triton import linear_gelu

    # So wide that the exact GELU is told from that of tanh.
    x, weight, bias = random(dtype, 2, 35, 64), random(dtype, 96, 64) / 4, random(dtype, 96)
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    plain = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    near(linear_gelu(x, weight, bias), plain, expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("heads", [3, 12])
def test_heads(heads: int, dtype: torch.dtype) -> None:
    dim = 64 * heads
    layer = perturbed(HybridAttention(dim, heads, qk_norm=True, eps=1e-6, lora_rank=None, lora_alpha=1.0), dtype)
    q, k, query, key = sliced(dtype, 4, dim)
    for rotation in (rotary(), None):
        for measured in ([], [(layer.norm_q, query)], [(layer.norm_q, query), (layer.norm_k, key)]):
            for normed in ([(layer.norm_q, q), (layer.norm_k, k)], [(layer.norm_k, k)], []):
                if not normed + measured:
                    continue
                found, factors = kernel_ops().normed_heads(normed, measured, heads, rotation)
                plain, _ = FusedOps(fp8=False).normed_heads(normed, measured, heads, rotation)
                wide = [(exact(norm), exact(x)) for norm, x in normed]
                expected, _ = FusedOps(fp8=False).normed_heads(wide, (), heads, rotation)
                for parts in zip(found, plain, expected, strict=True):
                    near(*parts)
                for factor, (_, x) in zip(factors, measured, strict=True):
                    expected_factor = (x.double().square().mean(-1) + 1e-6).rsqrt()
                    torch.testing.assert_close(factor.double(), expected_factor, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("shared", [False, True])
def test_keys_and_reads_of_a_state(size: int, dtype: torch.dtype, shared: bool) -> None:
    """With queries of their own, and with those of the attention in the block (a layer without adapters)."""
    layer = perturbed(
        HybridAttention(size * HEADS, HEADS, qk_norm=True, eps=1e-6, lora_rank=None, lora_alpha=1.0), dtype
    )
    q, _, query, key = sliced(dtype, 4, size * HEADS)
    query = q if shared else query
    state = torch.randn(BATCH, HEADS, size, size, device=DEVICE)
    gate = random(dtype, BATCH, TOKENS, HEADS + 4)[..., :HEADS]
    # As an attention may return it: heads before tokens.
    mixed = random(dtype, BATCH, HEADS, TOKENS, size).transpose(1, 2) / 4
    rotation = rotary_angles(torch.arange(FRAMES, device=DEVICE), HEIGHT, WIDTH, size)
    ops, plain = kernel_ops(), FusedOps(fp8=False)
    _, factors = ops.normed_heads((), [(layer.norm_q, query), (layer.norm_k, key)], HEADS, rotation)
    read_state = StateRead(state, query, factors[0], gate, rotation)
    wide, wide_layer = exact(read_state), exact(layer)
    found = ops.add_state_read(layer, mixed, read_state)
    near(
        found,
        plain.add_state_read(layer, mixed, read_state),
        plain.add_state_read(wide_layer, mixed.double(), wide),
        slack=1.1,
    )

    # One layer's place among several.
    buffers = [torch.full((3, BATCH, TOKENS, HEADS, size), torch.nan, device=DEVICE).to(dtype) for _ in range(2)]
    expected = torch.empty(BATCH, TOKENS, HEADS, size, device=DEVICE, dtype=torch.float64)
    ops.put_keys(layer, key, factors[1], rotation, buffers[0][1])
    plain.put_keys(layer, key, None, rotation, buffers[1][1])
    plain.put_keys(wide_layer, key.double(), None, wide.rotary, expected)
    near(buffers[0][1], buffers[1][1], expected, slack=1.1)
    assert buffers[0][::2].isnan().all()


def test_the_operators_keep_their_promises() -> None:
    """What the compiler is told of shapes, strides and mutation."""
    from arl2.inference.head_triton import norm_heads, read_state, state_keys
    from arl2.inference.row_triton import linear_gelu, norm, quantize

    dtype, dim = torch.bfloat16, 64 * HEADS
    x, time = random(dtype, BATCH, TOKENS, dim), random(dtype, BATCH, FRAMES, 6, dim)
    weight, six = random(dtype, dim), random(dtype, 1, 6, dim)
    q, k, query, _ = sliced(dtype, 4, dim)
    (cos, sin), factor = rotary(), torch.rand(BATCH, TOKENS, device=DEVICE)
    maps, state = random(dtype, HEADS, 64, 64), torch.randn(BATCH, HEADS, 64, 64, device=DEVICE)
    heads = x.unflatten(-1, (HEADS, 64))
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (norm, (x, x + 1, six, 2, six, 3, time, None, None, 1e-6, True)),
        (norm, (x, None, None, 0, None, 0, time, weight, weight, 1e-6, False)),
        (quantize, (query, True)),
        (linear_gelu, (x, random(dtype, 32, dim), random(dtype, 32))),
        (norm_heads, ([q, k], [weight, weight], [query], HEADS, cos, sin, 1e-6)),
        (read_state, (heads, state, x[..., :HEADS], query, factor, weight, maps, cos, sin, 1e-6)),
        (state_keys, (query, factor, weight, maps, cos, sin, 1e-6, heads.clone())),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
