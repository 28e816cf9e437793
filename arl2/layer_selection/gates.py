"""Layer gates: a learned choice, under a budget, of the layers to convert.

Every layer l computes both mixers, and a switch m_l selects one: m_l·hybrid + (1 - m_l)·softmax. Switches are drawn per
video from probabilities p_l. Only the p_l train, on the frozen hybrid layers of stage 1. Their loss is the
distillation loss of stage 2 plus a penalty that keeps the mean of p_l at the budget.

A draw is hard (0 or 1), so that a layer is judged in the form in which it will be used. The gradient is that of a soft
switch (straight-through, binary concrete: Maddison et al., arXiv 1611.00712). Layers with a high p_l are the ones to
convert.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from arl2.distillation.batch import BatchNoise, VideoBatch
from arl2.distillation.objective import LayerReports
from arl2.distillation.stage2 import Context, Stage2, Stage2Settings
from arl2.hybrid_attention import HybridAttention
from arl2.model import HybridWanModel
from arl2.rollout import generator_for
from wan.memory import LayerMemory, Memory, MemorySpec
from wan.model import SelfAttention
from wan.ops.rope import Rotary
from wan.parallel import ParallelLayout
from wan.utils.errors import InputError
from wan.utils.ranges import Bounds

HYBRID_SHARE = "hybrid_share"
"""Name of p_l in reports."""
Budget = Annotated[float, Bounds(0.001, 0.999)]
BudgetWeight = Annotated[float, Bounds(0, 10**6)]
Temperature = Annotated[float, Bounds(0.001, 1000)]
"""Ranges of the settings; outside them logits and soft switches overflow."""


class MixedView(NamedTuple):
    """Pair of views of both mixers, or of their updates."""

    hybrid: Any
    softmax: Any


class MixedMemory(Memory):
    """Memories of both mixers of a layer: first the hybrid's, then the softmax layer's."""

    def read(self, tokens: int) -> MixedView:  # type: ignore[override]  # a pair in place of a list
        """Views of both memories."""
        return MixedView(*super().read(tokens))


class MixedAttention(HybridAttention):
    """Layer that computes both mixers and switches between them; see `mix_among`.

    Attributes:
        mix_B11: switch of every video, 1 for the hybrid.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.mix_B11 = torch.ones(1, 1, 1, device="cpu")

    def new_memory(self, spec: MemorySpec) -> LayerMemory:
        """Memories of both mixers, or only the softmax layer's while the hybrid is not enabled."""
        if not self.enabled:
            return super().new_memory(spec)
        return MixedMemory([super().new_memory(spec), SelfAttention.new_memory(self, spec)])

    def parallel_view(self, layout: ParallelLayout, past: Any = None) -> Any:
        """See `SelfAttention.parallel_view`."""
        if not self.enabled:
            return super().parallel_view(layout, past)
        state, kv = (None, None) if past is None else past
        return MixedView(super().parallel_view(layout, state), SelfAttention.parallel_view(self, layout, kv))

    def forward(
        self, x_BLD: Tensor, rotary: Rotary, view: Any, *, attend: bool, remember: bool
    ) -> tuple[Tensor | None, Any]:
        """See `HybridAttention.forward`; the update is a `MixedView`."""
        if not isinstance(view, MixedView):
            return super().forward(x_BLD, rotary, view, attend=attend, remember=remember)
        hybrid, state = super().forward(x_BLD, rotary, view.hybrid, attend=attend, remember=remember)
        softmax, kv = SelfAttention.forward(self, x_BLD, rotary, view.softmax, attend=attend, remember=remember)
        update = MixedView(state, kv) if remember else None
        if hybrid is None or softmax is None:
            return None, update
        mix = self.mix_B11.to(hybrid.dtype)
        return mix * hybrid + (1 - mix) * softmax, update


def mix_among(model: HybridWanModel) -> dict[int, MixedAttention]:
    """Replace a model's hybrid layers by mixed ones, all hybrid at first; its parameters and their names stay."""
    return model.replace_hybrid_attentions(MixedAttention)


@dataclass(frozen=True)
class GateSettings(Stage2Settings):
    """Settings of layer gates.

    Attributes:
        budget: fraction of the layers that should be hybrid, between 0 and 1.
        budget_weight: weight of (mean p - budget)², relative to the distillation loss over its target's mean square.
        temperature: temperature of the soft switch whose gradient is used.
    """

    budget: Budget = 0.5
    budget_weight: BudgetWeight = 10.0
    temperature: Temperature = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks_per_graph is not None:
            raise InputError("layer gates have one graph for all blocks: drop blocks_per_graph")
        if self.context is not Context.DATA:
            raise InputError("layer gates are trained on context data")


class LayerGates(Stage2):
    """Objective of layer gates.

    Args:
        model: hybrid in all layers, with the parameters of stage 1. Its hybrid layers are replaced, see `mix_among`.
        settings: see `GateSettings`.

    Attributes:
        logits: logits of p by layer.
    """

    settings: GateSettings

    def __init__(self, model: HybridWanModel, settings: GateSettings) -> None:
        super().__init__(model, settings)
        self._mixed = mix_among(model)
        start = torch.logit(torch.tensor(settings.budget)).item()
        self.logits = {layer: nn.Parameter(torch.full((), start)) for layer in self._mixed}

    def parameters_to_train(self) -> dict[str, nn.Parameter]:
        """Logits by name, one per layer; they belong to no module."""
        return {f"layer_gates.{layer}": logit for layer, logit in self.logits.items()}

    def probabilities(self) -> dict[int, float]:
        """Probabilities p by layer."""
        return {layer: float(logit.detach().sigmoid()) for layer, logit in self.logits.items()}

    def losses(self, batch: VideoBatch, noise: BatchNoise) -> Iterator[Tensor]:
        """Relative error with respect to the teacher's mean square, plus the budget penalty; a single part."""
        self._draw(noise)
        (error,) = super().losses(batch, noise)
        target_mean_square = torch.stack(self._target_mean_square).sum() / noise.levels_BNP.numel()
        share = torch.stack([logit.sigmoid() for logit in self.logits.values()]).mean()
        yield error / target_mean_square + self.settings.budget_weight * (share - self.settings.budget).square()

    def metrics(self) -> dict[str, float]:
        """Metrics of stage 2, and the mean of p."""
        share = sum(self.probabilities().values()) / len(self.logits)
        return super().metrics() | {"mean_share": share}

    def reports(self, batch: VideoBatch, noise: BatchNoise) -> LayerReports:
        """Probabilities p by layer, as a report."""
        return {HYBRID_SHARE: self.probabilities()}

    def _draw(self, noise: BatchNoise) -> None:
        """Draw the switches of every video from its own seed, so that a step is the same whenever it is computed.

        The draws are independent of the noise and of the levels.
        """
        if len(noise.seeds) != len(noise.levels_BNP):
            raise ValueError(f"layer gates need a seed per video: {len(noise.seeds)} for {len(noise.levels_BNP)}")
        generators = (generator_for(seed, "layer gates") for seed in noise.seeds)
        drawn_BL = torch.stack([torch.rand(len(self.logits), generator=generator) for generator in generators])
        uniform_BL = drawn_BL.to(noise.levels_BNP.device).clamp(1e-6, 1 - 1e-6)
        for column, (layer, logit) in enumerate(self.logits.items()):
            soft = ((logit + torch.logit(uniform_BL[:, column])) / self.settings.temperature).sigmoid()
            hard = (soft > 0.5).to(soft.dtype)
            self._mixed[layer].mix_B11 = (hard + (soft - soft.detach()))[:, None, None]
