"""LoRA files of every layout, read strictly into changes of Wan's own parameters.

peft                    base_model.model.blocks.0.self_attn.q.lora_A[.default].weight, adapter_config.json beside it
diffusers               transformer.blocks.0.attn1.to_q.lora_A.weight
ComfyUI, Wan's names    diffusion_model.blocks.0.self_attn.q.lora_down.weight, .alpha, .diff, .diff_b, .diff_m
kohya                   lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha
a training's .pt        {"generator_lora": …, "critic_lora": …}, the latter left out

Every entry is accounted for, or nothing is read. A change is scale · up · down, with `down` (A) of [rank, in] and `up`
(B) of [out, rank]; the scale is alpha / rank, and 1 where the file does not say alpha.
"""

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan.checkpoints.formats import diffusers_name, has_config, native_name, unwrapped_name
from wan.checkpoints.identify import A_LORA, HYBRID_ALONE, IMAGE_BRANCH, LORA_FILES, family
from wan.checkpoints.loading import StateDict, as_state_dict, read_header, read_weights
from wan.checkpoints.peft import CONFIG_FILE, MAX_ALPHA, PeftSettings, read_peft_settings, settings_in_header
from wan.checkpoints.pickles import Opaque
from wan.checkpoints.tensors import describe_dtype, printable, require_finite, require_floating, summarize_names
from wan.utils.errors import CheckpointError, InputError
from wan.utils.files import content_hash

log = logging.getLogger(__name__)

GENERATOR_LORA, CRITIC_LORA = "generator_lora", "critic_lora"
MAX_SCALE = 100.0
_PEFT_PREFIX = re.compile(r"^base_model\.model\.")
_KOHYA_PREFIX = re.compile(r"^lora_(unet|transformer)_")
_PAIR = re.compile(
    r"^(?P<target>.+)\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.(?P<adapter>\w+))?"
    r"\.(?P<kind>weight|bias)$"
)
_OTHER = re.compile(r"^(?P<target>.+)\.(?P<part>alpha|diff|diff_b|diff_m)$")
_UP = ("lora_B", "lora_up", "lora.up")
_UNSUPPORTED = (
    (re.compile(r"\.(dora_scale|lora_magnitude_vector\b.*|magnitude)$"), "DoRA"),
    (re.compile(r"\.lokr_\w+$"), "LoKr"),
    (re.compile(r"\.hada_\w+$"), "LoHa"),
    (re.compile(r"\.(oft_\w+|boft_\w+|lora_mid\.weight|vera_\w+)$"), "another kind of adapter"),
    (re.compile(r"^(lora_te\d?_|text_encoder(_\d)?\.)"), "a LoRA of the text encoder"),
)
_DENSE = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
"""Suffixes of whole changes, and the parameter of a module that they change."""


@dataclass(frozen=True)
class LoRASource:
    """A LoRA file, or a folder of peft or diffusers, and what its changes are multiplied by.

    Attributes:
        scale: of all changes, whole ones (`.diff`) included; not 0.
    """

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < abs(self.scale) <= MAX_SCALE:
            raise InputError(
                f"the scale {self.scale:g} of {self.path} is out of range: give a number up to {MAX_SCALE:g}, or drop "
                "the LoRA if it is to do nothing"
            )

    @classmethod
    def from_text(cls, text: str) -> "LoRASource":
        """Read FILE or FILE:SCALE, as a command line has it.

        Raises:
            InputError: the scale is out of range.
        """
        path, colon, scale = text.rpartition(":")
        try:
            return cls(Path(path), float(scale)) if colon and path else cls(Path(text))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            return cls(Path(text))  # a colon in a name

    def files(self) -> list[Path]:
        """The file with the weights, and the adapter_config.json that goes with it if there is one.

        Raises:
            CheckpointError: there is no such file, or the folder does not show which one is meant.
        """
        path = self.path
        if path.is_dir():
            found = [path / name for name in LORA_FILES if (path / name).is_file()]
            if len(found) != 1:
                names = " nor ".join(LORA_FILES) if not found else " and ".join(file.name for file in found)
                fault = f"no {names}" if not found else f"both {names}"
                if not found and has_config(path):
                    raise CheckpointError(f"{path} holds a whole model, not a LoRA: give it as --checkpoint_path")
                raise CheckpointError(f"{path} has {fault}: give the LoRA's file")
            path = found[0]
        if not path.is_file():
            scale = "; a scale is a number behind a colon, FILE:0.8" if ":" in path.name else ""
            raise CheckpointError(f"no LoRA at {path}: check the path, or download it{scale}")
        config = path.with_name(CONFIG_FILE)
        return [path, config] if path.stem == Path(LORA_FILES[0]).stem and config.is_file() else [path]

    def identity(self) -> dict[str, Any]:
        """What a record of the use of a LoRA holds: the hash of its file, that of its settings, and the scale."""
        names = ("sha256", "settings_sha256")
        hashes = {name: content_hash(file) for name, file in zip(names, self.files(), strict=False)}
        return hashes | {"scale": self.scale}


def require_distinct(sources: Sequence[LoRASource]) -> None:
    """Make sure that no LoRA is given twice, whose changes would be added twice.

    Raises:
        InputError: one is.
    """
    seen = set[str]()
    for source in sources:
        place = os.path.realpath(source.path)
        if place in seen:
            raise InputError(f"the LoRA {source.path} is given twice: give it once, with the scale that is meant")
        seen.add(place)


class LowRank(NamedTuple):
    """A change scale · up · down of a weight, seen as a matrix.

    Attributes:
        down: A, [rank, in].
        up: B, [out, rank].
    """

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class LoRA:
    """Changes of a model's parameters, by Wan's names.

    Attributes:
        source: where they come from, for messages.
        low_rank: changes by products.
        dense: whole changes, in the shape of the parameter.
    """

    source: str
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)

    def names(self) -> set[str]:
        """Names of all parameters that change."""
        return self.low_rank.keys() | self.dense.keys()


def read_lora(path: Path, shapes: Mapping[str, torch.Size]) -> LoRA:
    """Read a LoRA file, or a folder of peft or diffusers.

    Args:
        path: see `LoRASource`.
        shapes: of the softmax model's parameters, by Wan's names.

    Raises:
        CheckpointError: no LoRA, damaged, of a kind that is not supported, or of another model; the message names the
            entry.
    """
    file, *config = LoRASource(path).files()
    weights = read_weights(file)
    settings = read_peft_settings(config[0]) if config else None
    if settings is None and file.suffix == ".safetensors":
        settings = settings_in_header(read_header(file)[1], file)
    return lora_of(weights, shapes, str(path), settings)


def lora_of(
    weights: Mapping[Any, Any], shapes: Mapping[str, torch.Size], source: str, settings: PeftSettings | None = None
) -> LoRA:
    """As `read_lora`, of what a file holds.

    Args:
        weights: names to tensors, or the dictionary of a training's file.
        settings: of peft, if they are known.
    """
    state = _state_of(weights, source)
    modules: dict[str, dict[str, Tensor]] = {}
    written_as: dict[str, str] = {}
    adapters: set[str] = set()
    spellings = _spellings(shapes)
    for name, value in state.items():
        written, part, adapter = _parsed(name, source)
        adapters |= {adapter} if adapter else set()
        module = _module(written, spellings, source)
        parts, written_as[module] = modules.setdefault(module, {}), written
        if part in parts:
            raise CheckpointError(f"{source}: {printable(module)} has several entries for {part}: save it once")
        parts[part] = value
    if len(adapters) > 1:
        raise CheckpointError(f"{source} holds several adapters, {summarize_names(adapters)}: save each on its own")
    if settings is not None:
        settings.require_known(written_as.values(), source)
    lora = LoRA(source)
    for module, parts in modules.items():
        scale = _scale(module, written_as[module], parts, settings, source)
        for name, change in _changes(module, parts, scale):
            _require_shape(name, change, shapes, source)
            if isinstance(change, LowRank):
                lora.low_rank[name] = change
            else:
                lora.dense[name] = lora.dense[name] + change if name in lora.dense else change
    _warn_of_nothing(lora)
    return lora


def _warn_of_nothing(lora: LoRA) -> None:
    """Say that a LoRA changes nothing, as an untrained one, whose B is still 0."""
    if not any(change.any() for change in (*(pair.up for pair in lora.low_rank.values()), *lora.dense.values())):
        log.warning("%s changes nothing: all its products are 0, as before training", lora.source)


def _state_of(weights: Mapping[Any, Any], source: str) -> StateDict:
    """The entries of a LoRA, finite floats but for alphas.

    Raises:
        CheckpointError: it is no LoRA.
    """
    inner = weights.get(GENERATOR_LORA, weights)
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"{source}: {GENERATOR_LORA!r} is no dictionary of tensors: save it as one")
    names = [name for name in inner if isinstance(name, str)]
    bare = {native_name(unwrapped_name(name)) for name in names}
    if "patch_embedding.weight" in bare or weights.keys() & {"generator", "generator_ema", "model"}:
        raise CheckpointError(f"{source} holds a whole model, not a LoRA: give it as --checkpoint_path")
    what = family(names)
    if what != A_LORA:
        cure = "give it as --checkpoint_path" if what == HYBRID_ALONE else "give a LoRA"
        raise CheckpointError(f"{source} holds {what}, not a LoRA: {cure}")
    state = as_state_dict({name: value for name, value in inner.items() if not isinstance(value, Opaque)}, source)
    for name in state:
        for pattern, kind in _UNSUPPORTED:
            if pattern.search(name):
                raise CheckpointError(
                    f"{source}: {printable(name)} belongs to {kind}, which is not supported: give a plain LoRA"
                )
    require_floating({name: value for name, value in state.items() if not name.endswith(".alpha")}, source)
    for name in (name for name in state if name.endswith(".alpha")):
        if state[name].dtype is torch.bool or state[name].is_complex() or state[name].is_meta:
            raise CheckpointError(f"{source}: {printable(name)} is {describe_dtype(state[name].dtype)}, not a number")
    require_finite({name: value.float() if name.endswith(".alpha") else value for name, value in state.items()}, source)
    return state


def _parsed(name: str, source: str) -> tuple[str, str, str | None]:
    """An entry's module as the file writes it, the part that it is (`down`, `up`, …), and the adapter's name if any."""
    bare = unwrapped_name(_PEFT_PREFIX.sub("", name))
    if match := _PAIR.match(bare):
        part = "up" if match["part"] in _UP else "down"
        if match["kind"] == "bias":
            if part == "down":
                raise CheckpointError(f"{source}: {printable(name)} is a bias before the product: no layout has it")
            part = "up_bias"
        return match["target"], part, match["adapter"]
    if match := _OTHER.match(bare):
        return match["target"], match["part"], None
    raise CheckpointError(f"{source}: {printable(name)} is no entry of a LoRA that we know: remove it, or convert it")


def _spellings(shapes: Collection[str]) -> dict[str, str]:
    """Wan's name of every module by each way that a file may write it."""
    found = {}
    for module in {name.rpartition(".")[0] for name in shapes}:
        theirs = diffusers_name(f"{module}.weight").removesuffix(".weight")
        for written in (module, theirs):
            found[written] = found[written.replace(".", "_")] = module
    return found


def _module(written: str, spellings: Mapping[str, str], source: str) -> str:
    bare = _KOHYA_PREFIX.sub("", written)
    if bare in spellings:
        return spellings[bare]
    if IMAGE_BRANCH.search(f"{written}.") or re.search(r"_(img_emb|[kv]_img|add_[kv]_proj)", written):
        raise CheckpointError(
            f"{source} adapts an image branch ({printable(written)}), which text-to-video models do not have: give a "
            "LoRA of a text-to-video model"
        )
    raise CheckpointError(
        f"{source} adapts {printable(written)}, which this model does not have: it is of another model or size"
    )


def _scale(module: str, written: str, parts: Mapping[str, Tensor], settings: PeftSettings | None, source: str) -> float:
    """What the product of a module's pair is multiplied by; the pair is checked first.

    Args:
        written: the module's name in the file, which peft's settings are about.

    Raises:
        CheckpointError: the pair is not whole or of wrong shapes, or alpha is no number.
    """
    down, up, alpha = parts.get("down"), parts.get("up"), parts.get("alpha")
    if (down is None) != (up is None):
        has, lacks = ("lora_A", "lora_B") if up is None else ("lora_B", "lora_A")
        raise CheckpointError(f"{source}: {module} has {has} without {lacks}: it is damaged or not complete")
    if down is None or up is None:
        if alone := parts.keys() & {"alpha", "up_bias"}:
            raise CheckpointError(f"{source}: {module} has {min(alone)} without lora_A: it is damaged or not complete")
        return 1.0
    if down.ndim < 2 or up.ndim < 2 or up.shape[1:].numel() != len(down) or not down.numel():
        raise CheckpointError(
            f"{source}: the adapter of {module} is of {tuple(down.shape)} and {tuple(up.shape)}, it must be [rank, "
            "in] and [out, rank]"
        )
    if alpha is None:
        return 1.0 if settings is None else settings.scale(written, len(down), source)
    if alpha.numel() == 1 and not float(alpha):
        # Some programs read 0 as the rank, others as no change at all.
        raise CheckpointError(f"{source}: alpha of {module} is 0, which says nothing: remove it, or give the number")
    if alpha.numel() != 1 or abs(float(alpha)) > MAX_ALPHA:
        found = f"is {float(alpha):g}" if alpha.numel() == 1 else f"has the shape {tuple(alpha.shape)}"
        raise CheckpointError(f"{source}: alpha of {module} {found}, it must be a number of at most {MAX_ALPHA:g}")
    return float(alpha) / len(down)


def _changes(module: str, parts: Mapping[str, Tensor], scale: float) -> Iterator[tuple[str, LowRank | Tensor]]:
    """The changes of a module's parameters, by name."""
    if "down" in parts:
        down, up = parts["down"], parts["up"]
        yield f"{module}.weight", LowRank(down.flatten(1), up.flatten(1), scale)
        if "up_bias" in parts:
            yield f"{module}.bias", scale * parts["up_bias"].float()
    for part, kind in _DENSE.items():
        if part in parts:
            yield f"{module}.{kind}", parts[part]


def _require_shape(name: str, change: LowRank | Tensor, shapes: Mapping[str, torch.Size], source: str) -> None:
    """Make sure that a change fits its parameter.

    Raises:
        CheckpointError: there is no such parameter, or it has another shape.
    """
    shape = shapes.get(name)
    if shape is None:
        raise CheckpointError(f"{source} changes {printable(name)}, which this model does not have: it is of another")
    if isinstance(change, LowRank):
        found: tuple[int, ...] = (len(change.up), change.down.shape[1])
        wanted: tuple[int, ...] = (shape[0], shape[1:].numel()) if len(shape) > 1 else tuple(shape)
    else:
        found, wanted = tuple(change.shape), tuple(shape)
    if found != wanted:
        raise CheckpointError(
            f"{source}: the change of {name} is of {found}, the model has {wanted}: it is of another model or size"
        )
