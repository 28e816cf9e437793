"""Sinks that are moving averages: equal to a plain loop over all keys, constant in size, refused where they cannot be.

The reference is written as the paper has it, and as the public code places it: it keeps every key before its rotation,
averages those, and counts positions from the start of the sink.
"""

from typing import Any

import pytest
import torch
from tiny_models import HYBRID, TOKENS_PER_FRAME, new_memory, tiny_model, tiny_video
from torch import Tensor

from arl2.inference.memory_pool import MemoryPool
from arl2.inference.model import InferenceModel
from arl2.model import HybridSettings
from arl2.rollout import predict_flow, remember_block
from wan.averaged_sink import AveragedSinkMemory
from wan.memory import ConcatView, KVUpdate, Memory, MemorySpec, SlotUpdate
from wan.ops.attention import attention
from wan.ops.rope import rotary_angles, rotate
from wan.utils.errors import InputError

ROWS, COLUMNS = 2, 3
SIZES = [(9, 3, 3), (8, 3, 3), (7, 2, 3), (5, 2, 3), (4, 1, 3), (6, 3, 1), (7, 1, 2), (9, 4, 2)]
"""Frames of window, sink and block; several do not divide one another."""


def spec(window: int | None, sink: int, decay: float | None = 0.9, **others: Any) -> MemorySpec:
    arguments = {"batch_size": 2, "tokens_per_frame": ROWS * COLUMNS, "device": torch.device("cpu")}
    arguments |= {"dtype": torch.float64, "frames": 3, "window_frames": window, "sink_frames": sink}
    return MemorySpec(**arguments, sink_decay=decay, **others)


def turned(x: Tensor, first_frame: int) -> Tensor:
    frames = torch.arange(first_frame, first_frame + x.shape[1] // (ROWS * COLUMNS))
    return rotate(x, rotary_angles(frames, ROWS, COLUMNS, x.shape[-1]))


def moved(x: Tensor, frames: int) -> Tensor:
    """Keys moved along the axis of frames; rows and columns stay."""
    cos, sin = rotary_angles(torch.tensor([frames]), 1, 1, x.shape[-1])
    return rotate(x, (cos, sin))


def kept(frames: list[Tensor], window: int, sink: int, block: int, decay: float) -> list[Tensor]:
    """Sink and window that a next block sees, of all frames so far, none of them rotated."""
    held, gone = list(frames[:sink]), max(0, len(frames) + block - window)
    for frame in range(sink, sink + gone):
        held[frame % sink] = decay * held[frame % sink] + (1 - decay) * frames[frame]
    # The sink frame that was averaged longest ago stands first.
    start = gone % sink
    return held[start:] + held[:start] + frames[sink + gone :]


@pytest.mark.parametrize(("window", "sink", "block"), SIZES)
def test_attention_is_that_over_averages_of_unrotated_keys(window: int, sink: int, block: int) -> None:
    decay, heads, head_dim = 0.8, 3, 12
    memory = AveragedSinkMemory(spec(window, sink, decay), heads, head_dim)
    keys, values = list[Tensor](), list[Tensor]()
    for start in range(0, 14 * block, block):
        q, k, v = (torch.randn(2, block * ROWS * COLUMNS, heads, head_dim, dtype=torch.float64) for _ in range(3))
        view = memory.read(k.shape[1])
        seen_keys, seen_values, _ = view.with_block(turned(k, start), v)
        found = attention(turned(q, start), seen_keys, seen_values)
        past = kept(keys, window, sink, block, decay)
        all_values = torch.cat([*kept(values, window, sink, block, decay), v], dim=1)
        all_keys = turned(torch.cat([*past, k], dim=1), 0)
        assert seen_keys.shape == all_keys.shape
        torch.testing.assert_close(found, attention(turned(q, len(past)), all_keys, all_values), rtol=1e-5, atol=1e-6)
        memory.commit(KVUpdate(turned(k, start), v))
        keys += k.split(ROWS * COLUMNS, dim=1)
        values += v.split(ROWS * COLUMNS, dim=1)


class PlainMemory:
    """Keeps every key and value of a layer, and makes the average anew at every read."""

    num_bytes = 0

    def __init__(self, window: int, sink: int, decay: float) -> None:
        self._sizes, self._frames = (window, sink), ([], [])
        self._decay = decay

    def read(self, tokens: int) -> ConcatView:
        window, sink = self._sizes
        block, turned_keys = tokens // TOKENS_PER_FRAME, self._frames[0]
        # Keys come rotated by their frame: turned back, averaged, and placed before the window.
        plain = [moved(key, -frame) for frame, key in enumerate(turned_keys)]
        keys = kept(plain, window, sink, block, self._decay)
        first = len(plain) - len(keys)
        if not keys:
            empty = torch.zeros(2, 0, 2, 12, dtype=torch.float64)
            return ConcatView(empty, empty)
        placed = torch.cat([moved(key, first + place) for place, key in enumerate(keys)], dim=1)
        return ConcatView(placed, torch.cat(kept(self._frames[1], window, sink, block, self._decay), dim=1))

    def commit(self, update: KVUpdate) -> None:
        update = update.copied() if isinstance(update, SlotUpdate) else update
        for frames, x in zip(self._frames, (update.keys_BLHD, update.values_BLHD), strict=True):
            frames += x.clone().split(TOKENS_PER_FRAME, dim=1)

    def detach(self) -> None:
        pass

    def reset(self) -> None:
        pass


def flows(model: Any, memory: Memory, text: Any, block: int, frames: int) -> Tensor:
    torch.manual_seed(0)
    video, found = tiny_video(frames=frames), []
    for start in range(0, frames, block):
        for time in (900.0, 400.0):  # a second step must find the memory as the first did
            noisy = video.noisy[:, start : start + block]
            found.append(predict_flow(model, noisy, torch.tensor(time), text, memory, start))
        remember_block(model, video.clean[:, start : start + block], text, memory, start)
    return torch.cat(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(("window", "sink", "block"), SIZES)
@pytest.mark.parametrize("hybrid", [HybridSettings(), HYBRID], ids=["softmax", "hybrid"])
def test_a_model_sees_what_a_plain_loop_over_all_keys_gives(
    window: int, sink: int, block: int, hybrid: HybridSettings
) -> None:
    model, text_BTD = tiny_model(hybrid), tiny_video().text
    text, frames = model.embed_text(text_BTD), 8 * block
    plain = new_memory(model, window=window, sink=sink)
    softmax = [layer for layer in range(len(plain.layers)) if layer not in hybrid.layers]
    for layer in softmax:
        plain.layers[layer] = PlainMemory(window, sink, 0.7)
    expected = flows(model, plain, text, block, frames)
    memory = new_memory(model, window=window, sink=sink, decay=0.7)
    torch.testing.assert_close(flows(model, memory, text, block, frames), expected, rtol=1e-4, atol=1e-5)
    first = flows(model, new_memory(model, window=window, sink=sink), text, block, frames)
    assert not torch.allclose(first, expected, rtol=1e-3, atol=1e-3)
    fast = new_memory(model, window=window, sink=sink, decay=0.7)
    found = flows(InferenceModel(model), fast, text, block, frames)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_it_has_one_size_at_any_length_and_forgets() -> None:
    model, text_BTD = tiny_model(), tiny_video().text
    text, pool = model.embed_text(text_BTD), MemoryPool(model)
    like = spec(9, 3)
    memory = pool.new_memory(like)
    before = memory.num_bytes
    first = flows(model, memory, text, 3, 30)
    assert memory.num_bytes == before == model.memory_bytes(30, 4, 6, torch.float64, 9, 3, 0.9) * 2
    plain = model.memory_bytes(30, 4, 6, torch.bfloat16, 9, 3)
    # Beside the window in bfloat16, a sink in float32.
    assert model.memory_bytes(30, 4, 6, torch.bfloat16, 9, 3, 0.9) == plain + plain // 9 * 3 * 2
    addresses = [view.keys_BMHD.data_ptr() for view in memory.read(18)]
    del memory
    again = pool.new_memory(like)
    assert [view.keys_BMHD.data_ptr() for view in again.read(18)] == addresses
    assert torch.equal(flows(model, again, text, 3, 30), first)
    del again
    assert not torch.equal(flows(model, pool.new_memory(spec(9, 3, 0.5)), text, 3, 30), first)


def test_averages_take_in_steps_that_half_precision_rounds_away() -> None:
    half = spec(2, 1, 0.999)
    memory = AveragedSinkMemory(MemorySpec(**{**half.__dict__, "dtype": torch.bfloat16}), 1, 2)
    tokens = ROWS * COLUMNS
    ones = torch.ones(2, tokens, 1, 2, dtype=torch.bfloat16)
    memory.commit(KVUpdate(ones, ones))
    for _ in range(400):
        memory.commit(KVUpdate(ones, 0 * ones))
    seen = memory.remembered(tokens).values_BLHD[:, :tokens]
    torch.testing.assert_close(seen, torch.full_like(seen, 0.999**400), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("window", "sink", "others"),
    [(None, 0, {}), (6, 0, {}), (6, 3, {"decay": 1.0}), (6, 3, {"decay": 0.0}), (6, 3, {"differentiable": True})],
)
def test_what_has_no_average_is_refused(window: int | None, sink: int, others: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"average.*: "):
        spec(window, sink, **others)


def test_blocks_of_another_size_are_an_error() -> None:
    memory = AveragedSinkMemory(spec(9, 3), 1, 2)
    x = torch.zeros(2, 3 * ROWS * COLUMNS, 1, 2, dtype=torch.float64)
    memory.commit(KVUpdate(x, x))
    for tokens in (6, 12):
        with pytest.raises(ValueError, match="one size"):
            memory.read(tokens)
    memory.reset()
    assert memory.read(6).visible == 6
