"""Classifier-free guidance against two plain passes, and blocks that start from given latents."""

import torch
from tiny_models import HEIGHT, HYBRID, TINY, WIDTH, new_memory, tiny_model
from torch import Tensor

from arl2.guidance import GuidedModel
from arl2.rollout import Conditions, FewStepSampler, SeededNoise, denoise_block, predict_flow, remember_block, rollout
from wan.flow import add_noise, flow_to_x0

BATCH, FRAMES, SCALE = 2, 3, 3.5
SAMPLER = FewStepSampler.from_steps([1000, 600, 300], 5.0)


def noise(batch: int = BATCH) -> SeededNoise:
    return SeededNoise(range(batch), (FRAMES, TINY["in_dim"], HEIGHT, WIDTH), torch.device("cpu"))


def texts() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 4, TINY["text_dim"]), torch.randn(BATCH, 4, TINY["text_dim"])


def test_guidance_equals_two_plain_passes_over_two_memories() -> None:
    model = tiny_model(HYBRID, torch.float32)
    prompts, negative = texts()
    expected, starting = [], noise()
    kv = [model.embed_text(text) for text in (prompts, negative)]
    memories = [new_memory(model, window=6, sink=1), new_memory(model, window=6, sink=1)]
    for block in range(3):
        x_t = starting(block, 0)
        for step, (time, level) in enumerate(zip(SAMPLER.timesteps, SAMPLER.sigmas, strict=True)):
            positive, other = (
                predict_flow(model, x_t, torch.tensor(time), text, memory, FRAMES * block)
                for text, memory in zip(kv, memories, strict=True)
            )
            x0 = flow_to_x0(other + SCALE * (positive - other), x_t, torch.tensor(level))
            if step < 2:
                x_t = add_noise(x0, starting(block, step + 1), torch.tensor(SAMPLER.sigmas[step + 1]))
        expected.append(x0)
        for text, memory in zip(kv, memories, strict=True):
            remember_block(model, x0, text, memory, FRAMES * block)
    text = model.embed_text(torch.cat([prompts, negative]))
    memory = new_memory(model, batch=2 * BATCH, window=6, sink=1)
    found = list(rollout(GuidedModel(model, SCALE), SAMPLER, noise(), text, memory, 3))
    torch.testing.assert_close(
        torch.cat([block.latents_BFCHW for block in found]), torch.cat(expected), rtol=2e-4, atol=2e-4
    )
    plain = list(rollout(model, SAMPLER, noise(), kv[0], new_memory(model, window=6, sink=1), 1))
    assert not torch.allclose(plain[0].latents_BFCHW, expected[0], atol=1e-2), "guidance changes something"


def test_scale_one_is_the_prompt_alone() -> None:
    model = tiny_model(HYBRID, torch.float32)
    prompts, negative = texts()
    both, alone = model.embed_text(torch.cat([prompts, negative])), model.embed_text(prompts)
    guided = rollout(GuidedModel(model, 1.0), SAMPLER, noise(), both, new_memory(model, batch=2 * BATCH), 2)
    plain = rollout(model, SAMPLER, noise(), alone, new_memory(model), 2)
    for one, other in zip(guided, plain, strict=True):
        torch.testing.assert_close(one.latents_BFCHW, other.latents_BFCHW, rtol=1e-4, atol=1e-4)


def test_kept_frames_stay_and_are_seen() -> None:
    model = tiny_model(HYBRID, torch.float32)
    text, kept = model.embed_text(texts()[0]), torch.randn(BATCH, 1, TINY["in_dim"], HEIGHT, WIDTH)
    seen = list[Tensor]()

    def hook(block: int, step: int, time: float, latents: Tensor) -> Tensor:
        seen.append(latents)
        return latents

    def video(conditions: Conditions) -> Tensor:
        blocks = rollout(model, SAMPLER, noise(), text, new_memory(model), 2, conditions=conditions)
        return torch.cat([block.latents_BFCHW for block in blocks], dim=1)

    found = video(Conditions(kept_BFCHW=kept, on_step=hook))
    assert torch.equal(found[:, :1], kept) and all(torch.equal(each[:, :1], kept) for each in seen[:3])
    other = video(Conditions(kept_BFCHW=kept + 1))
    assert not torch.allclose(found[:, 1:3], other[:, 1:3], atol=1e-3), "the rest of the block attends to them"
    # By hand: one step of the first block, at timestep 0 where frames are clean.
    x_t = torch.cat([kept, noise()(0, 0)[:, 1:]], dim=1)
    timesteps = torch.tensor([[0.0, SAMPLER.timesteps[0], SAMPLER.timesteps[0]]])
    flow = predict_flow(model, x_t, timesteps, text, new_memory(model), 0)
    expected = flow_to_x0(flow, x_t, torch.tensor(SAMPLER.sigmas[0]))[:, 1:]
    single = FewStepSampler(SAMPLER.timesteps[:1], SAMPLER.sigmas[:1])
    blocks = rollout(model, single, noise(), text, new_memory(model), 1, conditions=Conditions(kept_BFCHW=kept))
    torch.testing.assert_close(next(blocks).latents_BFCHW[:, 1:], expected)


def test_a_source_is_noised_to_the_first_step_that_is_taken() -> None:
    model = tiny_model(HYBRID, torch.float32)
    text, source = model.embed_text(texts()[0]), torch.randn(BATCH, 6, TINY["in_dim"], HEIGHT, WIDTH)

    def video(conditions: Conditions) -> Tensor:
        blocks = rollout(model, SAMPLER, noise(), text, new_memory(model), 2, conditions=conditions)
        return torch.cat([block.latents_BFCHW for block in blocks], dim=1)

    conditions = Conditions(source_BFCHW=source, strength=0.7)
    assert conditions.first_step(3) == 1 and conditions.first_step(10) == 3
    memory, expected = new_memory(model), []
    rest = FewStepSampler(SAMPLER.timesteps[1:], SAMPLER.sigmas[1:])
    for block in range(2):
        piece = source[:, 3 * block : 3 * block + 3]
        noised = add_noise(piece, noise()(block, 1), torch.tensor(SAMPLER.sigmas[1]))
        start = [noised, noise()(block, 2)]
        expected.append(denoise_block(model, rest, start.__getitem__, text, memory, 3 * block))
        remember_block(model, expected[-1], text, memory, 3 * block)
    torch.testing.assert_close(video(conditions), torch.cat(expected, dim=1))
    whole, plain = video(Conditions(source_BFCHW=source, strength=1.0)), video(Conditions())
    torch.testing.assert_close(whole, plain)


def test_the_hook_replaces_latents() -> None:
    model = tiny_model(HYBRID, torch.float32)
    text, calls = model.embed_text(texts()[0]), list[tuple[int, int, float]]()

    def hook(block: int, step: int, time: float, latents: Tensor) -> Tensor:
        calls.append((block, step, time))
        return torch.zeros_like(latents)

    blocks = list(rollout(model, SAMPLER, noise(), text, new_memory(model), 2, conditions=Conditions(on_step=hook)))
    assert all(not block.latents_BFCHW.any() for block in blocks)
    assert calls == [(block, step, SAMPLER.timesteps[step]) for block in range(2) for step in range(3)]
