"""Choosing how ranks that compute one video together exchange tokens, and share weights."""

import socket
from enum import StrEnum

import torch
from torch import distributed

from arl2.inference.parallel.sequence_parallel import SequenceParallel, ShardedWeights, check_divides
from wan.utils.device import triton_installed
from wan.utils.errors import InputError

NO_PEERS = "these processes have no GPUs of one host that access each other's memory: leave exchange auto"
NO_SHARDING = (
    "shard_weights needs several GPUs of one host that compute one video together, with the peer exchange: leave "
    "it off, or start torchrun with --parallel video"
)


class Exchange(StrEnum):
    """How ranks exchange tokens for heads: the faster of what they can do, by collectives, or by stores into peers."""

    AUTO = "auto"
    COLLECTIVE = "collective"
    PEER = "peer"


def new_sequence_parallel(num_heads: int, device: torch.device, exchange: Exchange = Exchange.AUTO) -> SequenceParallel:
    """Exchanges over all ranks of the default group; all of them make the same call.

    Args:
        num_heads: heads of the model.
        device: this rank's.
        exchange: `PEER` needs GPUs of one host that can access each other's memory, and Triton.

    Raises:
        InputError: the heads do not divide over the ranks, or `PEER` is asked for and cannot be.
    """
    check_divides(num_heads, distributed.get_world_size(), distributed.get_world_size())
    is_reachable = exchange is not Exchange.COLLECTIVE and peers_are_reachable(device)
    if is_reachable:
        from arl2.inference.parallel.peer_exchange import PeerParallel  # needs Triton and a GPU

        assert distributed.group.WORLD is not None
        return PeerParallel(num_heads, distributed.group.WORLD)
    if exchange is Exchange.PEER:
        raise InputError(NO_PEERS)
    return SequenceParallel(num_heads)


def new_sharded_weights(parallel: SequenceParallel | None, device: torch.device) -> ShardedWeights:
    """Sharding of large weights over the ranks that compute a video together.

    Raises:
        InputError: there is one rank only, or ranks cannot read each other's memory.
    """
    if parallel is None or not parallel.can_be_recorded:
        raise InputError(NO_SHARDING)
    from arl2.inference.parallel.weight_sharding import ShardedWeights  # needs GPUs

    assert parallel.group is not None
    return ShardedWeights(device, parallel.group)


def peers_are_reachable(device: torch.device) -> bool:
    """Returns whether every rank of the default group has a GPU that can access the memory of all others'.

    All ranks make the same call.
    """
    if device.type != "cuda" or distributed.get_backend() != "nccl":
        return False
    places: list[tuple[str, int]] = [("", 0)] * distributed.get_world_size()
    distributed.all_gather_object(places, (socket.gethostname(), device.index))
    others = [index for _, index in places if index != device.index]
    mine = triton_installed() and len(set(places)) == len(places) and len({host for host, _ in places}) == 1
    mine = mine and all(torch.cuda.can_device_access_peer(device, other) for other in others)
    answers = [False] * len(places)
    distributed.all_gather_object(answers, mine)
    return all(answers)
