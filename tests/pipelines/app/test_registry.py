"""Places of visitors: one per page, a bounded queue in order of coming, and nothing left of pages that are gone."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.app.limits import Limits
from pipelines.app.registry import Registry
from wan.utils.errors import InputError

LIMITS = Limits(running=2, waiting=2, idle_seconds=10, keep_seconds=100)


class Run:
    def __init__(self, breaks: bool = False) -> None:
        self.closed, self._breaks = 0, breaks

    def close(self) -> None:
        self.closed += 1
        if self._breaks:
            raise RuntimeError("cannot close")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_visitors_run_in_the_order_of_their_coming() -> None:
    registry: Registry[Run] = Registry(LIMITS)
    places = [registry.enter(name, Run) for name in "abcd"]
    # Whoever asks first, the queue's order holds.
    assert [registry.turn(place) for place in reversed(places)] == [4, 3, 0, 0]
    assert [registry.turn(place) for place in places] == [0, 0, 1, 2]
    registry.finish(places[0])
    assert registry.turn(places[3]) == 2 and registry.turn(places[2]) == 0 and registry.turn(places[3]) == 1
    registry.leave("b")
    assert registry.turn(places[3]) == 0


def test_one_generation_per_page_and_a_bound_on_all() -> None:
    registry: Registry[Run] = Registry(LIMITS)
    first = registry.enter("a", Run)
    with pytest.raises(InputError, match="already"):
        registry.enter("a", Run)
    for name in "bcd":
        registry.enter(name, Run)
    made = []
    with pytest.raises(InputError, match="2 generations run and 2 wait"):
        registry.enter("e", lambda: made.append(1) or Run())  # type: ignore[func-returns-value]
    assert not made
    registry.finish(first)
    registry.enter("e", Run)


def test_a_finished_generation_stays_until_the_next_one_or_the_end_of_the_page() -> None:
    registry: Registry[Run] = Registry(LIMITS)
    place = registry.enter("a", Run)
    registry.turn(place)
    registry.finish(place)
    assert registry.of("a") is place.run and not place.run.closed
    other = registry.enter("a", Run)
    assert place.run.closed == 1 and registry.of("a") is other.run
    registry.leave("a")
    registry.leave("a")
    assert other.run.closed == 1 and len(registry) == 0
    for call in (lambda: registry.of("a"), lambda: registry.turn(other), lambda: registry.touch(other)):
        with pytest.raises(InputError):
            call()


def test_a_former_generation_survives_a_refused_start() -> None:
    registry: Registry[Run] = Registry(LIMITS)
    place = registry.enter("a", Run)
    registry.finish(place)
    for name in "bcde":
        registry.enter(name, Run)
    with pytest.raises(InputError, match="limit"):
        registry.enter("a", Run)
    assert registry.of("a") is place.run and not place.run.closed


def test_pages_that_take_nothing_are_freed() -> None:
    clock = Clock()
    registry: Registry[Run] = Registry(LIMITS, clock)
    lost, there, done = (registry.enter(name, Run) for name in ("lost", "there", "done"))
    registry.finish(done)
    clock.now = 8
    registry.touch(there)
    assert registry.sweep() == 0
    clock.now = 11
    assert registry.sweep() == 1 and lost.run.closed == 1
    clock.now = 101
    assert registry.sweep() == 2 and len(registry) == 0 and there.run.closed == done.run.closed == 1


def test_one_that_cannot_be_closed_does_not_keep_others() -> None:
    registry: Registry[Run] = Registry(LIMITS)
    registry.enter("a", lambda: Run(breaks=True))
    other = registry.enter("b", Run)
    registry.close()
    assert other.run.closed == 1 and len(registry) == 0


def test_many_threads_never_exceed_the_bounds() -> None:
    registry: Registry[Run] = Registry(LIMITS)

    def visit(name: str) -> bool:
        most = 0
        try:
            place = registry.enter(name, Run)
        except InputError:
            return True
        for _ in range(20):
            registry.turn(place)
            most = max(most, sum(each.stage == "running" for each in list(registry._places.values())))
        registry.leave(name)
        return most <= LIMITS.running and place.run.closed == 1

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(visit, map(str, range(200))))
    assert len(registry) == 0
