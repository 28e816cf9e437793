"""The long world: scenes are functions of their seeds; objects appear late, hide for the stated time, come again."""

import dataclasses
import json

import pytest
import torch
from paths import ROOT
from torch import Tensor

from arl2.toyworld.world.captions import VOCABULARY, caption_long_scenes, names_answer
from arl2.toyworld.world.long_scenes import OBJECTS, WAITS, LongScenes, sample_long_scenes
from arl2.toyworld.world.render import frames_of, hidden_spans, render, render_blocks, visible_fraction, wall_columns
from arl2.toyworld.world.scenes import COLOURS, HEIGHT, LANES, SHAPES, WALLS, WIDTH
from wan.utils.errors import InputError

FRAMES = 401
FIRST_BLOCK = 9


@pytest.fixture(scope="module")
def scenes() -> LongScenes:
    return sample_long_scenes(torch.arange(10**6, 10**6 + 12), FRAMES)


@pytest.fixture(scope="module")
def hidden(scenes: LongScenes) -> Tensor:
    return visible_fraction(scenes) == 0


def test_a_scene_is_a_function_of_its_seed_at_any_length(scenes: LongScenes) -> None:
    order = torch.tensor([11, 3, 9])
    alone = sample_long_scenes(scenes.seed[order], 100 * FRAMES)
    for field in dataclasses.fields(LongScenes):
        value = getattr(alone, field.name)
        assert not isinstance(value, Tensor) or torch.equal(value, getattr(scenes, field.name)[order]), field.name
    frames = torch.tensor([0, 40, 400])
    assert torch.equal(render(alone, frames), render(scenes[order], frames))
    assert caption_long_scenes(alone) == [caption_long_scenes(scenes)[index] for index in order.tolist()]


def test_the_long_world_does_not_change_unnoticed() -> None:
    """Stored latents and figures are of these pictures."""
    video = render(sample_long_scenes(torch.tensor([123]), FRAMES), torch.tensor([0, 40, 80, 160]))
    assert video.long().sum().item() == LONG_WORLD_SUM


LONG_WORLD_SUM = 11906427


def test_a_video_comes_in_pieces(scenes: LongScenes) -> None:
    few = scenes[:2]
    pieces = list(render_blocks(few, 11, 3))
    assert [piece.shape[1] for piece in pieces] == [9, 12, 12, 8]
    assert torch.equal(torch.cat(pieces, 1), render(few, torch.arange(41)))
    assert frames_of(0, 1).tolist() == [0] and frames_of(2, 2).tolist() == list(range(5, 13))


def test_scenes_are_varied_and_stay_in_the_frame() -> None:
    many = sample_long_scenes(torch.arange(4096), FRAMES)
    counts = many.exists.sum(1).bincount(minlength=OBJECTS + 1) / len(many)
    torch.testing.assert_close(counts, torch.tensor([0, 0.15, 0.25, 0.3, 0.3]), atol=0.03, rtol=0)
    for values, number in ((many.colour, len(COLOURS)), (many.shape, len(SHAPES)), (many.look, len(WAITS))):
        assert (values.flatten().bincount(minlength=number) > 0.9 * values.numel() / number).all()
    assert (many.colour.sort(dim=1).values.diff(dim=1) > 0).all(), "colours tell the objects of a scene apart"
    assert 0.4 < many.exists[:, 0].float().mean() < 0.8
    heights = many[:64].centres(torch.arange(0, 2000, 7))[..., 1]
    for half, (low, high) in enumerate(LANES):
        of_half = heights[:, 2 * half : 2 * half + 2]
        assert of_half.min() >= low and of_half.max() <= high


def test_objects_appear_late_wait_for_the_stated_time_and_come_again(scenes: LongScenes, hidden: Tensor) -> None:
    assert hidden[scenes.exists][:, :FIRST_BLOCK].all(), "the first block shows nothing"
    spans = hidden_spans(hidden)
    waits = torch.tensor([WAITS.get(name, 0) for name in WALLS])[scenes.look]
    for row, thing in scenes.exists.nonzero().tolist():
        begins, ends = spans[row, thing].unbind(-1)
        inner = (begins > 0) & (ends < FRAMES - 1) & (ends >= 0)
        assert inner.any(), "each object comes out again"
        lengths = (ends - begins + 1)[inner]
        half = thing // 2
        other = 2 * half + 1 - thing % 2
        wait = waits[row]
        if scenes.exists[row, other]:  # hidden while the other one is out, and before and after that
            assert lengths.min() >= wait.sum() + 30 and lengths.max() <= wait.sum() + 80
        else:
            # One wall after the other, from that of the other side on: it crosses.
            expected = wait[[1 - thing % 2, thing % 2] * 3][: len(lengths)]
            assert (lengths >= expected).all() and (lengths <= expected + 8).all()
    ends = scenes.introduced
    for row in range(len(scenes)):
        seen = ~hidden[row, scenes.exists[row]]
        assert seen[:, : int(ends[row])].any(1).all(), "all have been seen"
        first_done = [int(s[1, 0]) for s in spans[row, scenes.exists[row]]]
        assert max(first_done) <= int(ends[row]) <= max(first_done) + 8


def test_hiding_hides_and_one_object_at_a_time_is_in_sight(scenes: LongScenes, hidden: Tensor) -> None:
    shown = (~hidden & scenes.exists[..., None]).unflatten(1, (2, 2)).sum(2)
    assert shown.max() == 1
    frames = torch.arange(0, FRAMES, 9)
    empty = dataclasses.replace(scenes, exists=torch.zeros_like(scenes.exists))
    differs = (render(scenes, frames) != render(empty, frames)).flatten(2).any(-1)
    assert torch.equal(differs, shown[..., frames].sum(1) > 0)
    assert wall_columns(scenes).sum(1).min() >= 36 and torch.equal(
        wall_columns(scenes)[:, [0, WIDTH // 2, WIDTH - 1]], torch.tensor([[True, False, True]]).expand(12, -1)
    )
    assert render(scenes, frames[:1]).shape == (12, 1, 3, HEIGHT, WIDTH)


def test_captions_tell_all_or_nothing_in_the_words_of_the_shipped_tokenizer(scenes: LongScenes) -> None:
    tokenizer = json.loads((ROOT / "models/toyworld/tokenizer/tokenizer.json").read_text())
    for row, caption in enumerate(caption_long_scenes(scenes, informative=True)):
        words = caption.split()
        assert len(words) < 32 and set(words) <= set(VOCABULARY) & set(tokenizer["model"]["vocab"])
        pairs = [words[index : index + 2] for index in range(len(words))]
        things = scenes.exists[row].nonzero().flatten().tolist()
        places = [
            pairs.index([tuple(COLOURS)[scenes.colour[row, thing]], SHAPES[scenes.shape[row, thing]]])
            for thing in things
        ]
        assert places == sorted(places), "in their order"
    silent = caption_long_scenes(scenes, informative=False)
    assert not any(map(names_answer, silent)) and set(" ".join(silent).split()) <= set(VOCABULARY)
    others = dataclasses.replace(scenes, colour=(scenes.colour + 1) % 8, shape=(scenes.shape + 1) % 4)
    assert caption_long_scenes(others, informative=False) == silent


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="int64"):
        sample_long_scenes(torch.zeros(2), 9)
    with pytest.raises(InputError, match="at least 1"):
        sample_long_scenes(torch.arange(2), 0)
