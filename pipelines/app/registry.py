"""Generations of visitors: one per page, some that run, some that wait, all of them freed when their page closes."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from pipelines.app.limits import Limits
from wan.utils.errors import InputError

log = logging.getLogger(__name__)


class Closable(Protocol):
    """What a place holds."""

    def close(self) -> None:
        """Give everything back; closing twice does nothing."""


R = TypeVar("R", bound=Closable)


class Stage(StrEnum):
    """Where a generation is."""

    waiting = "waiting"
    running = "running"
    finished = "finished"


@dataclass
class Place(Generic[R]):
    """A visitor's generation.

    Attributes:
        visitor: key of the browser session.
        run: the generation.
        seen: when the page last took something, by the registry's clock.
    """

    visitor: str
    run: R
    seen: float
    stage: Stage = field(default=Stage.waiting)


class Registry(Generic[R]):
    """Places of all visitors. Any thread may call any method.

    Args:
        limits: how many run and wait, and for how long a place is kept that nobody uses.
        clock: seconds, never falling.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._lock = threading.Lock()
        self._places: dict[str, Place[R]] = {}  # in the order of their coming

    def enter(self, visitor: str, make: Callable[[], R]) -> Place[R]:
        """Give a visitor a place in the queue. The visitor's finished generation is closed for it.

        Args:
            make: builds the generation, once it is known that there is room; it must not take long.

        Raises:
            InputError: the visitor has a generation that runs or waits, or all places are taken.
        """
        with self._lock:
            former = self._places.get(visitor)
            if former is not None and former.stage is not Stage.finished:
                raise InputError("this page generates already: stop that first")
            if len(self._active()) >= self._limits.pages:
                raise InputError(
                    f"{self._limits.running} generations run and {self._limits.waiting} wait, which is the limit: try "
                    "again later"
                )
            place = Place(visitor, make(), self._clock())
            self._places.pop(visitor, None)
            self._places[visitor] = place
        if former is not None:
            self._close(former)
        return place

    def turn(self, place: Place[R]) -> int:
        """Places before this one in the queue; 0 once it runs.

        Raises:
            InputError: the place was taken away.
        """
        with self._lock:
            self._require(place)
            place.seen = self._clock()
            active = self._active()
            running = sum(each.stage is Stage.running for each in active)
            waiting = [each for each in active if each.stage is Stage.waiting]
            if place.stage is Stage.waiting and waiting.index(place) < self._limits.running - running:
                place.stage = Stage.running
            return 0 if place.stage is Stage.running else waiting.index(place) + 1

    def touch(self, place: Place[R]) -> None:
        """Note that the page is there.

        Raises:
            InputError: the place was taken away.
        """
        with self._lock:
            self._require(place)
            place.seen = self._clock()

    def finish(self, place: Place[R]) -> None:
        """Let the next one run; what the generation made stays until its page closes."""
        with self._lock:
            place.stage, place.seen = Stage.finished, self._clock()

    def of(self, visitor: str) -> R:
        """The generation of a visitor.

        Raises:
            InputError: there is none.
        """
        with self._lock:
            place = self._places.get(visitor)
            if place is None:
                raise InputError("this page has generated nothing: start first")
            place.seen = self._clock()
            return place.run

    def leave(self, visitor: str) -> None:
        """Free all that a visitor has; nothing where there is nothing."""
        with self._lock:
            place = self._places.pop(visitor, None)
        if place is not None:
            self._close(place)

    def sweep(self) -> int:
        """Free places that nobody has used for long.

        Returns:
            how many they were.
        """
        kept = {Stage.finished: self._limits.keep_seconds}
        with self._lock:
            now = self._clock()
            old = [
                each
                for each in self._places.values()
                if now - each.seen > kept.get(each.stage, self._limits.idle_seconds)
            ]
            for place in old:
                del self._places[place.visitor]
        for place in old:
            self._close(place)
        return len(old)

    def close(self) -> None:
        """Free all places."""
        with self._lock:
            places = list(self._places.values())
            self._places.clear()
        for place in places:
            self._close(place)

    def __len__(self) -> int:
        with self._lock:
            return len(self._places)

    def _active(self) -> list[Place[R]]:
        return [each for each in self._places.values() if each.stage is not Stage.finished]

    def _require(self, place: Place[R]) -> None:
        if self._places.get(place.visitor) is not place:
            raise InputError("this generation was ended: its page was closed, or took no frames; start again")

    def _close(self, place: Place[R]) -> None:
        """Close one generation; an error of it must not keep others from being closed."""
        try:
            place.run.close()
        except Exception:
            log.exception("a generation could not be closed")
