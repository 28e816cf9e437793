"""Videos that start with a picture or a video, and videos that go through the steps again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from arl2.rollout import Conditions, SeededNoise, remember_block, rollout
from pipelines.config import MemoryConfig
from pipelines.generation.inputs.given import GivenFrames, frames_to_continue
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.media.reader import read_clip
from pipelines.media.video import VideoWriter
from wan.utils.errors import InputError

PROMPT = "a red shape"


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """29 frames [T, 3, H, W], of 8 latent frames."""
    noise = np.random.default_rng(0).integers(0, 256, (29, 16, 32, 3), np.uint8)
    return torch.from_numpy(noise).permute(0, 3, 1, 2).float() / 127.5 - 1


def latents(pipeline: CausalVideoPipeline, **options: Any) -> Tensor:
    frames = pipeline(**({"prompt": PROMPT, "seeds": [1], "output_type": "latent"} | options)).frames  # type: ignore[union-attr]
    assert isinstance(frames, Tensor)
    return frames


def by_hand(pipeline: CausalVideoPipeline, given: GivenFrames, blocks: int, strength: float = 1.0) -> Tensor:
    """The rollout of a video, called directly."""
    model = pipeline.transformer
    text = model.embed_text(pipeline.encode_prompt([PROMPT]))
    memory = pipeline.new_memory(1, 16, 32, None, MemoryConfig())
    for start in range(0, given.context_frames, 3):
        assert given.context_BFCHW is not None
        remember_block(model, given.context_BFCHW[:, start : start + 3], text, memory, start)
    noise = SeededNoise([1], (3, 16, 2, 4), torch.device("cpu"))
    conditions = Conditions(given.kept_BFCHW, given.source_BFCHW, strength)
    found = rollout(model, pipeline.sampler, noise, text, memory, blocks, given.context_frames, conditions=conditions)
    return torch.cat([block.latents_BFCHW for block in found], dim=1)


@torch.no_grad()
def test_a_picture_completes_the_first_block(shared_pipeline: CausalVideoPipeline, pixels: Tensor) -> None:
    encoded = shared_pipeline.wan_vae.encode(pixels[None, :1])
    found = latents(shared_pipeline, image=pixels[0])
    assert found.shape[1] == 6 and torch.equal(found[:, :1], encoded)
    torch.testing.assert_close(found, by_hand(shared_pipeline, GivenFrames(None, encoded), 2))
    picture = ((pixels[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    for same in (picture, Image.fromarray(picture), [Image.fromarray(picture)]):
        torch.testing.assert_close(latents(shared_pipeline, image=same), found)
    assert not torch.allclose(latents(shared_pipeline, image=pixels[1])[:, 1:], found[:, 1:], atol=1e-3)


@torch.no_grad()
def test_a_video_is_continued_by_whole_blocks_and_a_rest(shared_pipeline: CausalVideoPipeline, pixels: Tensor) -> None:
    encoded = shared_pipeline.wan_vae.encode(pixels[None])
    given = GivenFrames.to_continue(encoded, 3)
    assert given.context_frames == 6 and given.kept_BFCHW is not None and given.kept_BFCHW.shape[1] == 2
    streamed = list(shared_pipeline.stream(PROMPT, 45, video=pixels, seeds=[1]))
    assert [block.latents_BFCHW.shape[1] for block in streamed] == [3, 3]
    assert [block.pixels_BTCHW.shape[1] for block in streamed] == [33, 12], "the first brings what was given"
    found = torch.cat([block.latents_BFCHW for block in streamed], dim=1)
    torch.testing.assert_close(found, by_hand(shared_pipeline, given, 2))
    assert torch.equal(found[:, :2], encoded[:, 6:])


def test_frames_that_fill_no_latent_are_left_out_at_the_beginning(
    shared_pipeline: CausalVideoPipeline, pixels: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    assert frames_to_continue(29, 4) == (0, 8) and not caplog.records
    more = torch.cat([pixels[:2], pixels])
    found = latents(shared_pipeline, video=more, num_frames=33)
    assert "the first 2 of 31 frames are left out" in caplog.text
    torch.testing.assert_close(found, latents(shared_pipeline, video=pixels, num_frames=33))


def test_videos_of_every_kind(shared_pipeline: CausalVideoPipeline, pixels: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 16, 32) as writer:
        writer.write(((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1))
    array = np.stack(list(read_clip(path, 16, 32, fps=16)))
    known = latents(shared_pipeline, video=path, num_frames=33)
    for same in (str(path), array, [Image.fromarray(frame) for frame in array]):
        torch.testing.assert_close(latents(shared_pipeline, video=same, num_frames=33), known)
    batch = latents(shared_pipeline, video=array, num_frames=33, num_videos_per_prompt=2, seeds=[1, 2])
    torch.testing.assert_close(batch[:1], latents(shared_pipeline, video=array, num_frames=33), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_video_goes_through_the_last_steps_again(shared_pipeline: CausalVideoPipeline, pixels: Tensor) -> None:
    encoded = shared_pipeline.wan_vae.encode(pixels[None, :21])
    found = latents(shared_pipeline, video=pixels[:21], strength=0.5)
    assert found.shape[1] == 6, "as long as the video, in whole blocks"
    torch.testing.assert_close(found, by_hand(shared_pipeline, GivenFrames(source_BFCHW=encoded), 2, 0.5))
    assert not torch.allclose(found, latents(shared_pipeline), atol=1e-2)
    torch.testing.assert_close(
        latents(shared_pipeline, video=pixels[:21], strength=1.0), latents(shared_pipeline), rtol=1e-4, atol=1e-4
    )


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no room": ({"num_frames": 21}, "8 latent frames are given for a video of 6"),
    "too short to go through again": ({"strength": 0.5, "num_frames": 33}, "has 29 frames, 33 are needed"),
    "strength of no step": ({"strength": 0.4}, "0.4 of 2 steps is no step: give at least 0.5"),
    "strength out of range": ({"strength": 1.5}, "strength"),
    "no file": ({"video": "/nowhere.mp4"}, "no video at"),
    "no frames": ({"video": []}, "no frames"),
    "something else": ({"video": 3}, "is a int"),
    "a tensor of one frame": ({"video": torch.zeros(3, 16, 32)}, "give \\[T, 3, 16, 32\\]"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_a_video_that_cannot_be_used(case: str, shared_pipeline: CausalVideoPipeline, pixels: Tensor) -> None:
    options, message = WRONG[case]
    with pytest.raises(InputError, match=message) as caught:
        shared_pipeline.stream(PROMPT, **({"video": pixels, "seeds": [1]} | options))
    assert "\n" not in str(caught.value)


def test_what_is_no_video_is_refused_by_name(shared_pipeline: CausalVideoPipeline, tmp_path: Path) -> None:
    Image.new("RGB", (32, 16)).save(tmp_path / "a.png")
    (tmp_path / "b.mp4").write_text("no video")
    picture = Image.new("RGB", (32, 16))
    for video, words in (
        (tmp_path / "a.png", r"the video .*a\.png cannot be read"),
        (tmp_path / "b.mp4", r"the video .*b\.mp4 cannot be read"),
        (np.zeros((16, 32, 3), np.uint8), r"shape \[16, 32, 3\]: give \[T, H, W, 3\]"),
        (np.zeros((1, 5, 16, 32, 3), np.uint8), r"give \[T, H, W, 3\]"),
        (torch.zeros(3, 5, 16, 32), r"shape \[3, 5, 16, 32\]: give \[T, 3, 16, 32\]"),
        (torch.zeros(0, 3, 16, 32), "has no frames"),
        ([picture, None], "a video holds a NoneType"),
        ([[picture]], "a video holds a list"),
    ):
        with pytest.raises(InputError, match=words) as error:
            shared_pipeline.stream(PROMPT, 21, video=video)  # nothing is computed before the first block
        assert str(error.value).count(": ") <= 2 and str(error.value).isprintable()


def test_a_picture_from_0_to_1_is_warned_of(
    shared_pipeline: CausalVideoPipeline, pixels: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    shared_pipeline.stream(PROMPT, image=pixels[0])
    assert not caplog.records
    shared_pipeline.stream(PROMPT, image=(pixels[0] + 1) / 2)
    assert "give 2 * x - 1" in caplog.text


def test_latents_hold_the_given_frames_too(shared_pipeline: CausalVideoPipeline, pixels: Tensor) -> None:
    for count in (1, 9, 13):  # a part of a block, a block, and a part more
        found = latents(shared_pipeline, num_frames=21, image=pixels[None, :count])
        assert found.shape[1] == 6
        with torch.no_grad():
            encoded = shared_pipeline.wan_vae.encode(pixels[None, :count])
        torch.testing.assert_close(found[:, : encoded.shape[1]], encoded)


def test_frames_that_fill_no_block_are_named(
    shared_pipeline: CausalVideoPipeline, pixels: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    shared_pipeline.stream(PROMPT, video=pixels[:9], strength=0.5)
    assert not caplog.records
    shared_pipeline.stream(PROMPT, video=pixels[:15], strength=0.5)
    assert "the last 6 of 15 frames are left out" in caplog.text
