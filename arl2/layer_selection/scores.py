"""Which layers to convert: a score for every layer, and from scores the sets for shares of the layers.

A score says how much is lost by making a layer hybrid: low ones come first. Source of the method of replacement: ARL²,
arXiv 2605.16579, which scores by VBench; here the score needs no other model's weights.
"""

import math
import random
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from torch import Tensor

from arl2.evaluation.deviation import latent_deviation, roll_out, teacher_of
from arl2.evaluation.eval_setup import EvalSetup
from arl2.hybrid_attention import HybridAttention
from arl2.layer_selection.gates import HYBRID_SHARE
from arl2.lora import LoRALinear
from arl2.model import HybridWanModel, switched_off
from arl2.rollout import FewStepSampler, Noise
from wan.checkpoints.loading import summarize_names
from wan.utils.errors import InputError
from wan.utils.files import atomic_path, read_json

SHARES = (25, 50, 75)
"""In percent."""


@dataclass(frozen=True)
class Selection:
    """Scores and the sets that follow.

    Attributes:
        method: how the layers were scored.
        scores: of every layer, low is better.
    """

    method: str
    scores: Mapping[int, float]

    def layers(self, share: int) -> list[int]:
        """The layers with the lowest scores, in order; of equal ones the earlier.

        `share` percent of all, rounded, halves to the even number: of 30 layers 8, 15 and 22 for 25, 50 and 75. A score
        that is not finite (the rollout failed) is the worst.
        """
        worst_last = sorted(
            self.scores,
            key=lambda layer: (self.scores[layer] if math.isfinite(self.scores[layer]) else math.inf, layer),
        )
        return sorted(worst_last[: round(len(self.scores) * share / 100)])

    def write(self, path: Path) -> None:
        """As YAML: method, scores, and one list of layers for each share, under "25", "50" and "75".

        Raises:
            InputError: the folder cannot be written, or the disk is full.
        """
        page = {"method": self.method, "scores": dict(sorted(self.scores.items()))}
        sets = {str(share): self.layers(share) for share in SHARES}
        with atomic_path(path) as temporary:
            temporary.write_text(yaml.safe_dump(page | sets, sort_keys=False, default_flow_style=None, width=120))


@contextmanager
def only_hybrid_in(model: HybridWanModel, layers: Collection[int]) -> Iterator[HybridWanModel]:
    """Be hybrid in some of the hybrid layers only; the others, and adapters in their blocks, are switched off.

    A memory for it must be made inside.
    """
    others = [block for layer, block in enumerate(model.layers()) if layer not in layers]
    parts = [part for block in others for part in block.modules() if isinstance(part, HybridAttention | LoRALinear)]
    with switched_off(parts, "enabled"):
        yield model


def replacement_scores(
    model: HybridWanModel,
    sampler: FewStepSampler,
    text_BTD: Tensor,
    noise: Noise,
    blocks: int,
    context_noise: float = 0.0,
) -> dict[int, list[float]]:
    """Make one layer hybrid at a time and compare the videos with the teacher's, all softmax layers with full memory.

    Args:
        model: from stage 1, hybrid in every layer that is to be scored.
        sampler, text_BTD, noise, blocks, context_noise: as in `arl2.evaluation.deviation.roll_out`.

    Returns:
        mean squared difference of the latents of every video, by layer.
    """
    setup = teacher_of(EvalSetup(model, sampler))
    wanted = roll_out(setup, text_BTD, noise, blocks, as_teacher=True, context_noise=context_noise)
    scores = {}
    for layer in model.hybrid_attentions():
        with only_hybrid_in(model, {layer}):
            got = roll_out(setup, text_BTD, noise, blocks, context_noise=context_noise)
        scores[layer] = latent_deviation(got, wanted, wanted.shape[1] // blocks).by_video
    return scores


def random_scores(num_layers: int, seed: int) -> dict[int, float]:
    """A score for every layer that means nothing, as a control."""
    generator = random.Random(seed)
    return {layer: generator.random() for layer in range(num_layers)}


def read_scores(path: Path, num_layers: int) -> dict[int, float]:
    """Scores made elsewhere: JSON {"layer": score}, low for layers whose conversion costs little.

    Raises:
        InputError: missing, malformed, or not one number for every layer.
    """
    return _as_scores(read_json(path), num_layers, path)


def read_stage1_errors(path: Path, num_layers: int) -> dict[int, float]:
    """The relative error of every layer at the end of stage 1.

    Args:
        path: a report, which has "relative_error" (itself or under "layers") by layer; or the folder of a run, whose
            last report is taken.

    Raises:
        InputError: no report, or not one number for every layer.
    """
    return _read_report(path, num_layers, "relative_error", "stage-1 run")


def read_gates(path: Path, num_layers: int) -> dict[int, float]:
    """One minus the probability that a layer is hybrid, at the end of training layer gates.

    Args:
        path: as in `read_stage1_errors`, of a run of layer gates.

    Raises:
        InputError: no report, or not one number for every layer.
    """
    shares = _read_report(path, num_layers, HYBRID_SHARE, "run of layer gates")
    return {layer: 1 - share for layer, share in shares.items()}


def _read_report(path: Path, num_layers: int, name: str, kind: str) -> dict[int, float]:
    """What a run's last report, or a report, says of every layer under a name."""
    reports = sorted((path / "reports").glob("step-*.json")) if path.is_dir() else [path]
    if not reports:
        raise InputError(f"no reports in {path}: give the folder of a {kind}, or one of its reports")
    page = read_json(reports[-1])
    layers = page.get("layers", page)
    if not isinstance(layers, dict) or name not in layers:
        raise InputError(f'{reports[-1]} has no "{name}" by layer: give a report of a {kind}')
    return _as_scores(layers[name], num_layers, reports[-1])


def _as_scores(page: object, num_layers: int, path: Path) -> dict[int, float]:
    """Numbers by layer, one for each."""
    if not isinstance(page, dict) or not all(map(_is_number, page.values())):
        raise InputError(f'{path} holds no numbers by layer: expected {{"0": 0.12, "1": 0.34, …}}')
    wanted = {str(layer) for layer in range(num_layers)}
    missing, unknown = wanted - page.keys(), page.keys() - wanted
    if missing or unknown:
        wrong = f"lacks layers {summarize_names(missing)}" if missing else f"names layers {summarize_names(unknown)}"
        raise InputError(f"{path} {wrong}: give one score for each of the model's layers 0 to {num_layers - 1}")
    return {int(layer): float(score) for layer, score in page.items()}


def _is_number(value: object) -> bool:
    """Whether a value of a JSON file is a number that fits into a float; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max
