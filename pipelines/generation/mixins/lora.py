"""LoRAs on a pipeline, under the names that diffusers' pipelines have for it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
from torch import Tensor

from arl2.adapters import AdapterStack, Weighted, base_parameters, fuse
from arl2.model import HybridSettings, HybridWanModel
from pipelines.config import SpeedConfig
from pipelines.generation.inputs.hub import HubOptions, lora_folder
from pipelines.provenance import part_fingerprint
from wan.checkpoints.lora import MAX_SCALE, lora_of, read_lora
from wan.utils.errors import InputError
from wan.utils.ranges import Bounds, typed

Weight = Annotated[float, Bounds(-MAX_SCALE, MAX_SCALE)]


TRANSFORMER = "transformer"


class LoRAPipelineMixin:
    """Adds LoRAs to a pipeline's transformer, as diffusers' loaders do.

    The weights themselves are changed, at once and in place, so that generating costs nothing more. Their original
    values wait on the CPU, and come back exactly. A fast form of the transformer is made anew by every call that
    changes weights: its next pass may compile again. What `save_pretrained` writes is the model as it is, adapted.

    Attributes:
        base_fingerprint: of the transformer before `merge_loras` or at `note_base`; None without. Sums of products have
            other last bits on other devices, so that a record of what made a video holds this and the LoRAs' hashes.
        base_hybrid: settings of its hybrid layers at `note_base`; None without.
    """

    transformer: HybridWanModel
    base_fingerprint: str | None = None
    base_hybrid: HybridSettings | None = None
    _adapters: AdapterStack | None = None
    _before_fusing: dict[str, float] | None = None
    _before_disabling: Mapping[str, float] = MappingProxyType({})
    _speed: SpeedConfig | None = None

    def optimize_for_inference(self, speed: SpeedConfig | None = None) -> None:
        """See `SpeedMixin`."""
        raise NotImplementedError

    def undo_fast_form(self) -> None:
        """See `SpeedMixin`."""
        raise NotImplementedError

    def note_base(self) -> None:
        """Note what the transformer is now, for records of what is made with it.

        A fast form merges adapters into weights, and may keep a part of the weights alone: it says neither afterwards.
        """
        self.base_fingerprint = self.base_fingerprint or part_fingerprint(self.transformer)
        self.base_hybrid = self.transformer.hybrid

    def merge_loras(self, loras: Sequence[Weighted]) -> None:
        """Make LoRAs a part of the transformer, without a way back: nothing is kept of the weights before.

        Args:
            loras: from `arl2.adapters.read_loras`, none for nothing to do.

        Raises:
            CheckpointError: a sum leaves the range of its type. Then the transformer is of no use.
        """
        if loras:
            self.base_fingerprint = part_fingerprint(self.transformer)
            fuse(base_parameters(self.transformer), loras)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Put a LoRA on the transformer, with weight 1, beside those that are on it.

        Args:
            pretrained_model_name_or_path_or_dict: a file or folder, see `wan.checkpoints.lora`; the name of a
                repository ("owner/name"), whose file comes through huggingface_hub's cache; or names to tensors.
            adapter_name: "default_0" and so on by default.
            weight_name: of the file, in a folder or repository; by default the one named as peft or diffusers do.
            revision, cache_dir, token, local_files_only: of the hub's files, as in huggingface_hub.

        Raises:
            CheckpointError: no LoRA, damaged, or not for this model; the model is as before.
            InputError: the name is taken, LoRAs are fused, or the weights are quantised or not there.
        """
        self._require_not_fused()
        self._require_plain_weights()
        given = pretrained_model_name_or_path_or_dict
        if not isinstance(given, str | Path | Mapping):
            raise InputError(f"a LoRA is a {type(given).__name__}: give a file, a folder, or names to tensors")
        if adapter_name is not None and (not isinstance(adapter_name, str) or not adapter_name):
            raise InputError(f"adapter_name {adapter_name!r} is no name: give text, or leave it out")
        if weight_name is not None and isinstance(given, Mapping):
            raise InputError("weight_name goes with a folder, not with tensors: leave it out")
        if not isinstance(given, Mapping):
            options = HubOptions(revision, cache_dir, token, local_files_only)
            given = lora_folder(given, weight_name, options) / (weight_name or "")
        shapes = {name: parameter.shape for name, parameter in base_parameters(self.transformer).items()}
        lora = lora_of(given, shapes, "the LoRA") if isinstance(given, Mapping) else read_lora(Path(given), shapes)
        with self._plain_form():
            stack = self._adapters = self._adapters or AdapterStack(self.transformer)
            numbers = (number for number in count(len(stack.weights)) if f"default_{number}" not in stack.weights)
            name = f"default_{next(numbers)}" if adapter_name is None else adapter_name
            stack.add(name, lora)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Switch LoRAs on, with weights; those that are not named are switched off.

        Args:
            adapter_names: one or several.
            adapter_weights: one for all or one each; 1 by default, and for None.

        Raises:
            InputError: no such LoRA, one named twice, another number of weights, or LoRAs are fused.
            CheckpointError: a weight leaves the range of its type; the model is as before.
        """
        self._require_not_fused()
        names = _names(adapter_names)
        weights = _weights(adapter_weights, names)
        with self._plain_form():
            self._stack().set_weights(dict(zip(names, weights, strict=True)))
        self._before_disabling = {}

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget some LoRAs; the others stay as they are.

        Args:
            adapter_names: one or several.

        Raises:
            InputError: no such LoRA, one named twice, or LoRAs are fused. Then none is forgotten.
        """
        self._require_not_fused()
        names = _names(adapter_names)
        with self._plain_form():
            self._stack().remove(names)

    def disable_lora(self) -> None:
        """Switch all LoRAs off until `enable_lora`, or until `set_adapters` gives them weights.

        Raises:
            InputError: none is loaded, or they are fused.
        """
        self._require_not_fused()
        weights = {name: weight for name, weight in self._stack().weights.items() if weight}
        if weights:
            with self._plain_form():
                self._stack().set_weights({})
            self._before_disabling = weights

    def enable_lora(self) -> None:
        """Give LoRAs the weights that `disable_lora` took from them; those that have got others since keep them.

        Raises:
            InputError: none is loaded, or they are fused.
            CheckpointError: a weight leaves the range of its type; the model is as before.
        """
        self._require_not_fused()
        now = self._stack().weights
        weights = {name: weight or self._before_disabling.get(name, 0.0) for name, weight in now.items()}
        with self._plain_form():
            self._stack().set_weights(weights)
        self._before_disabling = {}

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all LoRAs that are loaded, by the part that they are on; empty without any."""
        names = [] if self._adapters is None else list(self._adapters.weights)
        return {TRANSFORMER: names} if names else {}

    def get_active_adapters(self) -> list[str]:
        """Names of the LoRAs that are switched on."""
        weights = {} if self._adapters is None else self._adapters.weights
        return [name for name, weight in weights.items() if weight]

    def fuse_lora(
        self,
        components: Sequence[str] = (TRANSFORMER,),
        lora_scale: float = 1.0,
        adapter_names: str | Sequence[str] | None = None,
    ) -> None:
        """Make the LoRAs a part of the model: `unload_lora_weights` then forgets them and keeps what they changed.

        Args:
            components: parts whose LoRAs are fused: the transformer, which alone has any.
            lora_scale: multiplies their weights; not 0.
            adapter_names: those to fuse, the others are switched off; by default all that are switched on.

        Raises:
            InputError: no such LoRA, none to fuse, a scale out of range, or they are fused already.
            CheckpointError: a weight leaves the range of its type; the model is as before.
        """
        self._require_not_fused()
        before = self._stack().weights
        if list(components) != [TRANSFORMER]:
            raise InputError(f"components {components!r} hold no LoRA: give ['{TRANSFORMER}'], or leave it out")
        names = self.get_active_adapters() if adapter_names is None else _names(adapter_names)
        scale = float(typed(Weight, lora_scale, "lora_scale"))
        if not names or not scale:
            why = "no adapter is switched on" if not names else "lora_scale is 0"
            raise InputError(f"there is nothing to fuse: {why}; unload_lora_weights takes adapters off")
        wanted = {name: float(typed(Weight, scale * (before.get(name) or 1.0), f"{name}: weight")) for name in names}
        if scale != 1 or adapter_names is not None:
            with self._plain_form():
                self._stack().set_weights(wanted)
        self._before_fusing = before

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`: LoRAs have their weights of before, and can be weighted anew or unloaded."""
        if self._before_fusing is not None:
            with self._plain_form():
                self._stack().set_weights(self._before_fusing)
            self._before_fusing = None

    def unload_lora_weights(self) -> None:
        """Forget all LoRAs. The transformer is exactly what it was before them; after `fuse_lora` it stays as it is."""
        if self._adapters is None:
            return
        if self._before_fusing is not None:
            self._adapters.forget()
        else:
            with self._plain_form():
                self._adapters.take_off()
        self._adapters = self._before_fusing = None
        self._before_disabling = {}

    def _stack(self) -> AdapterStack:
        if self._adapters is None or not self._adapters.weights:
            raise InputError("no adapter is loaded: call load_lora_weights first")
        return self._adapters

    def _require_plain_weights(self) -> None:
        """Make sure that the transformer's weights are there as numbers, to be added to.

        Raises:
            InputError: they are quantised, or brought layer by layer.
        """
        # Diffusers notes it on models that one of its quantisers has changed.
        if getattr(self.transformer, "hf_quantizer", None) is not None:
            raise InputError(
                "a LoRA cannot be added to quantised weights: add it first, save_pretrained, and quantise that folder"
            )
        if any(value.is_meta for value in self.transformer.parameters()):
            raise InputError(
                "a LoRA cannot be added while enable_sequential_cpu_offload keeps the weights away: load it before, or "
                "call remove_all_hooks first"
            )

    def _require_not_fused(self) -> None:
        if self._before_fusing is not None:
            raise InputError("the adapters are fused: call unfuse_lora, or unload_lora_weights to keep them for good")

    @contextmanager
    def _plain_form(self) -> Iterator[None]:
        """Weights may be changed inside the context: the fast form, which read them, is made anew at its end."""
        speed = self._speed
        if speed is not None:
            self.undo_fast_form()
        try:
            yield
        finally:
            if speed is not None:
                self.optimize_for_inference(speed)


def _names(given: str | Sequence[str]) -> list[str]:
    """Names of adapters, each once.

    Raises:
        InputError: something else.
    """
    names = [given] if isinstance(given, str) else list(given) if isinstance(given, Collection) else [given]
    other = [type(name).__name__ for name in names if not isinstance(name, str)]
    if other:
        raise InputError(f"names of adapters are or hold a {other[0]}: give text, or a list of texts")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"adapter {twice!r} is named twice: give it one weight")
    return names


def _weights(given: Any, names: Sequence[str]) -> list[float]:
    """The weight of every adapter: one for all, or one each, 1 for None.

    Raises:
        InputError: another number of them, or one that is no number in range.
    """
    if isinstance(given, Mapping):
        raise InputError("weights of single parts or blocks are not supported: give one number per adapter")
    is_list = isinstance(given, Collection) and not isinstance(given, str | Tensor | np.ndarray)
    weights = list(given) if is_list else [given] * len(names)
    if len(weights) != len(names):
        raise InputError(f"{len(weights)} weights for {len(names)} adapters: give one each, or one for all")
    return [
        1.0 if weight is None else float(typed(Weight, weight, f"the weight of adapter {name!r},"))
        for name, weight in zip(names, weights, strict=True)
    ]
