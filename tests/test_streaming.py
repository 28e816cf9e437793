"""Blocks are handed out while the next is computed."""

from collections.abc import Iterator

import pytest
import torch

from pipelines.random_model import random_pipeline
from pipelines.streaming import Transfer, one_ahead
from pipelines.video import to_uint8


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_results_wait_for_the_next_item_to_be_asked_for_but_not_to_be_finished(count: int) -> None:
    asked: list[int] = []
    finished: list[int] = []

    def items() -> Iterator[int]:
        for number in range(count):
            asked.append(number)
            yield number

    def finish(number: int) -> str:
        finished.append(number)
        return str(number)

    handed_out = []
    for result in one_ahead(finish, items()):
        handed_out.append(result)
        assert len(finished) == len(handed_out)
        assert len(asked) == min(count, len(handed_out) + (len(handed_out) > 1)), "the first comes at once"
    assert handed_out == [str(number) for number in range(count)]


def test_an_error_comes_where_it_arose() -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise RuntimeError("lost")

    ahead = one_ahead(str, items())
    assert [next(ahead), next(ahead)] == ["0", "1"]
    with pytest.raises(RuntimeError, match="lost"):
        next(ahead)


def test_on_a_cpu_a_tensor_has_arrived() -> None:
    value = torch.randn(3)
    assert Transfer(value).wait() is value


def test_a_block_brings_its_frames_as_bytes() -> None:
    pipeline = random_pipeline("toy", words=["a"])
    for block in pipeline.stream("a", 21, 16, 16, seeds=[0]):
        assert torch.equal(block.frames_BTHWC.wait()[0], to_uint8(block.pixels_BTCHW[0]))
        assert bool(block.finite.wait())


@pytest.mark.gpu
def test_a_transfer_does_not_wait_for_what_comes_later() -> None:
    value = torch.randn(1000, device="cuda")
    transfer = Transfer(value)
    torch.cuda._sleep(2_000_000_000)  # about a second
    later = torch.cuda.current_stream().record_event()
    arrived = transfer.wait()
    assert not later.query()
    assert torch.equal(arrived, value.cpu())
