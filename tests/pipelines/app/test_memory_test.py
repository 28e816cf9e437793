"""The memory test of the page: the probe's scenes and reader, one video at a time."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from app_world import limits, models
from paths import ROOT
from torch import Tensor

from arl2.toyworld.probe.long_probe import probe_scenes
from arl2.toyworld.world.captions import names_answer
from arl2.toyworld.world.render import render
from arl2.toyworld.world.scenes import COLOURS, HEIGHT, SHAPES, STANDARD_HIDDEN_FRAMES, WIDTH
from arl2.toyworld.world.worlds import World
from pipelines.app.app import App
from pipelines.app.live import LaneBlock, RunState
from pipelines.app.memory_test import GIVEN_FRAMES, NUM_FRAMES, MemoryTest, Verdict, Watch, is_of_toyworld
from pipelines.app.models import FULL, AppModel, models_of
from pipelines.app.pictures import MARK_COLOUR, MARK_FRAMES, lanes_html, marked
from pipelines.config import InferenceConfig, MemoryConfig, MemoryKind
from pipelines.generation.pipeline import CausalVideoPipeline
from wan.utils.errors import InputError

TWO_OBJECTS = 3
"""A seed whose scene has two."""


@cache
def toy_models() -> dict[str, AppModel]:
    """The shipped softmax model, with full memory and with a window that sees nothing of an object any more."""
    config = InferenceConfig(memory=MemoryConfig(MemoryKind.window, 6, 0))
    return models_of(config, CausalVideoPipeline.from_pretrained(ROOT / "models" / "toyworld"))


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    with App(toy_models(), limits(pixels=HEIGHT * WIDTH), tmp_path) as app:
        yield app


def true_frames(test: MemoryTest, **changes: Tensor) -> Tensor:
    """All frames of a test's scene, or of one that differs, [T, H, W, 3]."""
    return render(replace(test.scene, **changes), torch.arange(NUM_FRAMES))[0].permute(0, 2, 3, 1)


def watched(test: MemoryTest, frames: Tensor) -> tuple[Verdict, ...]:
    watch = Watch(test)
    for part in frames.split((33, *[12] * 4)):
        assert not watch.findings().verdicts
        watch.add(part)
    return watch.findings().verdicts


@pytest.mark.parametrize("seed", [0, TWO_OBJECTS, 12345])
def test_a_scene_is_the_probes_and_its_moments_are_those_of_the_frames(seed: int) -> None:
    test = MemoryTest.draw(seed)
    chosen, number = divmod(seed, 10_000)
    probed = probe_scenes(World.STANDARD, chosen, [number], STANDARD_HIDDEN_FRAMES, torch.device("cpu"))
    assert torch.equal(render(test.scene), render(probed)) and not names_answer(test.caption)
    without = true_frames(test, exists=torch.zeros_like(test.scene.exists))
    differs = (true_frames(test) != without).flatten(1).any(1)
    assert differs[:GIVEN_FRAMES].any() and len(test.moments) == int(test.scene.exists.sum())
    for moment in test.moments:
        assert moment.back - moment.hidden_from >= STANDARD_HIDDEN_FRAMES
    first = min(moment.back for moment in test.moments)
    last = max(moment.hidden_from for moment in test.moments)
    assert differs[last - 1] and not differs[last:first].any() and differs[first]
    given = ((test.given_pixels() + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(given, true_frames(test)[:GIVEN_FRAMES])


def test_the_verdict_says_what_came_back() -> None:
    test = MemoryTest.draw(0)
    true, after = true_frames(test), test.moments[0].back
    colour, shape = (int(value[0, 0]) for value in (test.scene.colour, test.scene.shape))
    name = f"{tuple(COLOURS)[colour]} {SHAPES[shape]}"
    others = {"colour": (test.scene.colour + 1) % len(COLOURS), "shape": (test.scene.shape + 1) % len(SHAPES)}
    assert watched(test, true) == (Verdict(name, name, "right"),)
    for wrong in ({"colour"}, {"shape"}, {"colour", "shape"}):
        changed = true_frames(test, **{what: others[what] for what in wrong})
        (verdict,) = watched(test, torch.cat((true[:after], changed[after:])))
        assert verdict.word == f"wrong {' and '.join(sorted(wrong))}" and verdict.seen not in (None, name)
    gone = true_frames(test, exists=torch.zeros_like(test.scene.exists))
    assert watched(test, torch.cat((true[:after], gone[after:]))) == (Verdict(name, None, "gone"),)


def test_the_moment_is_marked_in_frames_and_beside_them() -> None:
    test = MemoryTest.draw(TWO_OBJECTS)
    frames, watch = true_frames(test), Watch(test)
    watch.add(frames)
    first = 40
    shown = LaneBlock(0, "a", test.caption, frames[first:], len(frames), 1, 1.0, True, watch.findings())
    is_marked = (marked(shown)[:, 0, 0] == torch.tensor(MARK_COLOUR)).all(-1)
    spans = [range(moment.back, moment.back + MARK_FRAMES) for moment in test.moments]
    expected = [any(number in span for span in spans) for number in range(first, len(frames))]
    assert is_marked.tolist() == expected and any(expected)
    assert torch.equal(shown.frames_THWC, frames[first:])
    page = lanes_html([shown], 16)
    assert page.count("arl2-back") == 2 and page.count("right: a ") == 2
    assert all(f"from frame {moment.back}" in page for moment in test.moments)


def test_a_model_that_remembers_is_right_and_one_that_cannot_is_not(app: App) -> None:
    assert app.has_memory_test
    updates = list(app.test("a", {"models": list(app.models), "seed": 0, "steps": 0}))
    last = {block.lane: block for update in updates for block in update.blocks}
    assert updates[-1].state is RunState.finished and len(last) == 2
    words = []
    for block in last.values():
        assert block.findings is not None and block.total_frames == NUM_FRAMES
        words.append([verdict.word for verdict in block.findings.verdicts])
    assert words == [["right"], ["gone"]]


def test_a_test_keeps_its_caption(app: App) -> None:
    updates = app.test("a", {"models": [FULL], "seed": 0, "steps": 1})
    next(update for update in updates if update.blocks)
    with pytest.raises(InputError, match="names nothing"):
        app.switch("a", "a red ring")
    updates.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", [{"seed": -1}, {"seed": 2**41}, {"models": []}, {"steps": 99}, {"steps": None}])
def test_bad_input_is_a_message(app: App, change: dict[str, Any]) -> None:
    (only,) = app.test("a", {"models": [FULL], "seed": 0, "steps": 1} | change)
    assert only.state is RunState.failed and next(iter(change)).rstrip("s") in only.message


def test_other_models_have_no_memory_test(tmp_path: Path) -> None:
    assert not any(is_of_toyworld(model.pipeline) for model in models().values())
    with App(models(), limits(), tmp_path) as app:
        (only,) = app.test("a", {"models": [FULL], "seed": 0, "steps": 1})
        assert not app.has_memory_test and "toy world" in only.message
