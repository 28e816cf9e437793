"""LoRAs on a pipeline, under the names that diffusers' pipelines have for it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from arl2.adapters import AdapterStack, Weighted, base_parameters, fuse
from arl2.model import HybridWanModel
from pipelines.config import SpeedConfig
from pipelines.provenance import part_fingerprint
from wan.checkpoints.lora import MAX_SCALE, lora_of, read_lora
from wan.utils.errors import InputError


class LoRAPipelineMixin:
    """Adds LoRAs to a pipeline's transformer, as diffusers' loaders do.

    The weights themselves are changed, at once and in place, so that generating costs nothing more. Their original
    values wait on the CPU, and come back exactly. A fast form of the transformer is made anew by every call that
    changes weights: its next pass may compile again. What `save_pretrained` writes is the model as it is, adapted.

    Attributes:
        base_fingerprint: of the transformer before `merge_loras`; None without. Sums of products have other last bits
            on other devices, so that a record of what made a video holds this and the LoRAs' hashes.
    """

    transformer: HybridWanModel
    base_fingerprint: str | None = None
    _adapters: AdapterStack | None = None
    _before_fusing: dict[str, float] | None = None
    _speed: SpeedConfig | None = None

    def optimize_for_inference(self, speed: SpeedConfig | None = None) -> None:
        """See `SpeedMixin`."""
        raise NotImplementedError

    def undo_fast_form(self) -> None:
        """See `SpeedMixin`."""
        raise NotImplementedError

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
    ) -> None:
        """Put a LoRA on the transformer, with weight 1, beside those that are on it.

        Args:
            pretrained_model_name_or_path_or_dict: a file or folder, see `wan.checkpoints.lora`, or names to tensors;
                never asks a hub.
            adapter_name: "default_0" and so on by default.

        Raises:
            CheckpointError: no LoRA, damaged, or not for this model; the model is as before.
            InputError: the name is taken, or LoRAs are fused.
        """
        self._require_not_fused()
        given = pretrained_model_name_or_path_or_dict
        shapes = {name: parameter.shape for name, parameter in base_parameters(self.transformer).items()}
        lora = lora_of(given, shapes, "the LoRA") if isinstance(given, Mapping) else read_lora(Path(given), shapes)
        with self._plain_form():
            stack = self._adapters = self._adapters or AdapterStack(self.transformer)
            stack.add(f"default_{len(stack.weights)}" if adapter_name is None else adapter_name, lora)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Switch LoRAs on, with weights; those that are not named are switched off.

        Args:
            adapter_names: one or several.
            adapter_weights: one for all or one each; 1 by default.

        Raises:
            InputError: no such LoRA, another number of weights, or LoRAs are fused.
            CheckpointError: a weight leaves the range of its type; the model is as before.
        """
        self._require_not_fused()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = 1.0 if adapter_weights is None else adapter_weights
        weights = [float(given)] * len(names) if isinstance(given, int | float) else list(given)
        if len(weights) != len(names):
            raise InputError(f"{len(weights)} weights for {len(names)} adapters: give one each, or one for all")
        for name, weight in zip(names, weights, strict=True):
            if not abs(weight) <= MAX_SCALE:
                raise InputError(f"the weight {weight:g} of adapter {name!r} is out of range: give up to {MAX_SCALE:g}")
        with self._plain_form():
            self._stack().set_weights(dict(zip(names, weights, strict=True)))

    def get_active_adapters(self) -> list[str]:
        """Names of the LoRAs that are switched on."""
        weights = {} if self._adapters is None else self._adapters.weights
        return [name for name, weight in weights.items() if weight]

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """Make the LoRAs a part of the model: `unload_lora_weights` then forgets them and keeps what they changed.

        Args:
            lora_scale: multiplies their weights.
            adapter_names: those to fuse, the others are switched off; by default all that are switched on.

        Raises:
            InputError: no such LoRA, or they are fused already.
            CheckpointError: a weight leaves the range of its type; the model is as before.
        """
        self._require_not_fused()
        before = self._stack().weights
        names = self.get_active_adapters() if adapter_names is None else list(adapter_names)
        wanted = {name: lora_scale * (before.get(name) or 1.0) for name in names}
        if lora_scale != 1 or adapter_names is not None:
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

    def _stack(self) -> AdapterStack:
        if self._adapters is None or not self._adapters.weights:
            raise InputError("no adapter is loaded: call load_lora_weights first")
        return self._adapters

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
