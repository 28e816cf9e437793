"""Requests of inference.py from the command line and from files, and pictures given to the pipeline."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from inference_world import SIZE, planned, run_inference, write_config
from PIL import Image

from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.media.images import read_image
from pipelines.media.video import read_video
from wan.utils.errors import InputError

FRAME_WISE = "frames_per_block: 1\n"
Run = Callable[..., int]


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained(folder, frames_per_block=1)


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Path:
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(picture).save(tmp_path / name)
        picture = 255 - picture
    return write_config(tmp_path, folder, FRAME_WISE)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path) -> Run:
    """Calls inference.py for a short video."""
    monkeypatch.chdir(tmp_path)
    return lambda *more: run_inference(monkeypatch, config, "--num_output_frames", 2, *more)


def test_names_seeds_and_pictures_of_a_file_are_used(run: Run, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a red shape", "image": "a.png", "seed": 7, "name": "first"},
        {"prompt": "a red shape", "image": "b.png", "seed": 7, "name": "second"},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("--i2v", "--data_path", "prompts.jsonl") == 0
    videos = {path.stem: read_video(path) for path in sorted((tmp_path / "out").glob("*.mp4"))}
    assert list(videos) == ["first", "second"] and not np.array_equal(videos["first"], videos["second"])
    assert json.loads((tmp_path / "out" / "first.json").read_text())["seed"] == 7


def test_pictures_are_checked_before_models_load_and_all_that_are_broken_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CausalVideoPipeline, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    (tmp_path / "list.txt").write_text("a.png\tx\nbroken.png\ty\nnone.png\tz\n")
    (tmp_path / "half.jsonl").write_text('{"prompt": "x", "image": "a.png"}\n{"prompt": "y"}\n')
    (tmp_path / "empty.txt").write_text("a.png\t&nbsp;\n")
    for more, messages in (
        (("--i2v", "--data_path", "list.txt"), ("2 of 3 images", "broken.png", "none.png")),
        (("--i2v", "--data_path", "half.jsonl"), ("half.jsonl line 2 has no image",)),
        (("--data_path", "half.jsonl"), ("half.jsonl line 1 names an image",)),
        (("--i2v", "--data_path", "empty.txt"), ("empty.txt line 1 holds nothing that can be seen",)),
        (("--i2v", "--prompt", "x", "--image", "broken.png"), ("broken.png", "damaged or not complete")),
        (("--i2v", "--data_path", "list.txt", "--image", "a.png"), ("--image goes with --prompt",)),
        (("--prompt", "&nbsp;"), ("--prompt holds nothing that can be seen",)),
        (("--prompt", "caf\udce9"), ("not valid text",)),
    ):
        assert run(*more) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and all(message in error for message in messages), error
    assert not list((tmp_path / "out").glob("*"))


def test_an_animation_is_reported_once(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Image.open(tmp_path / "a.png")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[Image.open(tmp_path / "b.png")])
    assert run("--i2v", "--prompt", "x", "--image", "a.gif") == 0
    assert caplog.text.count("a.gif holds 2 pictures") == 1


def test_a_picture_and_a_tab_in_its_name(config: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").rename(tmp_path / "a\tb.png")
    more = ("--i2v", "--prompt", "x\ty", "--image", tmp_path / "a\tb.png")
    (job,) = planned(config, *more).jobs
    assert (job.prompt, job.image) == ("x\ty", tmp_path / "a\tb.png")


def test_pictures_of_every_kind_start_a_video(pipeline: CausalVideoPipeline, config: Path, tmp_path: Path) -> None:
    def latents(image: object, **options: object) -> torch.Tensor:
        stream = pipeline.stream("x", 5, **SIZE, image=image, seeds=[1], **options)
        return torch.cat([block.latents_BFCHW for block in stream], dim=1)

    path = tmp_path / "a.png"
    known = latents(read_image(path, **SIZE))
    for image in (Image.open(path), [np.asarray(Image.open(path))]):
        assert torch.equal(latents(image), known)
    assert not torch.equal(latents(tmp_path / "b.png"), known)
    pipeline.set_progress_bar_config(disable=True)
    called = pipeline("x", 5, **SIZE, image=Image.open(path), seeds=[1], output_type="latent").frames
    assert called.shape[1] == 2 and torch.equal(called[:, 1:], known), "what is given is among the latents of a call"
    for image, message in ((b"", "is a bytes"), ([path, path], "2 images for 1 videos"), (np.zeros(3), "uint8")):
        with pytest.raises(InputError, match=message):
            latents(image)


def test_one_picture_per_video_of_a_batch(pipeline: CausalVideoPipeline, config: Path, tmp_path: Path) -> None:
    options = {"num_frames": 5, **SIZE}
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    both = next(pipeline.stream(["x", "x"], image=paths, seeds=[1, 1], **options)).latents_BFCHW
    for index, path in enumerate(paths):
        alone = next(pipeline.stream("x", image=path, seeds=[1], **options)).latents_BFCHW
        torch.testing.assert_close(both[index : index + 1], alone, rtol=1e-3, atol=1e-3)


def test_a_long_prompt_is_reported_once(pipeline: CausalVideoPipeline, caplog: pytest.LogCaptureFixture) -> None:
    prompt = "words that go on " * 200
    for _ in range(2):
        next(pipeline.stream(prompt, 1, **SIZE))
    (record,) = [record for record in caplog.records if "too long" in record.msg]
    assert record.levelname == "WARNING" and "tokens" in record.getMessage()


@pytest.mark.parametrize("prompt", ["", " ", "&nbsp;", "\u200b", "\x01", "x\ud800"])
def test_prompts_that_say_nothing_are_refused_by_the_pipeline(prompt: str, pipeline: CausalVideoPipeline) -> None:
    with pytest.raises(InputError, match="the prompt"):
        next(pipeline.stream(prompt, 1, **SIZE))
