"""The formats that transformer weights come in, all read into Wan's own parameter names.

native folder       config.json + diffusion_pytorch_model.safetensors (or its shards)
diffusers folder    transformer/ of diffusers' WanTransformer3DModel, or of our models
training's .pt      {"generator": …, "generator_ema": …} or {"model": …}, names behind a training run's wrappers
.safetensors, .pt   names to tensors, also behind the prefixes of other programs
"""

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from wan.checkpoints.configs import check_settings, read_config
from wan.checkpoints.fields import (
    DIFFUSERS,
    DIFFUSERS_OPTIONAL,
    HYBRID,
    NATIVE_NEUTRAL,
    NATIVE_TEXT_DIM,
    OPTIONAL_HYBRID,
    RELEASED,
    SIZES,
    WAN_22_CHANNELS,
)
from wan.checkpoints.identify import (
    A_LORA,
    HYBRID_ALONE,
    LORA_FILES,
    OPTIMIZER,
    SHARD,
    family,
    other_architecture,
    quantisation,
)
from wan.checkpoints.loading import StateDict, as_state_dict, read_folder, read_weights
from wan.checkpoints.pickles import Opaque
from wan.checkpoints.record import RECORD, read_record
from wan.checkpoints.tensors import printable, require_floating, require_one_type_per_role
from wan.utils.errors import CheckpointError

log = logging.getLogger(__name__)

OUR_CLASSES = ("CausalWanModel", "HybridWanModel")
GENERATOR, GENERATOR_EMA, MODEL = "generator", "generator_ema", "model"
TEXT_TO_VIDEO = "t2v"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
DIFFUSERS_CLASS, CAUSAL_DIFFUSERS_CLASS = "WanTransformer3DModel", "CausalWanTransformer3DModel"
"""Classes of diffusers, and of a causal model under diffusers' names."""
EXPERTS = ("high_noise_model", "low_noise_model", "transformer_2")
"""Folders in which Wan 2.2 14B has one of its two transformers."""
# Wrappers of training frameworks, anywhere in a name, and the module that held the network, at its start.
_WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
_HOLDERS = re.compile(r"^((model|diffusion_model|transformer)\.)+")
_BLOCK_NUMBER = re.compile(r"^blocks\.(\d+)\.")
# diffusers' name of a part, and Wan's.
_DIFFUSERS_PARTS = (
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".o."),
    (".norm2.", ".norm3."),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    ("proj_out.", "head.head."),
)


@dataclass(frozen=True)
class TransformerWeights:
    """Transformer weights under Wan's names.

    Attributes:
        state: names to tensors.
        config: constructor arguments of the model, as far as the source states them; empty for bare files.
        source: where they came from, for messages.
        causal: whether the source says that it was trained for causal generation; None if it does not say.
        record: what the weight file itself says of how it was made, which must agree with all else that is said.
    """

    state: StateDict
    source: str
    config: dict[str, Any] = field(default_factory=dict)
    causal: bool | None = None
    record: dict[str, Any] = field(default_factory=dict)


def unwrapped_name(name: str) -> str:
    """A parameter's name without what a training framework or a holding module put before or into it."""
    return _HOLDERS.sub("", _WRAPPERS.sub("", name))


def native_name(name: str) -> str:
    """Wan's name of a parameter of diffusers' WanTransformer3DModel."""
    if name == "scale_shift_table":
        return "head.modulation"
    name = name.replace(".scale_shift_table", ".modulation")
    for theirs, ours in _DIFFUSERS_PARTS:
        name = name.replace(theirs, ours)
    return name


def diffusers_name(name: str) -> str:
    """The name that diffusers' WanTransformer3DModel gives to a parameter of Wan's."""
    if name == "head.modulation":
        return "scale_shift_table"
    name = re.sub(r"\.modulation$", ".scale_shift_table", name)
    for theirs, ours in _DIFFUSERS_PARTS:
        name = name.replace(ours, theirs)
    return name


def native_config(diffusers_config: Mapping[str, Any], source: str | Path = "config.json") -> dict[str, Any]:
    """Our constructor arguments from the config of diffusers' WanTransformer3DModel.

    Raises:
        CheckpointError: a setting is missing, unknown or out of range, or belongs to an image branch.
    """
    c = diffusers_config
    if c.get("image_dim") is not None or c.get("added_kv_proj_dim") is not None:
        raise CheckpointError(
            f"{source} is an image-to-video transformer with an image branch: give a text-to-video model"
        )
    c = check_settings(c, DIFFUSERS, source, needed=DIFFUSERS.keys() - set(DIFFUSERS_OPTIONAL))
    return {
        "patch_size": tuple(c["patch_size"]),
        "text_len": 512,  # diffusers leaves it to the pipeline, whose default it is
        "in_dim": c["in_channels"],
        "out_dim": c["out_channels"],
        "dim": c["num_attention_heads"] * c["attention_head_dim"],
        "num_heads": c["num_attention_heads"],
        "num_layers": c["num_layers"],
        "ffn_dim": c["ffn_dim"],
        "freq_dim": c["freq_dim"],
        "text_dim": c["text_dim"],
        "cross_attn_norm": c["cross_attn_norm"],
        "qk_norm": c["qk_norm"] is not None,
        "eps": c["eps"],
        "model_type": "t2v",
    }


def transformer_config(folder: Path) -> dict[str, Any]:
    """Constructor arguments of the transformer in a native, diffusers or our own folder, all of them.

    Raises:
        CheckpointError: no transformer there that we can build, or a setting that is missing, unknown or out of range.
    """
    config = stated_config(folder)
    require_sizes(config, transformer_folder(folder) / "config.json")
    return config


def require_sizes(config: Mapping[str, Any], source: str | Path) -> None:
    """Make sure that a config has all sizes, and that they fit one another.

    Raises:
        CheckpointError: one is missing, or dim does not divide into heads.
    """
    check_settings(config, SIZES, source, needed=SIZES.keys(), others=True)
    dim, heads = config["dim"], config["num_heads"]
    if dim % heads or dim // heads % 2:
        raise CheckpointError(
            f"{source}: dim {dim} does not divide into num_heads {heads} of an even number of channels: "
            "correct it, or download it again"
        )
    if config["patch_size"][0] != 1:
        raise CheckpointError(f"{source}: patch_size {config['patch_size']} has several frames: give a model with 1")


def stated_config(folder: Path) -> dict[str, Any]:
    """As `transformer_config`, but only what a native config.json says, with the values that all released models have.

    Raises:
        CheckpointError: no transformer there, or a setting that is unknown or out of range.
    """
    path = transformer_folder(folder) / "config.json"
    config = read_config(path)
    kind = config.get("_class_name")
    if WAN_22_CHANNELS in (config.get("in_dim"), config.get("in_channels")):
        raise _wan_22(path)
    task = config.get("model_type", TEXT_TO_VIDEO)
    if isinstance(task, str) and task != TEXT_TO_VIDEO:
        raise CheckpointError(f"{path} describes a model of model_type {printable(task)}: give one of {TEXT_TO_VIDEO}")
    if kind == CAUSAL_DIFFUSERS_CLASS:
        check_settings(config, NATIVE_NEUTRAL, path, others=True)
        config = {name: value for name, value in config.items() if name not in NATIVE_NEUTRAL}
    if kind in (DIFFUSERS_CLASS, CAUSAL_DIFFUSERS_CLASS):
        return native_config(config, path)
    if kind == "HybridWanModel":
        fields = SIZES | HYBRID | OPTIONAL_HYBRID
        return _with_patches(check_settings(config, fields, path, needed=SIZES.keys() | HYBRID.keys()))
    if kind == "CausalWanModel" and not config.keys() & NATIVE_NEUTRAL.keys():
        return _with_patches(check_settings(config, SIZES, path, needed=SIZES.keys())) | {"hybrid_layers": []}
    if kind in ("WanModel", "CausalWanModel") or (kind is None and "dim" in config):
        found = check_settings(config, SIZES | NATIVE_NEUTRAL, path, needed=("dim", "num_layers"))
        sizes = {name: value for name, value in found.items() if name in SIZES}
        return _with_patches(RELEASED | {"text_dim": NATIVE_TEXT_DIM} | sizes)
    raise CheckpointError(
        f"{path} describes a {printable(kind)}, not a Wan text-to-video transformer: give the folder of one"
    )


def _with_patches(config: dict[str, Any]) -> dict[str, Any]:
    """The config with its patch size as a tuple, which JSON does not have."""
    return config | {"patch_size": tuple(config["patch_size"])} if "patch_size" in config else config


def transformer_folder(folder: Path) -> Path:
    """The folder that holds the transformer: `folder` itself or its `transformer`.

    Raises:
        CheckpointError: there is no such folder, or it has two transformers.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no model folder {folder}: run scripts/download_weights.py or check the path")
    if experts := [name for name in EXPERTS if (folder / name).is_dir() or folder.name == name]:
        raise CheckpointError(
            f"{folder} is of Wan 2.2 14B, with two transformers for high and low noise ({experts[0]}): give a model "
            "that has one"
        )
    inner = folder / "transformer"
    return inner if inner.is_dir() else folder


def has_config(folder: Path) -> bool:
    """Whether a folder has a transformer's config.json; one of shards alone, for which others say the sizes, has not.

    Raises:
        CheckpointError: see `transformer_folder`.
    """
    return (transformer_folder(folder) / "config.json").is_file()


def read_transformer(path: str | Path, use_ema: bool = False) -> TransformerWeights:
    """Read transformer weights of any supported format into Wan's names.

    Args:
        path: a folder or a weight file.
        use_ema: of a file with `generator` and `generator_ema`, take the latter; where only one of both is, it is
            taken without being asked for.

    Raises:
        CheckpointError: not a transformer, damaged, or without the EMA weights asked for.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, use_ema)
    weights = read_weights(path)
    record = read_record(path, weights)
    weights.pop(RECORD, None)
    if key := _chosen_key(weights, path, use_ema):
        inner = weights[key]
        if not isinstance(inner, Mapping):
            raise CheckpointError(
                f"{path}: {key!r} is of type {type(inner).__name__}, not a dictionary of tensors: save it as one"
            )
        causal = None if key == MODEL else True
        return TransformerWeights(_named(inner, path), str(path), causal=causal, record=record)
    if use_ema:
        raise CheckpointError(f"{path} has no {GENERATOR_EMA!r}: drop use_ema")
    # Arguments of a training script beside the weights; no weight lacks a dot.
    kept = {name: value for name, value in weights.items() if not (isinstance(value, Opaque) and "." not in str(name))}
    return TransformerWeights(_named(kept, path), str(path), record=record)


def _chosen_key(weights: Mapping[Any, Any], path: Path, use_ema: bool) -> str | None:
    """The entry of a training's file that holds the wanted weights; None for a file of names to tensors.

    Raises:
        CheckpointError: there are no EMA weights, or it does not show which weights are meant.
    """
    found = [key for key in (GENERATOR, GENERATOR_EMA, MODEL) if key in weights]
    if not found:
        return None
    if MODEL in found and len(found) > 1:
        raise CheckpointError(f"{path} has both {found[0]!r} and {MODEL!r}: save the weights that are meant alone")
    if use_ema and GENERATOR_EMA not in found:
        raise CheckpointError(f"{path} has {found[0]!r} but no {GENERATOR_EMA!r}: drop use_ema")
    if found == [GENERATOR_EMA] and not use_ema:
        log.info("%s has %s alone: it is taken", path, GENERATOR_EMA)
    return GENERATOR_EMA if use_ema else found[0]


def _read_folder(path: Path, use_ema: bool) -> TransformerWeights:
    if use_ema:
        raise CheckpointError(f"{path} is a folder, which holds one set of weights: drop use_ema")
    folder = transformer_folder(path)
    is_stated = has_config(path)
    if not is_stated and any((folder / name).is_file() for name in LORA_FILES):
        raise _not_a_transformer(folder, A_LORA)
    if not is_stated and not any(SHARD.search(file.name) for file in folder.glob("*.safetensors")):
        read_config(folder / "config.json")  # says that it is missing
    config = stated_config(path) if is_stated else {}
    state, file = read_folder(folder, WEIGHT_FILES)
    kind = read_config(folder / "config.json").get("_class_name") if is_stated else None
    causal = kind in (*OUR_CLASSES, CAUSAL_DIFFUSERS_CLASS) if is_stated else None
    named = _named(state, folder if SHARD.search(file.name) else file)
    return TransformerWeights(named, str(folder), config, causal=causal, record=read_record(file, state))


def _named(weights: Mapping[Any, Any], path: Path) -> StateDict:
    """Names in Wan's style, wrappers and diffusers' names undone.

    Raises:
        CheckpointError: another family, names that collide, or tensors that are no weights.
    """
    names = [name for name in weights if isinstance(name, str)]
    what = family(names)
    if what in (OPTIMIZER, A_LORA):
        raise _not_a_transformer(path, what)
    state = as_state_dict(weights, path)
    named = {unwrapped_name(name): value for name, value in state.items()}
    if any(name.startswith("condition_embedder.") for name in named):
        named = {native_name(name): value for name, value in named.items()}
    if len(named) != len(state):
        raise CheckpointError(
            f"{path}: several entries have one name once wrappers are removed: save the weights without wrappers"
        )
    shard = SHARD.search(path.name)
    if shard and int(shard[2]) > 1 and path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is one shard of {int(shard[2])}: give its folder, or the .safetensors.index.json beside it"
        )
    if "patch_embedding.weight" not in named:
        raise _not_a_transformer(path, what)
    _require_wan_21(named, path)
    require_floating(named, path)
    require_one_type_per_role(named, path)
    return named


def _require_wan_21(state: Mapping[str, Tensor], path: Path) -> None:
    """Make sure that weights are of the architecture of Wan 2.1 text to video, as far as names and channels show it.

    Raises:
        CheckpointError: they are not, or they are quantised; the message says what they are.
    """
    if what := other_architecture(state):
        raise _not_a_transformer(path, what)
    if what := quantisation(state):
        raise CheckpointError(f"{path} holds {what}: give the weights as float32, float16 or bfloat16")
    patches, head = state["patch_embedding.weight"], state.get("head.head.weight")
    if patches.ndim != 5 or head is None or head.ndim != 2:
        return  # whatever this is, names and shapes will not fit
    channels, values = patches.shape[1], patches.shape[2:].numel()
    if channels == WAN_22_CHANNELS:
        raise _wan_22(path)
    if values and channels > head.shape[0] // values:
        raise _not_a_transformer(
            path,
            f"a transformer that reads {channels} channels and predicts {head.shape[0] // values}, the others being "
            "of an image or a control",
        )


def _wan_22(source: Path) -> CheckpointError:
    return CheckpointError(
        f"{source} is of Wan 2.2 5B, another backbone with {WAN_22_CHANNELS} latent channels and a VAE of its own: "
        "give a model of Wan 2.1"
    )


def _not_a_transformer(path: Path, what: str) -> CheckpointError:
    if what == HYBRID_ALONE:
        return CheckpointError(
            f"{path} holds {what}, without the softmax model that they belong on: give softmax weights or whole ones, "
            "which scripts/convert_checkpoint.py makes of both (--model_folder)"
        )
    if what == A_LORA:
        return CheckpointError(
            f"{path} holds {what}: give it as --lora, and the model that it was made for as --checkpoint_path"
        )
    return CheckpointError(f"{path} holds {what}, not a Wan text-to-video transformer: give the weights of one")


def num_blocks_in(state: Collection[str]) -> int:
    """Count the blocks in the names of a transformer's parameters."""
    return len({match[1] for name in state if (match := _BLOCK_NUMBER.match(name))})
