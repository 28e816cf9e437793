"""Models with random weights, of any size and in the public layouts: for tests, speed and memory, not for pictures."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import UMT5EncoderModel

from arl2.model import HybridSettings, HybridWanModel, keep_gates_in_float32
from pipelines.generation.pipeline import CausalVideoPipeline
from wan.checkpoints.formats import WEIGHT_FILES
from wan.checkpoints.saving import write_safetensors
from wan.config import wan_size
from wan.text import NATIVE_TEXT_FILE, NATIVE_TOKENIZER_FOLDER, TOY_TEXT, save_native_umt5, umt5_config, word_tokenizer
from wan.vae.wan_vae import NATIVE_VAE_FILE, TOY_VAE, WanVAE, new_vae, save_native_vae


def random_pipeline(
    size: str,
    hybrid: HybridSettings = HybridSettings(),
    *,
    vae_config: Mapping[str, Any] = TOY_VAE,
    text_config: Mapping[str, Any] = TOY_TEXT,
    words: Sequence[str] = ("a", "red", "blue", "shape", "rolls"),
    seed: int = 0,
    device: torch.device = torch.device("cpu"),
    dtype: torch.dtype = torch.float32,
    **sampling: Any,
) -> CausalVideoPipeline:
    """A whole pipeline with random weights, which computes plainly until `optimize_for_inference` is called.

    Args:
        size: of the transformer, see `wan.config.WAN_SIZES`; its text_dim becomes that of the text encoder.
        hybrid: hybrid layers and adapters.
        vae_config, text_config: sizes; toy ones by default, `WAN21_VAE` and `UMT5_XXL` for the real ones.
        words: the tokenizer's vocabulary.
        seed, device, dtype: of the weights.
        sampling: further arguments of `CausalVideoPipeline`.
    """
    torch.manual_seed(seed)
    with _drawing(device, dtype):
        transformer = _new_transformer(wan_size(size) | {"text_dim": text_config["dim"]}, hybrid)
        text_encoder = UMT5EncoderModel(umt5_config(text_config))
        vae = new_vae(vae_config)
    for part in (transformer, text_encoder, vae):
        part.eval().requires_grad_(False)
    pipeline = CausalVideoPipeline(transformer, vae, text_encoder, word_tokenizer(words), **sampling)
    pipeline.optimizes_by_default = False
    return pipeline


def random_transformer(
    size: str,
    hybrid: HybridSettings = HybridSettings(),
    *,
    seed: int = 0,
    device: torch.device = torch.device("cpu"),
    dtype: torch.dtype = torch.float32,
) -> HybridWanModel:
    """The transformer alone, frozen; arguments as in `random_pipeline`. A_log and dt_bias are float32 at least."""
    torch.manual_seed(seed)
    with _drawing(device, dtype):
        model = _new_transformer(wan_size(size), hybrid)
    keep_gates_in_float32(model, dtype)
    return model.eval().requires_grad_(False)


def _new_transformer(sizes: Mapping[str, Any], hybrid: HybridSettings) -> HybridWanModel:
    return HybridWanModel(
        **sizes,
        hybrid_layers=list(hybrid.layers),
        lora_rank=hybrid.lora_rank,
        lora_alpha=hybrid.lora_alpha,
        ffn_lora=hybrid.ffn_lora.value,
        state=hybrid.state.as_plain(),
    )


@contextmanager
def _drawing(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Let new parameters be drawn on a device in a dtype."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(previous)


def save_native_folder(pipeline: CausalVideoPipeline, folder: Path) -> None:
    """Write a pipeline's parts in the layout of a Wan 2.1 release."""
    folder.mkdir(parents=True, exist_ok=True)
    config = pipeline.transformer.config
    keys = (
        "dim",
        "eps",
        "ffn_dim",
        "freq_dim",
        "in_dim",
        "model_type",
        "num_heads",
        "num_layers",
        "out_dim",
        "text_len",
    )
    settings = {"_class_name": "WanModel"} | {key: config[key] for key in keys}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    write_safetensors(folder / WEIGHT_FILES[0], pipeline.transformer.state_dict())
    save_native_umt5(pipeline.text_encoder, folder / NATIVE_TEXT_FILE)
    save_native_vae(WanVAE(pipeline.vae), folder / NATIVE_VAE_FILE)
    assert pipeline.tokenizer is not None
    pipeline.tokenizer.save_pretrained(folder / NATIVE_TOKENIZER_FOLDER)
