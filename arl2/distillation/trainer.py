"""One trainer for every objective, on one process or many.

What trains is about 2 % of the model. It is replicated in float32, and its gradients are averaged by one flat
all-reduce a step. Not DDP: an objective back-propagates its loss in parts, and stage 1 reaches each layer's parameters
in passes of their own, which DDP's bookkeeping of "one forward, one backward" does not allow without
`no_sync` and unused-parameter searches. So a step is the same code on any number of ranks, replicas stay equal bit for
bit (all apply one reduced gradient), and a checkpoint is the same file. The frozen backbone is replicated, or sharded
by `arl2.distillation.sharding`.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from torch import Tensor

from arl2.distillation.batch import BatchNoise, VideoBatch
from arl2.distillation.checkpointing import (
    Fingerprint,
    Progress,
    TrainingState,
    complete_checkpoints,
    load_state,
    save_state,
)
from arl2.distillation.objective import LayerReports, Objective
from arl2.distillation.sampling import Batches
from arl2.model import HybridWanModel
from wan.utils.errors import InputError
from wan.utils.files import atomic_path, write_json
from wan.utils.ranges import Bounds, Choices, Count, Fraction, Positive

LOSSES, CHECKPOINTS = "losses.jsonl", "checkpoints"
DECAYS = ("constant", "cosine")
Momentum = Annotated[float, Bounds(0, 1, below=True)]
"""How much of a running mean a step keeps."""
BatchSize = Annotated[int, Bounds(1, 10**6)]
"""Videos at a time, or batches of a step."""


class TrainingError(InputError):
    """Training cannot go on."""


@dataclass
class OptimizerSettings:
    """AdamW and its learning rate.

    Attributes:
        lr: at its height.
        betas, weight_decay: of AdamW.
        warmup_steps: over which the rate rises from zero.
        decay: afterwards "constant", or "cosine" down to zero at the last step.
        max_grad_norm: longer gradients are shortened to it.
    """

    lr: Annotated[float, Bounds(0, 100, above=True)] = 1e-3
    betas: tuple[Momentum, Momentum] = (0.9, 0.99)
    weight_decay: Annotated[float, Bounds(0, 100)] = 0.0
    warmup_steps: Annotated[int, Bounds(0)] = 100
    decay: Annotated[str, Choices(DECAYS)] = "cosine"
    max_grad_norm: Positive = 1.0

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0, in a run of `steps`."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.decay == "constant":
            return self.lr * warm
        after = max(0, step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.lr * warm * (1 + math.cos(math.pi * after)) / 2


@dataclass(frozen=True)
class TrainerSettings:
    """How long, how much at a time, and what is kept.

    Attributes:
        steps: optimiser steps of the run.
        batch: videos a rank computes at a time.
        accumulation: batches of an optimiser step.
        optimizer: see there.
        ema_decay: of an average of what trains; None for none.
        save_every, keep: steps between checkpoints, and how many stay.
        report_every: steps between reports on the layers.
        max_bad_steps: so many steps in a row may be skipped.
    """

    steps: Count
    batch: BatchSize = 1
    accumulation: BatchSize = 1
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    ema_decay: Fraction | None = None
    save_every: Count = 100
    keep: Count = 2
    report_every: Count = 100
    max_bad_steps: Count = 10


class Trainer:
    """Minimises an objective, and survives being killed.

    Args:
        accelerator: device, precision, processes, trackers.
        objective: what to minimise. Of its model nothing but its parameters may require gradients.
        batches: the data.
        settings: see there.
        folder: of the run.
        fingerprint: everything that must not change between sessions.
        on_report: called on every rank with the steps done, the model and the figures of its layers.

    Attributes:
        state: parameters, optimiser, average, progress.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        batches: Batches,
        settings: TrainerSettings,
        folder: Path,
        fingerprint: Fingerprint,
        on_report: Callable[[int, HybridWanModel, LayerReports], None] = lambda step, model, reports: None,
    ) -> None:
        self._accelerator, self._objective, self._batches = accelerator, objective, batches
        self._settings, self._folder, self._fingerprint = settings, folder, fingerprint
        self._on_report = on_report
        trainables = objective.parameters_to_train()
        optimizer = settings.optimizer
        adamw = torch.optim.AdamW(
            trainables.values(), lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay
        )
        ema = None
        if settings.ema_decay is not None:
            ema = {name: value.detach().clone() for name, value in trainables.items()}
        self.state = TrainingState(trainables, adamw, ema, Progress())

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train from the newest whole checkpoint, or from the start, to the last step.

        Args:
            stop: asked before every step whether to keep what there is and end early; for one process.

        Returns:
            whether the last step is done.

        Raises:
            TrainingError: loss or gradient was not finite for too long.
            InputError: the checkpoint is of another run, a sample cannot be read, or the disk is full.
        """
        on_tensor_cores = self._accelerator.device.type == "cuda" and self._accelerator.mixed_precision == "bf16"
        # Compiled in bfloat16, a student's gradients were wrong now and then (docs/results/distillation.md); what has
        # no gradients asks for the compiler itself.
        with products_in_tf32(on_tensor_cores), torch.compiler.set_stance("force_eager"):
            return self._run(stop)

    def _run(self, stop: Callable[[], bool]) -> bool:
        settings, state = self._settings, self.state
        saved = complete_checkpoints(self._folder / CHECKPOINTS)
        if saved:
            load_state(state, saved[-1], self._fingerprint)
        if self._accelerator.is_main_process:
            truncate_losses(self._folder / LOSSES, state.progress.step)
        self._accelerator.wait_for_everyone()
        with self._bar() as (bar, task), self._prefetched() as batches, (self._folder / LOSSES).open("a") as losses:
            while state.progress.step < settings.steps:
                if stop():
                    self._save()
                    return False
                line = self._step(batches)
                step = state.progress.step
                if self._accelerator.is_main_process:
                    self._write(losses, line)
                if step % settings.report_every == 0 or step == settings.steps:
                    self._report(step)
                if step % settings.save_every == 0 or step == settings.steps:
                    self._save()
                speed = f"loss {line['loss'] or math.nan:.4g}, {1 / line['seconds']:.2f} steps/s"
                bar.update(task, completed=step, figures=speed)
                self._stop_if_lost()
        return True

    def _step(self, batches: Iterator[tuple[VideoBatch, BatchNoise]]) -> dict[str, Any]:
        """One optimiser step; returns its line of the log."""
        started, settings, progress = time.perf_counter(), self._settings, self.state.progress
        parameters = list(self.state.trainables.values())
        for parameter in parameters:
            parameter.grad = None
        total = torch.zeros((), device=self._accelerator.device)
        for _ in range(settings.accumulation):
            for part in self._parts(*next(batches)):
                part = part / settings.accumulation
                part.backward()
                total += part.detach()
        norm, loss = self._reduce_gradients(total)
        lr = settings.optimizer.lr_at(progress.step, settings.steps)
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            for group in self.state.optimizer.param_groups:
                group["lr"] = lr
            self.state.optimizer.step()
            self._average()
        progress.step += 1
        progress.skipped += not finite
        progress.skipped_in_row = 0 if finite else progress.skipped_in_row + 1
        return {
            "step": progress.step,
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": norm if math.isfinite(norm) else None,
            "lr": lr,
            "skipped": progress.skipped,
            "seconds": time.perf_counter() - started,
        }

    def _parts(self, batch: VideoBatch, noise: BatchNoise) -> Iterator[Tensor]:
        """The parts of a loss: their forward under autocast, but not what is done with them."""
        device = self._accelerator.device
        parts = self._objective.losses(batch.to(device), noise.to(device))
        while True:
            with self._accelerator.autocast():
                part = next(parts, None)
            if part is None:
                return
            yield part

    def _reduce_gradients(self, loss: Tensor) -> tuple[float, float]:
        """Average gradients and loss over ranks in one go, and shorten the gradient; its norm before, and the loss.

        What is not finite on one rank is not finite on any afterwards: all ranks agree.
        """
        parameters = list(self.state.trainables.values())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(grad.flatten() for grad in grads), loss.to(grads[0].dtype).reshape(1)])
        flat = self._accelerator.reduce(flat, "mean")
        gradient, mean_loss = flat[:-1], flat[-1]
        norm = gradient.norm()
        gradient.mul_((self._settings.optimizer.max_grad_norm / (norm + 1e-6)).clamp(max=1))
        for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
        return float(norm), float(mean_loss)

    @torch.no_grad()
    def _average(self) -> None:
        if self.state.ema is None or self._settings.ema_decay is None:
            return
        for name, parameter in self.state.trainables.items():
            self.state.ema[name].lerp_(parameter, 1 - self._settings.ema_decay)

    @contextmanager
    def _prefetched(self) -> Iterator[Iterator[tuple[VideoBatch, BatchNoise]]]:
        """This rank's batches from the current step on, each read while the one before is computed."""
        settings, world = self._settings, self._accelerator.num_processes

        def read(number: int) -> tuple[VideoBatch, BatchNoise]:
            step, turn = divmod(number, settings.accumulation)
            first = (turn * world + self._accelerator.process_index) * settings.batch
            return self._batches(step, range(first, first + settings.batch))

        def batches(pool: ThreadPoolExecutor) -> Iterator[tuple[VideoBatch, BatchNoise]]:
            number = self.state.progress.step * settings.accumulation
            waiting: Future[tuple[VideoBatch, BatchNoise]] = pool.submit(read, number)
            while True:
                number += 1
                ready, waiting = waiting.result(), pool.submit(read, number)
                yield ready

        with ThreadPoolExecutor(1) as pool:
            yield batches(pool)

    def _report(self, step: int) -> None:
        """Measure the layers on the first batch of the step to come."""
        places = range(self._settings.batch)
        device = self._accelerator.device
        batch, noise = self._batches(step, places)
        metrics = self._objective.metrics()
        with self._accelerator.autocast():
            reports = self._objective.reports(batch.to(device), noise.to(device))
        per_layer = {f"{name}/{layer}": value for name, values in reports.items() for layer, value in values.items()}
        self._accelerator.log(metrics | per_layer, step=step)
        if self._accelerator.is_main_process:
            write_json(
                self._folder / "reports" / f"step-{step:08d}.json",
                {"step": step, "metrics": metrics, "layers": reports},
            )
        self._on_report(step, self._objective.model, reports)

    def _write(self, losses: Any, line: dict[str, Any]) -> None:
        try:
            losses.write(json.dumps(line) + "\n")
            losses.flush()
        except OSError as error:
            raise InputError(f"cannot write {self._folder / LOSSES} ({error.strerror}): free some space") from error
        self._accelerator.log({name: value for name, value in line.items() if value is not None}, step=line["step"])

    def _save(self) -> None:
        if self._accelerator.is_main_process:
            save_state(self.state, self._folder / CHECKPOINTS, self._fingerprint, self._settings.keep)
        self._accelerator.wait_for_everyone()

    def _stop_if_lost(self) -> None:
        progress = self.state.progress
        if progress.skipped_in_row >= self._settings.max_bad_steps:
            raise TrainingError(
                f"loss or gradient was not finite in the last {progress.skipped_in_row} steps (now {progress.step}): "
                "lower optimizer.lr, or look at the data and the weights"
            )

    @contextmanager
    def _bar(self) -> Iterator[tuple[ProgressBar, TaskID]]:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
        with ProgressBar(*columns, disable=not self._accelerator.is_main_process) as bar:
            yield bar, bar.add_task("training", total=self._settings.steps, figures="")


@contextmanager
def products_in_tf32(on: bool) -> Iterator[None]:
    """Multiply float32 matrices in TF32 inside the context, if `on`: 10 bits of mantissa, on tensor cores.

    Under bfloat16 autocast only the writes to states multiply float32. Their keys and values come in bfloat16, whose 7
    bits TF32 holds exactly; what is computed from them is rounded to nearest (`arl2.ops.tf32.rounded`), which costs
    a state and its gradients less than the rounding of the keys did (`tests/arl2/test_gated_delta.py`).
    """
    before = torch.get_float32_matmul_precision()
    if on:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def truncate_losses(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which are computed again, and half a line that a killed run left."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    with atomic_path(path) as temporary:
        temporary.write_text("".join(kept))
