"""From weights of any format to a hybrid model, strictly: fit, convert on request, or refuse.

`arl2.statement` has the rule. Three things can happen to weights:

- they are hybrid in the layers asked for: every name must fit;
- they are hybrid in more layers (stage 1 trains all): the other layers' new parameters are left out;
- they have nothing of the hybrid's, and layers are asked for: that is a conversion. The names of the parameters that
  start untrained are returned.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from arl2.initial_values import initial_values
from arl2.model import (
    DEFAULT_LORA_ALPHA,
    FFNLoRA,
    HybridSettings,
    HybridWanModel,
    check_layers,
    keep_gates_in_float32,
    warn_of_untrained,
)
from arl2.state_settings import PAPER_STATE
from arl2.statement import (
    GATES,
    check_heads,
    found_settings,
    hybrid_layer_of,
    require_claims,
    require_hybrid_types,
    resolve_settings,
    state_of,
    stored_alpha,
    trained_memory_of,
    untrained_layers_of,
)
from wan.checkpoints.fields import HYBRID, OPTIONAL_HYBRID, RELEASED, SIZES, TRAINED_MEMORY
from wan.checkpoints.formats import GENERATOR, TransformerWeights, read_transformer, require_sizes
from wan.checkpoints.identify import is_hybrid_part
from wan.checkpoints.loading import StateDict, as_state_dict, load_strict, read_header, read_weights, require_fit
from wan.checkpoints.record import ALPHA, RECORD, check_record, read_record, require_record
from wan.checkpoints.saving import with_record, write_pickle, write_safetensors
from wan.checkpoints.tensors import describe_dtype, own_storage, require_floating
from wan.utils.errors import CheckpointError, InputError

log = logging.getLogger(__name__)

_PLAIN_FFN = re.compile(r"^(blocks\.\d+\.ffn\.\d+)\.(weight|bias)$")


def read_generator(folder: Path, checkpoint: str | Path | None, use_ema: bool = False) -> TransformerWeights:
    """Transformer weights: a folder's own, a whole checkpoint's, or the folder's with hybrid weights put on them.

    Args:
        folder: of the model.
        checkpoint: weights of any format that `wan.checkpoints.formats.read_transformer` reads; or a .safetensors
            file that holds nothing but what the softmax model does not have, see `save_hybrid_weights`.
        use_ema: see `read_transformer`.

    Raises:
        CheckpointError: missing, damaged, or hybrid weights for a model that has some already.
    """
    if checkpoint is None or not holds_hybrid_alone(Path(checkpoint)):
        return read_transformer(checkpoint or folder, use_ema)
    base, path = read_transformer(folder, use_ema), Path(checkpoint)
    found = found_settings(base.state, base.source)
    require_claims(base.config, found, base.state, base.source)
    check_record(base.record, base.source)
    require_record(base.record, base.config, base.source)
    if found.layers:
        raise CheckpointError(
            f"{path} holds hybrid weights alone, but {folder} is hybrid already: give its softmax model"
        )
    added = as_state_dict(read_weights(path), path)
    require_floating(added, path)
    record = read_record(path, added)
    sizes = {name: value for name, value in base.config.items() if name in SIZES}
    hybrid = {name: record[name] for name in (*HYBRID, *OPTIONAL_HYBRID) if name in record}
    source = f"{path} on {base.source}"
    return replace(base, state=base.state | added, config=sizes | hybrid, source=source, record=record)


def holds_hybrid_alone(path: Path) -> bool:
    """Whether a file has no names that the softmax model has; told by its header."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    names, _ = read_header(path)
    return bool(names) and all(is_hybrid_part(name) for name in names)


def save_hybrid_weights(model: HybridWanModel, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write what the softmax model does not have, about 2 % of the whole, under official names; atomic.

    Args:
        model: hybrid.
        path: of a .safetensors file, which `read_generator` puts on the weights that `model` was made from.
        dtype: of what is written, but A_log and dt_bias; None for what it has.
    """
    state = {
        name: value.to(value.dtype if dtype is None or name.endswith(GATES) else dtype).contiguous()
        for name, value in ((name, model.get_parameter(name).detach()) for name in model.hybrid_parameter_names())
    }
    # The scale under its own name too, where files without a record have it.
    write_safetensors(path, state, with_record(model.record()) | {ALPHA: str(model.hybrid.lora_alpha)})


@dataclass(frozen=True)
class LoadReport:
    """What happened to weights on their way into a model.

    Attributes:
        settings: of the model built.
        untrained: parameters that start from their initial values: the model needs training before it is of use.
        dropped: hybrid parameters of layers that were not asked for.
    """

    settings: HybridSettings
    untrained: list[str]
    dropped: list[str]


@dataclass(frozen=True)
class HybridPlan:
    """A model that fits its weights, neither of them in memory yet.

    Attributes:
        model: on the meta device, in evaluation mode and frozen.
        state: every parameter's values on the CPU in the dtype of its source, mapped from files where they allow it.
        source: where they come from, for messages.
        causal: see `wan.checkpoints.formats.TransformerWeights`.
        report: see there.
    """

    model: HybridWanModel
    state: StateDict
    source: str
    causal: bool | None
    report: LoadReport


def build_hybrid(
    weights: TransformerWeights,
    config: dict[str, Any],
    wanted: HybridSettings,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    seed: int = 0,
    to_be_trained: bool = False,
) -> tuple[HybridWanModel, LoadReport]:
    """Build the model that weights and wishes describe, and load it strictly.

    Args:
        weights, config, wanted, seed: see `plan_hybrid`.
        dtype: of the model, A_log and dt_bias stay float32; None for what every weight has, new ones float32.
        device: of the model.
        to_be_trained: whether training, or loading of what was trained, comes next: untrained parameters are no news.

    Returns:
        the model in evaluation mode, and what was done.

    Raises:
        CheckpointError, InputError: see `plan_hybrid`; or values are not finite.
    """
    plan = plan_hybrid(weights, config, wanted, seed)
    state = {name: value.to(device) for name, value in own_storage(plan.state, plan.source).items()}
    load_strict(plan.model, state, plan.source)
    if dtype is not None:
        keep_gates_in_float32(plan.model, dtype)
        if dtype.itemsize < 4 or any(value.dtype is torch.float64 for value in state.values()):
            for name, value in plan.model.state_dict().items():
                require_range(name, state[name], value, plan.source)
    log_report(plan, to_be_trained)
    return plan.model.requires_grad_(False), plan.report


def plan_hybrid(
    weights: TransformerWeights, config: dict[str, Any], wanted: HybridSettings, seed: int = 0
) -> HybridPlan:
    """Check that config, weights and request agree, and decide what a model is made of; no weight is read.

    Args:
        weights: from `wan.checkpoints.formats.read_transformer`.
        config: sizes of the transformer; entries in `weights.config` take precedence.
        wanted: see `arl2.statement.resolve_settings`.
        seed: of the initial values of untrained parameters.

    Raises:
        CheckpointError, InputError: config, weights and request contradict one another, see `arl2.statement`.
    """
    # What the folder of the sizes says of hybrid layers is about its own weights, which may be others.
    config = RELEASED | {name: value for name, value in config.items() if name in SIZES} | weights.config
    found, settings = _agreed_settings(weights, config, wanted)
    stored = {name: config.pop(name, None) for name in (*HYBRID, *OPTIONAL_HYBRID)}
    said = weights.record | {name: value for name, value in stored.items() if value is not None}
    config[TRAINED_MEMORY] = trained_memory_of(said, weights.source)
    marked = untrained_layers_of(said, found, config["num_layers"], weights.source)
    with torch.device("meta"):
        model = _new_model(config, settings)
    state, dropped = _fit_names(weights.state, model, found, settings)
    untrained = sorted(name for name in model.hybrid_parameter_names() if name not in state)
    trained = {name: value for name, value in model.state_dict().items() if name not in untrained}
    require_fit(trained, state, type(model).__name__, weights.source)  # before memory is taken for sizes that do not
    require_record(weights.record, config | {k: v for k, v in stored.items() if v is not None}, weights.source)
    check_heads(config, weights.record, weights.source)
    if untrained:
        one_layer, every_part = config | {"num_layers": 1}, replace(settings, layers=(0,), ffn_lora=FFNLoRA.ALL)
        state = state | initial_values(lambda: _new_model(one_layer, every_part), untrained, config["num_layers"], seed)
    # A mark of layers that are left out is left out, too.
    model.set_untrained_layers((marked | _layers_of(untrained)) & _layers_of(model.hybrid_parameter_names()))
    report = LoadReport(settings, untrained, dropped)
    return HybridPlan(model.eval().requires_grad_(False), state, weights.source, weights.causal, report)


def _layers_of(names: Iterable[str]) -> set[int]:
    """Layers that parameters of blocks belong to."""
    return {int(name.split(".")[1]) for name in names}


def _agreed_settings(
    weights: TransformerWeights, config: dict[str, Any], wanted: HybridSettings
) -> tuple[HybridSettings, HybridSettings]:
    """What the weights are, and what the model is to be, once config, weights and request agree.

    Raises:
        CheckpointError, InputError: they do not.
    """
    source, num_layers = weights.source, config.get("num_layers", 0)
    require_sizes(config, f"the config of {source}")
    require_floating(weights.state, source)
    found = found_settings(weights.state, source)
    check_record(weights.record, source)
    claims = weights.record | config
    require_claims(claims, found, weights.state, source)
    found = replace(found, state=state_of(weights.record, config, weights.state, source))
    if found.lora_rank is not None and "ffn_lora" in claims:
        found = replace(found, ffn_lora=FFNLoRA(claims["ffn_lora"]))  # hybrid and all, where every layer is hybrid
    require_hybrid_types(weights.state, source)
    alpha = stored_alpha(weights)
    if found.lora_rank is not None and alpha is None:
        log.info("%s does not say the alpha of its adapters: %g is taken", source, wanted.lora_alpha)
    wanted = replace(wanted, layers=check_layers(wanted.layers, num_layers))
    settings = resolve_settings(found, wanted, source, num_layers=num_layers, alpha=alpha)
    if settings.lora_rank is None and wanted.lora_alpha != DEFAULT_LORA_ALPHA:
        raise InputError(
            f"lora_alpha {wanted.lora_alpha:g} would do nothing: {source} has no adapters and none are asked for; "
            "give hybrid layers and lora_rank, or drop it"
        )
    without_effect = settings.lora_rank is None or settings.ffn_lora is not FFNLoRA.ALL
    if not settings.layers and (without_effect or wanted.state != PAPER_STATE):
        asked: dict[str, Any] = {"state": wanted.state.as_plain()}
        if without_effect:
            asked |= {"lora_rank": wanted.lora_rank, "ffn_lora": wanted.ffn_lora is FFNLoRA.ALL or None}
        names = [name for name, value in asked.items() if value]
        if names:
            raise InputError(
                f"{', '.join(names)} would do nothing: {source} has no hybrid layers and none are asked for; "
                "name hybrid_layers, or drop it"
            )
    if settings.lora_rank is not None and settings.lora_rank > config["dim"]:
        raise InputError(
            f"lora_rank {settings.lora_rank} is above the model's {config['dim']} channels: give a lower rank"
        )
    return found, settings


def require_range(name: str, before: torch.Tensor, after: torch.Tensor, source: str) -> None:
    """Make sure that no value left the range of the type that it was cast to.

    Raises:
        CheckpointError: one did.
    """
    if before.dtype is not after.dtype and not bool(after.isfinite().all()):
        raise CheckpointError(
            f"{source}: {name} has values beyond the range of {describe_dtype(after.dtype)}: load it in a wider type, "
            "or take other weights"
        )


def _new_model(config: dict[str, Any], settings: HybridSettings) -> HybridWanModel:
    return HybridWanModel(
        **config,
        hybrid_layers=list(settings.layers),
        lora_rank=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        ffn_lora=settings.ffn_lora.value,
        state=settings.state.as_plain(),
    )


def _fit_names(
    state: StateDict, model: HybridWanModel, found: HybridSettings, settings: HybridSettings
) -> tuple[StateDict, list[str]]:
    """Leave out hybrid parameters of layers that stay softmax, and move feed-forwards into their adapters' names."""
    unwanted = set(found.layers) - set(settings.layers)
    dropped = [name for name in state if hybrid_layer_of(name) in unwanted]
    adapted = set(settings.ffn_lora_layers(len(model.blocks)))

    def fitted(name: str) -> str:
        match = _PLAIN_FFN.match(name)
        if match and int(name.split(".")[1]) in adapted:
            return f"{match[1]}.linear.{match[2]}"
        return name

    return {fitted(name): value for name, value in state.items() if hybrid_layer_of(name) not in unwanted}, dropped


def log_report(plan: HybridPlan, to_be_trained: bool = False) -> None:
    """Log what happened to weights that were loaded; see `build_hybrid`."""
    dropped = plan.report.dropped
    if plan.causal is False:
        log.warning(
            "%s is the bidirectional Wan 2.1: it loads, but generates block by block only after causal training",
            plan.source,
        )
    if dropped:
        log.info("%s is hybrid in more layers than asked for: %d parameters left out", plan.source, len(dropped))
    if not to_be_trained:
        warn_of_untrained(plan.model.untrained_parameter_names())


def save_generator(model: HybridWanModel, path: Path) -> None:
    """Write weights as a Causal Forcing / ARL² `.pt`, or as `.safetensors` under the bare names; atomic.

    Both say how the weights were made, where other loaders do not look.

    Raises:
        InputError: the path ends otherwise, or cannot be written.
    """
    state = own_storage(model.state_dict(), path)
    if path.suffix == ".safetensors":
        write_safetensors(path, state, with_record(model.record()))
    elif path.suffix == ".pt":
        generator = {f"model.{name}": value for name, value in state.items()}
        write_pickle(path, {GENERATOR: generator, RECORD: model.record()})
    else:
        raise InputError(f"cannot write {path}: give a name that ends in .pt or .safetensors")
