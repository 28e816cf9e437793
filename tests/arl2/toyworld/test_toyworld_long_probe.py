"""The long probe: its bookkeeping against a count by hand, reading by blocks against reading whole, and its script."""

import gc
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arl2.evaluation.eval_setup import EvalSetup
from arl2.toyworld.probe import long_probe as probe_module
from arl2.toyworld.probe.long_probe import Context, given_latents, make_long_probe, probe_videos
from arl2.toyworld.probe.long_report import report
from arl2.toyworld.probe.passes import Answer, PassVotes, answers_of, find_passes, passes_of
from arl2.toyworld.world.latents import encode_pixels, toy_text_encoder
from arl2.toyworld.world.long_scenes import sample_long_scenes
from arl2.toyworld.world.reader import Detections, detect, judge, read_video
from arl2.toyworld.world.render import as_pixels, frames_of, render, render_blocks
from arl2.toyworld.world.scenes import SceneBatch, sample_scenes
from arl2.toyworld.world.worlds import World
from pipelines.generation.random_model import random_pipeline
from wan.memory import Memory
from wan.model import FlowModel, TextKV
from wan.vae.wan_vae import TOY_VAE, WanVAE


def numbers(*lines: str) -> Tensor:
    """Numbers of passes, [1, O, T], from lines of which a space is out of sight."""
    return torch.tensor([[[-1 if mark == " " else int(mark) for mark in line] for line in lines]])


def test_passes_are_those_of_a_count_by_hand() -> None:
    number = numbers(
        "00000      11111       2222",
        "    0000          1111     ",
    )
    whole = torch.zeros_like(number, dtype=torch.bool)
    whole[0, 0, [2, 13]] = whole[0, 1, [6, 20]] = True
    passes = passes_of(number, whole)
    assert passes.first[0].tolist() == [[0, 11, 23], [4, 18, -1]] and passes.last[0].tolist() == [
        [4, 15, 26],
        [7, 21, -1],
    ]
    assert passes.whole[0].tolist() == [[True, True, False], [True, True, False]]
    # Frames 4 and 11 are in latents 1 and 3, 15 and 23 in 4 and 6, 7 and 18 in 2 and 5.
    assert passes.age[0].tolist() == [[0, 2, 2], [0, 3, 0]]
    assert passes.load[0].tolist() == [[0, 2, 2], [0, 2, 0]]
    asked = passes.asked(torch.tensor([9]))
    assert asked.nonzero().tolist() == [[0, 0, 1], [0, 1, 1]], "the third pass never shows the whole object"
    assert not passes.asked(torch.tensor([19])).any()


def test_the_report_is_a_count_of_answers() -> None:
    right, wrong = (1, 1), (1, 0)
    videos = [
        [Answer(0, 1, 50, 4, 1, *right), Answer(0, 2, 90, 12, 2, *wrong), Answer(1, 1, 70, 30, 2, *right)],
        [Answer(0, 1, 60, 5, 1, 0, 1)],
    ]
    figures = report(videos)
    assert figures["after_last"]["both"]["objects"] == 3
    assert figures["after_last"]["both"]["accuracy"] == pytest.approx(1 / 3)
    assert figures["after_last"]["colour"]["accuracy"] == pytest.approx(2 / 3)
    assert [one["both"]["objects"] for one in figures["passes"]] == [3, 1]
    assert figures["passes"][0]["both"]["accuracy"] == pytest.approx(2 / 3)
    counts = {name: one["both"]["objects"] for name, one in figures["ages"].items()}
    assert counts == {"0 to 4": 1, "5 to 9": 1, "10 to 14": 1, "15 to 20": 0, "21 to 27": 0, "28 or more": 1}
    assert {name: one["both"]["accuracy"] for name, one in figures["loads"].items()} == {"1": 0.5, "2": 0.5}
    assert figures["all"]["both"]["accuracy"] == 0.5


def read_in_blocks(scenes: SceneBatch, latents: int) -> tuple[PassVotes, Tensor]:
    """Read the true frames of scenes block by block; returns what was read, and the number of each frame's pass."""
    passes = find_passes(scenes, 4 * latents - 3)
    votes, frame = PassVotes(passes, scenes.half_of), 0
    for pixels in render_blocks(scenes, latents, 3):
        votes.add(frame, detect(as_pixels(pixels), scenes.halved))
        frame += pixels.shape[1]
    return votes, passes.number


def test_blocks_are_read_as_the_whole_video_is() -> None:
    scenes = sample_scenes(torch.arange(70, 76), mix={"occlusion": 1, "binding": 1})
    votes, number = read_in_blocks(scenes, 40)
    frames = torch.arange(157)
    reading = read_video(as_pixels(render(scenes, frames)), scenes)
    colour, shape = votes.read()
    counts = judge(reading, scenes)["count"]
    assert torch.equal(number[scenes.exists], reading.phase[scenes.exists])
    assert torch.equal(colour[counts], reading.colour[counts]) and torch.equal(shape[counts], reading.shape[counts])
    assert torch.equal(find_passes(scenes, 157).whole, counts)


def test_the_reader_is_right_on_true_frames_of_the_long_world() -> None:
    scenes = sample_long_scenes(torch.arange(12), 333)
    passes = find_passes(scenes, 333)
    asked = passes.asked(1 + 4 * (given_latents(scenes) - 1))
    answers = [one for video in answers_of(passes, read_in_blocks(scenes, 84)[0], scenes, asked) for one in video]
    assert len(answers) >= 30
    assert sum(one.colour * one.shape for one in answers) >= 0.95 * len(answers)
    assert {one.load for one in answers} >= {1, 2, 3} and max(one.age for one in answers) > 21


def test_objects_are_introduced_by_given_blocks() -> None:
    scenes = sample_long_scenes(torch.arange(12), 233)
    passes, given = find_passes(scenes, 233), given_latents(scenes)
    assert (given % 3 == 0).all() and given.min() >= 6
    last_given = 4 * (given - 1)
    assert (passes.last[..., 0][scenes.exists] <= last_given[:, None].expand(-1, 4)[scenes.exists]).all()
    standard = sample_scenes(torch.arange(2))
    assert given_latents(standard).tolist() == [6, 6]


@pytest.fixture(scope="module")
def setup() -> tuple[EvalSetup, WanVAE]:
    pipeline = random_pipeline("toy", vae_config=TOY_VAE | {"dim": 2, "num_res_blocks": 1})
    return EvalSetup(pipeline.transformer, pipeline.sampler, 6), WanVAE(pipeline.vae)


def test_given_blocks_are_true_and_others_the_models_own(
    setup: tuple[EvalSetup, WanVAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, vae = setup
    probe = make_long_probe(toy_text_encoder(), World.STANDARD, 0, [0, 3], 12)
    real = encode_pixels(vae, as_pixels(render(probe.scenes, frames_of(0, 12))))
    remembered: list[Tensor] = []
    real_remember = probe_module.remember_block

    def noted(model: FlowModel, latents: Tensor, text: TextKV, memory: Memory, start: int) -> None:
        remembered.append(latents)
        real_remember(model, latents, text, memory, start)

    monkeypatch.setattr(probe_module, "remember_block", noted)
    probe_videos(model, vae, probe)
    own, remembered[:] = torch.cat(remembered, 1), []
    assert own.shape[1] == 9, "nothing reads the last block"
    torch.testing.assert_close(own[:, :6], real[:, :6], atol=1e-4, rtol=1e-4)
    assert (own[:, 6:9] - real[:, 6:9]).abs().max() > 0.1
    monkeypatch.setattr(probe_module, "_branch", lambda branch, starts: torch.zeros(2, 3, *real.shape[2:]))
    probe_videos(model, vae, probe, Context.TRUE)
    torch.testing.assert_close(torch.cat(remembered, 1), real, atol=1e-4, rtol=1e-4)


def test_a_branch_leaves_what_is_remembered_alone(
    setup: tuple[EvalSetup, WanVAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that makes the true blocks is right in all that is asked, whatever the length of its branches."""
    model, vae = setup
    probe = make_long_probe(toy_text_encoder(), World.STANDARD, 0, [0, 1], 21)
    real = encode_pixels(vae, as_pixels(render(probe.scenes, frames_of(0, 21))))
    states: list[tuple[int, object]] = []
    branches: list[int] = []

    class Perfect(probe_module._Model):
        def denoise(self, start: int) -> Tensor:
            return real[:, start : start + 3]

        def branch(self) -> probe_module._Model:
            branches.append(states[-1][0] + 3)
            return super().branch()

        def remember(self, latents: Tensor, start: int) -> None:
            super().remember(latents, start)
            states.append((start, self._memory))

    monkeypatch.setattr(probe_module, "_Model", Perfect)
    monkeypatch.setattr(probe_module, "WARM_BLOCKS", 7)  # all: an untrained decoder never gets warm
    seen: list[Tensor] = []

    def watched(pixels: Tensor, halves: Tensor) -> Detections:
        seen.append(pixels)
        return detect(pixels, halves)

    monkeypatch.setattr(probe_module, "detect", watched)
    answers = probe_videos(model, vae, probe, Context.TRUE)
    main = states[0][1]
    assert [start for start, memory in states if memory is main] == list(range(0, 21, 3))
    assert {id(memory) for _, memory in states} > {id(main)}, "branches have memories of their own"
    assert sum(map(len, answers)) > 0
    whole = vae.decode(real)
    for start, part in zip(branches, seen, strict=True):
        first = 4 * start - 3
        error = (part - whole[:, first : first + part.shape[1]]).abs().mean()
        assert part.shape[1] == 4 * min(9, 21 - start) and error < 1e-4, "each branch is where it belongs"


def test_answers_do_not_depend_on_the_batch(setup: tuple[EvalSetup, WanVAE]) -> None:
    model, vae = setup
    encoder = toy_text_encoder()
    together = probe_videos(model, vae, make_long_probe(encoder, World.STANDARD, 1, [4, 5], 21))
    alone = probe_videos(model, vae, make_long_probe(encoder, World.STANDARD, 1, [5], 21))
    assert together[1] == alone[0] and len(alone[0]) > 0


def test_memory_does_not_grow_with_the_length(setup: tuple[EvalSetup, WanVAE], monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that is alive between blocks has the length of the video, but numbers of passes."""
    model, vae = setup
    sizes: dict[int, int] = {}

    def watched(pixels: Tensor, halves: Tensor) -> object:
        alive = {id(x): x.numel() * x.element_size() for x in gc.get_objects() if type(x) is Tensor}
        sizes[latents] = max(sizes.get(latents, 0), sum(alive.values()))
        return detect(pixels, halves)

    monkeypatch.setattr(probe_module, "detect", watched)
    for latents in (9, 18):
        probe_videos(model, vae, make_long_probe(toy_text_encoder(), World.LONG, 0, [0], latents))
    assert sizes[18] - sizes[9] < 20_000, sizes


def test_the_script_answers_what_its_file_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = random_pipeline("toy", vae_config=TOY_VAE | {"dim": 2, "num_res_blocks": 1})
    pipeline.save_pretrained(tmp_path / "model")
    config = tmp_path / "config.yaml"
    config.write_text(f"model_folder: {tmp_path / 'model'}\nheight: 64\nwidth: 96\ndenoising_steps: [1000]\n")
    page = tmp_path / "long.json"
    module, made = import_module("probe_memory"), []
    real = probe_videos

    def noted(setup: EvalSetup | None, vae: WanVAE, probe: probe_module.LongProbe, context: Context) -> object:
        made.append(len(probe.scenes))
        return real(setup, vae, probe, context)

    monkeypatch.setattr("pipelines.toyworld.long_memory.probe_videos", noted)

    def run(*flags: object) -> int:
        fixed = ("--config", config, "--json", page, "--device", "cpu", "--times", 1, "--batch", 2)
        monkeypatch.setattr(sys, "argv", ["probe_memory.py", *map(str, (*fixed, *flags))])
        return int(module.main())

    only = ("--only", "vae", "window_21_sink")
    assert run("--videos", 2, *only) == 0 and made == [2, 2]
    rows = json.loads(page.read_text())["models"]
    assert list(rows) == ["vae", "window_21_sink"] and rows["window_21_sink"]["made_with"]["sink_frames"] == 3
    assert rows["vae"]["after_last"]["both"]["objects"] > 0
    before = page.read_bytes()
    assert run("--videos", 2, *only) == 0 and made == [2, 2] and page.read_bytes() == before
    assert run("--videos", 3, *only) == 0 and made == [2, 2, 1, 1]
    assert list(json.loads(page.read_text())["models"]["vae"]["answers"]) == ["0", "1", "2"]
    for flags, message in (
        (("--seed", 1), "seed was 0, is 1"),
        (("--world", "long"), "world was standard, is long"),
        (("--world", "long", "--hidden_frames", 30), "--hidden_frames is of --world standard"),
        (("--only", "x"), "no such row; there are vae, teacher, window_21, window_21_sink"),
    ):
        assert run("--videos", 2, *flags) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    page.unlink()
    assert run("--videos", 2, "--world", "long", "--only", "vae") == 2
    assert "give a larger --times" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["p", "--config", str(config), "--json", str(page), "--world", "long"])
    assert module.main() == 2 and "--world needs --times" in capsys.readouterr().err
