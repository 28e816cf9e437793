"""Memories: a denoising pass leaves them alone, a ring equals concatenation, nothing grows that should not."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import HEIGHT, HYBRID, TINY, TOKENS_PER_FRAME, WIDTH, new_memory, tiny_model, tiny_video
from torch import Tensor

from arl2.hybrid_attention import StateMemory
from arl2.rollout import predict_flow, remember_block
from wan.memory import ConcatKVMemory, KVMemory, KVUpdate, MemorySpec, SlotUpdate
from wan.utils.errors import InputError


def spec(window: int | None = None, sink: int = 0, differentiable: bool = False) -> MemorySpec:
    return MemorySpec(1, 2, torch.device("cpu"), torch.float64, 2, window, sink, differentiable)


def block(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(1, tokens, 1, 2, dtype=torch.float64), torch.randn(1, tokens, 1, 2, dtype=torch.float64)


def as_set(keys: Tensor) -> Tensor:
    """Keys in an order of their own: softmax does not care about order."""
    rows = keys.flatten(2)[0]
    return rows[rows[:, 0].argsort()]


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (6, 0), (6, 3), (7, 0), (7, 2), (5, 1), (4, 1), (3, 0)])
@pytest.mark.parametrize("sizes", [[3] * 7, [1] * 12, [1, 3, 3, 3, 3], [3, 1, 2, 3, 1, 3]])
def test_ring_holds_what_concatenation_holds(window: int | None, sink: int, sizes: list[int]) -> None:
    ring, plain = KVMemory(spec(window, sink), 1, 2), ConcatKVMemory(spec(window, sink), 1, 2)
    for frames in sizes:
        k, v = block(frames * 2)
        seen, expected = (memory.read(frames * 2).with_block(k, v) for memory in (ring, plain))
        for mine, theirs in zip(seen[:2], expected[:2], strict=True):
            torch.testing.assert_close(as_set(mine), as_set(theirs), rtol=0, atol=0)
        for memory in (ring, plain):
            memory.commit(KVUpdate(k, v))


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (6, 3), (7, 2), (5, 1)])
def test_a_block_that_is_in_its_slot_is_committed_without_a_copy(window: int | None, sink: int) -> None:
    copying, in_place = KVMemory(spec(window, sink), 1, 2), KVMemory(spec(window, sink), 1, 2)
    for frames in (3, 1, 3, 3, 1, 3):
        update = KVUpdate(*block(frames * 2))
        view = in_place.read(frames * 2)
        view.with_block(update.keys_BLHD, update.values_BLHD)
        left = SlotUpdate(view)
        for mine, theirs in zip(remembered_in(left), remembered_in(update), strict=True):
            assert torch.equal(mine, theirs)
        copying.commit(update)
        in_place.commit(left)
        for mine, theirs in zip(remembered(in_place, 2), remembered(copying, 2), strict=True):
            assert torch.equal(mine, theirs)
        with pytest.raises(ValueError, match="not in the next slot"):
            in_place.commit(left)
        with pytest.raises(ValueError, match="not in the next slot"):
            copying.commit(SlotUpdate(in_place.read(frames * 2)))


def remembered_in(update: KVUpdate | SlotUpdate) -> tuple[Tensor, Tensor]:
    update = update.copied() if isinstance(update, SlotUpdate) else update
    return update.keys_BLHD, update.values_BLHD


def test_a_window_has_bounded_bytes_and_a_full_memory_grows() -> None:
    windowed, full = KVMemory(spec(6, 3), 1, 2), KVMemory(spec(), 1, 2)
    before = windowed.num_bytes
    for _ in range(20):
        for memory in (windowed, full):
            memory.commit(KVUpdate(*block(6)))
    assert windowed.num_bytes == before == 2 * 6 * 2 * 2 * 8
    assert full.num_bytes >= 2 * 20 * 6 * 2 * 8


def test_a_block_that_does_not_fit_the_window_is_an_error() -> None:
    memory = KVMemory(spec(4, 2), 1, 2)
    memory.commit(KVUpdate(*block(6)))
    with pytest.raises(InputError, match="widen"):
        memory.read(6)
    with pytest.raises(InputError, match="sink"):
        spec(3, 3)


def test_reset_forgets() -> None:
    model, video = tiny_model(HYBRID), tiny_video()
    memory, text = new_memory(model), model.embed_text(video.text)
    timestep = torch.tensor(500.0)
    with torch.no_grad():
        first = predict_flow(model, video.noisy[:, :3], timestep, text, memory, 0)
        remember_block(model, video.clean[:, :3], text, memory, 0)
        assert not torch.equal(predict_flow(model, video.noisy[:, :3], timestep, text, memory, 0), first)
        memory.reset()
        assert torch.equal(predict_flow(model, video.noisy[:, :3], timestep, text, memory, 0), first)


def remembered(layer: KVMemory | StateMemory, tokens: int) -> list[Tensor]:
    if isinstance(layer, StateMemory):
        return [layer.read(tokens).state_BHKV.clone()]
    kept = layer.remembered(tokens)
    return [kept.keys_BLHD, kept.values_BLHD]


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (6, 3), (7, 2)])
def test_denoising_leaves_every_byte_of_memory_unchanged(window: int | None, sink: int) -> None:
    model, video = tiny_model(HYBRID), tiny_video(frames=15)
    memory, text = new_memory(model, window=window, sink=sink), model.embed_text(video.text)
    tokens = 3 * TOKENS_PER_FRAME
    with torch.no_grad():
        for start in range(0, 15, 3):
            before = [remembered(layer, tokens) for layer in memory.layers]
            frames = slice(start, start + 3)
            for time in (1000.0, 625.0):
                predict_flow(model, video.noisy[:, frames], torch.tensor(time), text, memory, start)
            after = [remembered(layer, tokens) for layer in memory.layers]
            for old, new in zip(before, after, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
            remember_block(model, video.clean[:, frames], text, memory, start)


def poison(memory: KVMemory, tokens: int) -> None:
    view = memory.read(tokens)
    for start, stop in view.slot:
        view.keys_BMHD[:, start:stop] = torch.nan
        view.values_BMHD[:, start:stop] = torch.nan


def test_what_a_pass_leaves_in_the_slot_does_not_matter() -> None:
    model, video = tiny_model(HYBRID), tiny_video(frames=12)
    text, timestep = model.embed_text(video.text), torch.tensor(500.0)

    def roll(prepare: Callable[[KVMemory, int], None]) -> list[Tensor]:
        memory, flows = new_memory(model, window=6, sink=3), []
        for start in range(0, 12, 3):
            kv = memory.layers[1]
            assert isinstance(kv, KVMemory)
            prepare(kv, 3 * TOKENS_PER_FRAME)
            flows.append(predict_flow(model, video.noisy[:, start : start + 3], timestep, text, memory, start))
            prepare(kv, 3 * TOKENS_PER_FRAME)
            remember_block(model, video.clean[:, start : start + 3], text, memory, start)
        return flows

    with torch.no_grad():
        for clean, poisoned in zip(roll(lambda memory, tokens: None), roll(poison), strict=True):
            assert torch.equal(clean, poisoned)


def test_state_memory_has_the_same_size_at_any_length() -> None:
    model, video = tiny_model(HYBRID), tiny_video(frames=30)
    memory, text = new_memory(model, window=6), model.embed_text(video.text)
    sizes = set()
    with torch.no_grad():
        for start in range(0, 30, 3):
            remember_block(model, video.clean[:, start : start + 3], text, memory, start)
            sizes.add(memory.num_bytes)
    assert len(sizes) == 1
    assert (TINY["in_dim"], HEIGHT, WIDTH) == tuple(video.clean.shape[2:])
