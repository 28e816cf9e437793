"""One trainer for every objective, on one process or many.

What trains is about 2 % of the model. It is replicated in float32, and its gradients are averaged by one flat
all-reduce a step. Not DDP: an objective back-propagates its loss in parts, and stage 1 reaches each layer's parameters
in passes of their own, which DDP's bookkeeping of "one forward, one backward" does not allow without
`no_sync` and unused-parameter searches. So a step is the same code on any number of ranks, replicas stay equal bit for
bit (all apply one reduced gradient), and a checkpoint is the same file. The frozen backbone is replicated, or sharded
by `arl2.distillation.sharding`.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

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
    first_not_finite,
    load_state,
    newest_checkpoint,
    require_within,
    save_state,
    truncate_losses,
)
from arl2.distillation.objective import LayerReports, Objective
from arl2.distillation.sampling import Batches
from arl2.model import HybridWanModel
from wan.checkpoints.fields import STATE_VARIANT
from wan.checkpoints.loading import fingerprint_of
from wan.checkpoints.saving import with_record
from wan.utils.errors import InputError, Interrupted
from wan.utils.files import write_json, writing
from wan.utils.json_lines import JsonLinesWriter
from wan.utils.ranges import Bounds, Choices, Count, Fraction, Positive
from wan.utils.ranks import OtherRankError, num_ranks, raise_together
from wan.utils.signals import SIGNALS, check_interrupted, end_at_once_on, on_signals

LOSSES, CHECKPOINTS = "losses.jsonl", "checkpoints"
DECAYS = ("constant", "cosine")
Momentum = Annotated[float, Bounds(0, 1, below=True)]
"""How much of a running mean a step keeps."""
BatchSize = Annotated[int, Bounds(1, 10**6)]
"""Videos at a time, or batches of a step."""


class TrainingError(InputError):
    """Training cannot go on."""


class NothingLearnedError(TrainingError):
    """Training came to its end, or far, and to nothing."""

    exit_status = 1


class Turn(NamedTuple):
    """What a rank computes at a time.

    Attributes:
        batch, noise: of zeros where the samples cannot be read.
        error: why not.
    """

    batch: VideoBatch
    noise: BatchNoise
    error: InputError | None = None


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


@dataclass
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

    steps: Count = 6000
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
        on_begin: called on every rank when the run can go on, before the first step.

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
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._accelerator, self._objective, self._batches = accelerator, objective, batches
        self._settings, self._folder, self._fingerprint = settings, folder, fingerprint
        self._on_report, self._on_begin = on_report, on_begin
        trainables = objective.parameters_to_train()
        optimizer = settings.optimizer
        adamw = torch.optim.AdamW(
            trainables.values(), lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay
        )
        ema = None
        if settings.ema_decay is not None:
            ema = {name: value.detach().clone() for name, value in trainables.items()}
        self.state = TrainingState(trainables, adamw, ema, Progress())
        self._signal: int | None = None
        self._is_stopping = False
        self._failure: InputError | None = None
        self._session_steps = 0
        self._zero_gradients = 0

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train from the newest checkpoint, or from the start, to the last step.

        SIGINT, SIGTERM and SIGHUP let the step in flight be finished and a checkpoint be written; a second one ends the
        process at once.

        Args:
            stop: asked before every step whether to keep what there is and end early; for one process.

        Returns:
            whether the last step is done.

        Raises:
            TrainingError: loss or gradient was not finite for too long, or a parameter is not finite.
            NothingLearnedError: more steps were skipped than learned from, or nothing changed.
            InputError: the checkpoint is damaged or of another run, a sample cannot be read, or the disk is full.
            Interrupted: a signal came; the checkpoint is written.
        """
        on_tensor_cores = self._accelerator.device.type == "cuda" and self._accelerator.mixed_precision == "bf16"
        # Compiled in bfloat16, a student's gradients were wrong now and then (docs/results/distillation.md); what has
        # no gradients asks for the compiler itself.
        with products_in_tf32(on_tensor_cores), torch.compiler.set_stance("force_eager"):
            return self._run(stop)

    def _run(self, stop: Callable[[], bool]) -> bool:
        settings, progress = self._settings, self._resume()
        start, first = fingerprint_of(self.state.trainables), progress.step
        check_interrupted()
        with (
            self._bar() as (bar, task),
            self._prefetched() as turns,
            JsonLinesWriter(self._folder / LOSSES) if self._is_main else nullcontext() as losses,
            on_signals(self._note_signal),
        ):
            while progress.step < settings.steps:
                if stop():
                    self._save()
                    return False
                line = self._step(turns)
                self._record(losses, line)
                is_stopping = self._is_stopping or (num_ranks() == 1 and self._signal is not None)
                if progress.step % settings.save_every == 0 or progress.step == settings.steps or is_stopping:
                    self._save()
                speed = f"loss {line['loss'] or math.nan:.4g}, {1 / line['seconds']:.2f} steps/s"
                bar.update(task, completed=progress.step, figures=speed)
                self._stop_if_lost()
                if is_stopping:
                    raise self._interrupted()
        raise_together(self._interrupted() if self._signal is not None else None, self._accelerator.device)
        if first == 0 and progress.learned and fingerprint_of(self.state.trainables) == start:
            raise NothingLearnedError(f"no parameter changed in {progress.step} steps: raise optimizer.lr")
        self._stop_if_useless(at_end=True)
        return True

    @property
    def _is_main(self) -> bool:
        return bool(self._accelerator.is_main_process)

    def _resume(self) -> Progress:
        """Load the newest checkpoint, if there is one, and drop what was logged after it."""
        newest = newest_checkpoint(self._folder / CHECKPOINTS)
        if newest is not None:
            load_state(self.state, newest, self._fingerprint)
        progress = self.state.progress
        require_within(progress, self._settings.steps, self._folder / CHECKPOINTS)
        with self._held():
            if self._is_main:
                truncate_losses(self._folder / LOSSES, progress.step)
            self._on_begin()
        raise_together(self._failure, self._accelerator.device)
        return progress

    def _note_signal(self, number: int) -> None:
        """Remember a signal, and leave the next one to the system: it ends the process whatever is being computed."""
        self._signal = number
        # On Ctrl-C torchrun sends the processes that it started a signal beside the terminal's.
        end_at_once_on((number,) if "TORCHELASTIC_RUN_ID" in os.environ else SIGNALS)

    def _interrupted(self) -> Interrupted:
        step, steps = self.state.progress.step, self._settings.steps
        text = f"{step} of {steps} steps are done and kept in {self._folder}: start the same command again to go on"
        return Interrupted(text, self._signal or signal.SIGTERM)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Keep an error back until all ranks hear of it: one that ended alone would leave the others waiting."""
        try:
            yield
        except InputError as error:
            if num_ranks() == 1:
                raise
            self._failure = self._failure or error

    def _step(self, turns: Iterator[Turn]) -> dict[str, Any]:
        """One optimiser step; returns its line of the log."""
        started, settings, progress = time.perf_counter(), self._settings, self.state.progress
        parameters = list(self.state.trainables.values())
        for parameter in parameters:
            parameter.grad = None
        total = torch.zeros((), device=self._accelerator.device)
        for _ in range(settings.accumulation):
            turn = next(turns)
            self._keep_error_of(turn)
            for part in self._parts(turn.batch, turn.noise):
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
        self._session_steps += 1
        self._zero_gradients += norm == 0
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
        """Average gradients and loss over ranks in one go, and clip the gradient; its norm before, and the loss.

        What is not finite on one rank is not finite on any afterwards: all ranks agree. In the same go they learn
        whether one of them is to stop, and whether one cannot go on.

        Raises:
            InputError: this rank, or another, cannot go on.
        """
        parameters = list(self.state.trainables.values())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flags = [float(self._signal is not None), float(self._failure is not None)]
        last = torch.cat([loss.to(grads[0].dtype).reshape(1), grads[0].new_tensor(flags)])
        flat = self._accelerator.reduce(torch.cat([*(grad.flatten() for grad in grads), last]), "mean")
        gradient = flat[: -len(last)]
        norm = gradient.norm()
        gradient.mul_((self._settings.optimizer.max_grad_norm / (norm + 1e-6)).clamp(max=1))
        for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
        length, mean_loss, stopping, failed = torch.cat([norm.reshape(1), flat[-len(last) :]]).tolist()
        if failed:
            raise self._failure or OtherRankError()
        self._is_stopping = stopping > 0
        return length, mean_loss

    @torch.no_grad()
    def _average(self) -> None:
        if self.state.ema is None or self._settings.ema_decay is None:
            return
        for name, parameter in self.state.trainables.items():
            self.state.ema[name].lerp_(parameter, 1 - self._settings.ema_decay)

    @contextmanager
    def _prefetched(self) -> Iterator[Iterator[Turn]]:
        """This rank's batches from the current step on, each read while the one before is computed."""
        settings, world = self._settings, self._accelerator.num_processes

        def read(number: int) -> Turn:
            step, turn = divmod(number, settings.accumulation)
            first = (turn * world + self._accelerator.process_index) * settings.batch
            return self._read(step, range(first, first + settings.batch))

        def turns(pool: ThreadPoolExecutor) -> Iterator[Turn]:
            number = self.state.progress.step * settings.accumulation
            waiting: Future[Turn] = pool.submit(read, number)
            while True:
                number += 1
                ready, waiting = waiting.result(), pool.submit(read, number)
                yield ready

        with ThreadPoolExecutor(1) as pool:
            yield turns(pool)

    def _read(self, step: int, places: range) -> Turn:
        try:
            return Turn(*self._batches(step, places))
        except InputError as error:
            # Computed all the same: the other ranks may need this one in their passes.
            return Turn(*self._batches.blank(step, places), error)

    def _keep_error_of(self, turn: Turn) -> None:
        with self._held():
            if turn.error is not None:
                raise turn.error

    def _record(self, losses: JsonLinesWriter | None, line: dict[str, Any]) -> None:
        """Log a step, and report on the layers where it is time to."""
        step = line["step"]
        with self._held():
            if losses is not None:
                losses.write(line)
            self._log({name: value for name, value in line.items() if value is not None}, step)
        if step % self._settings.report_every == 0 or step == self._settings.steps:
            self._report(step)

    def _log(self, figures: dict[str, float], step: int) -> None:
        with writing(self._folder):
            self._accelerator.log(figures, step=step)

    def _report(self, step: int) -> None:
        """Measure the layers on the first batch of the step to come."""
        device, turn = self._accelerator.device, self._read(step, range(self._settings.batch))
        self._keep_error_of(turn)
        metrics = self._objective.metrics()
        with self._accelerator.autocast():
            reports = self._objective.reports(turn.batch.to(device), turn.noise.to(device))
        per_layer = {f"{name}/{layer}": value for name, values in reports.items() for layer, value in values.items()}
        with self._held():
            self._log(metrics | per_layer, step)
            if self._is_main:
                page = {"step": step, "metrics": metrics, "layers": reports}
                write_json(self._folder / "reports" / f"step-{step:08d}.json", page)
        with self._held():
            self._on_report(step, self._objective.model, reports)

    def _save(self) -> None:
        with self._held():
            if self._is_main:
                self._require_finite()
                record = self._objective.model.record()
                header = with_record(record) if STATE_VARIANT in record else None  # weights do not show it
                save_state(self.state, self._folder / CHECKPOINTS, self._fingerprint, self._settings.keep, header)
        raise_together(self._failure, self._accelerator.device)

    def _require_finite(self) -> None:
        """Make sure that a checkpoint holds numbers.

        Raises:
            TrainingError: it would not; the message names the parameter.
        """
        name = first_not_finite(self.state.trainables) or first_not_finite(self.state.ema or {})
        if name is not None:
            raise TrainingError(
                f"{name} is not finite after step {self.state.progress.step}, no checkpoint of it is written: lower "
                "optimizer.lr, and start the same command again to go on from the checkpoint before"
            )

    def _stop_if_lost(self) -> None:
        """Check that the run still learns.

        Raises:
            TrainingError: it does not.
        """
        progress = self.state.progress
        if progress.skipped_in_row >= self._settings.max_bad_steps:
            raise TrainingError(
                f"loss or gradient was not finite in the last {progress.skipped_in_row} steps (now {progress.step}): "
                "lower optimizer.lr, or look at the data and the weights"
            )
        if min(progress.step, self._session_steps) >= self._settings.max_bad_steps:
            self._stop_if_useless(at_end=False)

    def _stop_if_useless(self, at_end: bool) -> None:
        """Check that more was learned than skipped, and that there is something to learn.

        Raises:
            NothingLearnedError: it is not so.
        """
        progress = self.state.progress
        if progress.skipped > progress.learned:
            raise NothingLearnedError(
                f"{progress.skipped} of {progress.step} steps were skipped, for loss or gradient was not finite: this "
                f"is no trained model{', nothing is exported' if at_end else ''}; lower optimizer.lr, or look at the "
                "data and the weights, and take another run_folder"
            )
        if self._session_steps and self._zero_gradients == self._session_steps:
            raise NothingLearnedError(
                f"the gradient was exactly zero in all {self._session_steps} steps of this session: nothing can be "
                "learned from this data with these settings"
            )

    @contextmanager
    def _bar(self) -> Iterator[tuple[ProgressBar, TaskID]]:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
        with ProgressBar(*columns, disable=not self._accelerator.is_main_process) as bar:
            yield (
                bar,
                bar.add_task("training", total=self._settings.steps, completed=self.state.progress.step, figures=""),
            )


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
