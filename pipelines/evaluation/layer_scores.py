"""Scores of layers from the evaluation of videos that were made with one layer hybrid at a time.

Source: the choice of layers in ARL², arXiv 2605.16579: twelve prompts, single replacements, six dimensions of VBench.

    FOLDER/baseline/scores.json      the softmax model
    FOLDER/layer_00/scores.json      the model whose layer 0 alone is hybrid, and so on
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.evaluation.scoring.metric import NOT_MEASURED
from pipelines.evaluation.scoring.metrics.read_back import VBENCH
from pipelines.evaluation.tables.sources import Kind, Source, read_source
from pipelines.evaluation.tables.vbench import QUALITY, SHOWN
from wan.utils.errors import InputError

BASELINE, SCORES = "baseline", "scores.json"


def layer_folder(layer: int) -> str:
    """Name of the folder of a layer's videos."""
    return f"layer_{layer:02}"


def read_layer_scores(folder: Path, num_layers: int, dimensions: Sequence[str] = SHOWN) -> dict[int, float]:
    """What each layer's conversion loses: weighted mean over dimensions of baseline minus layer, normalised by VBench.

    Args:
        folder: of evaluations, see the module.
        num_layers: of the model.
        dimensions: VBench's, of video quality. Its own values are taken where they were read back, else this project's.

    Returns:
        scores by layer, in % of VBench's normalised range; low for layers whose conversion costs little.

    Raises:
        InputError: an evaluation is missing or damaged, a dimension was not measured, or videos differ in number.
    """
    unknown = [name for name in dimensions if name not in QUALITY]
    if unknown or not dimensions:
        raise InputError(f"no dimension {', '.join(unknown) or 'given'}: choose from {', '.join(QUALITY)}")
    wanted = {"baseline": BASELINE} | {f"layer {layer}": layer_folder(layer) for layer in range(num_layers)}
    pages = {name: read_source(str(folder / place / SCORES)) for name, place in wanted.items()}
    for source in pages.values():
        if source.kind is not Kind.SCORES:
            raise InputError(f"{source.path} is no file of scripts/evaluate.py")
    own = _prefix(pages["baseline"], dimensions)
    baseline = pages["baseline"]
    values = {name: {each: _mean(page, own[each], baseline) for each in dimensions} for name, page in pages.items()}
    base = values.pop("baseline")
    return {layer: _loss(base, of_layer) for layer, of_layer in enumerate(values.values())}


def _prefix(baseline: Source, dimensions: Sequence[str]) -> dict[str, str]:
    """The metric that stands for each dimension: the same one for all layers."""
    metrics = baseline.page["metrics"]

    def is_measured(name: str) -> bool:
        return isinstance(metrics.get(name), Mapping) and NOT_MEASURED not in metrics[name]

    return {name: VBENCH.prefix + name if is_measured(VBENCH.prefix + name) else name for name in dimensions}


def _mean(source: Source, name: str, baseline: Source) -> float:
    metric = source.page["metrics"].get(name)
    if not isinstance(metric, Mapping) or NOT_MEASURED in metric or "value" not in metric:
        why = metric.get(NOT_MEASURED, "") if isinstance(metric, Mapping) else "it was not asked for"
        raise InputError(
            f"{source.path} has no {name} ({why}): measure it for all layers, or leave it out of --dimensions"
        )
    if source.page["videos"].keys() != baseline.page["videos"].keys():
        raise InputError(f"{source.path} and {baseline.path} are of other videos: sample the same prompts for all")
    return float(metric["value"]["mean"])


def _loss(base: Mapping[str, float], of_layer: Mapping[str, float]) -> float:
    lost, weights = 0.0, 0.0
    for name, value in base.items():
        dimension = QUALITY[name]
        lost += dimension.weight * (dimension.normalised(value) - dimension.normalised(of_layer[name]))
        weights += dimension.weight
    return 100 * lost / weights
