"""Saying what a file or a set of names is, where weights of another kind were wanted: for error messages."""

import re
from collections.abc import Iterable
from pathlib import Path

from wan.checkpoints.tensors import summarize_names
from wan.utils.files import LFS_POINTER, is_lfs_pointer

SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")
"""In the name of a file that holds a part of a model."""
IMAGE_BRANCH = re.compile(r"(^|\.)(img_emb|image_embedder|[kv]_img|norm_k_img|add_[kv]_proj|norm_added_k)\.")
OPTIMIZER = "an optimizer's state"
HYBRID_ALONE = "hybrid weights alone"
HYBRID_PART = re.compile(
    r"^blocks\.(\d+)\.self_attn\.(?P<part>(?:a_proj|b_proj|gate_proj|A_log|dt_bias|phi_[qkvo]|lora_[qkv]_[AB])\b.*)"
)
FFN_ADAPTER = re.compile(r"^blocks\.(\d+)\.(?P<part>ffn\.\d+\.lora_[AB])$")
"""With `HYBRID_PART`, names of what a hybrid model has beyond the softmax one."""
A_LORA = "a LoRA"
LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
"""Files with a LoRA in a folder of peft or diffusers."""
_OTHER_ARCHITECTURES = (
    (re.compile(r"(^|\.)to_gate_compress\."), "a transformer with sparse attention (to_gate_compress in its blocks)"),
    (IMAGE_BRANCH, "an image-to-video transformer with an image branch"),
    (re.compile(r"(^|\.)vace_(blocks|patch_embedding)\."), "a VACE transformer, with control blocks beside its own"),
    (
        re.compile(r"(^|\.)(control_adapter|controlnet\w*|ref_conv|face_adapter|motion_encoder|audio_\w+)\."),
        "a transformer with a branch for controls",
    ),
)
_QUANTISED = (
    (
        re.compile(r"(^|\.)(weight|input)_global_scale$|\.weight_scale_2$"),
        "a transformer quantised to FP4 (NVFP4, with scale tensors)",
    ),
    (
        re.compile(r"(^|\.)(scale_(weight|input)|(weight|input)_scale(_inv)?|scaled_fp8)$"),
        "a transformer quantised to FP8 or INT8 (with scale tensors)",
    ),
    (re.compile(r"\.(absmax|quant_map|SCB|quant_state\..*|qweight|qzeros)$"), "a quantised transformer"),
)
_FAMILIES = (
    (
        re.compile(
            r"(lora_down|lora_up|\.lora\.|lora_[AB]\.(\w+\.)?(weight|bias)$|^lora_unet_|\.diff(_b|_m)?$|\.dora_scale$"
            r"|\.(lokr|hada|oft)_\w+$|^(generator|critic)_lora$)"
        ),
        A_LORA,
    ),
    (re.compile(r"^(state|param_groups)$|(^|\.)(exp_avg|exp_avg_sq|momentum_buffer)$"), OPTIMIZER),
    (re.compile(r"^(encoder|decoder)\.(conv1|downsamples|upsamples|middle|conv_in|mid_block|\d+\.)"), "a VAE"),
    (
        re.compile(r"^(token_embedding|shared|encoder\.block|encoder\.embed_tokens|text_model|spiece_model)(\.|$)"),
        "a text encoder",
    ),
    *_OTHER_ARCHITECTURES,
    *_QUANTISED,
    (re.compile(r"\.(mod|modulation)\.lin\.|^(double|single)_blocks\.|^transformer_blocks\."), "another transformer"),
)
_MAGIC = (
    (b"GGUF", "a GGUF file, which is quantised: give the weights as .safetensors, not quantised"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive: unpack it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"\x89PNG", "a picture: check the path"),
    (b"\xff\xd8\xff", "a picture: check the path"),
    (b"\x93NUMPY", "a NumPy array: check the path"),
)


def family(names: Iterable[str]) -> str:
    """The likely content of a weight file, told by its names."""
    names = list(names)
    for pattern, what in _FAMILIES:
        if any(pattern.search(name) for name in names):
            return what
    odd = [name for name in names if not is_hybrid_part(name)]
    if not odd:
        return HYBRID_ALONE if names else "nothing"
    if 2 * len(odd) < len(names):
        return f"hybrid weights and, among them, what is none ({summarize_names(odd)})"
    return f"unknown weights ({summarize_names(names)})"


def other_architecture(names: Iterable[str]) -> str | None:
    """What a transformer is that has the names of Wan 2.1's and further ones; None if there are none that are known."""
    names = list(names)
    return next((what for pattern, what in _OTHER_ARCHITECTURES if any(map(pattern.search, names))), None)


def quantisation(names: Iterable[str]) -> str | None:
    """What a quantised transformer is, told by its scale tensors; None for one that is not quantised so."""
    names = list(names)
    return next((what for pattern, what in _QUANTISED if any(map(pattern.search, names))), None)


def is_hybrid_part(name: str) -> bool:
    """Whether a parameter is one that softmax models do not have."""
    return bool(HYBRID_PART.match(name) or FFN_ADAPTER.match(name))


def impostor(path: Path) -> str | None:
    """What a file is that has a weight file's name but is none, and the cure; None if that cannot be told.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "an empty file: download it again"
    if is_lfs_pointer(path):
        return LFS_POINTER.format("weights")
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"<(!doctype|html|head|body|\?xml|!--|script)", text, re.IGNORECASE):
        return "a web page, so the download went wrong: download the file itself"
    if head[8:9] == b"{" and path.suffix != ".safetensors":
        return "a safetensors file by its content: rename it to end in .safetensors"
    if head.startswith(b"PK\x03\x04") and path.suffix == ".safetensors":
        return "a .pt file, or another zip archive, by its content: rename it to end in .pt"
    if text[:1] in (b"{", b"[") and head[8:9] != b"{":
        return "a JSON text, so the download went wrong or the name is another file's: download the weights themselves"
    if head.isascii() and all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return "a text file, damaged or from a download that went wrong: download the weights themselves"
    return None
