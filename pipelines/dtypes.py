"""Types of weights by name, for every entry point."""

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type called `name`, one of `DTYPES`; by default bfloat16 on a GPU and float32 elsewhere."""
    return DTYPES[name or ("bfloat16" if device.type == "cuda" else "float32")]
