"""The app behind the page: visitors' requests in, updates and messages out. It knows nothing of the page's library."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from pipelines.app.limits import Limits, read_file, read_prompt, read_request
from pipelines.app.live import Job, LiveRun, RunState, Update, explain
from pipelines.app.memory_test import MemoryTest, is_of_toyworld, read_seed
from pipelines.app.models import AppModel
from pipelines.app.registry import Place, Registry
from pipelines.app.saved import read_saved
from wan.utils.errors import InputError
from wan.utils.ranges import Seed, typed

POLL_SECONDS = 0.25
SWEEP_SECONDS = 5.0


class App:
    """Generations of all visitors on some models; any thread may call any method.

    Args:
        models: by name.
        limits: of requests, places and times.
        folder: for recordings; everything in it is the app's.
    """

    def __init__(self, models: Mapping[str, AppModel], limits: Limits, folder: Path) -> None:
        self.models, self.limits = dict(models), limits
        self._folder = folder
        self._engine = ThreadPoolExecutor(1, "engine")
        self._registry: Registry[LiveRun] = Registry(limits)
        self._closed = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="sweeper", daemon=True)
        self._sweeper.start()

    @property
    def has_memory_test(self) -> bool:
        """Whether the models are the toy world's, whose scenes a memory test is made of."""
        return all(is_of_toyworld(model.pipeline) for model in self.models.values())

    def start(self, visitor: str, form: Mapping[str, Any]) -> Iterator[Update]:
        """Generate what a visitor asks for; bad input and errors are the message of the one update, or of the last.

        Args:
            visitor: key of the browser session.
            form: see `pipelines.app.limits.read_request`.
        """
        return self._generate(visitor, lambda: Job(read_request(form, self.limits, list(self.models)), self.models))

    def test(self, visitor: str, form: Mapping[str, Any]) -> Iterator[Update]:
        """Let models continue a scene whose object comes back, and judge what comes back; otherwise as `start`.

        Args:
            form: see `pipelines.app.memory_test.MemoryTest.request`.
        """
        return self._generate(visitor, lambda: self._read_test(form))

    def load(self, visitor: str, file: Any) -> Iterator[Update]:
        """Go on with a session that was saved; otherwise as `start`.

        Args:
            file: where it is.
        """
        return self._generate(visitor, lambda: self._engine.submit(self._read_saved, file).result())

    def _read_test(self, form: Mapping[str, Any]) -> Job:
        if not self.has_memory_test:
            raise InputError("the memory test is of the toy world: start the app on its models")
        test = MemoryTest.draw(read_seed(form))
        return Job(test.request(form, self.limits, list(self.models)), self.models, test)

    def _read_saved(self, file: Any) -> Job:
        model, request = read_saved(read_file(file, "session"), self.models, self.limits)
        return Job(request, {model.name: model})

    def _generate(self, visitor: str, read: Callable[[], Job]) -> Iterator[Update]:
        try:
            job = read()
            folder = self._folder / uuid.uuid4().hex
            place = self._registry.enter(visitor, lambda: LiveRun(job, self._engine, folder, self.limits))
        except Exception as error:
            yield Update(RunState.failed, message=explain(error))
            return
        try:
            yield from self._updates(place)
        except Exception as error:  # its place was taken away, for one
            yield Update(RunState.failed, message=explain(error))
        finally:
            place.run.stop()
            self._registry.finish(place)

    def _updates(self, place: Place[LiveRun]) -> Iterator[Update]:
        told = -1
        while ahead := self._registry.turn(place):
            if place.run.is_stopped:
                yield Update(RunState.stopped)
                return
            message = f"waiting: number {ahead} in the queue" if ahead != told else ""
            told = ahead
            yield Update(RunState.waiting, message=message)
            time.sleep(POLL_SECONDS)
        for update in place.run.updates():
            if update.state in (RunState.running, RunState.paused):
                self._registry.touch(place)
            yield update

    def pause(self, visitor: str) -> None:
        """See `LiveRun.pause`. As all methods here, it raises InputError where the visitor has no generation."""
        self._registry.of(visitor).pause()

    def go_on(self, visitor: str) -> None:
        """See `LiveRun.go_on`."""
        self._registry.of(visitor).go_on()

    def stop(self, visitor: str) -> None:
        """See `LiveRun.stop`."""
        self._registry.of(visitor).stop()

    def switch(self, visitor: str, prompt: Any) -> None:
        """See `LiveRun.switch`."""
        self._registry.of(visitor).switch(read_prompt(prompt, self.limits))

    def fork(self, visitor: str, seed: Any) -> None:
        """See `LiveRun.fork`."""
        self._registry.of(visitor).fork(typed(Seed, seed, "the fork's seed"))

    def save(self, visitor: str, number: Any) -> Path:
        """See `LiveRun.save`.

        Args:
            number: of the video, from 1.
        """
        return self._registry.of(visitor).save(typed(int, number, "video") - 1)

    def save_session(self, visitor: str, number: Any) -> Path:
        """See `LiveRun.save_session`.

        Args:
            number: of the video, from 1.
        """
        return self._registry.of(visitor).save_session(typed(int, number, "video") - 1)

    def leave(self, visitor: str) -> None:
        """Free everything that a visitor has."""
        self._registry.leave(visitor)

    @property
    def places(self) -> int:
        """Generations that are held for visitors, finished ones included."""
        return len(self._registry)

    def _sweep(self) -> None:
        while not self._closed.wait(SWEEP_SECONDS):
            self._registry.sweep()

    def close(self) -> None:
        """End all generations, and wait until what they hold is free."""
        self._closed.set()
        self._registry.close()
        self._engine.shutdown(wait=True)
        self._sweeper.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
