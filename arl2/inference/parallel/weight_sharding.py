"""Large weights sharded over the GPUs of one host: each keeps a part, and fetches a layer's rest before the layer runs.

While a layer computes, the copy engines bring the weights of the next one over NVLink, into one of two buffers that the
layers use in turn. What is computed does not change. Imported only where it runs: it needs GPUs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import _symmetric_memory as symmetric_memory

from arl2.inference.linear import Weight

ALIGNMENT = 256
"""Weights begin at multiples of so many bytes."""


@dataclass(frozen=True)
class _Place:
    """Where a weight lies in the bytes of its layer."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape) * self.dtype.itemsize

    def within(self, layer_bytes: Tensor) -> Tensor:
        return layer_bytes[self.start : self.stop].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class _Parameter:
    """A parameter of the model that was a view of a weight; on the meta device until the weight is whole again."""

    owner: nn.Module
    name: str
    original: nn.Parameter
    place: _Place
    offset: int
    shape: tuple[int, ...]

    def take_back(self, layer_bytes: Tensor) -> None:
        values = self.place.within(layer_bytes).flatten()[self.offset : self.offset + prod(self.shape)]
        self.original.data = values.view(self.shape).clone()
        self.owner.register_parameter(self.name, self.original)


@dataclass(frozen=True)
class _Layer:
    """A layer's weights and their places, this rank's shard, all ranks' shards, and parameters that were views."""

    weights: list[tuple[Weight, _Place]]
    shard: Tensor
    shards: list[Tensor]
    parameters: list[_Parameter]

    def fetch_into(self, layer_bytes: Tensor) -> None:
        """Copy all shards to a buffer, one after the other, without waiting."""
        for rank, shard in enumerate(self.shards):
            layer_bytes[rank * len(shard) :][: len(shard)].copy_(shard, non_blocking=True)


class ShardedWeights:
    """Weights of the layers of a model, sharded over ranks.

    Add the layers in order, then call `finish`; in every pass, call `before` for each layer in order. All ranks do the
    same.

    Args:
        device: this rank's GPU.
        group: ranks whose GPUs can access each other's memory.
    """

    def __init__(self, device: torch.device, group: distributed.ProcessGroup) -> None:
        self._device, self._group = device, group
        self._rank, self._size = distributed.get_rank(group), distributed.get_world_size(group)
        self._layers: list[_Layer | None] = []
        self._buffers: list[Tensor] = []
        self._stream = torch.cuda.Stream(device)
        self._fetched = [torch.cuda.Event() for _ in range(2)]

    @property
    def symmetric_bytes(self) -> int:
        """Bytes of this rank's shards, which PyTorch's allocator does not count."""
        return sum(len(layer.shard) for layer in self._layers if layer is not None)

    def keep(self) -> None:
        """Add a layer that every rank keeps whole."""
        self._layers.append(None)

    @torch.no_grad()
    def add(self, weights: Sequence[Weight], owner: nn.Module) -> None:
        """Add a layer whose weights are sharded.

        Args:
            weights: what to shard; usable again after `finish`.
            owner: module of the model whose parameters may be views of these weights. They are on the meta device until
                `release`: what uses them fails instead of reading a buffer.
        """
        places, stop = list[_Place](), 0
        for module, name in weights:
            tensor: Tensor = getattr(module, name)
            places.append(_Place(stop, tuple(tensor.shape), tensor.dtype))
            stop = _aligned(places[-1].stop)
        shard_bytes = _aligned(-(-stop // self._size))
        shard = symmetric_memory.empty(shard_bytes, dtype=torch.uint8, device=self._device)
        handle: Any = symmetric_memory.rendezvous(shard, self._group)
        whole = torch.zeros(shard_bytes * self._size, dtype=torch.uint8, device=self._device)
        parameters: list[_Parameter] = []
        for (module, name), place in zip(weights, places, strict=True):
            tensor = getattr(module, name)
            place.within(whole).copy_(tensor)
            parameters += _views_of(tensor, owner, place)
            _replace(module, name, torch.empty_like(tensor, device="meta"))
        for parameter in parameters:
            parameter.original.data = parameter.original.data.new_empty(0)
        shard.copy_(whole[self._rank * shard_bytes :][:shard_bytes])
        shards = [handle.get_buffer(rank, (shard_bytes,), torch.uint8) for rank in range(self._size)]
        self._layers.append(_Layer(list(zip(weights, places, strict=True)), shard, shards, parameters))
        torch.cuda.synchronize(self._device)
        handle.barrier(channel=0)  # from here on the others may read

    def finish(self) -> None:
        """Let the weights of all layers be views of the buffers that they are fetched into."""
        num_bytes = max((self._size * len(layer.shard) for layer in self._layers if layer is not None), default=0)
        self._buffers = [torch.empty(num_bytes, dtype=torch.uint8, device=self._device) for _ in range(2)]
        for index, layer in enumerate(self._layers):
            for (module, name), place in () if layer is None else layer.weights:
                _replace(module, name, place.within(self._buffers[index % 2]))

    def before(self, index: int) -> None:
        """Let the current stream have a layer's weights when it comes to it, and begin to fetch those of the next.

        Nothing waits for another rank: shards never change.
        """
        if self._layers[index] is not None:
            if index == 0:
                self._fetch(0)
            torch.cuda.current_stream(self._device).wait_event(self._fetched[index % 2])
        if index + 1 < len(self._layers) and self._layers[index + 1] is not None:
            self._fetch(index + 1)

    def _fetch(self, index: int) -> None:
        layer = self._layers[index]
        assert layer is not None
        # The layer before the last one, which used the same buffer, is behind the current stream.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            layer.fetch_into(self._buffers[index % 2])
            self._fetched[index % 2].record(self._stream)

    def release(self) -> None:
        """Give the model its parameters back, whole; all ranks call it, and this object must not be used afterwards."""
        for layer in self._layers:
            if layer is not None and layer.parameters:
                whole = torch.empty(len(layer.shard) * self._size, dtype=torch.uint8, device=self._device)
                layer.fetch_into(whole)
                for parameter in layer.parameters:
                    parameter.take_back(whole)
        torch.cuda.synchronize(self._device)
        distributed.barrier(self._group)  # until then others may read this rank's shards
        self._layers, self._buffers = [], []


def _aligned(num_bytes: int) -> int:
    return num_bytes + -num_bytes % ALIGNMENT


def _views_of(weight: Tensor, owner: nn.Module, place: _Place) -> list[_Parameter]:
    """Parameters below `owner` whose values lie in `weight`, which become parameters on the meta device."""
    found = []
    address = weight.untyped_storage().data_ptr()
    for module in owner.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta and parameter.untyped_storage().data_ptr() == address:
                offset = int(parameter.storage_offset() - weight.storage_offset())
                found.append(_Parameter(module, name, parameter, place, offset, tuple(parameter.shape)))
                absent = torch.empty_like(parameter, device="meta")
                module.register_parameter(name, nn.Parameter(absent, requires_grad=False))
    return found


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(module, name, tensor)
