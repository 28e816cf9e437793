"""What torch.compile needs to be told in this project."""

import torch

from wan.model import CausalWanModel

MOST_VARIANTS = 64
"""Compilations of one function in a process, one for every size, type, device and way of computing gradients that it
meets; beyond them torch silently computes uncompiled, and its own limit is 8."""

FOR_GRADIENTS = {"triton.mix_order_reduction": False}
"""Options of torch.compile for what is back-propagated through. With such reductions, on by default since torch 2.10,
gradients of modulated norms were silently wrong (https://github.com/pytorch/pytorch/issues/193061). For hybrid models
in bfloat16 that is not enough (docs/results/distillation.md)."""


def compile_blocks(model: CausalWanModel) -> None:
    """Compile the blocks for training: their many small operations become few. They are alike, so it takes seconds."""
    allow_variants()
    for block in model.layers():
        block.compile(dynamic=False, options=FOR_GRADIENTS)


def allow_variants() -> None:
    """Let one function be compiled for many kinds of arguments."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
