"""The formats that transformer weights come in, all read into Wan's own parameter names.

native folder       config.json + diffusion_pytorch_model.safetensors (or its shards)
diffusers folder    transformer/ of diffusers' WanTransformer3DModel, or of our models
Causal Forcing .pt  {"generator": …, "generator_ema": …}, names behind the wrappers of a training run
.safetensors, .pt   names to tensors
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan.checkpoints.loading import StateDict, as_state_dict, read_folder, read_weights, summarize_names
from wan.utils.errors import CheckpointError

OUR_CLASSES = ("CausalWanModel", "HybridWanModel")
GENERATOR, GENERATOR_EMA = "generator", "generator_ema"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
# Wrappers of training frameworks, anywhere in a name, and the module that held the network, at its start.
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_HOLDERS = re.compile(r"^((module|model)\.)+")

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
_NATIVE_DEFAULTS: dict[str, Any] = {"patch_size": (1, 2, 2), "text_dim": 4096, "qk_norm": True, "cross_attn_norm": True}
_NATIVE_KEYS = (
    "text_len",
    "in_dim",
    "dim",
    "ffn_dim",
    "freq_dim",
    "out_dim",
    "num_heads",
    "num_layers",
    "eps",
    "model_type",
)

_IMAGE_BRANCH = re.compile(r"(^img_emb\.|\.k_img\.|\.add_k_proj\.)")
_FAMILIES = (
    (re.compile(r"^(encoder|decoder)\.(conv1|downsamples|upsamples|middle|conv_in|mid_block)"), "a VAE"),
    (re.compile(r"^(token_embedding|shared|encoder\.block)\."), "a text encoder"),
    (_IMAGE_BRANCH, "an image-to-video transformer with an image branch"),
    (re.compile(r"(lora_down|lora_up|\.lora\.|lora_A\.(default|weight))"), "a LoRA of another tool"),
)


@dataclass(frozen=True)
class TransformerWeights:
    """Transformer weights under Wan's names.

    Attributes:
        state: names to tensors.
        config: constructor arguments of the model, as far as the source states them; empty for bare files.
        source: where they came from, for messages.
        causal: whether the source says that it was trained for causal generation; None if it does not say.
    """

    state: StateDict
    source: str
    config: dict[str, Any] = field(default_factory=dict)
    causal: bool | None = None


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


def native_config(diffusers_config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor arguments from the config of diffusers' WanTransformer3DModel."""
    c = diffusers_config
    if c.get("image_dim") is not None or c.get("added_kv_proj_dim") is not None:
        raise CheckpointError(
            "this is an image-to-video transformer with an image branch: only text-to-video is supported"
        )
    return {
        "patch_size": tuple(c["patch_size"]),
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
    }


def read_config(path: Path) -> dict[str, Any]:
    """A config.json.

    Raises:
        CheckpointError: missing or malformed.
    """
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"no config.json in {path.parent}: give the folder of a model") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no settings: download it again")
    return config


def transformer_config(folder: Path) -> dict[str, Any]:
    """Constructor arguments of the transformer in a native, diffusers or our own folder.

    Raises:
        CheckpointError: no transformer there that we can build.
    """
    folder = transformer_folder(folder)
    config = read_config(folder / "config.json")
    kind = config.get("_class_name")
    if kind == "WanTransformer3DModel":
        return native_config(config)
    if kind in OUR_CLASSES:
        return {name: value for name, value in config.items() if not name.startswith("_")}
    if kind in ("WanModel", None) and "dim" in config:
        return _NATIVE_DEFAULTS | {name: config[name] for name in _NATIVE_KEYS if name in config}
    raise CheckpointError(f"{folder}/config.json describes a {kind}, not a Wan text-to-video transformer")


def transformer_folder(folder: Path) -> Path:
    """The folder that holds the transformer: `folder` itself or its `transformer`.

    Raises:
        CheckpointError: there is no such folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no model folder {folder}: run scripts/download_weights.py or check the path")
    inner = folder / "transformer"
    return inner if inner.is_dir() else folder


def read_transformer(path: str | Path, use_ema: bool = False) -> TransformerWeights:
    """Read transformer weights of any supported format into Wan's names.

    Args:
        path: a folder or a weight file.
        use_ema: of a file with `generator` and `generator_ema`, take the latter.

    Raises:
        CheckpointError: not a transformer, damaged, or without the EMA weights asked for.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, use_ema)
    weights = read_weights(path)
    if GENERATOR in weights or GENERATOR_EMA in weights:
        key = GENERATOR_EMA if use_ema else GENERATOR
        if key not in weights:
            other = GENERATOR if use_ema else GENERATOR_EMA
            raise CheckpointError(f"{path} has {other!r} but no {key!r}: {'drop' if use_ema else 'give'} --use_ema")
        inner = weights[key]
        if not isinstance(inner, Mapping):
            raise CheckpointError(f"{path}: {key!r} is a {type(inner).__name__}, not a dictionary of tensors")
        return TransformerWeights(_named(as_state_dict(inner, path), path), str(path), causal=True)
    if use_ema:
        raise CheckpointError(f"{path} has no {GENERATOR_EMA!r}: drop --use_ema")
    return TransformerWeights(_named(as_state_dict(weights, path), path), str(path))


def _read_folder(path: Path, use_ema: bool) -> TransformerWeights:
    if use_ema:
        raise CheckpointError(f"{path} is a folder, which holds one set of weights: drop --use_ema")
    folder = transformer_folder(path)
    config = transformer_config(path)
    state, file = read_folder(folder, WEIGHT_FILES)
    ours = read_config(folder / "config.json").get("_class_name") in OUR_CLASSES
    return TransformerWeights(_named(state, file), str(folder), config, causal=ours)


def _named(state: StateDict, path: Path) -> StateDict:
    """Names in Wan's style, wrappers and diffusers' names undone; raises on other families and on collisions."""
    named = {unwrapped_name(name): value for name, value in state.items()}
    if any(name.startswith("condition_embedder.") for name in named):
        named = {native_name(name): value for name, value in named.items()}
    if len(named) != len(state):
        raise CheckpointError(f"{path}: several entries have one name once wrappers are removed")
    if "patch_embedding.weight" not in named or any(_IMAGE_BRANCH.search(name) for name in named):
        raise CheckpointError(
            f"{path} holds {family(named)}, not a Wan text-to-video transformer: check --checkpoint_path"
        )
    return named


def family(names: Mapping[str, Any]) -> str:
    """What a weight file seems to hold, for an error message."""
    for pattern, what in _FAMILIES:
        if any(pattern.search(name) for name in names):
            return what
    return f"unknown weights ({summarize_names(names)})" if names else "nothing"
