"""What torch.compile needs to be told in this project."""

from collections.abc import Callable
from typing import Any

import torch

from wan.model import CausalWanModel

MAX_VARIANTS = 256
"""Compilations of one function in a process, one for every size, type, device and way of computing gradients that it
meets, and one a layer where stage 1 observes them; beyond them torch silently computes uncompiled, and its own limit is
8."""

FOR_GRADIENTS = {"triton.mix_order_reduction": False}
"""Options of torch.compile for what is back-propagated through. With such reductions, on by default since torch 2.10,
gradients of modulated norms were silently wrong (https://github.com/pytorch/pytorch/issues/193061). For hybrid models
in bfloat16 that is not enough (docs/results/distillation.md)."""


def compile_blocks(model: CausalWanModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the blocks for training: their many small operations become few.

    They are alike, so that one compilation serves all; but each that stage 1 observes has its own.

    Args:
        model: in place.
        backend: of torch.compile; the options are those of its own.
    """
    allow_variants()
    # Else what was compiled before stage 1 observed its layers would serve then too, and nothing would be observed.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    options = FOR_GRADIENTS if backend == "inductor" else None
    for block in model.layers():
        block.compile(dynamic=False, backend=backend, options=options)


def allow_variants() -> None:
    """Let one function be compiled for many kinds of arguments."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)
