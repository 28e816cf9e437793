"""Where the time of generating a video goes, by kernel and by what the kernels do."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS: Mapping[str, tuple[str, ...]] = {
    "attention": ("fmha", "flash", "sdpa", "scaled_dot_product"),
    "writes to states": ("chunk_", "recompute_w_u", "solve_tril", "merge_16x16", "cumsum"),
    "kernels of our own": (
        "norm_kernel",
        "norm_heads_kernel",
        "state_kernel",
        "quantize_kernel",
        "norm_silu_kernel",
    ),
    "convolutions": ("conv", "fprop", "implicit"),
    "products": ("gemm", "nvjet", "cutlass", "aten::mm", "aten::addmm", "aten::bmm"),
    "compiled": ("triton_",),
    "copies": ("memcpy", "memset", "copy"),
}
"""Parts of kernels' names, in lower case, by kind; the first that fits counts."""
OTHER = "others"


def kind_of(name: str) -> str:
    """What a kernel does, told by its name."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), OTHER)


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
