"""Blocks are handed out while the next is computed."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from arl2.model import HybridSettings
from pipelines.config import SpeedConfig
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.random_model import random_pipeline
from pipelines.generation.streaming import SideStream, Transfer, one_ahead
from pipelines.media.video import to_uint8


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
    transfer = Transfer(value)
    transfer.join()
    assert transfer.wait() is value


def test_a_block_brings_its_frames_as_bytes() -> None:
    pipeline = random_pipeline("toy", words=["a"])
    for block in pipeline.stream("a", 21, 16, 16, seeds=[0]):
        assert torch.equal(block.frames_BTHWC.wait()[0], to_uint8(block.pixels_BTCHW[0]))
        assert bool(block.finite.wait())


def test_only_decoding_happens_on_the_side() -> None:
    pipeline, now, seen = random_pipeline("toy", words=["a"]), ["main"], set[tuple[str, str]]()

    class Aside(SideStream):
        def __init__(self) -> None:
            pass

        @contextmanager
        def work(self) -> Iterator[None]:
            now.append("side")
            yield
            now.pop()

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        seen.add((name, now[-1]))
        yield

    pipeline._side = Aside()
    for _ in pipeline.stream("a", 33, 16, 16, seeds=[0], phase=phase):
        assert now == ["main"], "whoever takes a block is not on the side"
    assert seen == {("text", "main"), ("denoise", "main"), ("remember", "main"), ("vae", "side")}


@pytest.mark.gpu
def test_work_on_the_side_delays_nobody_who_does_not_join_it() -> None:
    value, side = torch.randn(1000, device="cuda"), SideStream(torch.device("cuda"))
    # The first round loads kernels and takes pinned memory, which waits for the whole GPU.
    for cycles in (1, 2_000_000_000):  # the second takes about a second
        doubled = value * 2
        with side.work():
            torch.cuda._sleep(cycles)
            result = doubled + 1
            transfer = Transfer(result)
            later = torch.cuda.current_stream().record_event()
        torch.cuda.current_stream().synchronize()
    assert not later.query()
    transfer.join()
    assert torch.equal(result, value * 2 + 1)


def gpu_videos(pipeline: CausalVideoPipeline, overlap: bool) -> list[Tensor]:
    """Some videos as bytes, each decoded slowly; full memory, so that passes are recorded meanwhile."""
    pipeline.optimize_for_inference(SpeedConfig(compile=False, kernels=False, overlap_decoding=overlap))

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        if name == "vae":
            torch.cuda._sleep(50_000_000)
        yield

    videos = []
    for seed in (0, 1, 2, 3):
        pixels = []
        for block in pipeline.stream("a", 57, 32, 32, seeds=[seed], phase=phase):
            # Read on the GPU before anything has been waited for.
            pixels.append(to_uint8(block.pixels_BTCHW[0]))
            assert torch.equal(block.frames_BTHWC.wait()[0], pixels[-1].cpu())
        videos.append(torch.cat(pixels))
    return videos


@pytest.mark.gpu
def test_decoding_on_the_side_changes_nothing() -> None:
    pipeline = random_pipeline("toy", HybridSettings((0, 2)), words=["a"], device=torch.device("cuda"))
    apart, beside = gpu_videos(pipeline, False), gpu_videos(pipeline, True)
    for one, other in zip(apart, beside, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_a_transfer_does_not_wait_for_what_comes_later() -> None:
    value = torch.randn(1000, device="cuda")
    transfer = Transfer(value)
    torch.cuda._sleep(2_000_000_000)  # about a second
    later = torch.cuda.current_stream().record_event()
    arrived = transfer.wait()
    assert not later.query()
    assert torch.equal(arrived, value.cpu())
