"""Sharding of the frozen backbone over ranks by FSDP2, so that 14B fits; what is new stays whole on every rank."""

import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from arl2.checkpoint import HybridPlan, log_report, require_range
from arl2.model import HybridWanModel, keep_gates_in_float32
from arl2.state_memory import LocalWindow, StateView
from wan.checkpoints.loading import StateDict, checksum, digest_of
from wan.checkpoints.tensors import own_storage, require_finite
from wan.memory import ConcatView, KVUpdate
from wan.utils.errors import InputError
from wan.utils.ranks import raise_together

TENSOR_CLASSES = (StateView, LocalWindow, ConcatView, KVUpdate)
"""What blocks take and return beside tensors, and what gradients flow through."""


class ShardedLoading:
    """Loads a planned model over all ranks: a rank reads its shards of the backbone, and all that is new.

    First what is new is loaded, on construction; objectives may then replace modules. `shard` does the rest.

    Args:
        plan: from `arl2.checkpoint.plan_hybrid`.
        dtype: of the model; A_log and dt_bias stay float32.
        device: this rank's.

    Attributes:
        model: the plan's; its backbone is on the meta device until `shard`.
        report: what happened to the weights.
    """

    def __init__(self, plan: HybridPlan, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.report = plan.model, plan.report
        self._source, self._device = plan.source, device
        self._state = own_storage(plan.state, plan.source)
        plan.state.clear()  # what is loaded is not to be kept twice
        self._log_report = partial(log_report, plan, to_be_trained=True)
        keep_gates_in_float32(self.model, dtype)
        self._whole = set(self.model.hybrid_parameter_names())
        for name in self._whole:
            dtype_of_it = self.model.get_parameter(name).dtype
            put_parameter(self.model, name, self._loaded(name, self._state.pop(name), dtype_of_it))

    def shard(self) -> None:
        """Shard the backbone and load this rank's part of it. All ranks must call this.

        Raises:
            CheckpointError: values are not finite, here or on another rank.
        """
        shard_backbone(self.model)
        fill_shards(self.model, self._loaded_rows, self._device)
        self._state = {}
        self._log_report()

    def _loaded_rows(self, name: str, target: DTensor) -> Tensor:
        first = first_row(target)
        return self._loaded(name, self._state[name][first : first + target.to_local().shape[0]], target.dtype)

    def _loaded(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Values on the device in a dtype, checked."""
        there = value.to(self._device)
        require_finite({name: there}, self._source)
        cast = there.to(dtype)
        require_range(name, there, cast, self._source)
        return cast.clone() if cast.data_ptr() == value.data_ptr() else cast


def put_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a frozen parameter with values in the place of one on the meta device."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def shard_backbone(model: HybridWanModel) -> None:
    """Shard in place all parameters that the softmax model has too; the others must be on the device already.

    Modules that are called outside a block's forward are units of their own: stage 1 calls the self-attention of a
    layer, and all cross-attentions embed the text before the first block.
    """
    show_tensors()
    # FSDP2 warns of in-place operations on a unit's output; the model has none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    whole = {model.get_parameter(name) for name in model.hybrid_parameter_names()}
    for block in model.layers():
        fully_shard(block.self_attn, ignored_params=whole)
        fully_shard(block.cross_attn, ignored_params=whole)
        register_fsdp_forward_method(block.cross_attn, "keys_values")
        fully_shard(block, ignored_params=whole)
    fully_shard(model, ignored_params=whole)
    for name in ("embed_text", "embed"):
        register_fsdp_forward_method(model, name)


def fill_shards(model: nn.Module, rows_of: Callable[[str, DTensor], Tensor], device: torch.device) -> None:
    """Give values to the sharded parameters of a model on the meta device. All ranks must call this.

    Args:
        rows_of: this rank's rows of a parameter, on the device, from its name and the parameter without values.
        device: this rank's.

    Raises:
        InputError: `rows_of` raised one, here or on another rank.
    """
    filled: dict[str, Tensor] = {}
    error: InputError | None = None
    try:
        for name, target in model.state_dict().items():
            filled[name] = model.get_parameter(name)
            if isinstance(target, DTensor):
                rows, layout = rows_of(name, target), (target.device_mesh, target.placements)
                shape = target.shape
                sharded = DTensor.from_local(rows, *layout, run_check=False, shape=shape, stride=target.stride())
                filled[name] = nn.Parameter(sharded, requires_grad=False)
    except InputError as failure:
        error = failure
    raise_together(error, device)
    model.load_state_dict(filled, assign=True)


@cache
def show_tensors() -> None:
    """Let FSDP2 see the tensors in `TENSOR_CLASSES`.

    It gathers a unit's weights for the backward pass by hooks on the tensors that it finds in the unit's inputs and
    outputs. It did not find those in our classes: where a gradient came through the keys and values of a clean pass
    alone, the weights were gone ("setStorage: … out of bounds for storage of size 0", on CUDA).
    """
    for kind in TENSOR_CLASSES:
        torch.export.register_dataclass(kind)


def first_row(value: DTensor) -> int:
    """Index of this rank's first row in a tensor that FSDP2 sharded; the number of rows where it has none."""
    per_rank = -(-value.shape[0] // value.device_mesh.size())
    return min(value.device_mesh.get_local_rank() * per_rank, value.shape[0])


def sharded_fingerprint(state: Mapping[str, Tensor], device: torch.device) -> str:
    """`wan.checkpoints.loading.fingerprint_of` of weights that are sharded in part. All ranks must call this.

    Every rank sums over what it holds; nothing is gathered.
    """
    zero = torch.zeros((), dtype=torch.int64, device=device)
    sums = []
    for value in state.values():
        if isinstance(value, DTensor):
            row_bytes = value.numel() // value.shape[0] * value.element_size()
            sums.append(checksum(value.to_local(), first_row(value) * row_bytes))
        else:  # the same on all ranks
            sums.append(checksum(value).to(device) if distributed.get_rank() == 0 else zero)
    totals = torch.stack(sums)
    distributed.all_reduce(totals)
    return digest_of(state, totals.tolist())


def gathered_state(model: nn.Module, keep: bool) -> StateDict:
    """Gather all weights on the CPU; every rank must call this, and only ranks with `keep` receive them."""
    state: StateDict = {}
    for name, value in model.state_dict().items():
        whole: torch.Tensor = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            state[name] = whole.detach().cpu().contiguous()
    return state
