"""The kinds of memory that a softmax layer can have."""

from wan.averaged_sink import AveragedSinkMemory
from wan.memory import ConcatKVMemory, KVMemory, LayerMemory, MemorySpec


def new_kv_memory(spec: MemorySpec, num_heads: int, head_dim: int) -> LayerMemory:
    """New memory of a softmax layer: in place, or differentiable if the spec says so."""
    if spec.differentiable:
        return ConcatKVMemory(spec, num_heads, head_dim)
    kind = KVMemory if spec.sink_decay is None else AveragedSinkMemory
    return kind(spec, num_heads, head_dim)
