"""A generation that a page watches and steers while it runs."""

import copy
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
from pipelines.app.memory_test import Findings, MemoryTest, Watch
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
        findings: of a memory test; None for other videos.
    """

    lane: int
    title: str
    prompt: str
    frames_THWC: Tensor
    total_frames: int
    remembered: int
    fps: float
    is_recorded: bool
    findings: Findings | None = None


@dataclass(frozen=True)
class Job:
    """What a visitor asks for.

    Attributes:
        request: checked.
        models: by the names in the request.
        test: that the videos are watched for; None for none.
    """

    request: Request
    models: Mapping[str, AppModel]
    test: MemoryTest | None = None


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

    Args:
        number: index among the videos.
        title: see `LaneBlock`.
        model: that makes the video.
        request: what is asked of it.
        session, recording: of the video's own.
        watch: of a memory test; None for none.

    Attributes:
        is_done: whether the video has all its blocks.
    """

    def __init__(
        self,
        number: int,
        title: str,
        model: AppModel,
        request: Request,
        session: Session,
        recording: Recording,
        watch: Watch | None = None,
    ) -> None:
        self.number, self.title, self.request, self.recording = number, title, request, recording
        self._model, self._session, self._total, self._watch = model, session, 0, watch
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
        if self._watch is not None:
            self._watch.add(frames)
        remembered = self._model.bytes_remembered(self.request, self._session.next_frame)
        return LaneBlock(
            lane=self.number,
            title=self.title,
            prompt=self.request.prompt,
            frames_THWC=frames,
            total_frames=self._total,
            remembered=remembered + self._session.past_bytes,
            fps=min(len(frames), self._model.frames_per_block) / seconds,  # the first block brings given frames too
            is_recorded=is_recorded,
            findings=None if self._watch is None else self._watch.findings(),
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
        title = f"{self._model.name}, fork with seed {seed}"
        other = Lane(number, title, self._model, request, session, recording, copy.deepcopy(self._watch))
        other._total, other.is_done = self._total, self.is_done
        return other

    def save_session(self, path: Path) -> None:
        """Write a file from which the video goes on.

        Raises:
            InputError: the video has all its blocks, or the file cannot be written.
        """
        if self.is_done:
            raise InputError("the video has all its blocks: save a session before its video ends")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._session.save(path)

    def release(self) -> None:
        """Give the memory back; the recording stays."""
        self._session.close()


class LiveRun:
    """Videos of one job, side by side; the page's thread iterates `updates`, any other steers.

    Args:
        job: what is asked for.
        engine: its one thread does everything that a session does; generations take turns there, block by block.
        folder: of its own, for recordings; it need not exist.
        limits: of the app.
    """

    def __init__(self, job: Job, engine: Executor, folder: Path, limits: Limits) -> None:
        self._job, self._engine, self._folder, self._limits = job, engine, folder, limits
        self._lanes: tuple[Lane, ...] = ()
        self._go, self._stopped, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._go.set()
        self._due = 0.0

    # -- for the page that watches

    def updates(self) -> Iterator[Update]:
        """Generate; a block is handed out while the next is computed. Errors become the message of a last update."""
        try:
            yield from self._signs_of_life([checked := self._engine.submit(self._check)])
            if not self._stopped.is_set():
                checked.result()
                yield from self._blocks()
            is_stopped = self._stopped.is_set()
            yield Update(RunState.stopped if is_stopped else RunState.finished)
        except Exception as error:  # one generation's error must not end the app
            is_stopped = self._stopped.is_set()
            yield Update(RunState.stopped) if is_stopped else Update(RunState.failed, message=explain(error))
        finally:
            self._end()

    def _blocks(self) -> Iterator[Update]:
        # At first each video is begun and shown by itself, as soon as it is there; then they go on together.
        for each in [self._engine.submit(self._first, name) for name in self._job.request.models]:
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
        """Give all videos another prompt, after the block that is being computed.

        Raises:
            InputError: it is a memory test, which another caption could answer.
        """
        self._require_going()
        if self._job.test is not None:
            raise InputError("a memory test keeps its caption, which names nothing: start a generation to switch")
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
        chosen = self._lane(lane)
        return chosen.recording.save(self._folder / f"video-{lane + 1}-seed-{chosen.request.seed}.mp4")

    def save_session(self, lane: int) -> Path:
        """A file from which a video goes on after its newest block, which may be one that is still to be shown.

        Raises:
            InputError: there is no such video, or it has all its blocks.
        """
        self._require_going()
        chosen = self._lane(lane)
        path = self._folder / f"session-{lane + 1}-seed-{chosen.request.seed}.safetensors"
        self._do(self._engine.submit(chosen.save_session, path))
        return path

    def _lane(self, number: int) -> Lane:
        lanes = self._lanes
        if not 0 <= number < len(lanes):
            raise InputError(f"there is no video {number + 1}: {len(lanes)} are there")
        return lanes[number]

    def close(self) -> None:
        """End, and remove all files."""
        self.stop()
        self._later(self._remove)

    # -- in the engine's thread

    def _check(self) -> None:
        """Refuse a request that one of the models cannot have as a whole, before the first one takes memory."""
        for name in self._job.request.models:
            self._job.models[name].choose_memory(self._job.request)

    def _first(self, name: str) -> LaneBlock:
        """Begin the video of a model, and generate its first block."""
        if self._stopped.is_set():
            raise CancelledError
        model, request, test = self._job.models[name], self._job.request, self._job.test
        session, number = model.begin(request), len(self._lanes)
        watch = None if test is None else Watch(test)
        lane = Lane(number, model.name, model, request, session, self._record(number), watch)
        self._lanes = (*self._lanes, lane)
        return lane.step()

    def _record(self, number: int) -> Recording:
        size, limits = (self._job.request.height, self._job.request.width), self._limits
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
