"""What this card can do at best on shapes of this model: matrix products and attention, measured here and now."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils.benchmark import Timer

from arl2.model import HybridWanModel
from pipelines.benchmark.flops import Flops
from wan.ops.attention import AttentionBackend, attention, available_backends

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ceilings:
    """Operations a second.

    Attributes:
        gemm: matrix products, by shape.
        attention: attention, by backend and number of keys.
    """

    gemm: dict[str, float] = field(default_factory=dict)
    attention: dict[str, float] = field(default_factory=dict)

    def least_seconds(self, flops: Flops) -> float:
        """Seconds that these operations would take at the best rates; those on states count as products."""
        products = flops.linear + flops.state
        return products / max(self.gemm.values()) + flops.attention / max(self.attention.values())


def measure_ceilings(
    model: HybridWanModel, tokens: int, window: int, device: torch.device, dtype: torch.dtype
) -> Ceilings:
    """Measure the rates of the model's own shapes.

    Args:
        model: only its shapes are used.
        tokens: of a block.
        window: tokens of a window.
        device, dtype: where and in what to compute.
    """
    dim, ffn = model.config.dim, model.config.ffn_dim
    shapes = {"dim→dim": (dim, dim), "dim→3·dim": (dim, 3 * dim), "dim→ffn": (dim, ffn), "ffn→dim": (ffn, dim)}
    gemm = {name: _gemm_rate(tokens, *shape, device, dtype) for name, shape in shapes.items()}
    rates = {}
    for keys in sorted({tokens, window, 4 * window}):
        for backend in available_backends(device, dtype):
            if backend is AttentionBackend.MATH and device.type == "cuda":
                continue  # keeps all scores in memory
            try:
                rates[f"{backend.value}, {keys} keys"] = _attention_rate(model, tokens, keys, backend, device, dtype)
            except RuntimeError as error:
                log.warning("no attention rate of %s: %s", backend.value, str(error).splitlines()[0])
    return Ceilings(gemm, rates)


def _gemm_rate(tokens: int, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype) -> float:
    x, weight = (torch.randn(rows, inputs, device=device, dtype=dtype) for rows in (tokens, outputs))
    return 2 * tokens * inputs * outputs / _seconds(lambda: torch.nn.functional.linear(x, weight), device)


def _attention_rate(
    model: HybridWanModel,
    tokens: int,
    keys: int,
    backend: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    heads, head_dim = model.config.num_heads, model.head_dim
    q, k, v = (torch.randn(1, n, heads, head_dim, device=device, dtype=dtype) for n in (tokens, keys, keys))
    return 4 * tokens * keys * heads * head_dim / _seconds(lambda: attention(q, k, v, backend=backend), device)


@torch.no_grad()
def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call, warmed up."""
    long = 0.3 if device.type == "cuda" else 0.02
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    timer.blocked_autorange(min_run_time=long / 3)
    return float(timer.blocked_autorange(min_run_time=long).median)
