"""What takes the memory of a training step, noted at the borders between its phases."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arl2.distillation.batch import BatchNoise, VideoBatch
from arl2.distillation.objective import LayerReports, Objective
from arl2.distillation.stage1 import Stage1
from arl2.hybrid_attention import HybridAttention
from wan.memory import Memory


class Allocator:
    """Bytes of the GPU's allocator; zeros on a CPU, which keeps no account.

    Attributes:
        reserved_peak: most bytes taken from the card, fragments included.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self.reserved_peak = 0
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)

    def allocated(self) -> int:
        """Bytes in use now."""
        return 0 if self._device is None else torch.cuda.memory_allocated(self._device)

    def take_peak(self) -> int:
        """Most bytes in use since this was last asked."""
        if self._device is None:
            return 0
        peak = torch.cuda.max_memory_allocated(self._device)
        self.reserved_peak = max(self.reserved_peak, torch.cuda.max_memory_reserved(self._device))
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


@dataclass
class MemoryNotes:
    """Bytes at the borders between the phases of steps, the most of all steps.

    Attributes:
        weights: the model as drawn.
        trainables: what their float32 copies and their average add.
        gradients_and_optimizer: what stays after a step besides.
        teacher_memory: keys and values of the teacher's blocks, where they are made.
        student_memory: keys, values and states of the student at the end of a forward.
        observations: stage 1, what the teacher's layers saw and said, when the first student layer begins.
        activations: all else that is kept before a graph is propagated back; in stage 1 with the observations.
        forward_peak, backward_peak, step_peak: most bytes in use within the phase, and ever in a step.
        report_peak: most bytes in use while layers are reported on.
        reserved_peak: most bytes taken from the card.
    """

    weights: int = 0
    trainables: int = 0
    gradients_and_optimizer: int = 0
    teacher_memory: int = 0
    student_memory: int = 0
    observations: int = 0
    activations: int = 0
    forward_peak: int = 0
    backward_peak: int = 0
    step_peak: int = 0
    report_peak: int = 0
    reserved_peak: int = 0

    def note(self, **values: int) -> None:
        """Keep what is larger than before."""
        for name, value in values.items():
            setattr(self, name, max(vars(self)[name], value))


class WatchedObjective(Objective):
    """An objective that notes memory at the borders of its phases, and computes what it always does.

    Args:
        objective: the one to watch.
        allocator: tells bytes.
        notes: filled.
    """

    def __init__(self, objective: Objective, allocator: Allocator, notes: MemoryNotes) -> None:
        self.model = objective.model
        self._objective, self._allocator, self._notes = objective, allocator, notes
        self._memories: list[Memory] = []
        self._teacher_bytes = 0

    def parameters_to_train(self) -> dict[str, nn.Parameter]:
        """See `Objective`."""
        return self._objective.parameters_to_train()

    def losses(self, batch: VideoBatch, noise: BatchNoise) -> Iterator[Tensor]:
        """See `Objective`."""
        notes, allocator = self._notes, self._allocator
        notes.note(step_peak=allocator.take_peak())
        before = allocator.allocated()
        with self._watching(before):
            for part in self._objective.losses(batch, noise):
                student = sum(memory.num_bytes for memory in self._memories)
                kept = allocator.allocated() - before - self._teacher_bytes - student
                peak = allocator.take_peak()
                notes.note(student_memory=student, activations=kept, forward_peak=peak, step_peak=peak)
                yield part
                peak = allocator.take_peak()
                notes.note(backward_peak=peak, step_peak=peak)

    def metrics(self) -> dict[str, float]:
        """See `Objective`."""
        return self._objective.metrics()

    def reports(self, batch: VideoBatch, noise: BatchNoise) -> LayerReports:
        """See `Objective`."""
        self._notes.note(step_peak=self._allocator.take_peak())
        reports = self._objective.reports(batch, noise)
        self._notes.note(report_peak=self._allocator.take_peak())
        return reports

    @contextmanager
    def _watching(self, before: int) -> Iterator[None]:
        """Note what memories take when they are made, and what there is when the first hybrid layer begins."""
        self._memories, self._teacher_bytes = [], 0
        allocator = self._allocator

        def note_memory(memory: Memory, differentiable: bool) -> None:
            if differentiable:
                self._memories.append(memory)
            else:
                self._teacher_bytes += memory.num_bytes
                self._notes.note(teacher_memory=self._teacher_bytes)

        def begins(module: HybridAttention, arguments: tuple[Any, ...]) -> None:
            if module.enabled and isinstance(self._objective, Stage1):
                self._notes.note(observations=allocator.allocated() - before - self._teacher_bytes)

        first = self.model.hybrid_attentions()[min(self.model.hybrid.layers)]
        handle = first.register_forward_pre_hook(begins)
        self._objective.on_new_memory = note_memory
        try:
            yield
        finally:
            self._objective.on_new_memory = None
            handle.remove()
            self._memories = []  # they would keep the graph
