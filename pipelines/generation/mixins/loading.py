"""Loading a pipeline from a folder or the hub, moving it, and saving it."""

import inspect
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKLWan
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from arl2.adapters import Weighted, read_loras
from arl2.checkpoint import build_hybrid, read_generator
from arl2.model import HybridSettings, HybridWanModel, keep_gates_in_float32
from pipelines.config import PipelineSettings, SpeedConfig, stored_sampling
from pipelines.dtypes import DTYPES
from pipelines.generation.inputs.hub import HubOptions, model_folder
from pipelines.generation.inputs.quantised import load_quantised
from pipelines.generation.mixins.lora import LoRAPipelineMixin
from pipelines.generation.mixins.speed import SpeedMixin
from wan.checkpoints.configs import read_config
from wan.checkpoints.formats import transformer_config
from wan.checkpoints.lora import LoRASource
from wan.checkpoints.saving import give_umask_mode
from wan.text import load_text_encoder
from wan.utils.device import require_device, wide_range_dtype
from wan.utils.errors import InputError
from wan.utils.files import writing
from wan.utils.ranges import declarations, typed
from wan.vae.wan_vae import load_vae

log = logging.getLogger(__name__)
LOAD = "load"
"""For a part that comes from the folder."""
CPU = torch.device("cpu")


class LoadingMixin(SpeedMixin, LoRAPipelineMixin):
    """Adds loading, moving and saving to a pipeline.

    Attributes:
        load_seconds: how long `from_pretrained` took.
    """

    load_seconds: float | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        checkpoint_path: str | Path | None = None,
        use_ema: bool = False,
        hybrid: HybridSettings = HybridSettings(),
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: str | None = None,
        vae_device: torch.device | None = None,
        seed: int = 0,
        lora: Sequence[LoRASource | str | Path] = (),
        optimize: bool | SpeedConfig = True,
        quantization_config: Any = None,
        transformer: HybridWanModel | None = None,
        vae: AutoencoderKLWan | None = None,
        text_encoder: UMT5EncoderModel | str | None = LOAD,
        tokenizer: PreTrainedTokenizerBase | str | None = LOAD,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **sampling: Any,
    ) -> Self:
        """Load every part, strictly, from a native Wan 2.1 folder or a diffusers folder, of this machine or the hub.

        Args:
            pretrained_model_name_or_path: a folder, which never asks the hub; or, where there is no such folder, the
                name of a repository ("owner/name"), whose files come through huggingface_hub's cache.
            checkpoint_path: transformer weights, see `arl2.checkpoint.read_generator`; those of the folder without it.
            use_ema: take `generator_ema` of a checkpoint that has both.
            hybrid: hybrid layers and adapters; by default those of the weights.
            dtype: of all parts, or its name, float32 by default; float16 only of the transformer. "auto" takes the type
                of the transformer's weights.
            torch_dtype: the former name of `dtype`.
            device, device_map: of all parts, the CPU by default; the two names mean the same here.
            vae_device: where the VAE goes instead, to decode beside the transformer's work.
            seed: of parameters that a conversion adds.
            lora: LoRAs that become a part of the transformer, without a way back: "FILE" or "FILE:SCALE"; see
                `load_lora_weights` for others.
            optimize: whether the first call on a CUDA device optimizes, see `SpeedMixin`; or how, at once.
            quantization_config: of diffusers, for the transformer; see `pipelines.generation.inputs.quantised`.
            transformer, vae, text_encoder, tokenizer: parts that are there already, and are taken as they are. None for
                the text encoder loads neither it nor the tokenizer: calls need `prompt_embeds` then.
            revision, cache_dir, token, local_files_only: of the hub's files, as in huggingface_hub.
            sampling: settings of this class that replace those stored in the folder.

        Raises:
            CheckpointError, InputError: something is missing, damaged or does not fit, or the hub cannot be reached.
            TypeError: an unknown argument; nothing was read then.
        """
        begin, place, dtype = time.perf_counter(), _device(device, device_map), _dtype(dtype, torch_dtype)
        _check_settings(cls, sampling)
        _check_parts(transformer, vae, text_encoder, tokenizer, optimize)
        sources = _lora_sources(lora)
        is_plain = (checkpoint_path, use_ema, hybrid, sources) == (None, False, HybridSettings(), [])
        _check_transformer(transformer, quantization_config, is_plain)
        without = {
            "transformer": transformer is not None or checkpoint_path is not None,
            "vae": vae is not None,
            "text_encoder": text_encoder != LOAD,
            "tokenizer": text_encoder is None or tokenizer != LOAD,
        }
        hub = HubOptions(revision, cache_dir, token, local_files_only)
        folder = model_folder(pretrained_model_name_or_path, hub, without)
        loras: list[Weighted] = []
        if quantization_config is not None:
            transformer = load_quantised(folder, quantization_config, dtype, place)
        elif transformer is None:
            weights = read_generator(folder, checkpoint_path, use_ema)
            loras = read_loras(weights.state, sources)
            dtype = weights.state["patch_embedding.weight"].dtype if dtype is None else dtype
            sizes = transformer_config(folder)
            transformer, _ = build_hybrid(weights, sizes, hybrid, dtype=dtype, device=place, seed=seed)
        dtype = transformer.dtype if dtype is None else dtype
        if vae is None:
            vae = load_vae(folder, dtype=dtype, device=vae_device or place).model
        text = _read_text(folder, text_encoder, tokenizer, transformer.config.text_len, dtype, place)
        pipeline = cls(transformer, vae, *text, **(stored_sampling(folder) | sampling))
        pipeline.merge_loras(loras)
        pipeline._is_loaded(optimize, time.perf_counter() - begin)
        return pipeline

    def _is_loaded(self, optimize: bool | SpeedConfig, seconds: float) -> None:
        self.optimizes_by_default, self.load_seconds = optimize is True, seconds
        log.info("model loaded in %.1f s", seconds)
        if isinstance(optimize, SpeedConfig):
            self.optimize_for_inference(optimize)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the parts, arguments as for diffusers' pipelines.

        Only the transformer is cast to float16, and gates of hybrid layers stay in float32 at least, as when a model is
        loaded. A fast form of the transformer is undone, and made anew on the new device before the next pass.
        """
        for given in (*args, kwargs.get("device")):
            if isinstance(given, str | torch.device):
                _device(given, None)
        self.undo_fast_form()
        self._side = None
        types = [each for each in (*args, kwargs.get("dtype")) if isinstance(each, torch.dtype)]
        # Diffusers notes it on models that one of its quantisers has changed: how to cast those is its own matter.
        if len(types) != 1 or getattr(self.transformer, "hf_quantizer", None) is not None:
            return super().to(*args, **kwargs)
        others = [argument for argument in args if not isinstance(argument, torch.dtype)]
        super().to(*others, **{name: value for name, value in kwargs.items() if name != "dtype"})
        keep_gates_in_float32(self.transformer, types[0])
        self.wan_vae.to(dtype=types[0])
        if self.text_encoder is not None:
            self.text_encoder.to(dtype=wide_range_dtype(types[0], self.text_encoder.device))
        return self

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As in diffusers, but files get the mode that the umask says. Adapters of a fast form are written as such.

        Raises:
            InputError: the disk is full, or the folder cannot be written.
        """
        self.undo_fast_form()
        with writing(Path(save_directory)):
            super().save_pretrained(save_directory, **options)
            give_umask_mode(Path(save_directory))


def _device(device: torch.device | str | None, device_map: str | None) -> torch.device:
    """The device that the two arguments name.

    Raises:
        InputError: both are given, or the name is none of a device.
    """
    if device is not None and device_map is not None:
        raise InputError("device and device_map mean the same: give one of them")
    name = device if device_map is None else device_map
    if name is None:
        return CPU
    try:
        found = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"device_map {name!r} is no device: give 'cuda', 'cuda:1' or 'cpu'; parts that do not fit together go to "
            "the GPU one after the other with enable_model_cpu_offload"
        ) from error
    require_device(found)
    return found


def _lora_sources(given: Sequence[LoRASource | str | Path]) -> list[LoRASource]:
    """LoRAs, each given as it is, as a file, or as FILE:SCALE.

    Raises:
        InputError: something else, or a scale out of range.
    """
    if isinstance(given, str | Path | LoRASource):
        given = [given]
    for one in given:
        if not isinstance(one, LoRASource | str | Path):
            raise InputError(f"lora holds a {type(one).__name__}: give files, as 'FILE' or 'FILE:SCALE'")
    return [one if isinstance(one, LoRASource) else LoRASource.from_text(str(one)) for one in given]


def _check_parts(transformer: Any, vae: Any, text_encoder: Any, tokenizer: Any, optimize: Any) -> None:
    """Make sure that parts are objects, not names, and that `optimize` says what it may.

    Raises:
        InputError: one is not.
    """
    kinds = {
        "transformer": (transformer, HybridWanModel),
        "vae": (vae, AutoencoderKLWan),
        "text_encoder": (text_encoder, UMT5EncoderModel),
        "tokenizer": (tokenizer, PreTrainedTokenizerBase),
    }
    for name, (part, kind) in kinds.items():
        is_left_out = part is None or (part == LOAD and name in ("text_encoder", "tokenizer"))
        if not is_left_out and not isinstance(part, kind):
            raise InputError(
                f"{name} is a {type(part).__name__}: give a {kind.__name__} that is loaded, or leave it out"
            )
    if not isinstance(optimize, bool | SpeedConfig):
        raise InputError(f"optimize is a {type(optimize).__name__}: give True, False or a SpeedConfig")


def _dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A type of weights by itself or by its name, under one of two names of the argument; None for "auto".

    Raises:
        InputError: no such type, or both arguments are given.
    """
    if dtype is not None and torch_dtype is not None:
        raise InputError("dtype and torch_dtype mean the same: give one of them")
    name = "dtype" if torch_dtype is None else "torch_dtype"
    given = next((each for each in (dtype, torch_dtype) if each is not None), torch.float32)
    if given == "auto":
        return None
    found = DTYPES.get(str(given).removeprefix("torch."))
    if found is None and given is not torch.float64:
        raise InputError(f"{name} {given!r} is unknown: give {', '.join(DTYPES)} or auto")
    return torch.float64 if found is None else found


def _check_settings(cls: type, sampling: dict[str, Any]) -> None:
    known = declarations(PipelineSettings)
    unknown = [name for name in sampling if name not in known]
    if unknown:
        names = [name for name in inspect.signature(cls.from_pretrained).parameters if name != "sampling"]  # type: ignore[attr-defined]
        raise TypeError(
            f"{cls.__name__}.from_pretrained() got an unexpected keyword argument {unknown[0]!r}: it takes "
            f"{', '.join([*names, *known])}"
        )
    typed(PipelineSettings, sampling, "")


def _check_transformer(transformer: HybridWanModel | None, quantization_config: Any, is_plain: bool) -> None:
    given = {"transformer": transformer, "quantization_config": quantization_config}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InputError("quantization_config is of a transformer that is loaded here: give it or transformer")
    if names and not is_plain:
        raise InputError(f"{names[0]} goes with none of checkpoint_path, use_ema, hybrid and lora: leave those out")


def _read_text(
    folder: Path,
    text_encoder: UMT5EncoderModel | str | None,
    tokenizer: PreTrainedTokenizerBase | str | None,
    text_len: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[UMT5EncoderModel | None, PreTrainedTokenizerBase | None]:
    """Text encoder and tokenizer: those given, those of a folder in the place of `LOAD`, or neither."""
    if text_encoder is None or (text_encoder == LOAD and _has_no_text_encoder(folder)):
        return None, None
    if isinstance(text_encoder, str) or isinstance(tokenizer, str):
        text = load_text_encoder(folder, text_len=text_len, dtype=dtype, device=device)
        text_encoder = text.model if isinstance(text_encoder, str) else text_encoder
        tokenizer = text.tokenizer if isinstance(tokenizer, str) else tokenizer
    return text_encoder, tokenizer


def _has_no_text_encoder(folder: Path) -> bool:
    """Whether a folder says that its pipeline was saved without a text encoder."""
    index = folder / "model_index.json"
    return index.is_file() and read_config(index).get("text_encoder", ...) in ([None, None], None)
