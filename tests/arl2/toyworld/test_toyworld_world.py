"""The toy world: a video is a function of its seed, occlusion really hides, captions keep their secret, and the
reader reads the truth, blurred and noisy too."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arl2.toyworld.world.captions import VOCABULARY, caption_scenes, names_answer
from arl2.toyworld.world.reader import Reading, detect, judge, phases, read_generated, read_video
from arl2.toyworld.world.render import as_pixels, coverage, hidden_spans, render, visible_fraction, wall_columns
from arl2.toyworld.world.scenes import (
    AREA,
    COLOURS,
    DEFAULT_MIX,
    KINDS,
    LANES,
    NUM_FRAMES,
    SHAPES,
    STANDARD_HIDDEN_FRAMES,
    STRIPED,
    Scenes,
    sample_scenes,
    splitmix64,
)
from wan.utils.errors import InputError

HIDING = {"occlusion": 0.4, "binding": 0.4, "leave": 0.2}


def seeds(number: int, first: int = 10**6) -> Tensor:
    return torch.arange(first, first + number)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample_scenes(seeds(24))


@pytest.fixture(scope="module")
def video(scenes: Scenes) -> Tensor:
    return render(scenes)


def blur(pixels: Tensor, sigma: float) -> Tensor:
    offsets = torch.arange(-5, 6).float()
    kernel = F.normalize(torch.exp(-offsets.square() / (2 * sigma**2)), p=1, dim=0)
    planes = F.pad(pixels.flatten(0, 2)[:, None], (5, 5, 5, 5), mode="replicate")
    planes = F.conv2d(F.conv2d(planes, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return planes.view(pixels.shape)


def test_the_hash_is_splitmix64() -> None:
    """The first outputs of the published generator from seed 1234567: the k-th hashes seed + (k - 1) increments."""
    states = 1234567 + torch.arange(3) * -7046029254386353131
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423 - 2**64]
    assert splitmix64(states).tolist() == expected


def test_a_video_is_a_function_of_its_seed(scenes: Scenes, video: Tensor) -> None:
    order = torch.tensor([21, 3, 19])
    alone = sample_scenes(scenes.seed[order])
    for field in dataclasses.fields(Scenes):
        value = getattr(alone, field.name)
        assert not isinstance(value, Tensor) or torch.equal(value, getattr(scenes, field.name)[order]), field.name
    assert torch.equal(render(alone), video[order])
    assert caption_scenes(alone) == [caption_scenes(scenes)[index] for index in order.tolist()]


def test_a_longer_video_begins_as_the_shorter_one(video: Tensor) -> None:
    longer = sample_scenes(seeds(2), num_frames=10 * NUM_FRAMES)
    frames = torch.tensor([0, 40, 80])
    assert torch.equal(render(longer, frames), video[:2, frames])
    assert longer.centres().shape == (2, 2, 10 * NUM_FRAMES, 2)


def test_scenes_are_varied_and_as_mixed() -> None:
    many = sample_scenes(seeds(4096))
    shares = many.kind.bincount(minlength=len(KINDS)) / len(many)
    torch.testing.assert_close(shares, torch.tensor([DEFAULT_MIX[kind] for kind in KINDS]), atol=0.03, rtol=0)
    for values, number in ((many.colour, len(COLOURS)), (many.shape, len(SHAPES))):
        assert (values.flatten().bincount(minlength=number) > 0.9 * values.numel() / number).all()
        assert (values[:, 0] != values[:, 1]).all(), "what two objects are called tells them apart"
    together = many.colour[:, 0] * len(SHAPES) + many.shape[:, 0]
    assert together.bincount(minlength=32).min() > 0.7 * len(many) / 32, "colour says nothing of shape"
    binding = many[many.kind == KINDS.index("binding")]
    crossing = (binding.heading[:, 0] != binding.heading[:, 1]).float().mean()
    assert 0.4 < crossing < 0.6
    assert torch.equal(many.exists.sum(1) == 2, many.exists[:, 1]) and bool(binding.exists.all())
    assert len(set(many.background.tolist())) == 4 and set(many.wall.tolist()) == {-1, 0, 1, 2}


def test_shapes_have_equal_area_and_objects_their_lanes(scenes: Scenes) -> None:
    bounces = sample_scenes(seeds(16), mix={"bounce": 1})
    areas = coverage(bounces, torch.arange(3)).sum((-1, -2))[bounces.exists]
    torch.testing.assert_close(areas, torch.full_like(areas, AREA), rtol=0.01, atol=0)
    heights = scenes.centres()[scenes.exists[:, 1], :, :, 1]
    for lane, (low, high) in enumerate(LANES):
        assert heights[:, lane].min() >= low and heights[:, lane].max() <= high
    assert scenes[scenes.kind == 0].wall_right.sub(scenes[scenes.kind == 0].wall_left).unique().tolist() == [26, 28, 30]


def test_occlusion_really_hides() -> None:
    hiding = sample_scenes(seeds(48), mix=HIDING)
    visible = visible_fraction(hiding)
    spans = hidden_spans(visible == 0)[hiding.exists]
    lengths = spans[:, 0, 1] - spans[:, 0, 0] + 1
    assert lengths.min() >= STANDARD_HIDDEN_FRAMES and lengths.max() <= STANDARD_HIDDEN_FRAMES + 9
    shown = visible[hiding.exists] > 0.99
    times = torch.arange(NUM_FRAMES)
    assert (shown & (times < spans[:, 0, :1])).sum(1).min() >= 5, "wholly seen first"
    assert (shown & (times > spans[:, 0, 1:2])).sum(1).min() >= 8, "and again"
    assert (visible[hiding.exists][:, 33:45] == 0).all(), "block 3 is hidden in every scene"
    # A pixel of an object that were to show would change if the object had another colour, or were not there.
    block = torch.arange(33, 45)
    others = dataclasses.replace(hiding, colour=(hiding.colour + 3) % len(COLOURS))
    without = dataclasses.replace(hiding, exists=torch.zeros_like(hiding.exists))
    hidden = render(hiding, block)
    assert torch.equal(hidden, render(others, block)) and torch.equal(hidden, render(without, block))
    assert not torch.equal(render(hiding, times[:1]), render(without, times[:1]))


def test_an_object_shows_up_to_the_last_visible_frame() -> None:
    """The stated span is neither too short nor too long: frames beside it show the object."""
    hiding = sample_scenes(seeds(12), mix={"occlusion": 1})
    first, last = hidden_spans(visible_fraction(hiding) == 0)[:, 0, 0].unbind(-1)
    for row in range(len(hiding)):
        scene = hiding[row : row + 1]
        covered = coverage(scene, torch.stack((first[row] - 1, first[row], last[row], last[row] + 1)))[0, 0]
        seen = (covered * ~wall_columns(scene)[0]).sum((-1, -2)) > 0
        assert seen.tolist() == [True, False, False, True]


def test_objects_come_out_on_the_other_side_and_leavers_on_their_own() -> None:
    hiding = sample_scenes(seeds(64), mix={"occlusion": 1, "leave": 1})
    spans = hidden_spans(visible_fraction(hiding) == 0)[:, 0, 0]
    x = hiding.centres()[:, 0, :, 0]
    before = x.gather(1, spans[:, :1] - 1) > 48
    after = x.gather(1, spans[:, 1:] + 1) > 48
    assert torch.equal((before != after)[:, 0], hiding.kind == KINDS.index("occlusion"))


def test_the_long_form_hides_for_longer_and_again_and_again() -> None:
    long = sample_scenes(seeds(4), num_frames=249, mix={"binding": 1}, hidden_frames=124)
    spans = hidden_spans(visible_fraction(long) == 0)
    lengths = spans[:, :, 0, 1] - spans[:, :, 0, 0] + 1
    assert lengths.min() >= 124 and lengths.max() <= 133 and bool((long.wall == STRIPED).all())
    repeated = sample_scenes(seeds(2), num_frames=801, mix={"occlusion": 1})
    spans = hidden_spans(visible_fraction(repeated) == 0)[:, 0]
    lengths = spans[..., 1] - spans[..., 0] + 1
    assert spans.shape[1] >= 11 and lengths[:, :-1].min() >= STANDARD_HIDDEN_FRAMES


def test_motion_is_smooth(scenes: Scenes) -> None:
    steps = scenes.centres(torch.arange(400)).diff(dim=2)[scenes.exists]
    speed = scenes.speed[scenes.exists].float()[:, None]
    assert (steps[..., 0].abs() <= speed + 1e-4).all() and (steps[..., 1].abs() <= 0.8 * speed + 1e-4).all()


def test_captions_tell_all_or_nothing(scenes: Scenes) -> None:
    for caption, row in zip(caption_scenes(scenes, informative=True), range(len(scenes)), strict=True):
        words = caption.split()
        for thing in scenes.exists[row].nonzero().flatten().tolist():
            pair = [tuple(COLOURS)[scenes.colour[row, thing]], SHAPES[scenes.shape[row, thing]]]
            assert pair in [words[index : index + 2] for index in range(len(words))], caption
        assert names_answer(caption)
    assert not any(map(names_answer, caption_scenes(scenes, informative=False)))
    # What is said without the answer is the same whatever the answer is.
    others = dataclasses.replace(scenes, colour=(scenes.colour + 1) % 8, shape=(scenes.shape + 1) % 4)
    assert caption_scenes(others, informative=False) == caption_scenes(scenes, informative=False)


def test_the_vocabulary_is_closed_and_half_of_the_captions_name_nothing() -> None:
    many = sample_scenes(seeds(4096))
    captions = caption_scenes(many) + caption_scenes(sample_scenes(seeds(512), hidden_frames=60))
    assert set(" ".join(captions).split()) == set(VOCABULARY)
    assert max(len(caption.split()) for caption in captions) < 30, "with the end mark they fit 32 tokens"
    assert 0.47 < sum(map(names_answer, captions[:4096])) / 4096 < 0.53
    assert len(set(captions)) > 500


def assert_all_right(reading: Reading, scenes: Scenes) -> None:
    verdicts = judge(reading, scenes)
    count = verdicts.pop("count")
    assert count[..., 0][scenes.exists].all() and count.any(-1).sum() == scenes.exists.sum()
    for name, right in verdicts.items():
        assert right[count].all(), name


@pytest.mark.parametrize(("sigma", "noise"), [(0, 0), (1.0, 0.0), (2.0, 0.1), (0.0, 0.2)])
def test_the_reader_is_right_on_the_truth(scenes: Scenes, video: Tensor, sigma: float, noise: float) -> None:
    pixels = as_pixels(video)
    pixels = blur(pixels, sigma) if sigma else pixels
    pixels = pixels + noise * torch.randn(pixels.shape)
    assert_all_right(read_video(pixels, scenes), scenes)
    if noise <= 0.1:
        reading = read_generated(pixels, scenes.exists[:, 1])
        hiding = scenes.exists & (scenes.kind != KINDS.index("bounce"))[:, None]
        for name, same in reading.same_object().items():
            assert torch.equal(same, hiding), name
        assert torch.equal(reading.colour[..., 0][scenes.exists], scenes.colour[scenes.exists])


def test_the_reader_sees_what_is_there_not_what_should_be(scenes: Scenes) -> None:
    """A video whose objects change behind the wall is read as what it shows, and a lost object as lost."""
    some = scenes[(scenes.kind != KINDS.index("bounce"))][:12]
    others = dataclasses.replace(some, colour=(some.colour + 1) % 8, shape=(some.shape + 1) % 4)
    early, late = torch.arange(40), torch.arange(40, NUM_FRAMES)
    changed = as_pixels(torch.cat((render(some, early), render(others, late)), 1))
    gone = dataclasses.replace(some, exists=torch.zeros_like(some.exists))
    lost = as_pixels(torch.cat((render(some, early), render(gone, late)), 1))
    for name in ("colour", "shape", "both"):
        before, after = judge(read_video(changed, some), some)[name][some.exists][:, :2].unbind(-1)
        assert before.all() and not after.any()
        assert not read_generated(changed, some.exists[:, 1]).same_object()[name].any()
    reading = read_video(lost, some)
    assert (reading.colour[..., 1] == -1).all() and not judge(reading, some)["place"][..., 1].any()
    assert not read_generated(lost, some.exists[:, 1]).same_object()["both"].any()


def test_swapped_objects_are_read_as_swapped() -> None:
    some = sample_scenes(seeds(6), mix={"binding": 1})
    swapped = dataclasses.replace(some, colour=some.colour.flip(1), shape=some.shape.flip(1))
    reading = read_video(as_pixels(render(swapped)), some)
    assert torch.equal(reading.colour[..., 1], some.colour.flip(1))
    assert not judge(reading, some)["both"][..., 1].any() and judge(reading, some)["place"][..., 1].all()


def test_phases_count_disappearances() -> None:
    hidden = torch.tensor([[[1, 0, 0, 1, 1, 0, 1, 0]]]).bool()
    assert phases(hidden).tolist() == [[[-1, 0, 0, -1, -1, 1, -1, 2]]]
    assert hidden_spans(hidden).tolist() == [[[[0, 0], [3, 4], [6, 6]]]]
    assert hidden_spans(torch.zeros(1, 2, 5, dtype=torch.bool)).shape == (1, 2, 0, 2)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="int64"):
        sample_scenes(torch.rand(3))
    with pytest.raises(InputError, match="occlusion, binding, bounce, leave"):
        sample_scenes(seeds(3), mix={"explosion": 1.0})
    with pytest.raises(InputError, match="at least 1"):
        sample_scenes(seeds(3), hidden_frames=0)
    with pytest.raises(InputError, match=r"give \[B, T, 3, 64, 96\]"):
        detect(torch.zeros(1, 2, 3, 32, 32), torch.tensor([False]))


@pytest.mark.gpu
def test_the_gpu_draws_and_reads_the_same(scenes: Scenes, video: Tensor) -> None:
    there = sample_scenes(scenes.seed.cuda())
    drawn = render(there)
    assert (drawn.cpu().int() - video.int()).abs().max() <= 1
    assert torch.equal((visible_fraction(there) == 0).cpu(), visible_fraction(scenes) == 0)
    assert_all_right(read_video(as_pixels(drawn), there), there)
