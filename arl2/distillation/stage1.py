"""Stage 1: every hybrid layer learns to reproduce the output of the teacher's softmax attention on the same input.

The frozen teacher runs over the blocks, and inputs and outputs of its attention layers are recorded. Then each hybrid
layer, which shares the projections, runs on the same input with its own state. Layers run one after the other, so
only the graph of one layer exists at a time.

No gradient crosses layers: run stage 1 once for all layers, and choose which to convert afterwards.

Source: ARL², arXiv 2605.16579; `Stage1Settings` holds what the paper leaves open.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arl2.distillation.batch import BatchNoise, TrainingBlock, VideoBatch, noisy_video, video_blocks
from arl2.distillation.diagnostics import measured
from arl2.distillation.losses import mean_squared_errors, mean_squares
from arl2.distillation.objective import ForwardMode, LayerReports, Objective, ObjectiveSettings, frozen_teacher
from arl2.hybrid_attention import HybridAttention
from arl2.model import HybridWanModel
from arl2.rollout import num_blocks, predict_flow, remember_block
from wan.memory import LayerMemory, Memory
from wan.model import SelfAttention, TextKV
from wan.ops.rope import Rotary
from wan.parallel import ParallelLayout
from wan.teacher_forcing import teacher_forced_layers

STAGE1_PARTS = ("a_proj.", "b_proj.", "gate_proj.", "A_log", "dt_bias", "phi_q.", "phi_k.", "phi_v.", "phi_o.")
"""Name prefixes of the parameters of a hybrid layer that stage 1 trains."""
MIN_TARGET_MEAN_SQUARE = 1e-8
"""Lower bound on the mean square of a target in the relative loss."""


@dataclass(frozen=True)
class Stage1Settings(ObjectiveSettings):
    """Settings of stage 1 that the paper leaves open.

    Attributes:
        loss_on_clean_pass: whether the clean pass contributes to the loss too.
        relative: whether to divide each squared error by the mean square of its target, per video. Otherwise layers
            with large outputs get the largest gradients under the common learning rate.
    """

    loss_on_clean_pass: bool = True
    relative: bool = True


def stage1_parameters(model: HybridWanModel) -> dict[str, nn.Parameter]:
    """Parameters that stage 1 trains, by name: the new parts of the hybrid layers, without adapters."""
    names = {name for name in model.hybrid_parameter_names() if name.split("self_attn.")[-1].startswith(STAGE1_PARTS)}
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


class Observation(NamedTuple):
    """Input and output of the teacher's attention in one pass.

    Attributes:
        x_BLD: input.
        rotary: rotation of the tokens.
        output_BLD: output.
    """

    x_BLD: Tensor
    rotary: Rotary
    output_BLD: Tensor


@contextmanager
def observed(layers: dict[int, HybridAttention]) -> Iterator[dict[int, Observation]]:
    """Record inputs and outputs of some attention layers while they are the teacher's.

    A pass that only remembers skips the output of the last layer; it is computed here.
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

    # First among the hooks: those of a sharded layer free its parameters.
    handles = [module.register_forward_hook(hook(layer), prepend=True) for layer, module in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Pass(NamedTuple):
    """A pass of the teacher over a block, which the hybrid layers repeat.

    Attributes:
        seen: observations by layer.
        reads, writes: whether the output contributes to the loss, and whether the block is written to the state.
    """

    seen: dict[int, Observation]
    reads: bool
    writes: bool


class Stage1(Objective):
    """Objective of stage 1.

    Args:
        model: model that is hybrid in the layers to train.
        settings: see `Stage1Settings`.
    """

    def __init__(self, model: HybridWanModel, settings: Stage1Settings) -> None:
        self.model = model
        self.settings = settings
        self._layers = model.hybrid_attentions()
        self._error: dict[int, Tensor] = {}
        self._target_mean_square: dict[int, Tensor] = {}

    def parameters_to_train(self) -> dict[str, nn.Parameter]:
        """See `stage1_parameters`."""
        return stage1_parameters(self.model)

    def losses(self, batch: VideoBatch, noise: BatchNoise) -> Iterator[Tensor]:
        """Iterate over the errors of each layer in each graph; their sum is the mean over layers and passes."""
        parallel = self.settings.forward_mode is ForwardMode.PARALLEL
        yield from self._parallel(batch, noise) if parallel else self._loop(batch, noise)

    def metrics(self) -> dict[str, float]:
        """Mean of the layers' relative errors."""
        relative = self.relative_errors()
        return {"relative_error": sum(relative.values()) / len(relative)}

    def relative_errors(self) -> dict[int, float]:
        """Relative RMS error of every layer in the last batch: 0 is perfect, 1 is that of a zero output."""
        return {layer: float((self._error[layer] / self._target_mean_square[layer]).sqrt()) for layer in self._error}

    @torch.no_grad()
    def reports(self, batch: VideoBatch, noise: BatchNoise) -> LayerReports:
        """Relative errors, and the diagnostics of `measured`."""
        height, width = batch.latents_BFCHW.shape[-2:]
        with measured(self.model, self.model.tokens_per_frame(height, width)) as figures:
            for _ in self._loop(batch, noise, cut_every_block=True):
                pass
        return {"relative_error": self.relative_errors()} | figures

    def _loop(self, batch: VideoBatch, noise: BatchNoise, cut_every_block: bool = False) -> Iterator[Tensor]:
        self._forget()
        weight = self._pass_weight(batch, noise)
        memory = self.new_memory(batch, differentiable=True)
        for graph in self._graphs(batch, noise, cut_every_block):
            for layer in self._layers:
                memory.layers[layer].detach()
                yield weight * self._layer_error(layer, memory.layers[layer], graph)

    def _graphs(self, batch: VideoBatch, noise: BatchNoise, cut_every_block: bool) -> Iterator[list[Pass]]:
        """Iterate over the teacher's passes of each graph; graphs are cut before a block is remembered.

        Args:
            cut_every_block: whatever the settings say. Without gradients that changes nothing but memory.
        """
        settings = self.settings
        with frozen_teacher(self.model):
            text, memory = self.model.embed_text(batch.text_BTD), self.new_memory(batch)
        passes: list[Pass] = []
        for block in video_blocks(batch, settings.frames_per_block):
            passes += self._noisy_passes(block, noise, text, memory)
            if settings.starts_graph(block.number) or (cut_every_block and block.number > 0):
                yield passes
                passes = []
            if settings.loss_on_clean_pass or not block.last:
                with frozen_teacher(self.model), observed(self._layers) as seen:
                    remember_block(self.model, block.clean, text, memory, block.start)
                passes.append(Pass(seen, settings.loss_on_clean_pass, writes=not block.last))
        if passes:
            yield passes

    def _noisy_passes(self, block: TrainingBlock, noise: BatchNoise, text: TextKV, memory: Memory) -> Iterator[Pass]:
        for place in range(noise.num_noise_levels):
            noisy, timestep = noise.applied(block.clean, block.number, place)
            with frozen_teacher(self.model), observed(self._layers) as seen:
                predict_flow(self.model, noisy, timestep, text, memory, block.start)
            yield Pass(seen, reads=True, writes=False)

    def _layer_error(self, layer: int, memory: LayerMemory, graph: list[Pass]) -> Tensor:
        """Sum of a layer's errors over the passes of a graph; frees the observations that it uses."""
        errors = []
        for one in graph:
            x, rotary, target = one.seen.pop(layer)
            view = memory.read(x.shape[1])
            output, update = self._layers[layer](x, rotary, view, attend=one.reads, remember=one.writes)
            if one.reads:
                errors.append(self._passes_error(layer, output, target, 1))
            if one.writes:
                memory.commit(update)
        return torch.stack(errors).sum()

    def _parallel(self, batch: VideoBatch, noise: BatchNoise) -> Iterator[Tensor]:
        self._forget()
        weight, clean = self._pass_weight(batch, noise), batch.latents_BFCHW
        frames, _, height, width = clean.shape[1:]
        size = self.settings.frames_per_block
        noisy, times = noisy_video(batch, noise, size)
        layout = ParallelLayout(frames, size, self.model.tokens_per_frame(height, width), 2, clean.device)
        teacher = teacher_forced_layers(self.model, noisy, times, batch.text_BTD, size, clean)
        while True:  # a layer's observation is used and freed before the teacher's next layer runs
            with frozen_teacher(self.model, compiled=True), observed(self._layers) as seen:
                layer = next(teacher, None)
            if layer is None:
                return
            if layer not in seen:
                continue
            module, (x, rotary, target) = self._layers[layer], seen.pop(layer)
            output, _ = module(x, rotary, module.parallel_view(layout), attend=True, remember=False)
            passes = 2 * layout.num_blocks
            if not self.settings.loss_on_clean_pass:
                output, target, passes = output.chunk(2, dim=1)[1], target.chunk(2, dim=1)[1], layout.num_blocks
            yield weight * self._passes_error(layer, output, target, passes)

    def _pass_weight(self, batch: VideoBatch, noise: BatchNoise) -> float:
        """Weight of one pass of one layer in the loss."""
        blocks = num_blocks(batch.latents_BFCHW.shape[1], self.settings.frames_per_block)
        return 1 / (len(self._layers) * blocks * (noise.num_noise_levels + self.settings.loss_on_clean_pass))

    def _forget(self) -> None:
        self._error, self._target_mean_square = {}, {}

    def _passes_error(self, layer: int, output_BLD: Tensor, target_BLD: Tensor, passes: int) -> Tensor:
        """Sum over passes of the squared error, averaged over videos; also added to the layer's metrics."""
        error_BP = mean_squared_errors(output_BLD, target_BLD, passes)
        target_mean_square_BP = mean_squares(target_BLD, passes)
        self._error[layer] = error_BP.detach().mean(0).sum() + self._error.get(layer, 0)
        self._target_mean_square[layer] = target_mean_square_BP.mean(0).sum() + self._target_mean_square.get(layer, 0)
        if self.settings.relative:
            error_BP = error_BP / target_mean_square_BP.clamp(min=MIN_TARGET_MEAN_SQUARE)
        return error_BP.mean(0).sum()
