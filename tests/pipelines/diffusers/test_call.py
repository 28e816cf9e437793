"""The call's arguments: each has its effect, or is refused before anything is computed."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.config import MemoryConfig, MemoryKind
from pipelines.generation.blocks import VideoOutput
from pipelines.generation.pipeline import CausalVideoPipeline
from wan.utils.errors import InputError

PROMPT = "a red shape"


def latents(pipeline: CausalVideoPipeline, *args: Any, **options: Any) -> Tensor:
    given = {"seeds": [1]} | options if "generator" not in options else options
    found = pipeline(*(args or (PROMPT,)), output_type="latent", **given)
    assert isinstance(found, VideoOutput) and isinstance(found.frames, Tensor)
    return found.frames


def test_sizes_are_those_that_the_model_stores(shared_pipeline: CausalVideoPipeline) -> None:
    (frames,) = shared_pipeline(PROMPT, seeds=[1], return_dict=False)
    assert isinstance(frames, np.ndarray) and frames.shape == (1, 21, 16, 32, 3)
    assert shared_pipeline(PROMPT, 9, 32, 16, seeds=[1]).frames.shape == (1, 9, 32, 16, 3)


def test_a_call_and_a_stream_are_one(shared_pipeline: CausalVideoPipeline) -> None:
    options: dict[str, Any] = {
        "num_inference_steps": 3,
        "num_videos_per_prompt": 2,
        "seeds": [1, 2],
        "memory": "window",
    }
    streamed = [block.latents_BFCHW for block in shared_pipeline.stream(PROMPT, **options)]
    assert torch.equal(torch.cat(streamed, dim=1), latents(shared_pipeline, **options))


def test_steps(shared_pipeline: CausalVideoPipeline) -> None:
    own = latents(shared_pipeline)
    assert torch.equal(latents(shared_pipeline, num_inference_steps=2), own)
    assert torch.equal(latents(shared_pipeline, timesteps=[1000, 500]), own)
    three = latents(shared_pipeline, timesteps=[1000, 667, 333])
    assert torch.equal(latents(shared_pipeline, num_inference_steps=3), three) and not torch.equal(three, own)


def test_generators(shared_pipeline: CausalVideoPipeline) -> None:
    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    alone = [latents(shared_pipeline, generator=seeded(seed)) for seed in (3, 4)]
    both = latents(shared_pipeline, num_videos_per_prompt=2, generator=[seeded(3), seeded(4)])
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-3, atol=1e-3)
    assert not torch.equal(*alone)
    again = latents(shared_pipeline, [PROMPT, "blue"], num_videos_per_prompt=2, generator=seeded(5))
    assert len(again) == 4 and not torch.allclose(again[0], again[1], atol=1e-2)


def test_given_noise_is_the_starting_point(shared_pipeline: CausalVideoPipeline) -> None:
    noise = torch.randn(1, 6, 16, 2, 4)
    found = latents(shared_pipeline, latents=noise)
    assert torch.equal(found, latents(shared_pipeline, latents=noise))
    other = noise.clone()
    other[:, 3:] += 1  # the second block's alone
    changed = latents(shared_pipeline, latents=other)
    assert torch.equal(changed[:, :3], found[:, :3]) and not torch.equal(changed[:, 3:], found[:, 3:])
    one_step = [latents(shared_pipeline, latents=noise, seeds=[seed], timesteps=[1000]) for seed in (1, 2)]
    assert torch.equal(*one_step), "with one step no other noise is drawn"


def test_embeddings_take_the_place_of_words(shared_pipeline: CausalVideoPipeline) -> None:
    embeds = shared_pipeline.encode_prompt([PROMPT])
    assert torch.equal(latents(shared_pipeline, None, prompt_embeds=embeds), latents(shared_pipeline))
    short = shared_pipeline.encode_prompt([PROMPT], max_sequence_length=2)
    assert short.shape[1] == 2
    cut = latents(shared_pipeline, max_sequence_length=2)
    assert torch.equal(cut, latents(shared_pipeline, None, prompt_embeds=short))
    assert not torch.equal(cut, latents(shared_pipeline))


def test_the_callback_sees_every_step_and_may_change_it(shared_pipeline: CausalVideoPipeline) -> None:
    steps: list[tuple[int, float]] = []

    def watch(pipe: Any, step: int, timestep: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert pipe is shared_pipeline and tensors["latents"].shape == (1, 3, 16, 2, 4)
        steps.append((step, timestep))
        return tensors

    assert torch.equal(latents(shared_pipeline, callback_on_step_end=watch), latents(shared_pipeline))
    assert [step for step, _ in steps] == [0, 1, 2, 3] and steps[0][1] == 1000 > steps[1][1]
    zeros = latents(shared_pipeline, callback_on_step_end=lambda *a: {"latents": torch.zeros_like(a[3]["latents"])})
    assert not zeros.any()
    told = list[Any]()
    latents(
        shared_pipeline,
        callback_on_step_end=lambda *a: told.append(a[3]),
        callback_on_step_end_tensor_inputs=[],
    )
    assert told == [{}] * 4


def test_a_memory_by_its_name(shared_pipeline: CausalVideoPipeline) -> None:
    options: dict[str, Any] = {"num_frames": 69}
    window = latents(shared_pipeline, memory="window", **options)
    assert torch.equal(window, latents(shared_pipeline, memory=MemoryConfig(MemoryKind.window), **options))
    assert not torch.equal(window, latents(shared_pipeline, memory="full", **options))


def test_guidance_is_that_of_two_passes(pipeline: CausalVideoPipeline) -> None:
    guided = CausalVideoPipeline(**pipeline.components, **dict(_settings(pipeline), guidance_distilled=False))
    guided.set_progress_bar_config(disable=True)
    assert torch.equal(latents(guided, guidance_scale=1.0), latents(guided))
    high, low = (latents(guided, guidance_scale=scale, num_frames=9) for scale in (4.0, 2.0))
    plain = latents(guided, num_frames=9)
    assert not torch.allclose(high, plain, atol=1e-3) and not torch.allclose(high, low, atol=1e-3)
    torch.testing.assert_close(
        latents(guided, guidance_scale=3.0, negative_prompt=PROMPT), latents(guided), rtol=1e-3, atol=1e-3
    )
    embeds = {"prompt_embeds": guided.encode_prompt([PROMPT]), "negative_prompt_embeds": guided.encode_prompt(["blue"])}
    torch.testing.assert_close(
        latents(guided, None, guidance_scale=3.0, **embeds),
        latents(guided, guidance_scale=3.0, negative_prompt="blue"),
    )


def _settings(pipeline: CausalVideoPipeline) -> dict[str, Any]:
    names = ("frames_per_block", "denoising_steps", "height", "width", "num_frames")
    return {name: pipeline.config[name] for name in names}


NOISE = torch.zeros(1, 6, 16, 2, 4)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "guidance of a distilled model": ({"guidance_scale": 5.0}, "is distilled"),
    "negative prompt of one": ({"negative_prompt": "ugly"}, "would do nothing"),
    "guidance out of range": ({"guidance_scale": -1.0}, "out of range"),
    "steps twice": ({"num_inference_steps": 2, "timesteps": [500]}, "not both"),
    "no steps": ({"num_inference_steps": 0}, "out of range"),
    "rising steps": ({"timesteps": [500, 600]}, "must fall"),
    "no videos": ({"num_videos_per_prompt": 0}, "at least 1"),
    "generators of others": ({"generator": [torch.Generator()] * 2, "seeds": None}, "2 generators for 1 videos"),
    "seeds and generator": ({"generator": torch.Generator()}, "seeds or generator"),
    "no generator": ({"generator": 3, "seeds": None}, "is a int"),
    "noise of another shape": ({"latents": NOISE.transpose(1, 2)}, "latents have the shape"),
    "noise of NaN": ({"latents": NOISE * torch.nan}, "NaN"),
    "noise and strength": ({"latents": NOISE, "video": [Image.new("RGB", (9, 9))] * 21, "strength": 0.5}, "leave one"),
    "prompt and embeddings": ({"prompt_embeds": torch.zeros(1, 4, 64)}, "not both"),
    "too many tokens": ({"max_sequence_length": 10**6}, "out of range"),
    "unknown memory": ({"memory": "all"}, "trained, full, window"),
    "a small window": ({"memory": MemoryConfig(MemoryKind.window, 3, 3)}, "cannot hold a block"),
    "unknown tensors": ({"callback_on_step_end_tensor_inputs": ["noise_pred"]}, "noise_pred"),
    "no callback": ({"callback_on_step_end": 3}, "give a function"),
    "unknown output": ({"output_type": "gif"}, "unknown output_type"),
    "frames that cannot be": ({"num_frames": 8}, "1 plus a multiple of 4"),
    "frames of no block": ({"num_frames": 25}, "do not divide into blocks"),
    "a height that cannot be": ({"height": 30}, "multiple of 16"),
    "an image and a video": ({"image": Image.new("RGB", (9, 9)), "video": [Image.new("RGB", (9, 9))]}, "not both"),
    "strength of nothing": ({"strength": 0.5}, "give video too"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_a_wrong_call_is_refused_before_anything_is_computed(
    case: str, shared_pipeline: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = WRONG[case]
    monkeypatch.setattr(CausalVideoPipeline, "generate", lambda *_: pytest.fail("something was computed"))
    with pytest.raises(InputError, match=message) as caught:
        shared_pipeline(**({"prompt": PROMPT, "seeds": [1]} | options))
    assert "\n" not in str(caught.value)


def test_unknown_arguments_fail_at_once(shared_pipeline: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalVideoPipeline, "encode_prompt", lambda *_: pytest.fail("a prompt was encoded"))
    for call in (shared_pipeline, shared_pipeline.stream):
        with pytest.raises(TypeError, match="guidance_rescale"):
            call(PROMPT, guidance_rescale=0.5)  # type: ignore[operator]


def test_a_callback_that_returns_something_else(shared_pipeline: CausalVideoPipeline) -> None:
    for returned, message in ((3, "returned a int"), ({"latents": torch.zeros(1)}, "keep the shape")):
        with pytest.raises(InputError, match=message):
            latents(shared_pipeline, callback_on_step_end=lambda *_, value=returned: value)


NOISE = torch.zeros(1, 6, 16, 2, 4)
WRONG_KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "a negative prompt by position": ({"num_frames": "blurry"}, "num_frames 'blurry' does not fit"),
    "a fraction of frames": ({"num_frames": 9.5}, "num_frames 9.5 does not fit"),
    "height as text": ({"height": "16"}, "height '16' does not fit"),
    "width of floats": ({"width": 32.0}, "width 32.0 does not fit"),
    "videos per prompt as text": ({"num_videos_per_prompt": "2"}, "num_videos_per_prompt '2' does not fit"),
    "steps of floats": ({"num_inference_steps": 2.5}, "num_inference_steps 2.5 does not fit"),
    "steps as a switch": ({"num_inference_steps": True}, "num_inference_steps true does not fit"),
    "fractions of timesteps": ({"timesteps": [999.5]}, "timestep 999.5 does not fit"),
    "no number among timesteps": ({"timesteps": torch.tensor([float("nan")])}, "timestep nan does not fit"),
    "timesteps in rows": ({"timesteps": torch.tensor([[1000, 500]])}, r"timesteps has the shape \[1, 2\]"),
    "one timestep": ({"timesteps": 500}, "timesteps is a int"),
    "timesteps as text": ({"timesteps": "500"}, "timesteps is a str"),
    "one seed": ({"seeds": 5}, "seeds is a int"),
    "seeds as text": ({"seeds": "5"}, "seeds is a str"),
    "a seed that is none": ({"seeds": [None]}, r"seeds\[0\] null does not fit"),
    "a seed of floats": ({"seeds": [1.5]}, r"seeds\[0\] 1.5 does not fit"),
    "a seed beyond 64 bits": ({"seeds": [2**70]}, r"seeds\[0\] .* is out of range"),
    "noise of NumPy": ({"latents": NOISE.numpy()}, "latents is a ndarray"),
    "noise in a list": ({"latents": [NOISE]}, "latents is a list"),
    "noise of integers": ({"latents": NOISE.long()}, "latents is a tensor of torch.int64"),
    "noise without values": ({"latents": NOISE.to("meta")}, "latents is a tensor without values"),
    "a prompt that is none": ({"prompt": [None]}, "prompt is or holds a NoneType"),
    "embeddings of NumPy": ({"prompt": None, "prompt_embeds": np.zeros((1, 2, 3))}, "prompt_embeds is a ndarray"),
    "embeddings without a batch": ({"prompt": None, "prompt_embeds": torch.zeros(2, 3)}, r"shape \[2, 3\]: give"),
    "embeddings without tokens": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 0, 64)},
        r"shape \[1, 0, 64\]: give",
    ),
    "guidance as text": ({"guidance_scale": "5"}, "guidance_scale '5' does not fit"),
    "tokens as text": ({"max_sequence_length": "4"}, "max_sequence_length '4' does not fit"),
    "a window as text": ({"memory": MemoryConfig(MemoryKind.window, "6")}, "memory.window_frames '6' does not fit"),  # type: ignore[arg-type]
    "one name of a tensor": ({"callback_on_step_end_tensor_inputs": "latents"}, "tensor_inputs is a str"),
    "no names of tensors": ({"callback_on_step_end_tensor_inputs": None}, "tensor_inputs is a NoneType"),
}


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_a_value_of_another_kind_is_refused_by_name(name: str, shared_pipeline: CausalVideoPipeline) -> None:
    options, words = WRONG_KINDS[name]
    with pytest.raises(InputError, match=words) as error:
        shared_pipeline.stream(**({"prompt": PROMPT} | options))  # nothing is computed before the first block
    assert str(error.value).isprintable()


def test_numbers_of_other_libraries_count_as_numbers(shared_pipeline: CausalVideoPipeline) -> None:
    own = latents(shared_pipeline)
    for steps in (torch.tensor([1000.0, 500.0]), np.array([1000, 500])):
        assert torch.equal(latents(shared_pipeline, timesteps=steps, seeds=np.array([1])), own)
    window = MemoryConfig("window", np.int64(6), 0)  # type: ignore[arg-type]
    assert torch.equal(
        latents(shared_pipeline, memory=window), latents(shared_pipeline, memory=MemoryConfig(MemoryKind.window, 6, 0))
    )


def test_what_a_callback_cannot_change_is_refused(shared_pipeline: CausalVideoPipeline) -> None:
    with pytest.raises(InputError, match="returned 'prompt_embeds', which would change nothing"):
        latents(shared_pipeline, callback_on_step_end=lambda *_: {"prompt_embeds": torch.zeros(1)})


def test_texts_are_encoded_one_by_one_or_together(shared_pipeline: CausalVideoPipeline) -> None:
    encode = shared_pipeline.encode_prompt
    assert torch.equal(encode(PROMPT), encode([PROMPT])), "a text is one prompt, not one per letter"
    for wrong, words in (([], "no prompts"), (None, "holds a NoneType"), ([5], "holds a int")):
        with pytest.raises(InputError, match=words):
            encode(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_sequence_length 100000 is out of range"):
        encode(PROMPT, max_sequence_length=100_000)
