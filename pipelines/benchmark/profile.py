"""Where the time of generating a video goes, by kernel and by what the kernels do."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS: Mapping[str, tuple[str, ...]] = {
    "compiled": ("triton_",),
    "attention": ("fmha", "flash", "sdpa", "scaled_dot_product"),
    "writes to states": ("chunk_", "gated_delta", "recompute_w_u", "solve_tril", "merge_16x16", "cumsum"),
    "convolutions": ("conv", "fprop", "implicit"),
    "products": ("gemm", "nvjet", "cutlass", "aten::mm", "aten::addmm", "aten::bmm"),
    "copies": ("memcpy", "memset", "copy"),
}
"""Parts of kernels' names, in lower case, by kind; the first that fits counts."""
OWN = (
    "_norm_kernel",
    "_norm_heads_kernel",
    "_state_kernel",
    "_quantize_kernel",
    "_round_kernel",
    "_rotate_kernel",
    "_add_norm_silu_kernel",
)
"""Whole names of the project's own."""


def kind_of(name: str) -> str:
    """What a kernel does, told by its name."""
    if name in OWN:
        return "kernels of our own"
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "others")


def profiled(run: Callable[[], None], device: torch.device) -> list[dict[str, Any]]:
    """Kernels that `run` started on a GPU, or operations on a CPU: name, kind, count and seconds; the longest first."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels = [
        {
            "name": event.key,
            "kind": kind_of(event.key),
            "count": event.count,
            "seconds": (event.self_device_time_total if on_gpu else event.self_cpu_time_total) * 1e-6,
        }
        for event in trace.key_averages()
        if event.device_type == wanted
    ]
    return sorted(kernels, key=lambda kernel: -kernel["seconds"])


def summary(kernels: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Count and seconds by kind, the longest first."""
    kinds: dict[str, dict[str, float]] = {}
    for kernel in kernels:
        kind = kinds.setdefault(kernel["kind"], {"count": 0, "seconds": 0.0})
        kind["count"] += kernel["count"]
        kind["seconds"] += kernel["seconds"]
    return dict(sorted(kinds.items(), key=lambda item: -item[1]["seconds"]))
