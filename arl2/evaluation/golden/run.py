"""Replays of whole golden files and folders."""

from collections.abc import Iterator
from pathlib import Path

import torch

from arl2.evaluation.golden import backbone, parts
from arl2.evaluation.golden.manifests import check_manifest
from arl2.evaluation.golden.vectors import CaseResult, Golden, Precision, Replay, compare
from wan.utils.errors import InputError

REPLAYS: dict[str, Replay] = {
    "causal_dit_inference": backbone.replay_passes,
    "causal_dit_inference_windowed": backbone.replay_windowed_passes,
    "causal_dit_training": backbone.replay_parallel_forwards,
    "hybrid_model_inference": backbone.replay_passes,
    "few_step_autoregressive_pipeline": backbone.replay_few_step_loops,
    "hybrid_attention_module": parts.replay_hybrid_attention,
    "flow_match_scheduler": parts.replay_schedule,
    "umt5_encoder": parts.replay_text_encoder,
    "causal_vae": parts.replay_vae,
}


def known_fault(name: str) -> bool:
    """Returns whether a tensor records a published fault: teacher forcing that leaves the noisy half unrotated."""
    return name.endswith("teacher_forcing_published")


def verify_file(path: Path, precision: Precision) -> list[CaseResult]:
    """Replay one golden file.

    Raises:
        InputError: the file cannot be read or is of an unknown kind.
    """
    golden = Golden.read(path)
    kind = golden.info["kind"]
    if kind == "manifest":
        return [check_manifest(golden)]
    if kind not in REPLAYS:
        raise InputError(f"{path} is of kind {kind!r}: known are manifest, {', '.join(REPLAYS)}")
    try:
        with torch.no_grad():
            return compare(golden, REPLAYS[kind](golden, precision), precision, known_fault)
    except (InputError, OSError, KeyError, ValueError, RuntimeError) as error:
        # A file that cannot be replayed must not stop the others.
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return [CaseResult(golden.path.stem, "replay", failure=reason)]


def verify_folder(folder: Path, precision: Precision) -> Iterator[CaseResult]:
    """Replay every golden file of a folder, in the order of their names.

    Raises:
        InputError: the folder has no golden file.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise InputError(f"no golden file (*.json) in {folder}")
    for path in files:
        yield from verify_file(path, precision)
