"""Files in the layouts of published causal models, at the size of a tiny model: one writer per layout."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import TINY
from torch import Tensor

from wan.checkpoints.formats import diffusers_name

State = Mapping[str, Tensor]
DIFFUSERS_CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "num_attention_heads": TINY["num_heads"],
    "attention_head_dim": TINY["dim"] // TINY["num_heads"],
    "in_channels": TINY["in_dim"],
    "out_channels": TINY["out_dim"],
    "text_dim": TINY["text_dim"],
    "freq_dim": TINY["freq_dim"],
    "ffn_dim": TINY["ffn_dim"],
    "num_layers": TINY["num_layers"],
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "rope_max_seq_len": 1024,
}
FSDP_BLOCK = "model._fsdp_wrapped_module.{}._fsdp_wrapped_module._checkpoint_wrapped_module.{}"


@dataclass(frozen=True)
class Layout:
    """A published file.

    Attributes:
        write: writes weights into a folder; returns what to load.
        causal: what loading says of it, see `wan.checkpoints.formats.TransformerWeights`.
    """

    write: Callable[[State, Path], Path]
    causal: bool | None


def wrapped(state: State, pattern: str = "model.{}") -> dict[str, Tensor]:
    """The weights under names with a prefix."""
    return {pattern.format(name): value for name, value in state.items()}


def sharded_by_fsdp(state: State) -> dict[str, Tensor]:
    """The weights under names with wrappers before, in and after the block's number."""

    def name_of(name: str) -> str:
        if not name.startswith("blocks."):
            return f"model._fsdp_wrapped_module.{name}"
        _, number, rest = name.split(".", 2)
        return FSDP_BLOCK.format(f"blocks.{number}", rest)

    return {name_of(name): value for name, value in state.items()}


def pickled(content: Mapping[str, Any], file: Path) -> Path:
    """A .pt file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(content), file)
    return file


def stored(state: State, file: Path) -> Path:
    """A .safetensors file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, file, {"format": "pt"})
    return file


def shards(state: State, folder: Path, count: int, *, index: bool) -> Path:
    """A folder of shards, with or without their index."""
    names, weight_map = sorted(state), {}
    for number in range(count):
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = names[number::count]
        stored({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        page = folder / "diffusion_pytorch_model.safetensors.index.json"
        page.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def diffusers_folder(state: State, folder: Path, **config: Any) -> Path:
    """A transformer in diffusers' layout."""
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    stored({diffusers_name(name): value for name, value in state.items()}, file)
    file.with_name("config.json").write_text(json.dumps(DIFFUSERS_CONFIG | config))
    return folder


def beside_critic(state: State) -> dict[str, Any]:
    """A training's file: generator, critic and counters."""
    return {"generator": wrapped(state), "critic": {"model.x": torch.ones(2)}, "step": 600}


def with_scales(state: State, names: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of linear layers in a narrow type, with scale tensors beside them."""
    linear = [name for name, value in state.items() if value.ndim == 2 and name.endswith(".weight")]
    narrow = {name: (state[name].to(dtype) if dtype.is_floating_point else state[name].byte()) for name in linear}
    scales = {name.removesuffix("weight") + end: torch.ones(1) for name in linear for end in names}
    return wrapped({**state, **narrow, **scales})


LAYOUTS: dict[str, Layout] = {
    "Self-Forcing": Layout(lambda s, f: pickled({"generator_ema": wrapped(s)}, f / "self_forcing_dmd.pt"), True),
    "Self-Forcing, flat mirror": Layout(lambda s, f: pickled(wrapped(s), f / "self_forcing_dmd.pt"), None),
    "Causal-Forcing, chunk-wise": Layout(
        lambda s, f: pickled({"generator": wrapped(s)}, f / "chunkwise/causal_forcing.pt"), True
    ),
    "Causal-Forcing, frame-wise and ++": Layout(
        lambda s, f: pickled({"generator_ema": wrapped(s)}, f / "causal-forcing++/framewise-1step.pt"), True
    ),
    "CausVid": Layout(lambda s, f: pickled(beside_critic(s), f / "autoregressive_checkpoint/model.pt"), True),
    "CausVid 14B": Layout(lambda s, f: pickled(s, f / "causvid_model.pt"), None),
    "LongLive": Layout(lambda s, f: pickled({"generator": wrapped(s)}, f / "models/longlive_base.pt"), True),
    "LongLive, model": Layout(lambda s, f: pickled({"model": wrapped(s)}, f / "models/longlive_base.pt"), None),
    "MemFlow": Layout(lambda s, f: pickled({"generator": wrapped(s)}, f / "base.pt"), True),
    "Reward-Forcing": Layout(lambda s, f: pickled({"generator_ema": wrapped(s)}, f / "rewardforcing.pt"), True),
    "Reward-Forcing, flat": Layout(lambda s, f: pickled(wrapped(s), f / "rewardforcing.pt"), None),
    "RollingForcing": Layout(
        lambda s, f: pickled({"generator_ema": sharded_by_fsdp(s)}, f / "rolling_forcing_dmd.pt"), True
    ),
    "Infinite-Forcing": Layout(lambda s, f: pickled({"generator_ema": wrapped(s)}, f / "infinite_forcing.pt"), True),
    "Krea, one file": Layout(lambda s, f: stored(wrapped(s), f / "krea-realtime-video-14b.safetensors"), None),
    "Krea, shards": Layout(lambda s, f: shards(s, f / "transformer", 3, index=False).parent, None),
    "Krea, shards with their index": Layout(lambda s, f: shards(s, f / "transformer", 3, index=True), None),
    "StreamDiffusionV2": Layout(
        lambda s, f: pickled({"generator": wrapped(s)}, f / "wan_causal_dmd_v2v/model.pt"), True
    ),
    "SFWan in diffusers' layout": Layout(diffusers_folder, False),
    "SFWan under a causal class": Layout(
        lambda s, f: diffusers_folder(s, f, _class_name="CausalWanTransformer3DModel", local_attn_size=-1, sink_size=0),
        True,
    ),
    "ComfyUI, of a checkpoint": Layout(
        lambda s, f: stored(wrapped(s, "model.diffusion_model.{}"), f / "a.safetensors"), None
    ),
    "ComfyUI, of a model": Layout(lambda s, f: stored(wrapped(s, "diffusion_model.{}"), f / "a.safetensors"), None),
    "data parallel inside": Layout(
        lambda s, f: pickled({"generator": wrapped(s, "model._orig_mod.module.{}")}, f / "a.pt"), True
    ),
    "data parallel outside": Layout(
        lambda s, f: pickled({"generator": wrapped(s, "module._orig_mod.model.{}")}, f / "a.pt"), True
    ),
}
"""Writers of everything that loads, by published model."""


def _like(state: State, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {**state, name: torch.ones(shape)}


REFUSED: dict[str, tuple[Callable[[State, Path], Path], str]] = {
    "FastWan": (
        lambda s, f: stored(
            {diffusers_name(n): v for n, v in _like(s, "blocks.0.to_gate_compress.weight", (24, 24)).items()},
            diffusers_folder(s, f) / "transformer" / "diffusion_pytorch_model.safetensors",
        ).parents[1],
        r"sparse attention \(to_gate_compress",
    ),
    "Self-Forcing-FP8": (
        lambda s, f: stored(with_scales(s, ("weight_scale",), torch.float8_e4m3fn), f / "a.safetensors"),
        "quantised to FP8 or INT8",
    ),
    "ComfyUI's scaled FP8": (
        lambda s, f: stored(
            {
                **with_scales(s, ("scale_weight",), torch.float8_e4m3fn),
                "scaled_fp8": torch.ones(2).to(torch.float8_e4m3fn),
            },
            f / "a.safetensors",
        ),
        "quantised to FP8 or INT8",
    ),
    "FP8 without scales": (
        lambda s, f: stored(with_scales(s, (), torch.float8_e4m3fn), f / "a.safetensors"),
        "is float8_e4m3fn",
    ),
    "Self-Forcing-NVFP4": (
        lambda s, f: stored(with_scales(s, ("weight_scale", "weight_global_scale"), torch.uint8), f / "a.safetensors"),
        r"quantised to FP4 \(NVFP4",
    ),
    "GGUF": (lambda s, f: _gguf(f / "wan2.1-t2v.gguf"), "a GGUF file, which is quantised"),
    "LongLive 2.0": (
        lambda s, f: pickled(
            {"generator": wrapped({**s, "patch_embedding.weight": torch.ones(24, 48, 1, 2, 2)})}, f / "a.pt"
        ),
        "Wan 2.2 5B, another backbone with 48 latent channels",
    ),
    "Wan 2.2 5B, a folder": (
        lambda s, f: _native_folder(s, f, {"model_type": "ti2v", "in_dim": 48, "out_dim": 48, "dim": 24}),
        "Wan 2.2 5B, another backbone with 48 latent channels",
    ),
    "Wan 2.2 14B": (
        lambda s, f: shards(s, f / "high_noise_model", 2, index=True).parent,
        "Wan 2.2 14B, with two transformers",
    ),
    "Wan 2.2 14B, one of its two": (
        lambda s, f: shards(s, f / "low_noise_model", 2, index=True),
        "Wan 2.2 14B, with two transformers",
    ),
    "Wan 2.2 14B in diffusers' layout": (
        lambda s, f: (diffusers_folder(s, f), (f / "transformer_2").mkdir())[0],
        "Wan 2.2 14B, with two transformers",
    ),
    "image to video by a CLIP branch": (
        lambda s, f: stored(_like(s, "blocks.0.cross_attn.k_img.weight", (24, 24)), f / "a.safetensors"),
        "an image branch",
    ),
    "image to video by channels": (
        lambda s, f: stored({**s, "patch_embedding.weight": torch.ones(24, 36, 1, 2, 2)}, f / "a.safetensors"),
        "reads 36 channels and predicts 4",
    ),
    "image to video, a folder": (
        lambda s, f: _native_folder(s, f, {"model_type": "i2v", "in_dim": 36, "dim": 24}),
        "a model of model_type i2v: give one of t2v",
    ),
    "VACE": (
        lambda s, f: pickled(wrapped(_like(s, "vace_blocks.0.before_proj.weight", (24, 24))), f / "a.pt"),
        "a VACE transformer",
    ),
    "control": (
        lambda s, f: stored(_like(s, "control_adapter.conv.weight", (24, 24)), f / "a.safetensors"),
        "a branch for controls",
    ),
    "a shard alone": (
        lambda s, f: shards(s, f, 3, index=False) / "diffusion_pytorch_model-00002-of-00003.safetensors",
        "is one shard of 3",
    ),
    "a shard missing": (
        lambda s, f: _without(shards(s, f, 3, index=False), "diffusion_pytorch_model-00002-of-00003.safetensors"),
        "lacks the shard diffusion_pytorch_model-00002-of-00003",
    ),
    "shards of two models": (
        lambda s, f: stored(s, shards(s, f, 3, index=False) / "x-00001-of-00001.safetensors").parent,
        "shards of several models",
    ),
    "a critic alone": (lambda s, f: pickled({"critic": wrapped(s)}, f / "a.pt"), "'critic' is a dict"),
    "two models": (
        lambda s, f: pickled({"generator": wrapped(s), "model": wrapped(s)}, f / "a.pt"),
        "has both 'generator' and 'model'",
    ),
    "a LoRA": (
        lambda s, f: pickled({"generator_lora": {"base_model.model.a.lora_A.weight": torch.ones(2)}}, f / "lora.pt"),
        "holds a LoRA: give it as --lora",
    ),
    "a LoRA of ComfyUI": (
        lambda s, f: stored(
            {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.ones(2)}, f / "a.safetensors"
        ),
        "holds a LoRA: give it as --lora",
    ),
}
"""Writers of everything that is refused, and words of the reason."""


def _gguf(file: Path) -> Path:
    file.write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    return file


def _without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def _native_folder(state: State, folder: Path, config: dict[str, Any]) -> Path:
    stored(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_layers": 3} | config))
    return folder
