"""Generations that a page watches: the frames of `stream`, steered while they come, freed whatever happens."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from app_world import BLOCKS, CONFIG, FORM, HEIGHT, WIDTH, lane_blocks, limits, models
from PIL import Image

from pipelines.app.app import App
from pipelines.app.limits import Request
from pipelines.app.live import LaneBlock, RunState, Update
from pipelines.app.models import EQUAL_WINDOW, FULL, HYBRID, AppModel, memory_bytes, models_of, num_frames
from pipelines.app.pictures import animation, lanes_html, message_html
from pipelines.config import MemoryConfig, MemoryKind
from pipelines.media.video import count_frames
from wan.utils.errors import InputError

REQUEST = Request("a red shape", (HYBRID,), 3, HEIGHT, WIDTH, 2, BLOCKS)
ALONE = FORM | {"models": [HYBRID]}
ENDLESS = ALONE | {"blocks": 0}


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    with App(models(), limits(running=1, waiting=1), tmp_path) as app:
        yield app


def frames(blocks: list[LaneBlock]) -> torch.Tensor:
    return torch.cat([block.frames_THWC for block in blocks])


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def next_blocks(updates: Iterator[Update]) -> Update:
    return next(update for update in updates if update.blocks)


def stream(model: AppModel, memory: MemoryConfig) -> torch.Tensor:
    """The same video by the pipeline alone."""
    pipeline, options = model.pipeline, {"seeds": [3], "num_inference_steps": 2, "memory": memory}
    blocks = pipeline.stream("a red shape", num_frames(pipeline, 3 * BLOCKS), HEIGHT, WIDTH, **options)
    return torch.cat([block.frames_BTHWC.wait()[0] for block in blocks])


def test_side_by_side_every_model_makes_its_video(app: App, tmp_path: Path) -> None:
    updates = list(app.start("a", FORM))
    assert updates[-1] == Update(RunState.finished)
    memories = [MemoryConfig(MemoryKind.full), models()[EQUAL_WINDOW].choose_memory(REQUEST), MemoryConfig()]
    assert memories[1].kind is MemoryKind.window
    for lane, (model, memory) in enumerate(zip(models().values(), memories, strict=True)):
        blocks = lane_blocks(iter(updates), lane)
        assert [block.title for block in blocks] == [model.name] * BLOCKS
        assert torch.equal(frames(blocks), stream(model, memory))
        assert blocks[-1].total_frames == len(frames(blocks)) == count_frames(app.save("a", lane + 1))
        assert all(block.fps > 0 for block in blocks)
    full, window, hybrid = ([block.remembered for block in lane_blocks(iter(updates), lane)] for lane in range(3))
    assert full == [full[0] * count for count in range(1, BLOCKS + 1)]
    assert window[-3] == window[-1] <= hybrid[-1] < full[-1]
    app.leave("a")
    until(lambda: not list(tmp_path.iterdir()))
    assert app.places == 0


def test_the_first_frames_are_shown_before_other_models_have_theirs(app: App) -> None:
    counts = [len(update.blocks) for update in app.start("a", FORM) if update.blocks]
    assert counts == [1, 1, 1, *[3] * (BLOCKS - 1)]


def test_blocks_come_no_faster_than_they_play(tmp_path: Path) -> None:
    with App(models(), limits(playback_fps=20), tmp_path) as app:
        times, counts = [], []
        for update in app.start("a", ALONE):
            times += [time.monotonic()] if update.blocks else []
            counts += [len(block.frames_THWC) for block in update.blocks]
    for before, after, count in zip(times, times[1:], counts, strict=False):
        assert after - before > 0.9 * count / 20


def test_an_equal_window_is_the_largest_that_is_no_larger_than_the_hybrid() -> None:
    softmax, hybrid = models()[FULL].pipeline, models()[HYBRID]
    found = []
    for blocks in (1, 2, 7, 30, None):
        request = replace(REQUEST, blocks=blocks)
        window = models()[EQUAL_WINDOW].choose_memory(request)
        bytes_of_hybrid = hybrid.bytes_remembered(request, None if blocks is None else 3 * blocks)
        larger = replace(window, window_frames=window.window_frames + 1)
        assert memory_bytes(softmax, request, None, larger) > bytes_of_hybrid
        assert window.window_frames == 3 or memory_bytes(softmax, request, None, window) <= bytes_of_hybrid
        found.append(window.window_frames)
    assert found == [*sorted(found[:4]), found[4]] and found[4] < found[3]


def test_models_without_a_second_checkpoint() -> None:
    softmax, hybrid = models()[FULL].pipeline, models()[HYBRID].pipeline
    assert list(models_of(CONFIG, softmax)) == ["full memory", "window"]
    assert list(models_of(CONFIG, hybrid)) == ["hybrid"]
    for pair in ((hybrid, hybrid), (softmax, softmax), (hybrid, softmax)):
        with pytest.raises(InputError, match="--hybrid_checkpoint"):
            models_of(CONFIG, *pair)


def test_a_video_without_an_end_takes_constant_memory(app: App) -> None:
    updates = app.start("a", ENDLESS | {"models": [EQUAL_WINDOW, HYBRID]})
    found = [next_blocks(updates) for _ in range(9)][3:]  # with full windows
    assert len({tuple(block.remembered for block in update.blocks) for update in found}) == 1
    run = app._registry.of("a")
    assert [lane._session.memory_bytes for lane in run._lanes] == [block.remembered for block in found[-1].blocks]
    app.stop("a")
    assert [update.state for update in updates][-1] is RunState.stopped
    (refused,) = [update for update in app.start("a", ENDLESS | {"models": [FULL, HYBRID]}) if update.message]
    assert refused.state is RunState.failed and "no end" in refused.message


def test_a_pause_holds_the_next_frames(app: App) -> None:
    updates = app.start("a", ALONE)
    found = [next_blocks(updates)]
    app.pause("a")
    assert next(updates).state is RunState.paused
    app.go_on("a")
    found += [update for update in updates if update.blocks]
    assert torch.equal(frames([update.blocks[0] for update in found]), stream(models()[HYBRID], MemoryConfig()))


def test_a_pause_ends(tmp_path: Path) -> None:
    with App(models(), limits(pause_seconds=0.01), tmp_path) as app:
        updates = app.start("a", ALONE)
        next_blocks(updates)
        app.pause("a")
        assert "paused for more than" in list(updates)[-1].message


def test_a_switch_changes_the_prompt_and_the_frames(app: App) -> None:
    updates = app.start("a", ALONE)
    first = next_blocks(updates)
    app.switch("a", "a blue shape")
    blocks = [*first.blocks, *lane_blocks(updates)]
    # One block was being computed at the switch.
    assert blocks[0].prompt == "a red shape" and blocks[-1].prompt == "a blue shape"
    switched = next(number for number, block in enumerate(blocks) if block.prompt == "a blue shape")
    former, plain = len(frames(blocks[:switched])), stream(models()[HYBRID], MemoryConfig())
    assert 1 <= switched <= 3
    assert torch.equal(frames(blocks)[:former], plain[:former])
    assert not torch.equal(frames(blocks)[former:], plain[former:])


def test_a_fork_with_the_same_seed_goes_the_same_way_and_another_does_not(app: App) -> None:
    updates = app.start("a", ALONE)
    seen = [next_blocks(updates)]
    app.fork("a", 3)
    app.fork("a", 4)
    seen += [update for update in updates if update.blocks]
    last = {block.lane: block for block in seen[-1].blocks}
    assert torch.equal(last[0].frames_THWC, last[1].frames_THWC)
    assert not torch.equal(last[0].frames_THWC, last[2].frames_THWC)
    assert last[2].title == "hybrid, fork with seed 4"
    assert [count_frames(app.save("a", number)) for number in (1, 2, 3)] == [last[0].total_frames] * 3
    for call in (lambda: app.fork("a", 5), lambda: app.save("a", 4), lambda: app.save("a", 0)):
        with pytest.raises(InputError):
            call()


def test_a_video_starts_with_a_picture(app: App, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(picture)
    pipeline, options = models()[HYBRID].pipeline, {"seeds": [3], "num_inference_steps": 2, "image": picture}
    expected = pipeline.stream("a red shape", num_frames(pipeline, 3 * BLOCKS), HEIGHT, WIDTH, **options)
    found = frames(lane_blocks(app.start("a", ALONE | {"image": str(picture)})))
    assert torch.equal(found, torch.cat([block.frames_BTHWC.wait()[0] for block in expected]))
    assert not torch.equal(found, stream(models()[HYBRID], MemoryConfig()))


def test_forks_are_bounded(app: App) -> None:
    updates = app.start("a", ENDLESS)
    next_blocks(updates)
    for seed in range(3):
        app.fork("a", seed)
    with pytest.raises(InputError, match="limit"):
        app.fork("a", 3)
    updates.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "change", [{"prompt": ""}, {"seed": None}, {"models": ["other"]}, {"width": 31}, {"steps": 99}]
)
def test_bad_input_is_a_message(app: App, change: dict[str, Any]) -> None:
    *_, last = app.start("a", ALONE | change)
    assert last.state is RunState.failed and last.message
    assert list(app.start("a", ALONE))[-1].state is RunState.finished


def test_bad_steering_is_an_input_error_and_the_video_goes_on(app: App) -> None:
    calls: list[Callable[[], object]] = [
        *(lambda act=act: act("a") for act in (app.pause, app.go_on, app.stop)),
        *(lambda act=act: act("a", 1) for act in (app.switch, app.fork, app.save)),
    ]
    for call in calls:
        with pytest.raises(InputError):
            call()
    updates = app.start("a", ALONE)
    next_blocks(updates)
    for bad in (lambda: app.switch("a", ""), lambda: app.fork("a", 2**64), lambda: app.fork("a", "1")):
        with pytest.raises(InputError):
            bad()
    assert list(updates)[-1].state is RunState.finished
    for late in (lambda: app.switch("a", "a blue shape"), lambda: app.fork("a", 1), lambda: app.pause("a")):
        with pytest.raises(InputError, match="ended"):
            late()


@pytest.mark.parametrize("after", [0, 2])
def test_a_crash_is_a_message_and_the_app_goes_on(tmp_path: Path, after: int) -> None:
    calls = iter(range(100))

    def choose(request: Request) -> MemoryConfig:
        if next(calls) == after + 1:
            raise RuntimeError("something broke\nsecond line")
        return MemoryConfig()

    broken = {**models(), "broken": replace(models()[HYBRID], name="broken", choose_memory=choose)}
    with App(broken, limits(), tmp_path) as app:
        *_, last = app.start("a", ALONE | {"models": ["broken"]})
        assert last.state is RunState.failed and "RuntimeError: something broke)" in last.message
        assert list(app.start("a", ALONE))[-1].state is RunState.finished
        assert list(app.start("b", ALONE))[-1].state is RunState.finished


def test_a_page_that_closes_in_the_middle_leaves_nothing(app: App, tmp_path: Path) -> None:
    updates = app.start("a", ENDLESS)
    next_blocks(updates)
    run = app._registry.of("a")
    app.leave("a")
    assert list(updates)[-1].state in (RunState.stopped, RunState.failed)
    until(lambda: not list(tmp_path.iterdir()) and all(lane._session._closed for lane in run._lanes))
    assert run._lanes and app.places == 0


def test_a_waiting_page_is_told_and_gets_its_turn(app: App) -> None:
    first, second = app.start("a", ENDLESS), app.start("b", ALONE)
    next_blocks(first)
    waiting = next(second)
    assert waiting.state is RunState.waiting and "number 1" in waiting.message
    (refused,) = app.start("c", ALONE)
    assert "limit" in refused.message
    app.stop("a")
    assert list(first)[-1].state is RunState.stopped
    assert list(second)[-1].state is RunState.finished


def test_generations_take_turns(tmp_path: Path) -> None:
    with App(models(), limits(running=2), tmp_path) as app:
        found: dict[str, list[Update]] = {}
        work = [
            threading.Thread(target=lambda name=name: found.update({name: list(app.start(name, ALONE))}))
            for name in ("a", "b")
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join(timeout=30)
        first, second = (frames(lane_blocks(iter(found[name]))) for name in ("a", "b"))
        assert torch.equal(first, second) and torch.equal(first, stream(models()[HYBRID], MemoryConfig()))


def test_what_visitors_write_is_no_markup() -> None:
    block = LaneBlock(
        0, "<b>", "<script>alert(1)</script>", torch.zeros(2, 16, 32, 3, dtype=torch.uint8), 2, 5, 1.0, True
    )
    assert "<script" not in lanes_html([block], 16) and "<script" not in message_html("<script>")
    assert "http" not in lanes_html([block], 16)


def test_a_block_is_a_picture_that_plays_once_in_its_time() -> None:
    given = torch.randint(0, 256, (12, 16, 32, 3), dtype=torch.uint8)
    durations = []
    with Image.open(io.BytesIO(animation(given, 16))) as picture:
        for number, frame in enumerate(given):
            picture.seek(number)
            assert np.array_equal(np.asarray(picture.convert("RGB")), frame.numpy())
            durations.append(picture.info["duration"])
        assert picture.n_frames == 12 and picture.info["loop"] == 1 and sum(durations) == 750
