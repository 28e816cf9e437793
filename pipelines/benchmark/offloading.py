"""Speed and GPU memory of generation with parts in host memory, and what that changes in the video."""

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from arl2.model import HybridSettings
from pipelines.config import Frames, MemoryConfig, MemoryKind, Pixels
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.random_model import random_pipeline
from pipelines.provenance import environment
from wan.config import WAN_SIZES
from wan.text import TOY_TEXT, UMT5_XXL
from wan.utils.errors import InputError
from wan.utils.files import write_json
from wan.utils.ranges import Bounds, Choices, Seed, check_ranges
from wan.vae.wan_vae import TOY_VAE, WAN21_VAE

log = logging.getLogger(__name__)

JSON_FILE = "offloading.json"
PROMPT = "a red shape rolls"


@dataclass(frozen=True)
class OffloadingBenchmark:
    """What is measured.

    Attributes:
        size: of the transformer, see `wan.config.WAN_SIZES`; real sizes have the real VAE and UMT5-XXL.
        num_hybrid_layers: how many of the first layers are hybrid.
        height, width: pixels of the video.
        latent_frames: of it.
        window_frames, sink_frames: memory of the softmax layers.
        seed: of weights and noise.
    """

    size: Annotated[str, Choices(tuple(WAN_SIZES))] = "1.3B"
    num_hybrid_layers: Annotated[int, Bounds(0, 1000)] = 22
    height: Pixels = 480
    width: Pixels = 832
    latent_frames: Frames = 21
    window_frames: Frames = 9
    sink_frames: Annotated[int, Bounds(0)] = 3
    seed: Seed = 0


def _on_device(pipeline: CausalVideoPipeline, device: torch.device) -> None:
    pipeline.to(device)


def _fast(pipeline: CausalVideoPipeline, device: torch.device) -> None:
    pipeline.to(device)
    pipeline.optimize_for_inference()


def _whole_parts(pipeline: CausalVideoPipeline, device: torch.device) -> None:
    pipeline.enable_model_cpu_offload(device=device)


def _layers(pipeline: CausalVideoPipeline, device: torch.device, exclude_modules: str | None = None) -> None:
    is_gpu = device.type == "cuda"
    pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=is_gpu, exclude_modules=exclude_modules)


ROWS: dict[str, Callable[[CausalVideoPipeline, torch.device], None]] = {
    "plain": _on_device,
    "fast": _fast,
    "model-offload": _whole_parts,
    "group-offload": _layers,
    "group-offload-text": partial(_layers, exclude_modules="transformer"),
}
"""How parts are placed, by row. `group-offload-text` keeps the transformer on the device; it computes plainly, too."""


def run_offloading_benchmark(
    benchmark: OffloadingBenchmark, rows: list[str], device: torch.device, dtype: torch.dtype, folder: Path
) -> dict[str, Any]:
    """Generate one video per row, after one to warm up, and compare its frames with those of `plain`.

    Args:
        rows: names of `ROWS`; `plain` comes first, and is added where it is missing.
        folder: `offloading.json` is written there after every row.

    Returns:
        settings, and by row: status, seconds, frames per second, first_frame_seconds, peak_bytes of the device, and
        mean and greatest difference of its frames from those of `plain`, in grey levels.

    Raises:
        InputError: an unknown row, or a value out of range.
    """
    check_ranges(benchmark)
    unknown = [name for name in rows if name not in ROWS]
    if unknown:
        raise InputError(f"no row {unknown[0]}: choose from {', '.join(ROWS)}")
    page: dict[str, Any] = {"settings": asdict(benchmark) | {"dtype": str(dtype)}, "rows": {}}
    page["environment"] = environment(device)
    expected: Tensor | None = None
    for name in ["plain", *(row for row in rows if row != "plain")]:
        page["rows"][name], frames = _measure(benchmark, name, device, dtype, expected)
        expected = frames if name == "plain" else expected
        write_json(folder / JSON_FILE, page)
        log.info("%s: %s", name, page["rows"][name])
    return page


def _new_pipeline(benchmark: OffloadingBenchmark, device: torch.device, dtype: torch.dtype) -> CausalVideoPipeline:
    """Random weights, drawn on the device part by part, in host memory."""
    is_toy = benchmark.size == "toy"
    pipeline = random_pipeline(
        benchmark.size,
        HybridSettings(tuple(range(benchmark.num_hybrid_layers))),
        vae_config=TOY_VAE if is_toy else WAN21_VAE,
        text_config=TOY_TEXT if is_toy else UMT5_XXL,
        seed=benchmark.seed,
        device=device,
        dtype=dtype,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cpu")
    return pipeline


def _measure(
    benchmark: OffloadingBenchmark, name: str, device: torch.device, dtype: torch.dtype, expected: Tensor | None
) -> tuple[dict[str, Any], Tensor | None]:
    """Figures of a row and its frames. Each has a pipeline of its own: not all that diffusers sets up can be undone."""
    try:
        return _measure_row(benchmark, name, device, dtype, expected)
    except torch.cuda.OutOfMemoryError:
        return {"status": "out of memory"}, None
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure_row(
    benchmark: OffloadingBenchmark, name: str, device: torch.device, dtype: torch.dtype, expected: Tensor | None
) -> tuple[dict[str, Any], Tensor]:
    pipeline = _new_pipeline(benchmark, device, dtype)
    ROWS[name](pipeline, device)
    _video(benchmark, pipeline)
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    frames, first, seconds = _video(benchmark, pipeline)
    found: dict[str, Any] = {"status": "ok", "seconds": seconds, "fps": len(frames) / seconds}
    found |= {"first_frame_seconds": first}
    found["peak_bytes"] = torch.cuda.max_memory_allocated(device) if is_gpu else None
    if expected is not None:
        difference = (frames.float() - expected.float()).abs()
        found |= {"mean_difference": float(difference.mean()), "greatest_difference": float(difference.max())}
    return found, frames


def _video(benchmark: OffloadingBenchmark, pipeline: CausalVideoPipeline) -> tuple[Tensor, float, float]:
    """Frames [T, H, W, 3] of bytes on the CPU, and seconds to the first of them and to the last."""
    memory = MemoryConfig(MemoryKind.window, benchmark.window_frames, benchmark.sink_frames)
    started, first, parts = time.perf_counter(), 0.0, []
    frames = 1 + 4 * (benchmark.latent_frames - 1)
    blocks = pipeline.stream(PROMPT, frames, benchmark.height, benchmark.width, seeds=[benchmark.seed], memory=memory)
    for block in blocks:
        parts.append(block.frames_BTHWC.wait()[0])
        first = first or time.perf_counter() - started
    return torch.cat(parts), first, time.perf_counter() - started
