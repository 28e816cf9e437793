"""All blocks at once: block by block without a mask is what the mask says."""

import pytest
import torch
from torch import Tensor

import wan.parallel
from wan.memory import ConcatView
from wan.ops.attention import AttentionBackend, attention
from wan.parallel import BlocksView, MaskedView, ParallelLayout

LAYOUTS = [(9, 3, 2, None, 0), (9, 3, 1, None, 0), (12, 2, 3, 6, 2), (12, 3, 2, 6, 0), (5, 1, 2, 4, 3), (4, 4, 2, 4, 0)]


STARTS = [0, 12, 36]
"""First frames of sequences: of a video, and of later segments, which begin with a whole block."""


def layout_of(
    frames: int, per_block: int, halves: int, window: int | None, sink: int, start: int = 0
) -> ParallelLayout:
    return ParallelLayout(frames, per_block, 5, halves, torch.device("cpu"), window, sink, start)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_what_a_block_sees_is_its_row_of_the_mask(sizes: tuple[int, int, int, int | None, int], start: int) -> None:
    layout = layout_of(*sizes, start)
    for place, rows in enumerate(layout.mask.split(layout.tokens_per_block)):
        seen = torch.zeros(layout.mask.shape[1], dtype=torch.bool)
        for part in layout.seen_tokens(*divmod(place, layout.num_blocks)):
            assert part.start < part.stop and not seen[part].any()
            seen[part] = True
        assert torch.equal(rows, seen.expand_as(rows)), place


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_the_mask_of_a_segment_is_a_part_of_that_of_the_video(
    sizes: tuple[int, int, int, int | None, int], start: int
) -> None:
    layout = layout_of(*sizes, start)
    whole = layout_of(start + sizes[0], *sizes[1:])
    tokens = torch.arange(whole.num_frames * whole.halves * 5).view(whole.halves, whole.num_frames, 5)
    of_segment = tokens[:, start:].flatten()
    past = tokens[0, torch.tensor(layout.past_frames, dtype=torch.long)].flatten()
    rows = whole.mask[of_segment]
    assert torch.equal(layout.mask, rows[:, torch.cat([past, of_segment])])
    assert layout.mask.sum() == rows.sum(), "the memory holds all that is seen"


@pytest.mark.parametrize("start", STARTS)
def test_a_memory_of_other_frames_is_an_error(start: int) -> None:
    layout = layout_of(6, 3, 2, 6, 3, start)
    tokens = 5 * len(layout.past_frames)
    held = ConcatView(*(torch.zeros(1, tokens + 5, 1, 2) for _ in range(2)))
    with pytest.raises(ValueError, match="a memory of"):
        layout.view(held)


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_by_blocks_values_and_gradients_are_those_under_the_mask(sizes: tuple[int, int, int, int | None, int]) -> None:
    layout = layout_of(*sizes)
    tokens = len(layout.mask)
    q, k, v = (torch.randn(2, tokens, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.randn(2, tokens, 3, 4, dtype=torch.float64)

    def with_gradients(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad((out * weight).sum(), (q, k, v))]

    masked = with_gradients(attention(q, k, v, mask_LM=layout.mask))
    by_blocks = with_gradients(BlocksView(layout).attention(q, k, v, AttentionBackend.AUTO))
    torch.testing.assert_close(by_blocks, masked, rtol=1e-12, atol=1e-12)


def test_long_blocks_go_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(9, 3, 2, None, 0)
    assert isinstance(layout.view(), MaskedView)
    monkeypatch.setattr(wan.parallel, "MAX_MASKED_TOKENS", 14)
    assert isinstance(layout.view(), BlocksView)
