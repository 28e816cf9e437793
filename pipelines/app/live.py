"""A generation that a page watches and steers while it runs."""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import Tensor

from pipelines.app.limits import Limits, Request
from pipelines.app.models import AppModel
from pipelines.app.recording import Recording
from pipelines.generation.blocks import NonFiniteBlockError
from pipelines.generation.sessions.session import Session
from wan.utils.errors import InputError, out_of_memory

log = logging.getLogger(__name__)

SIGN_OF_LIFE_SECONDS = 1.0
"""Time between updates without frames, after which a page that has closed is noticed."""


class RunState(StrEnum):
    """What a generation does."""

    waiting = "waiting"
    running = "running"
    paused = "paused"
    finished = "finished"
    stopped = "stopped"
    failed = "failed"


@dataclass(frozen=True)
class LaneBlock:
    """New frames of one of the videos side by side.

    Attributes:
        lane: index of the video.
        title: name of the model, and of a fork its seed.
        prompt: under which the block was made.
        frames_THWC: bytes.
        total_frames: of the video so far, these included.
        remembered: bytes of the transformer's memory.
        fps: frames per second of computing.
        is_recorded: whether the video's file has them.
    """

    lane: int
    title: str
    prompt: str
    frames_THWC: Tensor
    total_frames: int
    remembered: int
    fps: float
    is_recorded: bool


@dataclass(frozen=True)
class Update:
    """What a page is told.

    Attributes:
        blocks: new frames, one per video that goes on; none for a sign of life.
        message: for the visitor.
    """

    state: RunState
    blocks: tuple[LaneBlock, ...] = ()
    message: str = ""


class Lane:
    """One of the videos side by side. All methods are for the engine's thread.

    Attributes:
        is_done: whether the video has all its blocks.
    """

    def __init__(
        self, number: int, title: str, model: AppModel, request: Request, session: Session, recording: Recording
    ) -> None:
        self.number, self.title, self.request, self.recording = number, title, request, recording
        self._model, self._session, self._total = model, session, 0
        self.is_done = False

    def step(self) -> LaneBlock:
        """Generate the next block."""
        begin = time.perf_counter()
        frames = self._session.next().frames_BTHWC.wait()[0]
        seconds = time.perf_counter() - begin
        self.is_done = self._session.is_finished
        is_recorded = not self.recording.is_full
        self.recording.write(frames)
        self._total += len(frames)
        return LaneBlock(
            lane=self.number,
            title=self.title,
            prompt=self.request.prompt,
            frames_THWC=frames,
            total_frames=self._total,
            remembered=self._model.bytes_remembered(self.request, self._session.next_frame),
            fps=len(frames) / seconds,
            is_recorded=is_recorded,
        )

    def switch(self, prompt: str) -> None:
        """Change the prompt from the next block on."""
        self._session.switch(prompt)
        self.request = replace(self.request, prompt=prompt)

    def fork(self, number: int, seed: int, folder: Path) -> "Lane":
        """Another video with the same past, whose future has other noise."""
        session = self._session.fork(seeds=[seed])
        recording = self.recording.copy(folder)
        request = replace(self.request, seed=seed)
        other = Lane(number, f"{self._model.name}, fork with seed {seed}", self._model, request, session, recording)
        other._total, other.is_done = self._total, self.is_done
        return other

    def release(self) -> None:
        """Give the memory back; the recording stays."""
        self._session.close()


class LiveRun:
    """Videos of one request, side by side; the page's thread iterates `updates`, any other steers.

    Args:
        request: checked.
        models: by name.
        engine: its one thread does everything that a session does; generations take turns there, block by block.
        folder: of its own, for recordings; it need not exist.
        limits: of the app.
    """

    def __init__(
        self, request: Request, models: Mapping[str, AppModel], engine: Executor, folder: Path, limits: Limits
    ) -> None:
        self.request = request
        self._models, self._engine, self._folder, self._limits = models, engine, folder, limits
        self._lanes: tuple[Lane, ...] = ()
        self._go, self._stopped, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._go.set()
        self._due = 0.0

    # -- for the page that watches

    def updates(self) -> Iterator[Update]:
        """Generate; a block is handed out while the next is computed. Errors become the message of a last update."""
        try:
            yield from self._signs_of_life([begun := self._engine.submit(self._begin)])
            if not self._stopped.is_set():
                begun.result()
                yield from self._blocks()
            is_stopped = self._stopped.is_set()
            yield Update(RunState.stopped if is_stopped else RunState.finished)
        except Exception as error:  # one generation's error must not end the app
            is_stopped = self._stopped.is_set()
            yield Update(RunState.stopped) if is_stopped else Update(RunState.failed, message=explain(error))
        finally:
            self._end()

    def _blocks(self) -> Iterator[Update]:
        # At first each video is shown as soon as it is there; then they go on together.
        for each in self._submit_round():
            yield from self._computed([each])
            if self._stopped.is_set():
                return
            yield self._shown([each])
        pending = self._submit_round()
        while pending:
            yield from self._computed(pending)
            if self._stopped.is_set():
                return
            done, pending = pending, self._submit_round()
            self._stopped.wait(max(0.0, self._due - time.monotonic()))  # until the page has played what it has
            yield self._shown(done)

    def _computed(self, pending: Sequence[Future[LaneBlock]]) -> Iterator[Update]:
        yield from self._signs_of_life(pending)
        yield from self._pauses()  # a block that was computed ahead is shown after a pause

    def _shown(self, done: Sequence[Future[LaneBlock]]) -> Update:
        blocks = tuple(each.result() for each in done)
        self._due = time.monotonic() + len(blocks[0].frames_THWC) / self._limits.playback_fps
        return Update(RunState.running, blocks)

    def _submit_round(self) -> list[Future[LaneBlock]]:
        return [self._engine.submit(lane.step) for lane in self._lanes if not lane.is_done]

    def _signs_of_life(self, pending: Sequence[Future[Any]]) -> Iterator[Update]:
        while not self._stopped.is_set() and wait(pending, SIGN_OF_LIFE_SECONDS).not_done:
            yield Update(RunState.running)

    def _pauses(self) -> Iterator[Update]:
        begin = time.monotonic()
        while not self._stopped.is_set() and not self._go.wait(SIGN_OF_LIFE_SECONDS):
            if time.monotonic() - begin > self._limits.pause_seconds:
                seconds = self._limits.pause_seconds
                raise InputError(f"it was paused for more than {seconds:.0f} seconds, and has ended: start again")
            yield Update(RunState.paused)

    # -- for the page that steers

    def pause(self) -> None:
        """Stand still after the block that is being shown.

        Raises:
            InputError: it has ended, as for all methods here.
        """
        self._require_going()
        self._go.clear()

    def go_on(self) -> None:
        """Go on after a pause."""
        self._require_going()
        self._go.set()

    def stop(self) -> None:
        """End the videos; their files stay. Stopping twice does nothing."""
        self._stopped.set()
        self._go.set()

    @property
    def is_stopped(self) -> bool:
        """Whether it was stopped."""
        return self._stopped.is_set()

    def switch(self, prompt: str) -> None:
        """Give all videos another prompt, after the block that is being computed."""
        self._require_going()
        self._do(self._engine.submit(self._switch, prompt))

    def fork(self, seed: int) -> None:
        """Add a video that has the first one's past, and another future.

        Raises:
            InputError: there is no room for another one.
        """
        self._require_going()
        self._do(self._engine.submit(self._fork, seed))

    def save(self, lane: int) -> Path:
        """The mp4 of a video as far as it is generated.

        Raises:
            InputError: there is no such video, or it has no frames yet.
        """
        lanes = self._lanes
        if not 0 <= lane < len(lanes):
            raise InputError(f"there is no video {lane + 1}: {len(lanes)} are there")
        recording = lanes[lane].recording
        return recording.save(self._folder / f"video-{lane + 1}-seed-{lanes[lane].request.seed}.mp4")

    def close(self) -> None:
        """End, and remove all files."""
        self.stop()
        self._later(self._remove)

    # -- in the engine's thread

    def _begin(self) -> None:
        if self._stopped.is_set():
            return
        # Before the first one takes memory: a request that one model cannot have is refused as a whole.
        models = [self._models[name] for name in self.request.models]
        for model in models:
            model.choose_memory(self.request)
        for number, model in enumerate(models):
            session = model.begin(self.request)
            self._lanes = (*self._lanes, Lane(number, model.name, model, self.request, session, self._record(number)))

    def _record(self, number: int) -> Recording:
        size, limits = (self.request.height, self.request.width), self._limits
        return Recording(self._lane_folder(number), *size, limits.playback_fps, limits.recorded_frames)

    def _lane_folder(self, number: int) -> Path:
        return self._folder / f"lane-{number}"

    def _switch(self, prompt: str) -> None:
        for lane in self._lanes:
            if not lane.is_done:
                lane.switch(prompt)

    def _fork(self, seed: int) -> None:
        number = len(self._lanes)
        if not number or self._lanes[0].is_done or self._stopped.is_set():
            raise InputError("there is nothing to fork now: fork between the first frames and the last")
        if number >= self._limits.lanes:
            raise InputError(f"{number} videos are side by side, which is the limit: stop, and start again")
        self._lanes = (*self._lanes, self._lanes[0].fork(number, seed, self._lane_folder(number)))

    def _release(self) -> None:
        for lane in self._lanes:
            lane.release()

    def _remove(self) -> None:
        self._release()
        for lane in self._lanes:
            lane.recording.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- both

    def _end(self) -> None:
        self._ended.set()
        self.stop()
        self._later(self._release)

    def _later(self, work: Callable[[], None]) -> None:
        """Have the engine do something when it comes to it; an engine that has ended has done it all before."""
        with suppress(RuntimeError):
            self._engine.submit(work).add_done_callback(_log_failure)

    def _require_going(self) -> None:
        if self._ended.is_set() or self._stopped.is_set():
            raise InputError("this generation has ended: start again")

    def _do(self, work: "Future[None]") -> None:
        """Wait for what was asked of the engine.

        Raises:
            InputError: it cannot be done; the generation goes on.
        """
        try:
            work.result()
        except InputError:
            raise
        except Exception as error:
            raise InputError(explain(error)) from error


def _log_failure(done: "Future[None]") -> None:
    error = None if done.cancelled() else done.exception()
    if error is not None:
        log.error("what a generation held could not be freed", exc_info=error)


def explain(error: BaseException) -> str:
    """An error in one line for the visitor; what only a developer can act on goes to the log as a whole."""
    if isinstance(error, InputError | NonFiniteBlockError):
        return str(error)
    if out_of_memory(error):
        log.warning("out of memory: %s", error)
        return "out of memory: ask for a smaller or shorter video, or for fewer models"
    if isinstance(error, CancelledError):
        return "the app is shutting down"
    log.error("a generation failed", exc_info=error)
    first = (str(error).splitlines() or [""])[0]
    return f"the generation failed ({type(error).__name__}: {first[:200]}): the app goes on, start again"
