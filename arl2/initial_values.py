"""Initial values of a hybrid model's new parameters, without the memory and most of the time of building its layers."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wan.checkpoints.loading import StateDict

_CHUNK = 1 << 18
_UNIFORM = (Tensor.uniform_, nn.init.uniform_, nn.init.kaiming_uniform_)
_LIKE_ANOTHER = (Tensor.new_empty, Tensor.new_zeros)
_NORMAL = (torch.randn, Tensor.normal_, nn.init.normal_)


def initial_values(new_layer: Callable[[], nn.Module], names: Sequence[str], num_layers: int, seed: int) -> StateDict:
    """Initial values of parameters called `names`: for a seed the same whichever other layers are hybrid.

    Args:
        new_layer: makes a model of one layer, block 0, with everything that a layer can have new.
        names: of parameters in blocks, "blocks.<layer>.<name>".
        num_layers: layers of the model.
        seed: layer `l` draws from the generator of seed · num_layers + l.

    Returns:
        The values that `new_layer` gives to block 0 under the layer's seed, float32 on the CPU.
    """
    wanted: dict[int, list[str]] = {}
    for name in names:
        wanted.setdefault(int(name.split(".")[1]), []).append(name)

    with torch.device("meta"):
        block = new_layer().state_dict()
    largest = max((block[_in_block_0(name)].numel() for name in names), default=0)

    def values_of(layer: int) -> StateDict:
        with DrawsOfOneSeed(seed * num_layers + layer, largest):
            block = new_layer().state_dict()
        return {name: block[_in_block_0(name)] for name in wanted[layer]}

    values: StateDict = {}
    # Not PyTorch's number of threads, which torchrun sets to one.
    threads = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for part in pool.map(values_of, wanted):
            values |= part
    return values


def _in_block_0(name: str) -> str:
    return ".".join(["blocks", "0", *name.split(".")[2:]])


class DrawsOfOneSeed(TorchFunctionMode):
    """Modules made inside draw from a generator of their own; large parameters stay on the meta device.

    What a large parameter would have drawn is drawn and dropped, so that all others have the values that they
    would have on the CPU after `torch.manual_seed(seed)`. Threads may enter contexts of their own at the same time.

    Args:
        seed: of the generator.
        largest: most elements of a parameter that gets values.
    """

    def __init__(self, seed: int, largest: int) -> None:
        super().__init__()
        self._largest = largest
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _UNIFORM:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                self._skip(tensor.numel())
                return tensor
        if func in (*_UNIFORM, *_NORMAL):
            kwargs["generator"] = self._generator
        if func is torch.empty and _numel(args) > self._largest:
            kwargs["device"] = "meta"
        elif func in _LIKE_ANOTHER:  # adapters are made like the weight that they adapt
            kwargs["device"] = "meta" if _numel(args[1:]) > self._largest else "cpu"
        return func(*args, **kwargs)

    def _skip(self, numel: int) -> None:
        """Advance the generator by the draws of a large tensor, one per element."""
        scratch = torch.empty(_CHUNK)
        for first in range(0, numel, _CHUNK):
            scratch[: numel - first].uniform_(generator=self._generator)


def _numel(args: tuple[Any, ...]) -> int:
    """Elements of a tensor that `torch.empty` makes with these arguments."""
    shape = args[0] if len(args) == 1 and isinstance(args[0], tuple | torch.Size) else args
    return torch.Size(shape).numel()
