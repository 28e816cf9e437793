"""LoRAs of published and self-trained models, folded into the weights of a hybrid or softmax model.

A LoRA changes parameters of the softmax model. Hybrid layers keep those under the same names: their q, k, v and o serve
both the softmax inside the block and the memory, so a LoRA changes both. Parameters that only hybrid layers have, their
own adapters included, are never changed; the initial values of a conversion do not depend on the softmax weights, so it
makes no difference whether a LoRA comes before or after it.

Sums are computed in float32 at least and rounded once, to the type of the parameter: what a model loaded in bfloat16
holds is the bfloat16 of its weights in that type plus all changes.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from arl2.model import HybridWanModel
from wan.checkpoints.identify import is_hybrid_part
from wan.checkpoints.lora import LoRA, LoRASource, read_lora, require_distinct
from wan.checkpoints.tensors import describe_dtype, summarize_names
from wan.utils.errors import CheckpointError, InputError

log = logging.getLogger(__name__)

Value = TypeVar("Value", bound=Tensor)
Weighted = tuple[LoRA, float]
"""A LoRA and what its changes are multiplied by."""


def base_tensors(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Those of a model's tensors, or of a checkpoint's, that the softmax model has too, by its names."""
    return {name.replace(".linear.", "."): value for name, value in tensors.items() if not is_hybrid_part(name)}


def base_parameters(model: HybridWanModel) -> dict[str, nn.Parameter]:
    """The parameters that a LoRA may change, by the softmax model's names."""
    return base_tensors(dict(model.named_parameters()))


def read_loras(tensors: Mapping[str, Tensor], sources: Sequence[LoRASource]) -> list[Weighted]:
    """Read LoRA files for a model.

    Args:
        tensors: of the model or of its checkpoint; their values do not matter.

    Raises:
        CheckpointError: see `wan.checkpoints.lora.read_lora`.
        InputError: one is given twice.
    """
    require_distinct(sources)
    shapes = {name: value.shape for name, value in base_tensors(tensors).items()}
    loras = [(read_lora(source.path, shapes), source.scale) for source in sources]
    for lora, scale in loras:
        log.info("%s: changes of %d weights, times %g", lora.source, len(lora.names()), scale)
    return loras


@torch.no_grad()
def fuse(
    parameters: Mapping[str, Tensor],
    loras: Sequence[Weighted],
    names: Iterable[str] | None = None,
    originals: Mapping[str, Tensor] | None = None,
) -> None:
    """Set parameters to original + Σ weight · change, in place.

    Args:
        parameters: of the softmax model, by its names.
        loras: what to add; their changes fit.
        names: of the parameters to set; by default all that change.
        originals: values to add to, on any device; by default those that the parameters have.

    Raises:
        CheckpointError: a sum leaves the range of the type. Then some parameters are changed.
    """
    chosen = sorted(set[str]().union(*(lora.names() for lora, _ in loras)) if names is None else names)
    finite = []
    with _whole_products():
        for name in chosen:
            parameter = parameters[name]
            parameter.copy_(_changed(name, (originals or parameters)[name], parameter.device, loras))
            finite.append(parameter.isfinite().all())
    if not finite:
        return
    wrong = [name for name, ok in zip(chosen, torch.stack(finite).tolist(), strict=True) if not ok]
    if wrong:
        sources, dtype = ", ".join(lora.source for lora, _ in loras), describe_dtype(parameters[wrong[0]].dtype)
        raise CheckpointError(
            f"{sources}: with these changes {summarize_names(wrong)} leaves the range of {dtype}: give a smaller "
            "scale, or load the model in a wider type"
        )


@contextmanager
def _whole_products() -> Iterator[None]:
    """Compute products of float32 in float32 inside the context, whatever is allowed outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _changed(name: str, original: Tensor, device: torch.device, loras: Sequence[Weighted]) -> Tensor:
    """An original with all changes, on a device in float32 at least; itself if nothing changes."""
    mine = [(lora, weight) for lora, weight in loras if weight and name in lora.names()]
    if not mine:
        return original
    wide = torch.promote_types(original.dtype, torch.float32)
    total = original.to(device, wide, copy=True).contiguous()
    for lora, weight in mine:
        if name in lora.low_rank:
            down, up, scale = lora.low_rank[name]
            total.view(len(total), -1).addmm_(up.to(device, wide), down.to(device, wide), alpha=weight * scale)
        if name in lora.dense:
            total.add_(lora.dense[name].to(device, wide), alpha=weight)
    return total


class AdapterStack:
    """LoRAs on a model that can be weighted anew and taken off again, exactly.

    The original values of changed parameters are kept on the CPU. They are what the model had when the first LoRA that
    changes them was added: whoever changes weights otherwise must take the LoRAs off before.

    Args:
        model: whose weights are changed in place.
    """

    def __init__(self, model: HybridWanModel) -> None:
        self._model = model
        self._loras: dict[str, LoRA] = {}
        self._weights: dict[str, float] = {}
        self._originals: dict[str, Tensor] = {}

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every LoRA by its name; 0 for those that are switched off."""
        return dict(self._weights)

    def add(self, name: str, lora: LoRA, weight: float = 1.0) -> None:
        """Put a LoRA on the model.

        Raises:
            InputError: there is one of that name.
            CheckpointError: a sum leaves the range of the type; the model is as before.
        """
        if name in self._loras:
            raise InputError(f"there is an adapter {name!r} already: give another name, or unload it")
        parameters = base_parameters(self._model)
        for changed in lora.names() - self._originals.keys():
            self._originals[changed] = parameters[changed].detach().to("cpu", copy=True)
        self._loras[name] = lora
        try:
            self._set(self._weights | {name: weight}, lora.names())
        except CheckpointError:
            del self._loras[name]
            fuse(parameters, self._active(self._weights), lora.names(), self._originals)
            raise

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Weight the LoRAs anew; those that are not named are switched off.

        Raises:
            InputError: there is no LoRA of a name.
            CheckpointError: a sum leaves the range of the type; the model is as before.
        """
        unknown = weights.keys() - self._loras.keys()
        if unknown:
            known = summarize_names(self._loras) or "none"
            raise InputError(f"there is no adapter {min(unknown)!r}: those loaded are {known}")
        before, wanted = self._weights, dict.fromkeys(self._loras, 0.0) | dict(weights)
        moved = [self._loras[name].names() for name in wanted if wanted[name] != before[name]]
        names = set[str]().union(*moved)
        try:
            self._set(wanted, names)
        except CheckpointError:
            fuse(base_parameters(self._model), self._active(before), names, self._originals)
            raise

    def remove(self, names: Collection[str]) -> None:
        """Take some LoRAs off, and forget them; the others keep their weights.

        Raises:
            InputError: there is no LoRA of a name; the model is as before.
            CheckpointError: a sum of the others leaves the range of the type; the model is as before.
        """
        self.set_weights(
            {name: weight for name, weight in self._weights.items() if name not in names} | dict.fromkeys(names, 0.0)
        )
        for name in names:
            del self._loras[name], self._weights[name]

    def take_off(self) -> None:
        """Give all changed parameters their original values, and forget the LoRAs."""
        fuse(base_parameters(self._model), (), self._originals, self._originals)
        self.forget()

    def forget(self) -> None:
        """Forget LoRAs and original values: what is changed stays so."""
        self._loras, self._weights, self._originals = {}, {}, {}

    def _set(self, weights: Mapping[str, float], names: Iterable[str]) -> None:
        fuse(base_parameters(self._model), self._active(weights), names, self._originals)
        self._weights = dict(weights)

    def _active(self, weights: Mapping[str, float]) -> list[Weighted]:
        return [(self._loras[name], weight) for name, weight in weights.items() if weight]
