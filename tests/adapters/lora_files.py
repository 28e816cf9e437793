"""LoRA files in the layouts that users have, for a tiny model."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from published import pickled, stored
from torch import Tensor

from wan.checkpoints.formats import diffusers_name

RANK, ALPHA = 3, 5.0
LINEARS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
Pairs = Mapping[str, tuple[Tensor, Tensor]]


def new_pairs(shapes: Mapping[str, torch.Size], blocks: tuple[int, ...] = (0, 2), rank: int = RANK) -> Pairs:
    """A pair (A, B) of random values for linears of some blocks, by Wan's names of modules."""
    pairs = {}
    for name in [f"blocks.{block}.{linear}" for block in blocks for linear in LINEARS]:
        out, width = shapes[f"{name}.weight"]
        pairs[name] = (0.3 * torch.randn(rank, width), 0.3 * torch.randn(out, rank))
    return pairs


def products(pairs: Pairs, scale: float) -> dict[str, Tensor]:
    """The changes of weights, in float64."""
    return {f"{name}.weight": scale * (b.double() @ a.double()) for name, (a, b) in pairs.items()}


def theirs(module: str) -> str:
    """diffusers' name of a module."""
    return diffusers_name(f"{module}.weight").removesuffix(".weight")


def named(pairs: Pairs, pattern: str, name: Callable[[str], str] = str) -> dict[str, Tensor]:
    """Entries of a file.

    Args:
        pattern: with the module's name, and A or B as it is written.
    """
    words = ("lora_A", "lora_B") if "lora" not in pattern.partition("{}")[2] else ("down", "up")
    return {
        pattern.replace("{}", name(module), 1).replace("[]", word): value
        for module, pair in pairs.items()
        for word, value in zip(words, pair, strict=True)
    }


def alphas(pairs: Pairs, pattern: str, name: Callable[[str], str] = str) -> dict[str, Tensor]:
    """Scalar alphas of all modules."""
    return {pattern.replace("{}", name(module)): torch.tensor(ALPHA) for module in pairs}


def peft_folder(state: Mapping[str, Tensor], folder: Path, **settings: Any) -> Path:
    """A folder as peft writes it."""
    stored(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_dora": False} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def kohya(module: str) -> str:
    """kohya's name of a module."""
    return module.replace(".", "_")


def in_header(state: Mapping[str, Tensor], file: Path) -> Path:
    """A file as diffusers writes it, with peft's settings in its header."""
    from safetensors.torch import save_file

    settings = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.use_dora": False}
    save_file(dict(state), file, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    return file


@dataclass(frozen=True)
class LoRALayout:
    """A kind of file.

    Attributes:
        write: writes pairs into a folder; returns what to load.
        scale: of the products, as the file says it.
    """

    write: Callable[[Pairs, Path], Path]
    scale: float


PEFT, PEFT_NAMED = "base_model.model.{}.[].weight", "base_model.model.{}.[].default.weight"
NATIVE, NATIVE_WORDS = "diffusion_model.{}.[].weight", "diffusion_model.{}.lora_[].weight"
WRAPPED = "base_model.model.model._fsdp_wrapped_module.{}.[].weight"
LAYOUTS: dict[str, LoRALayout] = {
    "peft": LoRALayout(lambda p, f: peft_folder(named(p, PEFT), f / "lora"), ALPHA / RANK),
    "peft, its file": LoRALayout(
        lambda p, f: peft_folder(named(p, PEFT), f / "lora") / "adapter_model.safetensors", ALPHA / RANK
    ),
    "peft, rank-stabilised": LoRALayout(
        lambda p, f: peft_folder(named(p, PEFT_NAMED), f, use_rslora=True), ALPHA / RANK**0.5
    ),
    "peft without its settings": LoRALayout(lambda p, f: stored(named(p, PEFT_NAMED), f / "a.safetensors"), 1.0),
    "LongLive": LoRALayout(
        lambda p, f: pickled({"generator_lora": named(p, PEFT), "critic_lora": {"x": torch.ones(1)}}, f / "lora.pt"),
        1.0,
    ),
    "wrapped for training": LoRALayout(
        lambda p, f: pickled({"generator_lora": named(p, WRAPPED), "step": 3}, f / "lora.pt"), 1.0
    ),
    "diffusers": LoRALayout(
        lambda p, f: (
            stored(named(p, "transformer.{}.[].weight", theirs), f / "pytorch_lora_weights.safetensors").parent
        ),
        1.0,
    ),
    "diffusers with settings": LoRALayout(
        lambda p, f: in_header(named(p, "transformer.{}.[].weight", theirs), f / "a.safetensors"), ALPHA / RANK
    ),
    "ComfyUI": LoRALayout(lambda p, f: stored(named(p, NATIVE), f / "a.safetensors"), 1.0),
    "ComfyUI with alphas": LoRALayout(
        lambda p, f: stored(
            named(p, NATIVE_WORDS) | alphas(p, "diffusion_model.{}.alpha"), f / "wan2.1_t2v_14b_lora.safetensors"
        ),
        ALPHA / RANK,
    ),
    "kohya": LoRALayout(
        lambda p, f: stored(
            named(p, "lora_unet_{}.lora_[].weight", kohya) | alphas(p, "lora_unet_{}.alpha", kohya), f / "a.safetensors"
        ),
        ALPHA / RANK,
    ),
    "kohya, diffusers' names": LoRALayout(
        lambda p, f: stored(named(p, "lora_unet_{}.lora_[].weight", lambda m: kohya(theirs(m))), f / "a.safetensors"),
        1.0,
    ),
    "old diffusers": LoRALayout(
        lambda p, f: stored(named(p, "transformer.{}.lora.[].weight", theirs), f / "a.safetensors"), 1.0
    ),
}
"""Writers of everything that loads."""
