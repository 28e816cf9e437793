"""What a video goes on from: another video, or a session that was saved; and what its memory does at a switch."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from app_world import BLOCKS, FORM, HEIGHT, WIDTH, lane_blocks, limits, models
from sessions_world import build

from pipelines.app.app import App
from pipelines.app.limits import read_request
from pipelines.app.live import RunState, Update
from pipelines.app.models import EQUAL_WINDOW, FULL, HYBRID, AppModel, latent_frames, num_frames
from pipelines.app.saved import SAVED
from pipelines.config import MemoryConfig, MemoryKind
from pipelines.media.video import VideoWriter, count_frames
from pipelines.prompts.schedules import OnSwitch
from wan.utils.errors import InputError

FPS = 16
ALONE = FORM | {"models": [HYBRID]}


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    with App(models(), limits(given_frames=20), tmp_path / "runs") as app:
        yield app


def next_blocks(updates: Iterator[Update]) -> Update:
    return next(update for update in updates if update.blocks)


def frames(updates: Iterator[Update]) -> torch.Tensor:
    return torch.cat([block.frames_THWC for block in lane_blocks(updates)])


def message(updates: Iterator[Update]) -> str:
    *_, last = updates
    assert last.state is RunState.failed
    return last.message


def write_video(path: Path, count: int) -> Path:
    pixels = torch.randint(0, 256, (count, HEIGHT // 4, WIDTH // 4, 3), dtype=torch.uint8)
    with VideoWriter(path, HEIGHT, WIDTH, FPS) as writer:
        writer.write(pixels.repeat_interleave(4, 1).repeat_interleave(4, 2))
    return path


# 14 frames: 13 of them are 7 latents of 2 frames, two blocks and one latent that begins the next.
@pytest.mark.parametrize("count", [11, 14])
@pytest.mark.parametrize("blocks", [2, 0])
def test_a_video_is_continued(tmp_path: Path, count: int, blocks: int) -> None:
    video = write_video(tmp_path / "given.mp4", count)
    taken, wanted = count - (count - 1) % 2, 2
    pipeline = models()[HYBRID].pipeline
    with App(models(), limits(given_frames=20, playback_fps=FPS), tmp_path / "runs") as app:
        updates = app.start("a", ALONE | {"video": str(video), "blocks": blocks})
        shown = [next_blocks(updates) for _ in range(wanted)]
        app.stop("a")
        list(updates)
    form = ALONE | {"video": str(video), "blocks": blocks}
    request = read_request(form, limits(given_frames=20, playback_fps=FPS), [HYBRID])
    length = num_frames(pipeline, latent_frames(pipeline, request))
    given_blocks = ((taken - 1) // 2 + 1) // 3
    assert length == ((3 * (given_blocks + 2) - 1) * 2 + 1 if blocks else None)
    options = {
        "seeds": [3],
        "num_inference_steps": 2,
        "video": video,
        "memory": models()[HYBRID].choose_memory(request),
    }
    expected = pipeline.stream("a red shape", length, HEIGHT, WIDTH, **options)
    for update, block in zip(shown, expected, strict=False):
        assert torch.equal(update.blocks[0].frames_THWC, block.frames_BTHWC.wait()[0])
    assert shown[0].blocks[0].total_frames > taken


@pytest.mark.parametrize(
    ("count", "change", "said"),
    [(21, {}, "more than 20 frames"), (5, {"image": __file__}, "remove one of them"), (None, {}, "no video at")],
)
def test_a_video_that_cannot_be_continued_is_a_message(
    tmp_path: Path, count: int | None, change: dict[str, Any], said: str
) -> None:
    video = tmp_path / "given.mp4"
    if count is not None:
        write_video(video, count)
    with App(models(), limits(given_frames=20, playback_fps=FPS), tmp_path / "runs") as app:
        assert said in message(app.start("a", ALONE | {"video": str(video)} | change))
        video.write_text("no video")
        assert "given.mp4" in message(app.start("a", ALONE | {"video": str(video)}))


def test_the_memory_at_a_switch_is_chosen(app: App) -> None:
    """Both videos are alike up to the switch; afterwards they differ in what their memories hold."""
    ends = []
    for on_switch in OnSwitch:
        updates = app.start("a", FORM | {"blocks": 12, "on_switch": on_switch.value})
        blocks = [block for update in (next_blocks(updates) for _ in range(3)) for block in update.blocks]
        app.pause("a")
        app.switch("a", "a blue shape")
        app.go_on("a")
        blocks += [block for update in updates for block in update.blocks]
        ends.append([block for block in blocks if block.lane == 0])
    assert [block.prompt for block in ends[0]][-1] == [block.prompt for block in ends[1]][-1] == "a blue shape"
    assert torch.equal(ends[0][0].frames_THWC, ends[1][0].frames_THWC)
    assert not torch.equal(ends[0][-1].frames_THWC, ends[1][-1].frames_THWC)
    assert ends[0][-1].remembered < ends[1][-1].remembered  # the blocks that it would be computed from are counted


def test_an_equal_window_is_of_whole_blocks_where_it_is_computed_anew() -> None:
    model = models()[EQUAL_WINDOW]
    for blocks in (2, 5, 9):
        request = read_request(FORM | {"blocks": blocks}, limits(), list(models()))
        kept = model.choose_memory(request).window_frames
        anew = model.choose_memory(replace(request, on_switch=OnSwitch.recompute)).window_frames
        assert anew % 3 == 0 and max(kept - 3, 2) < anew <= max(kept, 3)


@pytest.mark.parametrize("name", [HYBRID, EQUAL_WINDOW])
def test_a_saved_session_goes_on_to_the_same_frames(app: App, tmp_path: Path, name: str) -> None:
    updates = app.start("a", FORM | {"models": [name], "blocks": 8})
    before = next_blocks(updates).blocks[0].total_frames
    app.pause("a")
    kept = app.save_session("a", 1)
    done = count_frames(app.save("a", 1))
    file = kept.rename(tmp_path / "kept.safetensors")
    app.go_on("a")
    rest = frames(updates)[done - before :]
    again = list(app.load("b", str(file)))
    assert again[-1].state is RunState.finished
    blocks = lane_blocks(iter(again))
    assert torch.equal(torch.cat([block.frames_THWC for block in blocks]), rest) and len(rest)
    assert blocks[0].title == SAVED and blocks[-1].prompt == "a red shape"
    assert blocks[-1].total_frames == len(rest) == count_frames(app.save("b", 1))


def saved(folder: Path, model: AppModel, num_frames: int | None = 41, **arguments: Any) -> Path:
    """A session after its first block."""
    options = {"seeds": [3], "num_inference_steps": 2, "memory": MemoryConfig(MemoryKind.window, 6, 0)} | arguments
    with model.pipeline.session("a red shape", num_frames, HEIGHT, WIDTH, **options) as session:
        session.next()
        session.save(folder / "kept.safetensors")
    return folder / "kept.safetensors"


def test_a_loaded_session_is_steered_as_any(app: App, tmp_path: Path) -> None:
    updates = app.load("a", str(saved(tmp_path, models()[HYBRID], None)))
    next_blocks(updates)
    app.switch("a", "a blue shape")
    app.fork("a", 5)
    last = next(update for update in updates if len(update.blocks) == 2 and update.blocks[0].prompt == "a blue shape")
    assert last.blocks[1].title == f"{SAVED}, fork with seed 5"
    assert app.save_session("a", 2).is_file()
    app.stop("a")
    assert list(updates)[-1].state is RunState.stopped
    with pytest.raises(InputError, match="ended"):
        app.save_session("a", 1)


def big(folder: Path) -> Path:
    with models()[HYBRID].pipeline.session("a red shape", 11, 2 * HEIGHT, WIDTH, seeds=[3]) as session:
        session.save(folder / "kept.safetensors")
    return folder / "kept.safetensors"


def damaged(folder: Path) -> Path:
    path = saved(folder, models()[HYBRID])
    path.write_bytes(path.read_bytes()[:-10])
    return path


def foreign(folder: Path) -> Path:
    other = replace(models()[HYBRID], pipeline=build((1,)))
    return saved(folder, other)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: saved(folder, models()[HYBRID], None, memory="full"), "grow without a bound"),
        (lambda folder: saved(folder, models()[HYBRID], 2 * 3 * 12 - 1), "11 blocks to come"),
        (lambda folder: saved(folder, models()[HYBRID], 5), "all its blocks"),
        (lambda folder: saved(folder, models()[FULL], seeds=[3, 4], num_videos_per_prompt=2), "several videos"),
        (lambda folder: saved(folder, models()[FULL], num_inference_steps=51), "51 steps"),
        (big, "pixels"),
        (damaged, "damaged"),
        (foreign, "no model of this page"),
        (lambda folder: folder / "nowhere.safetensors", "no session at"),
        (lambda folder: Path(__file__), "safetensors"),
        (lambda folder: None, "NoneType"),
    ],
)
def test_a_session_that_cannot_go_on_is_a_message(
    tmp_path: Path, make: Callable[[Path], Path | None], said: str
) -> None:
    file = make(tmp_path)
    with App(models(), limits(blocks=10), tmp_path / "runs") as app:
        assert said in message(app.load("a", None if file is None else str(file)))
        assert list(app.start("a", ALONE | {"blocks": BLOCKS}))[-1].state is RunState.finished
