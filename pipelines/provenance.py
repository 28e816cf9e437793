"""Where and with what something was made or measured."""

import hashlib
import json
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from arl2 import __version__
from arl2.model import HybridWanModel
from pipelines.console.shipped import IN_WHEEL, SOURCES
from pipelines.console.shipped import ROOT as ROOT
from wan.checkpoints.fields import HYBRID, SIZES, STATE_VARIANT, UNTRAINED
from wan.checkpoints.loading import fingerprint_of
from wan.text import SPECIAL_TOKENS, TextEncoder
from wan.vae.wan_vae import WanVAE

PACKAGES = ("triton", "diffusers", "transformers", "flash-linear-attention")
SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit")
PACKAGES_OF_OURS = ("arl2", "pipelines", "wan")
HASH_DIGITS = 16
VAE_FIELDS = ("latents_mean", "latents_std", "temperal_downsample")
TEXT_FIELDS = (
    "num_heads",
    "d_kv",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
    "feed_forward_proj",
)
TOKENIZER_SETTINGS = {
    "padding_side": "right",
    "truncation_side": "right",
    "split_special_tokens": "False",
    **{f"{role}_token": token for role, token in zip(("pad", "eos", "unk"), SPECIAL_TOKENS, strict=True)},
}
"""What shapes tokens beside the state of a fast tokenizer, with the values of UMT5's."""
TEXT_SIZES = ("d_model", "d_ff", "num_layers", *TEXT_FIELDS)
"""Sizes of a text encoder in transformers' configuration; what `TEXT_FIELDS` lacks shows in the weights."""


def environment(device: torch.device) -> dict[str, Any]:
    """Card, driver, clocks, versions, commit and time; None for what cannot be found out."""
    on_gpu = device.type == "cuda"
    return {
        "device": device_name(device),
        "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        "nvidia_smi": nvidia_smi(device) if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "versions": versions(PACKAGES),
        "commit": git_commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def vae_fingerprint(vae: WanVAE) -> str:
    """Hash of all that latents depend on: weights in their type now, structure and statistics."""
    return _hash(fingerprint_of(vae.model.state_dict()), {name: vae.model.config[name] for name in VAE_FIELDS})


def text_encoder_fingerprint(encoder: TextEncoder) -> str:
    """Hash of a text encoder: weights in their type now, structure, vocabulary and length; see `text_fingerprints`."""
    structure = encoder.model.config.to_dict()
    about = {name: structure.get(name) for name in TEXT_FIELDS} | {"text_len": encoder.text_len}
    vocabulary = encoder.tokenizer.get_vocab() if encoder.tokenizer is not None else {}
    return _hash(fingerprint_of(encoder.model.state_dict()), about | {"vocabulary": vocabulary})


def text_fingerprints(encoder: TextEncoder) -> dict[str, str]:
    """All that embeddings depend on: the encoder's fingerprint, and that of its tokenizer if it has one."""
    found = {"text_encoder": text_encoder_fingerprint(encoder)}
    return found if encoder.tokenizer is None else found | {"tokenizer": tokenizer_fingerprint(encoder.tokenizer)}


def architecture_of(model: HybridWanModel) -> dict[str, Any]:
    """What a transformer computes beside its weights: sizes, and the settings of hybrid layers where it has some."""
    record, hybrid = model.record(), model.hybrid
    names = [*SIZES, *(HYBRID if hybrid.lora_rank is not None else ["hybrid_layers"] if hybrid.layers else [])]
    names += [STATE_VARIANT] if STATE_VARIANT in record else []
    return {name: record[name] for name in names}


def part_fingerprint(part: nn.Module) -> str:
    """Hash of all that a part of a pipeline is: weights in their type now, and its configuration if it has one."""
    weights = fingerprint_of(part.state_dict())
    config: Any = getattr(part, "config", None)
    if config is None:
        return _hash(weights)
    if isinstance(config, Mapping):  # diffusers', which holds every argument of the class
        # Whether layers are trained says nothing that the weights do not.
        return _hash(weights, {k: value for k, value in config.items() if not k.startswith("_") and k != UNTRAINED})
    return _hash(weights, {name: vars(config).get(name) for name in TEXT_SIZES})


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of all that a tokenizer does to a text, but for the lengths to which it was last told to pad and cut."""
    settings = {name: str(getattr(tokenizer, name, value)) for name, value in TOKENIZER_SETTINGS.items()}
    # Fingerprints of earlier versions did not have these: usual ones leave them as they were.
    unusual = [settings] if settings != TOKENIZER_SETTINGS else []
    if not tokenizer.is_fast:
        return _hash(tokenizer.get_vocab(), *unusual)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return _hash({name: value for name, value in state.items() if name not in ("padding", "truncation")}, *unusual)


def summary_of(what: object) -> str:
    """A short hash of something that JSON can hold, for comparisons."""
    return _hash(what)


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:HASH_DIGITS]


def device_name(device: torch.device) -> str:
    """The card, or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def nvidia_smi(device: torch.device) -> dict[str, str] | None:
    """Driver, clocks and power of the card at this moment."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    line = _output("nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader")
    return None if line is None else dict(zip(SMI_FIELDS, line.split(", "), strict=False))


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of some packages, PyTorch with its build, this code and Python."""
    ours = {"torch": torch.__version__, "arl2": __version__, "python": platform.python_version()}
    return {package: package_version(package) for package in packages} | ours


def git_commit() -> str | None:
    """The commit of this code, with a mark if files differ from it; None outside of its repository."""
    if ROOT != SOURCES:  # an environment may lie in a repository of something else
        return None
    return _output("git", "-C", str(SOURCES), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")


def source_fingerprint() -> str:
    """Hash of this code as it lies on the disk; without git, and of changes that no commit has, too."""
    digest = hashlib.sha256()
    for package in PACKAGES_OF_OURS:
        for path in sorted((SOURCES / package).rglob("*.py")):
            if path.is_relative_to(IN_WHEEL):  # entry points, which a checkout has elsewhere
                continue
            digest.update(f"{path.relative_to(SOURCES)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:HASH_DIGITS]


def package_version(name: str) -> str | None:
    """Version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a program prints; None if it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip() or None
