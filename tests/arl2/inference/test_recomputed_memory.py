"""Memories that are made anew before every block: equal to one pass with a block-causal mask, from any start.

The reference is written as the public code of Krea Realtime does it: all frames before a block pass at once, over
nothing, and positions count from the first of them.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_models import TOKENS_PER_FRAME, new_memory, tiny_model, tiny_video
from torch import Tensor

from arl2.guidance import GuidedModel
from arl2.inference.model import InferenceModel
from arl2.model import HybridWanModel
from arl2.rollout import Conditions, FewStepSampler, denoise_block, remember_anew, rollout
from wan.flow import flow_to_x0
from wan.memory import ConcatView, KVMemory

STEPS = FewStepSampler.from_steps([1000, 500], 5.0)
ONE = FewStepSampler.from_steps([1000], 5.0)
BLOCKS = 6


@dataclass(frozen=True)
class BlockCausalView:
    """A pass over several blocks at once, over no memory."""

    mask_LM: Tensor

    def with_block(self, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return k_BLHD, v_BLHD, self.mask_LM


def flow_after(model: HybridWanModel, context: Tensor, noisy: Tensor, time: float, text: Any, frames: int) -> Tensor:
    """Velocity of a block behind some frames, computed from their latents alone."""
    past, block = context.shape[1], noisy.shape[1]
    views: list[Any] = []
    if past:
        number = torch.arange(past * TOKENS_PER_FRAME) // (frames * TOKENS_PER_FRAME)
        view = BlockCausalView(number[:, None] >= number)
        clean = torch.zeros(context.shape[:2])
        layers = [view] * len(model.layers())
        updates = model(context, clean, text, layers, torch.arange(past), remember=True).updates
        assert updates is not None
        views = [ConcatView(update.keys_BLHD, update.values_BLHD) for update in updates]
    else:
        views = new_memory(model).read(block * TOKENS_PER_FRAME)
    timesteps = torch.full(noisy.shape[:2], time)
    flow = model(noisy, timesteps, text, views, torch.arange(past, past + block)).flow
    assert flow is not None
    return flow


@torch.no_grad()
@pytest.mark.parametrize(("recomputed", "frames"), [(3, 3), (6, 3), (1, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("given", [0, 1, 3], ids="given{}".format)
def test_a_rollout_equals_passes_over_all_frames_before_a_block(recomputed: int, frames: int, given: int) -> None:
    model, video = tiny_model(), tiny_video(frames=(given + BLOCKS) * frames)
    text = model.embed_text(video.text)
    window = recomputed + frames
    noise = torch.randn(BLOCKS, *video.clean[:, :frames].shape, dtype=torch.float64)
    context = video.clean[:, : given * frames][:, -recomputed:] if given else None
    expected = [] if context is None else [context]
    for index in range(BLOCKS):
        past = torch.cat([torch.zeros_like(noise[0, :, :0]), *expected], dim=1)[:, -recomputed:]
        flow = flow_after(model, past, noise[index], ONE.timesteps[0], text, frames)
        expected.append(flow_to_x0(flow, noise[index], torch.tensor(ONE.sigmas[0])))
    expected = expected[context is not None :]
    for fast in (model, InferenceModel(model)):
        memory = new_memory(model, window=window)
        if context is not None:
            remember_anew(fast, context, frames, text, memory, given * frames - context.shape[1])
        before = memory.num_bytes
        made = rollout(
            fast,
            ONE,
            lambda block, step: noise[block],
            text,
            memory,
            BLOCKS,
            given * frames,
            conditions=Conditions(context_BFCHW=context),
            recomputed_frames=recomputed,
        )
        for block, wanted in zip(made, expected, strict=True):
            torch.testing.assert_close(block.latents_BFCHW, wanted, rtol=1e-4, atol=1e-5)
        assert memory.num_bytes == before


def roll(model: Any, owner: HybridWanModel, text: Any, recomputed: int, batch: int = 2) -> list[Tensor]:
    noise = torch.randn(4, 2, 2, 3, 4, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    memory = new_memory(owner, batch=batch, window=9)
    made = rollout(model, STEPS, lambda *at: noise[at], text, memory, 4, recomputed_frames=recomputed)
    return [block.latents_BFCHW for block in made]


@torch.no_grad()
def test_it_changes_videos_only_once_a_frame_has_left() -> None:
    model, video = tiny_model(), tiny_video()
    text = model.embed_text(video.text)
    once, anew = roll(model, model, text, 0), roll(model, model, text, 6)
    for number, (one, other) in enumerate(zip(once, anew, strict=True)):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-6) is (number < 3)
    guided = roll(GuidedModel(model, 1.0), model, model.embed_text(torch.cat([video.text] * 2)), 6, batch=4)
    torch.testing.assert_close(torch.cat(guided), torch.cat(anew))


@torch.no_grad()
def test_what_was_remembered_before_does_not_matter() -> None:
    model, video = tiny_model(), tiny_video(frames=12)
    text, flows = model.embed_text(video.text), []
    for forget in (False, True):
        memory = new_memory(model, window=6)
        for start in () if forget else (0, 3):
            remember_anew(model, video.noisy[:, start : start + 3], 3, text, memory, start)
        remember_anew(model, video.clean[:, 6:9], 3, text, memory, 6)
        assert all(isinstance(layer, KVMemory) for layer in memory.layers)
        flows.append(denoise_block(model, STEPS, lambda step: video.noisy[:, 9:], text, memory, 9))
    assert torch.equal(*flows)
