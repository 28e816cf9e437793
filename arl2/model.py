"""The causal Wan transformer with hybrid attention in some of its layers."""

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # diffusers looks for it beside a pipeline's part
from torch import Tensor, nn

from arl2.hybrid_attention import HybridAttention
from arl2.lora import LoRALinear
from arl2.ops.gated_delta import WriteBackend
from arl2.state_settings import PAPER_STATE, Rotation, StateSettings, stated_state
from arl2.trained_memory import TrainedMemory
from wan.checkpoints.fields import MIN_ALPHA, STATE_VARIANT, UNTRAINED
from wan.checkpoints.formats import WEIGHT_FILES, require_sizes, stated_config
from wan.checkpoints.record import check_record, read_record, require_record
from wan.checkpoints.saving import MAX_SHARD_SIZE, write_model_folder
from wan.checkpoints.tensors import require_finite, summarize_names
from wan.model import CausalWanModel
from wan.ops.rope import Rotary, rotary_angles
from wan.utils.errors import CheckpointError, InputError

log = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound=HybridAttention)
DEFAULT_LORA_ALPHA = 32.0
FFN_LINEARS = (0, 2)
"""Places of the two linear layers in a block's feed-forward."""


class FFNLoRA(StrEnum):
    """Choice of the blocks with adapters on their feed-forward."""

    NONE = "none"
    HYBRID = "hybrid"
    ALL = "all"


def warn_of_untrained(names: Sequence[str]) -> None:
    """Say of parameters, if there are any, that they are of no use yet."""
    if names:
        log.warning(
            "conversion: %d parameters of %d hybrid layers are UNTRAINED (%s): train them with train_stage1.py",
            len(names),
            len({name.split(".")[1] for name in names}),
            summarize_names(names),
        )


def check_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Sort layer indices and check them.

    Raises:
        InputError: an index is out of range or repeated.
    """
    outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside:
        raise InputError(f"hybrid layer {outside[0]} is out of range: the model has layers 0 to {num_layers - 1}")
    if len(set(layers)) != len(layers):
        repeated = next(layer for layer in layers if list(layers).count(layer) > 1)
        raise InputError(f"hybrid layer {repeated} is named more than once: name every layer once")
    return tuple(sorted(layers))


@dataclass(frozen=True)
class HybridSettings:
    """Settings that make a softmax model hybrid.

    Attributes:
        layers: indices of the layers whose self-attention is hybrid.
        lora_rank: rank of the adapters on the state branch's q, k, v and on feed-forwards; None for no adapters.
        lora_alpha: scale of the adapters times their rank. Checkpoints do not store it.
        ffn_lora: choice of the feed-forwards with adapters, if there are adapters at all.
        state: variant of the state. As a request, the default leaves it to the weights.
    """

    layers: tuple[int, ...] = ()
    lora_rank: int | None = None
    lora_alpha: float = DEFAULT_LORA_ALPHA
    ffn_lora: FFNLoRA = FFNLoRA.HYBRID
    state: StateSettings = PAPER_STATE

    def __post_init__(self) -> None:
        if self.lora_rank is not None and self.lora_rank < 1:
            raise InputError(f"lora_rank {self.lora_rank} is not positive: give a rank, or none for no adapters")
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha >= MIN_ALPHA):
            raise InputError(
                f"lora_alpha {self.lora_alpha} is no number of at least {MIN_ALPHA:g}: adapters would do nothing of use"
            )

    def __str__(self) -> str:
        """For messages: "hybrid layers 0, 2 with adapters of rank 16 (alpha 32), also on the feed-forwards there"."""
        text = f"hybrid layers {', '.join(map(str, self.layers))}" if self.layers else "softmax in all layers"
        if self.state != PAPER_STATE:
            text += f", their states of {self.state},"
        if self.lora_rank is None:
            return text
        places = {
            FFNLoRA.NONE: "",
            FFNLoRA.HYBRID: ", also on the feed-forwards there",
            FFNLoRA.ALL: ", also on the feed-forwards of all blocks",
        }
        return f"{text} with adapters of rank {self.lora_rank} (alpha {self.lora_alpha:g}){places[self.ffn_lora]}"

    def ffn_lora_layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the blocks with adapters on their feed-forward."""
        if self.lora_rank is None or self.ffn_lora is FFNLoRA.NONE:
            return ()
        return tuple(range(num_layers)) if self.ffn_lora is FFNLoRA.ALL else self.layers


class HybridWanModel(CausalWanModel):
    """`CausalWanModel` with hybrid attention in `hybrid_layers` and with adapters if a rank is given.

    Without hybrid layers it is the softmax model. Arguments beyond those of `CausalWanModel` are the fields of
    `HybridSettings`, `trained_memory`, see `arl2.trained_memory.TrainedMemory`, and `untrained_layers`, whose hybrid
    parameters no training has met, as plain values so that they can be stored in a `config.json`. A
    config has no `state` if it is the paper's.
    """

    # Their rounding changes the half-life of the memory; `from_pretrained` honours this list in any dtype.
    _keep_in_fp32_modules: ClassVar[list[str]] = ["A_log", "dt_bias"]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        text_len: int = 512,
        in_dim: int = 16,
        dim: int = 1536,
        ffn_dim: int = 8960,
        freq_dim: int = 256,
        text_dim: int = 4096,
        out_dim: int = 16,
        num_heads: int = 12,
        num_layers: int = 30,
        qk_norm: bool = True,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
        model_type: str = "t2v",
        hybrid_layers: Sequence[int] = (),
        lora_rank: int | None = None,
        lora_alpha: float = DEFAULT_LORA_ALPHA,
        ffn_lora: str = "hybrid",
        trained_memory: Mapping[str, int | None] | None = None,
        untrained_layers: Sequence[int] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            text_len=text_len,
            in_dim=in_dim,
            dim=dim,
            ffn_dim=ffn_dim,
            freq_dim=freq_dim,
            text_dim=text_dim,
            out_dim=out_dim,
            num_heads=num_heads,
            num_layers=num_layers,
            qk_norm=qk_norm,
            cross_attn_norm=cross_attn_norm,
            eps=eps,
            model_type=model_type,
        )
        if trained_memory is not None:
            TrainedMemory.from_plain(trained_memory, type(self).__name__)
        layers = check_layers(hybrid_layers, num_layers)
        adapted = self.hybrid.ffn_lora_layers(num_layers)
        self._state_settings = self.hybrid.state
        for layer, block in enumerate(self.layers()):
            if layer in layers:
                block.self_attn = HybridAttention(
                    dim, num_heads, qk_norm, eps, lora_rank, lora_alpha, self._state_settings
                )
            for place in FFN_LINEARS if layer in adapted else ():
                linear = block.ffn[place]
                assert lora_rank is not None and isinstance(linear, nn.Linear)
                block.ffn[place] = LoRALinear(linear, lora_rank, lora_alpha)

    @property
    def hybrid(self) -> HybridSettings:
        """Settings of the hybrid layers, from the config."""
        config = self.config
        layers = tuple(sorted(config.hybrid_layers))
        state = StateSettings.from_plain(config.get(STATE_VARIANT), type(self).__name__)
        return HybridSettings(layers, config.lora_rank, config.lora_alpha, FFNLoRA(config.ffn_lora), state)

    def register_to_config(self, **settings: Any) -> None:
        """See diffusers; states as in the paper are left out, as files written before there were others have it."""
        if STATE_VARIANT in settings:
            plain = StateSettings.from_plain(settings.pop(STATE_VARIANT), type(self).__name__).as_plain()
            settings |= {} if plain is None else {STATE_VARIANT: plain}
        super().register_to_config(**settings)

    def rotary(self, frames_F: Tensor, height: int, width: int) -> Rotary:
        """See `CausalWanModel.rotary`; four tensors where states are rotated otherwise, see `arl2.hybrid_attention`."""
        rotary, state = super().rotary(frames_F, height, width), self._state_settings
        if state.rotation is Rotation.ABSOLUTE:
            return rotary
        if state.rotation is Rotation.NONE:
            return *rotary, torch.ones_like(rotary[0]), torch.zeros_like(rotary[1])
        return *rotary, *rotary_angles(state.rotation_frames(frames_F), height, width, self.head_dim)

    @property
    def trained_memory(self) -> TrainedMemory | None:
        """The memory of the softmax layers in training; None if it is not known."""
        settings = self.config.trained_memory
        return None if settings is None else TrainedMemory.from_plain(settings, type(self).__name__)

    def set_trained_memory(self, memory: TrainedMemory) -> None:
        """Note the memory of the softmax layers in training, which is stored with the weights."""
        self.register_to_config(trained_memory=memory.as_plain())

    def set_untrained_layers(self, layers: Collection[int]) -> None:
        """Note the layers whose hybrid parameters are initial values, which is stored with the weights."""
        self.register_to_config(untrained_layers=sorted(layers) or None)

    def mark_trained(self, memory: TrainedMemory) -> None:
        """Note that all hybrid layers are trained, and with which memory of the softmax layers."""
        self.set_trained_memory(memory)
        self.set_untrained_layers(())

    def untrained_parameter_names(self) -> list[str]:
        """Names of the hybrid parameters of the layers that are noted as untrained."""
        layers = set(self.config.untrained_layers or ())
        return [name for name in self.hybrid_parameter_names() if int(name.split(".")[1]) in layers]

    def record(self) -> dict[str, Any]:
        """Record stored with weights: the constructor's arguments as plain values; no mark where all is trained."""
        config = {name: value for name, value in self.config.items() if not name.startswith("_")}
        if config[UNTRAINED] is None:
            del config[UNTRAINED]
        return {name: list(value) if isinstance(value, list | tuple) else value for name, value in config.items()}

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        **others: Any,
    ) -> None:
        """Save as in diffusers, except that weights carry `record`, modes follow the umask, and each file is atomic.

        Args:
            save_directory: where to.
            safe_serialization, variant, others: what is not plain safetensors is left to diffusers' own.
            max_shard_size: of a file; larger weights are divided over several.

        Raises:
            InputError: the disk is full, or the folder cannot be written.
        """
        if others or variant is not None or not safe_serialization:
            super().save_pretrained(
                save_directory,
                safe_serialization=safe_serialization,
                variant=variant,
                max_shard_size=max_shard_size,
                **others,
            )
            return
        write_model_folder(
            Path(save_directory), self.to_json_string(), self.state_dict(), self.record(), max_shard_size
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load as in diffusers, except that inconsistent config or weights are an error; see `arl2.statement`.

        Raises:
            CheckpointError: a setting, name or value that the folder should not have, or lacks; NaN or infinity.
        """
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        is_local = (folder / "config.json").exists()
        if is_local:
            require_sizes(stated_config(folder), folder / "config.json")
        try:
            model = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except InputError:
            raise
        except (
            ValueError,
            OSError,
        ) as error:  # a shape that differs, a file that is not there
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{folder} does not hold a {cls.__name__}: {reason}") from error
        for file in (folder / name for name in WEIGHT_FILES if is_local and (folder / name).is_file()):
            record = read_record(file, {})
            check_record(record, file)
            require_record(record, model.record(), file)
            stated_state(record, model.record(), file)
            model.set_untrained_layers(record.get(UNTRAINED) or model.config.untrained_layers or ())
        warn_of_untrained(model.untrained_parameter_names())
        # What a quantiser has made of weights is of a class of its own, or whole numbers.
        plain = {name: value for name, value in model.state_dict().items() if type(value.data) is Tensor}
        require_finite({name: value for name, value in plain.items() if value.is_floating_point()}, folder)
        return model

    def hybrid_attentions(self) -> dict[int, HybridAttention]:
        """Hybrid attention modules by layer index."""
        attentions = {layer: block.self_attn for layer, block in enumerate(self.layers())}
        return {layer: module for layer, module in attentions.items() if isinstance(module, HybridAttention)}

    def use_write_backend(self, backend: WriteBackend) -> None:
        """Use `backend` for all writes to states."""
        for module in self.hybrid_attentions().values():
            module.write_backend = backend

    def adapters(self) -> list[LoRALinear]:
        """Feed-forward layers with adapters, in order."""
        return [module for module in self.modules() if isinstance(module, LoRALinear)]

    @contextmanager
    def as_teacher(self) -> Iterator["HybridWanModel"]:
        """Switch hybrid layers and adapters off inside the context: the model is the softmax model again.

        A memory for the teacher must be made inside, by `new_memory`; the weights are shared.
        """
        with switched_off(self.hybrid_attentions().values(), "enabled"), switched_off(self.adapters(), "enabled"):
            yield self

    @contextmanager
    def without_lora(self) -> Iterator["HybridWanModel"]:
        """Switch all adapters off inside the context; hybrid layers stay on."""
        attentions = self.hybrid_attentions().values()
        with switched_off(attentions, "lora_enabled"), switched_off(self.adapters(), "enabled"):
            yield self

    def hybrid_parameter_names(self) -> list[str]:
        """Names of all parameters that the softmax model does not have."""
        owners = {id(module): name for name, module in self.named_modules()}
        names = []
        for attention in self.hybrid_attentions().values():
            prefix = owners[id(attention)]
            teacher = ("q.", "k.", "v.", "o.", "norm_q.", "norm_k.")
            names += [f"{prefix}.{name}" for name, _ in attention.named_parameters() if not name.startswith(teacher)]
        for adapter in self.adapters():
            names += [f"{owners[id(adapter)]}.lora_{letter}" for letter in "AB"]
        return names

    def replace_hybrid_attentions(self, kind: type[Kind]) -> dict[int, Kind]:
        """Replace the hybrid layers by layers of another class over the same parameters, under the same names.

        Args:
            kind: see `HybridAttention.sharing`.

        Returns:
            the new layers by index.
        """
        replaced = {layer: kind.sharing(module) for layer, module in self.hybrid_attentions().items()}
        for layer, module in replaced.items():
            self.layers()[layer].self_attn = module
        return replaced

    def merge_ffn_lora(self, keep_on: torch.device | None = None) -> "MergedAdapters":
        """Fold the feed-forward adapters into their linear layers, for inference and export.

        Args:
            keep_on: device to which the layers with adapters move; None leaves them where they are.

        Returns:
            what `unmerge_ffn_lora` needs to undo it exactly; without it, the adapters are lost.
        """
        merged = MergedAdapters({}, self.hybrid.ffn_lora, self.hybrid.lora_rank)
        for number, block in enumerate(self.layers()):
            for place in FFN_LINEARS:
                linear = block.ffn[place]
                if isinstance(linear, LoRALinear):
                    block.ffn[place] = linear.merged()
                    merged.layers[number, place] = linear if keep_on is None else linear.to(keep_on)
        rank = merged.lora_rank if self.hybrid.layers else None  # without hybrid layers no adapter is left
        self.register_to_config(ffn_lora=FFNLoRA.NONE.value, lora_rank=rank)
        return merged

    def unmerge_ffn_lora(self, merged: "MergedAdapters") -> None:
        """Put back what `merge_ffn_lora` took out, on the device and in the dtype of the merged layers."""
        for (number, place), linear in merged.layers.items():
            ffn = self.layers()[number].ffn
            weight = ffn[place].weight
            assert isinstance(weight, Tensor)
            ffn[place] = linear.to(weight.device, weight.dtype)
        self.register_to_config(ffn_lora=merged.ffn_lora.value, lora_rank=merged.lora_rank)


@dataclass(frozen=True)
class MergedAdapters:
    """Layers that `HybridWanModel.merge_ffn_lora` took out of a model.

    Attributes:
        layers: by index of the block and place in its feed-forward.
        ffn_lora, lora_rank: settings of the model before.
    """

    layers: dict[tuple[int, int], LoRALinear]
    ffn_lora: FFNLoRA
    lora_rank: int | None


@contextmanager
def switched_off(modules: Iterable[nn.Module], switch: str) -> Iterator[None]:
    """Set a boolean attribute of some modules to False inside the context."""
    before = [(module, getattr(module, switch)) for module in modules]
    try:
        for module, _ in before:
            setattr(module, switch, False)
        yield
    finally:
        for module, value in before:
            setattr(module, switch, value)


def keep_gates_in_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model to `dtype`, except A_log and dt_bias, whose rounding changes the half-life of the memory."""
    gates = {
        parameter: parameter.data.to(torch.promote_types(dtype, torch.float32))
        for module in model.modules()
        if isinstance(module, HybridAttention)
        for parameter in (module.A_log, module.dt_bias)
    }
    nn.Module.to(model, dtype)  # not diffusers' own, which warns that it would cast the gates
    for parameter, value in gates.items():
        parameter.data = value  # as in `nn.Module.to`: references to the parameter stay valid
