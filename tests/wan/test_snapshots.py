"""Memories go on from a snapshot as if nothing had been in between."""

import pytest
import torch

from arl2.state_memory import StateMemory
from wan.averaged_sink import AveragedSinkMemory
from wan.memory import ConcatKVMemory, KVMemory, KVUpdate, LayerMemory, Memory, MemorySpec
from wan.snapshots import Snapshot
from wan.utils.errors import InputError

CPU = torch.device("cpu")
TOKENS = 4


def spec(window: int | None = None, sink: int = 0, decay: float | None = None, frames: int = 1) -> MemorySpec:
    return MemorySpec(2, TOKENS, CPU, torch.float64, frames, window, sink, sink_decay=decay)


KINDS = {
    "full": lambda: KVMemory(spec(), 2, 4),
    "window": lambda: KVMemory(spec(5, 2), 2, 4),
    "average": lambda: AveragedSinkMemory(spec(5, 2, 0.7), 2, 4),
    "concatenated": lambda: ConcatKVMemory(spec(5, 2), 2, 4),
}


def commit(memory: LayerMemory, frames: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, frames * TOKENS, 2, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    memory.commit(KVUpdate(keys, values))


def seen(memory: LayerMemory) -> list[torch.Tensor]:
    """What a block of zeros sees."""
    keys, values, _ = memory.read(TOKENS).with_block(*(torch.zeros(2, TOKENS, 2, 4, dtype=torch.float64),) * 2)
    return [keys.clone(), values.clone()]


@pytest.mark.parametrize("blocks", [0, 1, 3, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_memory_goes_on(kind: str, blocks: int) -> None:
    memory, other = KINDS[kind](), KINDS[kind]()
    commit(other, 1, 99)  # which is forgotten
    for block in range(blocks):
        commit(memory, 1, block)
    snapshot = memory.snapshot().clone()
    other.restore(snapshot)
    for block in range(blocks, blocks + 4):
        for mine, theirs in zip(seen(memory), seen(other), strict=True):
            assert torch.equal(mine, theirs)
        commit(memory, 1, block)
        commit(other, 1, block)


def test_what_does_not_fit_is_refused_before_the_buffer_grows() -> None:
    memory = KVMemory(spec(), 2, 4)
    commit(memory, 3, 0)
    held = memory.snapshot()
    target = KVMemory(spec(), 2, 4)
    before = target.num_bytes
    for tensors, counters, words in (
        (held.tensors, {"written": 10**15}, "must hold 1000000000000000 tokens"),
        (held.tensors, {"written": -1}, "written is -1"),
        (held.tensors, {}, "written is None"),
        ({}, held.counters, "keys is missing"),
        ({"keys": held.tensors["keys"]}, held.counters, "values is missing"),
        ({name: value.float() for name, value in held.tensors.items()}, held.counters, "it must be"),
        ({name: value[:, :, :1] for name, value in held.tensors.items()}, held.counters, "it must be"),
    ):
        with pytest.raises(InputError, match=words):
            target.restore(Snapshot(tensors, counters))
        if "written" in words or "hold" in words:
            assert target.num_bytes == before


def test_the_memory_of_a_model_names_the_layer() -> None:
    memory = Memory([KVMemory(spec(), 2, 4), StateMemory(spec(), (2, 2, 4, 4))])
    commit(memory.layers[0], 2, 0)
    memory.layers[1].commit(torch.randn(2, 2, 4, 4, dtype=torch.float64))
    snapshot = memory.snapshot().clone()
    other = Memory([KVMemory(spec(), 2, 4), StateMemory(spec(), (2, 2, 4, 4))])
    address = other.layers[1].read(1).state_BHKV.data_ptr()
    other.restore(snapshot)
    assert torch.equal(other.layers[1].read(1).state_BHKV, memory.layers[1].read(1).state_BHKV)
    assert other.layers[1].read(1).state_BHKV.data_ptr() == address, "recorded passes read it there"
    smaller = Memory([KVMemory(spec(), 2, 4), StateMemory(spec(), (2, 1, 4, 4))])
    with pytest.raises(InputError, match=r"the memory of layer 1 does not fit: state is \[2, 2, 4, 4\]"):
        smaller.restore(snapshot)
