"""Diagnostics of running hybrid layers: gates, branches, decay and state."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from arl2.distillation.objective import LayerReports
from arl2.hybrid_attention import HybridAttention, gated
from arl2.model import HybridWanModel
from arl2.state_memory import LocalWindow, StateView
from wan.ops.rope import Rotary

GATE_CLOSED, GATE_OPEN = 0.05, 0.95
"""Bounds beyond which a gate counts as saturated: its gradient is small there."""


@torch.no_grad()
def measure(module: HybridAttention, x_BLD: Tensor, rotary: Rotary, view: StateView | LocalWindow) -> dict[str, Tensor]:
    """Measure one layer in one pass over a view of its memory; means over tokens, heads and videos."""
    state_BHKV, past = view.state_BHKV, view.softmax if isinstance(view, LocalWindow) else None
    gate, q = module.output_gate(x_BLD).float(), module.q(x_BLD)
    local = module.local_attention(q, module.k(x_BLD), module.v(x_BLD), rotary, None, past)
    remembered = gated(module.read(state_BHKV, module.state_query(x_BLD, q, rotary)).float(), gate)
    return {
        "gate_mean": gate.mean(),
        "gate_saturation": ((gate < GATE_CLOSED) | (gate > GATE_OPEN)).float().mean(),
        "intra_mean_square": local.float().square().mean(),
        "inter_mean_square": remembered.square().mean(),
        "decay": -module.log_decay(x_BLD).mean(),
        "state_norm": state_BHKV.flatten(2).norm(dim=2).mean(),
    }


@contextmanager
def measured(model: HybridWanModel, tokens_per_frame: int) -> Iterator[LayerReports]:
    """Measure the hybrid layers in every attending pass inside the context; the reports are filled when it ends.

    The RMS of the branches is taken before the output projection. Half-lives are ln 2 over the mean log decay.
    """
    sums: dict[int, dict[str, Tensor]] = {}
    passes: dict[int, int] = defaultdict(int)

    def hook(layer: int) -> Callable[..., None]:
        def note(module: HybridAttention, arguments: tuple[Any, ...], result: tuple[Tensor | None, Any]) -> None:
            x, rotary, view = arguments[:3]
            if module.enabled and result[0] is not None and isinstance(view, StateView | LocalWindow):
                now, before = measure(module, x, rotary, view), sums.get(layer, {})
                sums[layer] = {name: value + before.get(name, 0) for name, value in now.items()}
                passes[layer] += 1

        return note

    # First among the hooks: those of a sharded layer free its parameters.
    attentions = model.hybrid_attentions().items()
    handles = [module.register_forward_hook(hook(layer), prepend=True) for layer, module in attentions]
    reports: LayerReports = defaultdict(dict)
    try:
        yield reports
    finally:
        for handle in handles:
            handle.remove()
    for layer, values in sorted(sums.items()):
        mean = {name: float(value) / passes[layer] for name, value in values.items()}
        tokens = math.log(2) / max(mean["decay"], 1e-12)
        for name in ("gate_mean", "gate_saturation", "state_norm"):
            reports[name][layer] = mean[name]
        reports["intra_rms"][layer] = math.sqrt(mean["intra_mean_square"])
        reports["inter_rms"][layer] = math.sqrt(mean["inter_mean_square"])
        reports["half_life_tokens"][layer] = tokens
        reports["half_life_frames"][layer] = tokens / tokens_per_frame
