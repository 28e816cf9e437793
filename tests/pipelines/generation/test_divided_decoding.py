"""Processes that decode a band of every frame each have the frames of one, and stay together whatever happens."""

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY
from torch import Tensor, distributed

from arl2.model import HybridWanModel
from pipelines.config import SpeedConfig
from pipelines.generation.blocks import PIXELS, NonFiniteBlockError
from pipelines.generation.lockstep import Lockstep
from pipelines.generation.pipeline import CausalVideoPipeline
from wan.vae.fast import FastDecodeStream
from wan.vae.wan_vae import TOY_VAE, DecodeStream, new_vae

CPU = torch.device("cpu")
HEADS = 6
FRAMES = 33
SIZE = (48, 32)
LOW = (16, 96)
"""Two rows of latents."""
Videos = dict[str, Tensor]
Work = Callable[[Lockstep, Path, torch.device], None]
"""What a process does with the others, leaving in a folder what came of it."""


def new_pipeline(device: torch.device, frames_per_block: int = 3) -> CausalVideoPipeline:
    """A pipeline, the same in all processes: in float64, on a GPU in float32."""
    torch.manual_seed(0)
    transformer = HybridWanModel(**TINY | {"dim": 12 * HEADS, "num_heads": HEADS, "in_dim": 16, "out_dim": 16})
    vae = new_vae(TOY_VAE | {"dim": 4})
    for model in (transformer, vae):
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.to(device, torch.float32 if device.type == "cuda" else torch.float64).eval().requires_grad_(False)
    return CausalVideoPipeline(transformer, vae, None, None, frames_per_block)


def generate(
    pipeline: CausalVideoPipeline,
    lockstep: Lockstep | None,
    size: tuple[int, int] = SIZE,
    blocks: int | None = None,
    frames: int = FRAMES,
    **options: Any,
) -> Tensor:
    """Pixels of two videos, and their bytes; of some blocks of it. Of a process that follows nothing."""
    embeds = torch.randn(2, 4, TINY["text_dim"], generator=torch.Generator().manual_seed(1))
    stream = pipeline.stream(None, frames, *size, prompt_embeds=embeds, seeds=[3, 4], lockstep=lockstep, **options)
    pixels = []
    for number, block in enumerate(stream, 1):
        shown = block.frames_BTHWC.wait().permute(0, 1, 4, 2, 3)
        assert ((block.pixels_BTCHW.cpu() + 1) * 127.5 - shown).abs().max() <= 0.5001
        pixels.append(block.pixels_BTCHW.cpu())
        if number == blocks:
            break
    return torch.cat(pixels, dim=1) if pixels else torch.zeros(0)


def failure(pipeline: CausalVideoPipeline, lockstep: Lockstep | None) -> str:
    """What of a video is not finite; nothing for a process that follows."""
    try:
        generate(pipeline, lockstep)
    except NonFiniteBlockError as error:
        return error.what
    return ""


def all_videos(lockstep: Lockstep | None, device: torch.device = CPU) -> Videos:
    """Videos of every kind, one after the other, as they come after one another in a run."""
    torch.backends.cudnn.allow_tf32 = False  # as in the processes
    speed = SpeedConfig(compile=False)
    videos, pipeline, by_frame = {}, new_pipeline(device), new_pipeline(device, 1)
    image = torch.rand(1, 5, 3, *SIZE, generator=torch.Generator().manual_seed(2)) * 2 - 1
    for each in (pipeline, by_frame):
        if lockstep is not None:
            each.parallelize()
        each.optimize_for_inference(speed)
        assert each.overlaps_decoding is (device.type == "cuda")
    videos["whole"] = generate(pipeline, lockstep)
    videos["from given frames"] = generate(by_frame, lockstep, frames=17, image=image)
    videos["broken off after a block"] = generate(pipeline, lockstep, blocks=1)
    videos["broken off after two"] = generate(pipeline, lockstep, blocks=2)
    videos["after that"] = generate(pipeline, lockstep)
    videos["of few rows"] = generate(pipeline, lockstep, LOW)
    pipeline.optimize_for_inference(replace(speed, fast_vae=False))
    videos["plain decoder"] = generate(pipeline, lockstep)
    return videos


def compute(rank: int, size: int, folder: Path, work: Work, gpu: bool) -> None:
    """What a process of several does."""
    torch.set_num_threads(1)
    store, device = distributed.FileStore(str(folder / "store"), size), CPU
    if gpu:
        torch.backends.cudnn.allow_tf32 = False
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    backend, timeout = "nccl" if gpu else "gloo", timedelta(seconds=60)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    work(Lockstep(device), folder, device)
    distributed.destroy_process_group()


def together(size: int, folder: Path, work: Work, *, gpu: bool = False) -> None:
    """Let some processes work together, each on a GPU of its own if asked to."""
    context: SpawnContext | ForkServerContext = multiprocessing.get_context("spawn")
    if not gpu:  # a process that was forked cannot use a GPU if the one before it has
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pipelines.training.run"])
    processes = [context.Process(target=compute, args=(rank, size, folder, work, gpu)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0


def make_all(lockstep: Lockstep, folder: Path, device: torch.device) -> None:
    """Make all videos, with a look at who decodes what."""
    heights: dict[type, set[int]] = {FastDecodeStream: set(), DecodeStream: set()}
    for kind in heights:
        kind._pixels = watched(kind._pixels, heights[kind])  # type: ignore[attr-defined]
    torch.save(all_videos(lockstep, device), folder / f"{lockstep.rank}.pt")
    torch.save([heights[FastDecodeStream], heights[DecodeStream]], folder / f"heights-{lockstep.rank}.pt")


def watched(pixels: Callable[..., Tensor], heights: set[int]) -> Callable[..., Tensor]:
    """A stream's method that notes how many rows it decodes."""

    def watching(*arguments: Any) -> Tensor:
        decoded = pixels(*arguments)
        heights.add(decoded.shape[3])
        return decoded

    return watching


@pytest.fixture(scope="module")
def alone() -> Videos:
    torch.set_num_threads(1)  # as started processes have it: on a busy machine threads wait for one another
    return all_videos(None)


@pytest.mark.parametrize("size", [2, 3])
def test_videos_are_those_of_one_process(size: int, alone: Videos, tmp_path: Path) -> None:
    together(size, tmp_path, make_all)
    first, *others = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    assert first.keys() == alone.keys()
    for kind, video in alone.items():
        assert first[kind].shape == video.shape
        assert (first[kind] - video).abs().max() < 1e-8, kind
        assert all(not each[kind].numel() for each in others), "only the leading process hands out frames"
    for rank in range(size):
        fast, plain = torch.load(tmp_path / f"heights-{rank}.pt")
        assert fast == {SIZE[0] // size, LOW[0] // 2}
        assert plain == ({SIZE[0]} if rank == 0 else set())


def break_bands(lockstep: Lockstep, folder: Path, device: torch.device) -> None:
    """Let the band of one process after the other be not finite, and make a whole video after each."""
    pipeline = new_pipeline(device)
    pipeline.parallelize()
    pipeline.optimize_for_inference(SpeedConfig(compile=False))
    bias = pipeline.vae.decoder.conv_out.bias
    for rank in range(lockstep.size):
        for value in (torch.nan, torch.inf):
            kept = bias.clone()
            if lockstep.rank == rank:
                bias.fill_(value)  # infinity would be white or black when clamped
            assert failure(pipeline, lockstep) == (PIXELS if lockstep.leads else "")
            bias.copy_(kept)
    torch.save({"whole": generate(pipeline, lockstep)}, folder / f"{lockstep.rank}.pt")


def test_what_is_not_finite_in_any_band_ends_the_video_and_no_other(alone: Videos, tmp_path: Path) -> None:
    together(3, tmp_path, break_bands)
    assert (torch.load(tmp_path / "0.pt")["whole"] - alone["whole"]).abs().max() < 1e-8


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_make_the_videos_of_one(tmp_path: Path) -> None:
    """Decoding beside the next block's denoising, with exchanges of both at one time."""
    wanted = all_videos(None, torch.device("cuda", 0))
    together(2, tmp_path, make_all, gpu=True)
    found = torch.load(tmp_path / "0.pt")
    for kind, video in wanted.items():
        assert (found[kind] - video).abs().max() < 1e-3, kind


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_band_of_a_gpu_that_is_not_finite_ends_the_video_and_no_other(tmp_path: Path) -> None:
    together(2, tmp_path, break_bands, gpu=True)
    whole = all_videos(None, torch.device("cuda", 0))["whole"]
    assert (torch.load(tmp_path / "0.pt")["whole"] - whole).abs().max() < 1e-3
