"""Stage 1: every hybrid layer learns to put out what the teacher's softmax attention puts out on the same input.

The frozen teacher runs the block loop. What goes into and comes out of each of its attention layers is written down;
the layer's hybrid, which shares the projections, is then run on the same input with a state of its own. No gradient
crosses layers, so one run serves every later choice of layers. Source: ARL², arXiv 2605.16579; what it leaves open is
in `Stage1Settings`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arl2.distillation.batch import ObjectiveSettings, VideoBatch, video_blocks
from arl2.hybrid_attention import HybridAttention
from arl2.model import HybridWanModel
from arl2.rollout import predict_flow, remember_block
from wan.flow import NUM_TRAIN_TIMESTEPS, add_noise
from wan.model import SelfAttention
from wan.rope import Rotary

STAGE1_PARTS = ("a_proj.", "b_proj.", "gate_proj.", "A_log", "dt_bias", "phi_q.", "phi_k.", "phi_v.")
"""Parts of a hybrid layer that stage 1 trains."""


@dataclass(frozen=True)
class Stage1Settings(ObjectiveSettings):
    """What the method leaves open.

    Attributes:
        read_clean: whether the clean pass counts in the loss too.
    """

    read_clean: bool = True


def stage1_parameters(model: HybridWanModel) -> dict[str, nn.Parameter]:
    """Names and parameters that stage 1 trains: the new parts of the hybrid layers, without adapters."""
    names = {name for name in model.hybrid_parameter_names() if name.split("self_attn.")[-1].startswith(STAGE1_PARTS)}
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


class Observation(NamedTuple):
    """What the teacher's attention saw and said in one pass.

    Attributes:
        x_BLD: its input.
        rotary: rotation of its tokens.
        output_BLD: its output.
    """

    x_BLD: Tensor
    rotary: Rotary
    output_BLD: Tensor


@contextmanager
def observed(layers: dict[int, HybridAttention]) -> Iterator[dict[int, Observation]]:
    """Write down what passes through some attention layers while they are the teacher's.

    In a pass that only remembers, the last layer is not asked for its output; it is computed here all the same.
    """
    seen: dict[int, Observation] = {}

    def hook(layer: int) -> Callable[..., None]:
        def note(module: HybridAttention, arguments: tuple[Any, ...], result: tuple[Tensor | None, Any]) -> None:
            x, rotary, view = arguments[:3]
            output = result[0]
            if output is None:
                output, _ = SelfAttention.forward(module, x, rotary, view, attend=True, remember=False)
            assert output is not None
            seen[layer] = Observation(x, rotary, output)

        return note

    handles = [module.register_forward_hook(hook(layer)) for layer, module in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class LayerErrors:
    """Squared errors of every layer, summed over passes.

    Attributes:
        error: mean squared error, with its graph.
        power: mean square of what was to be matched.
    """

    error: dict[int, Tensor] = field(default_factory=dict)
    power: dict[int, Tensor] = field(default_factory=dict)
    passes: int = 0

    def add(self, layer: int, output: Tensor, target: Tensor) -> None:
        """Count one pass of one layer in."""
        error, power = (output.float() - target.float()).square().mean(), target.float().square().mean()
        self.error[layer] = self.error[layer] + error if layer in self.error else error
        self.power[layer] = self.power[layer] + power if layer in self.power else power

    def loss(self) -> Tensor:
        """Mean over layers and passes."""
        return torch.stack(list(self.error.values())).mean() / self.passes

    def relative(self) -> dict[int, float]:
        """Root of error over power of every layer: 0 is perfect, 1 as good as saying nothing."""
        return {layer: float((self.error[layer].detach() / self.power[layer]).sqrt()) for layer in self.error}


def stage1_errors(
    model: HybridWanModel, batch: VideoBatch, settings: Stage1Settings, noise: Callable[[int, int], Tensor]
) -> LayerErrors:
    """Run the teacher over some videos and its hybrids beside it.

    Args:
        model: hybrid in the layers to be trained; `stage1_parameters` must require gradients, nothing else.
        batch: clean videos, remembered as they are.
        settings: see there.
        noise: of a block (its index) and a read (its place among the noise levels), [B, F, C, h, w].

    Returns:
        the errors, whose `loss()` is to be minimised.
    """
    layers, errors = model.hybrid_attentions(), LayerErrors()
    with torch.no_grad(), model.as_teacher():
        text, teacher_memory = model.embed_text(batch.text_BTD), model.memory_for(batch.latents_BFCHW)
    student_memory = model.memory_for(batch.latents_BFCHW, differentiable=True)
    for block in video_blocks(batch, settings.frames_per_block):
        for place, sigma in enumerate(settings.noise_levels):
            level = torch.full((), sigma, device=block.clean.device)
            noisy = add_noise(block.clean, noise(block.number, place), level)
            with torch.no_grad(), model.as_teacher(), observed(layers) as seen:
                predict_flow(model, noisy, level * NUM_TRAIN_TIMESTEPS, text, teacher_memory, block.start)
            for layer, one in seen.items():
                view = student_memory.layers[layer].read(one.x_BLD.shape[1])
                output, _ = layers[layer](one.x_BLD, one.rotary, view, attend=True, remember=False)
                errors.add(layer, output, one.output_BLD)
            errors.passes += 1
        if settings.starts_graph(block.number):
            student_memory.detach()
        with torch.no_grad(), model.as_teacher(), observed(layers) as seen:
            remember_block(model, block.clean, text, teacher_memory, block.start)
        for layer, one in seen.items():
            memory = student_memory.layers[layer]
            view = memory.read(one.x_BLD.shape[1])
            output, update = layers[layer](one.x_BLD, one.rotary, view, attend=settings.read_clean, remember=True)
            if settings.read_clean:
                errors.add(layer, output, one.output_BLD)
            memory.commit(update)
        errors.passes += settings.read_clean
    return errors
