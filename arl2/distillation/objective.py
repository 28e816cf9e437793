"""Interface between trainer and objectives, and the parts that both objectives share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor, nn

from arl2.distillation.batch import BatchNoise, VideoBatch
from arl2.model import HybridWanModel
from wan.memory import Memory
from wan.utils.errors import InputError
from wan.utils.ranges import Count, check_ranges

LayerReports = dict[str, dict[int, float]]
"""Measurements of hybrid layers: name to value by layer."""


class ForwardMode(StrEnum):
    """Computation of the blocks of a video: one after the other over a memory, or all in one forward."""

    SEQUENTIAL = "sequential"
    PARALLEL = "parallel"

    @classmethod
    def _missing_(cls, value: object) -> "ForwardMode | None":
        """Member for a former value."""
        return cls.SEQUENTIAL if value == "loop" else None


@dataclass(frozen=True)
class ObjectiveSettings:
    """Settings of both objectives.

    Attributes:
        frames_per_block: latent frames per block.
        blocks_per_graph: number of blocks through which gradients flow back; None for the whole video. In parallel
            mode, also the number of blocks per forward, where the objective `takes_segments`.
        forward_mode: sequential is the specification and takes everything; parallel takes half the time or less, by
            fewer and larger kernels.
    """

    takes_segments: ClassVar[bool] = False

    frames_per_block: Count
    blocks_per_graph: Count | None = None
    forward_mode: ForwardMode = ForwardMode.SEQUENTIAL

    def __post_init__(self) -> None:
        check_ranges(self)
        in_one_graph = self.forward_mode is ForwardMode.PARALLEL and not self.takes_segments
        if in_one_graph and self.blocks_per_graph is not None:
            raise InputError(
                "forward_mode parallel has one graph for all blocks: drop blocks_per_graph, or take sequential"
            )

    def starts_graph(self, block: int) -> bool:
        """Returns whether the memory must be detached before this block is remembered.

        Detaching after it would cut the gradient of what the block writes. Before the first block there is nothing
        to cut.
        """
        return self.blocks_per_graph is not None and block > 0 and block % self.blocks_per_graph == 0


class Objective(ABC):
    """Loss over videos as a function of some parameters of a model.

    Attributes:
        model: holds the parameters; its other parameters are frozen.
        on_new_memory: called with every memory that `losses` makes, and whether it is the student's.
    """

    model: HybridWanModel
    on_new_memory: Callable[[Memory, bool], None] | None = None

    def new_memory(
        self,
        batch: VideoBatch,
        window_frames: int | None = None,
        sink_frames: int = 0,
        differentiable: bool = False,
        of_student: bool | None = None,
    ) -> Memory:
        """Empty memory for the videos of a batch; see `wan.model.CausalWanModel.memory_for`.

        Args:
            of_student: for `on_new_memory`; None for if it is differentiable.
        """
        memory = self.model.memory_for(batch.latents_BFCHW, window_frames, sink_frames, differentiable)
        if self.on_new_memory is not None:
            self.on_new_memory(memory, differentiable if of_student is None else of_student)
        return memory

    @abstractmethod
    def parameters_to_train(self) -> dict[str, nn.Parameter]:
        """Parameters to train by name."""

    @abstractmethod
    def losses(self, batch: VideoBatch, noise: BatchNoise) -> Iterator[Tensor]:
        """Iterate over parts whose sum is the loss of the batch, a mean over its videos.

        Back-propagate each part before asking for the next, which frees its graph.

        Raises:
            InputError: the frames do not divide into blocks.
        """

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Metrics of the last batch; synchronizes with the device."""

    @abstractmethod
    def reports(self, batch: VideoBatch, noise: BatchNoise) -> LayerReports:
        """Measure every hybrid layer on a batch, without gradients."""


@contextmanager
def frozen_teacher(model: HybridWanModel, compiled: bool = False) -> Iterator[None]:
    """Run the model as the teacher: softmax layers, no adapters, no gradients, no autocast.

    Args:
        model: hybrid model; switched back afterwards.
        compiled: whether compiled blocks run compiled; the trainer prevents it elsewhere.
    """
    device = model.patch_embedding.weight.device
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        model.as_teacher(),
        torch.compiler.set_stance("default") if compiled else nullcontext(),
    ):
        yield
