"""Requirements on tensors of weights: dense, of a floating type that we compute with, and finite."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from wan.utils.errors import CheckpointError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types that weights may have in a file."""
MAX_NAME = 100
"""Characters of a parameter's name in a message."""
_BLOCK = re.compile(r"^(encoder\.)?blocks?\.\d+\.")
_HEAD_MODULATION = "head.modulation"
"""Outside the blocks, the counterpart of their modulation."""


def printable(name: object) -> str:
    """A name from a file, as a message may show it: one line, plain characters, not too long."""
    text = name if isinstance(name, str) and name.isprintable() else ascii(name)
    return text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}…"


def summarize_names(names: Iterable[str], most: int = 3) -> str:
    """A few names for a one-line message, with the count of the rest."""
    ordered = sorted(names)
    rest = len(ordered) - most
    return ", ".join(map(printable, ordered[:most])) + (f" and {rest} more" if rest > 0 else "")


def describe_dtype(dtype: torch.dtype) -> str:
    """A dtype's short name: "int8"."""
    return str(dtype).removeprefix("torch.")


def require_floating(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Make sure that all tensors are dense, on a device, and of one of `DTYPES`.

    Raises:
        CheckpointError: one is not; the message names it and what it is.
    """
    for name, value in state.items():
        if value.is_quantized or value.dtype not in DTYPES:
            what, cure = describe_dtype(value.dtype), "convert it to float32, float16 or bfloat16"
        elif value.is_nested:
            what, cure = "a nested tensor", "store every part as a dense tensor under a name of its own"
        elif value.layout is not torch.strided:
            what, cure = f"a {str(value.layout).removeprefix('torch.')} tensor", "store it dense"
        elif value.is_meta:
            what, cure = "a tensor without values (meta device)", "save the model where its weights are"
        else:
            continue
        raise CheckpointError(f"{source}: {printable(name)} is {what}, not a dense tensor of floats: {cure}")


def require_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Make sure that no tensor holds NaN or infinity; costs one pass over the weights.

    Raises:
        CheckpointError: one does; the message names it.
    """
    with torch.no_grad():
        # A sum that holds NaN or infinity is never finite; one of finite numbers may overflow, and is looked at again.
        sums = {name: value.sum().isfinite() for name, value in state.items() if value.numel()}
        finite = torch.stack([each.cpu() for each in sums.values()]).tolist() if sums else []
        for name in (name for name, is_finite in zip(sums, finite, strict=True) if not is_finite):
            wrong = int((~state[name].isfinite()).sum())
            if wrong:
                raise CheckpointError(
                    f"{source}: {printable(name)} has {wrong} of {state[name].numel()} values NaN or infinite: the "
                    "file is damaged or its training diverged; download it again or take an earlier checkpoint"
                )


def require_one_type_per_role(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Make sure that a parameter has the same type in all blocks, and that no bias is narrower than its weight.

    A tensor of another type than its counterparts was rounded, or comes from another model.

    Raises:
        CheckpointError: two types where one is expected, or no dense floats; the message names the odd tensor.
    """
    require_floating(state, source)
    roles: dict[str, list[str]] = {}
    for name in state:
        if _BLOCK.match(name) or name == _HEAD_MODULATION:
            roles.setdefault(_BLOCK.sub("", name).removeprefix("head."), []).append(name)
    narrow_blocks = any(_has_wide_bias(name, state) for name in state if _BLOCK.match(name))
    for names in roles.values():
        require_same_type(names, state, source)
    for name in (name for name in state if not _BLOCK.match(name) and name.endswith(".weight")):
        if not (narrow_blocks and _has_wide_bias(name, state)):
            require_same_type([name, *_bias(name, state)], state, source)


def require_same_type(names: list[str], state: Mapping[str, Tensor], source: str | Path) -> None:
    """Make sure that some tensors have one type.

    Raises:
        CheckpointError: they have several; the message names one of the rarer type and one of the other.
    """
    counts: dict[torch.dtype, int] = {}
    for name in names:
        counts[state[name].dtype] = counts.get(state[name].dtype, 0) + 1
    if len(counts) > 1:
        rare, usual = min(counts, key=lambda each: counts[each]), max(counts, key=lambda each: counts[each])
        odd, other = (next(name for name in names if state[name].dtype is dtype) for dtype in (rare, usual))
        if rare is usual:  # as many of each
            odd, rare = next((name, state[name].dtype) for name in names if state[name].dtype is not usual)
        raise CheckpointError(
            f"{source}: {printable(odd)} is {describe_dtype(rare)} where {printable(other)} is "
            f"{describe_dtype(usual)}: the file is damaged or put together from several; convert it again"
        )


def _bias(weight: str, state: Mapping[str, Tensor]) -> list[str]:
    name = weight.removesuffix("weight") + "bias"
    return [name] if name in state else []


def _has_wide_bias(name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a weight matrix has a bias of a wider type, as some converters leave it."""
    wide = [state[bias] for bias in _bias(name, state)] if name.endswith(".weight") and state[name].ndim > 1 else []
    return any(bias.dtype.itemsize > state[name].dtype.itemsize for bias in wide)


def own_storage(state: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The tensors contiguous, none sharing memory with another: what was shared is copied.

    Raises:
        CheckpointError: one is no dense tensor of floats.
    """
    require_floating(state, source)
    tensors = {name: value.detach().contiguous() for name, value in state.items()}
    ends: dict[torch.device, int] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        if begin < ends.get(tensor.device, 0) and begin < end:
            tensors[name] = tensor.clone()
        ends[tensor.device] = max(end, ends.get(tensor.device, 0))
    return tensors
