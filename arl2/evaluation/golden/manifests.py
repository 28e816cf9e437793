"""Manifests: comparison of our full-size models with the parameter names and shapes of the releases."""

from typing import Any

import torch

from arl2.evaluation.golden.backbone import new_model
from arl2.evaluation.golden.vectors import CaseResult, Golden
from wan.checkpoints.loading import summarize_names
from wan.text import native_umt5_names
from wan.vae.wan_vae import native_vae_names

Names = dict[str, tuple[int, ...]]


def our_names(config: dict[str, Any], listed: Names) -> Names:
    """Names and shapes of the parameters of our model for a manifest; nothing is allocated.

    Args:
        config: configuration of the manifest.
        listed: names and shapes of the manifest, which decide where a transformer is hybrid and has adapters.
    """
    if "vocab_size" in config:
        return native_umt5_names(config)
    if "z_dim" in config:
        return native_vae_names(config)
    with torch.device("meta"):
        model = new_model(config, {name: torch.empty(shape) for name, shape in listed.items()})
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def check_manifest(golden: Golden) -> CaseResult:
    """Compare names and shapes in both directions."""
    listed = {name: tuple(shape) for name, shape in golden.info["parameters"].items()}
    ours = our_names(golden.info["config"], listed)
    result = CaseResult(golden.path.stem, "names", compared=len(listed))
    if listed.keys() != ours.keys():
        missing, unexpected = listed.keys() - ours.keys(), ours.keys() - listed.keys()
        result.failure = f"missing {summarize_names(missing)}; unexpected {summarize_names(unexpected)}"
    elif wrong := [name for name, shape in listed.items() if ours[name] != shape]:
        result.failure = f"shape of {wrong[0]} is {ours[wrong[0]]}, the manifest has {listed[wrong[0]]}"
    return result
