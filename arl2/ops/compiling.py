"""Settings of torch.compile."""

from collections.abc import Callable
from typing import Any

import torch

from wan.model import CausalWanModel

MAX_VARIANTS = 256
"""Upper bound on compilations of one function in a process.

There is one per size, dtype, device and gradient mode, and one per layer where stage 1 observes them. Beyond the bound
torch silently runs uncompiled code; its own bound is 8.
"""

FOR_GRADIENTS = {"triton.mix_order_reduction": False}
"""Options of torch.compile for functions with gradients.

With mixed-order reductions, on by default since torch 2.10, gradients of modulated norms were silently wrong
(https://github.com/pytorch/pytorch/issues/193061). For hybrid models in bfloat16 that is not enough
(docs/results/distillation.md).
"""


def compile_blocks(model: CausalWanModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the blocks of a model in place, for training: fuses their many small operations.

    One compilation serves all blocks, except that each block observed by stage 1 has its own.

    Args:
        model: its blocks are compiled in place.
        backend: backend of torch.compile; options are set for "inductor" only.
    """
    allow_variants()
    # Global, and needed: otherwise code compiled before stage 1 adds its hooks would be reused, and skip them.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    options = FOR_GRADIENTS if backend == "inductor" else None
    for block in model.layers():
        block.compile(dynamic=False, backend=backend, options=options)


def allow_variants() -> None:
    """Raise torch's limit on compilations of one function to `MAX_VARIANTS`; global to the process."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)
