"""From weights of any format to a hybrid model, strictly: fit, convert on request, or refuse.

Three things can happen to weights:

- they are hybrid already, in the layers asked for: every name must fit;
- they are hybrid in more layers (stage 1 trains all): the other layers' new parameters are left out;
- they lack hybrid parameters or adapters that are asked for: that is a conversion. It is allowed, and the names of the
  parameters that start untrained are returned.
"""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from arl2.model import (
    DEFAULT_LORA_ALPHA,
    FFNLoRA,
    HybridSettings,
    HybridWanModel,
    check_layers,
    keep_gates_in_float32,
)
from wan.checkpoints.formats import TransformerWeights, read_transformer
from wan.checkpoints.loading import StateDict, as_state_dict, load_strict, read_weights, summarize_names
from wan.utils.errors import CheckpointError, InputError
from wan.utils.files import atomic_path

log = logging.getLogger(__name__)

ALPHA = "lora_alpha"

_HYBRID_PART = re.compile(
    r"^blocks\.(\d+)\.self_attn\.(a_proj|b_proj|gate_proj|A_log|dt_bias|phi_[qkv]|lora_[qkv]_[AB])"
)
_FFN_LORA_PART = re.compile(r"^blocks\.(\d+)\.ffn\.\d+\.lora_A$")
_FFN_ADAPTER = re.compile(r"^blocks\.\d+\.ffn\.\d+\.lora_[AB]$")
_PLAIN_FFN = re.compile(r"^(blocks\.\d+\.ffn\.\d+)\.(weight|bias)$")


def found_settings(state: StateDict) -> HybridSettings:
    """What weights say of themselves by their names and shapes; alpha is not among it.

    Raises:
        CheckpointError: feed-forward adapters sit neither on the hybrid blocks nor on all.
    """
    layers = sorted({int(m[1]) for name in state if (m := _HYBRID_PART.match(name))})
    with_ffn_lora = sorted({int(m[1]) for name in state if (m := _FFN_LORA_PART.match(name))})
    ranks = {value.shape[1] for name, value in state.items() if name.endswith(("lora_q_A", "lora_A"))}
    if len(ranks) > 1:
        raise CheckpointError(f"adapters of several ranks {sorted(ranks)} in one checkpoint are not supported")
    num_layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    if not with_ffn_lora:
        ffn_lora = FFNLoRA.NONE
    elif with_ffn_lora == layers:
        ffn_lora = FFNLoRA.HYBRID
    elif len(with_ffn_lora) == num_layers:
        ffn_lora = FFNLoRA.ALL
    else:
        raise CheckpointError(f"feed-forward adapters in blocks {with_ffn_lora}, hybrid layers {layers}: not supported")
    return HybridSettings(tuple(layers), ranks.pop() if ranks else None, ffn_lora=ffn_lora)


def resolve_settings(found: HybridSettings, wanted: HybridSettings, source: str) -> HybridSettings:
    """The settings to build a model with: those asked for, completed by what the weights have.

    Args:
        found: from `found_settings`.
        wanted: from the user; no layers means those of the weights, no rank the rank of the weights.

    Raises:
        InputError: what is asked for contradicts the weights.
    """
    layers = wanted.layers or found.layers
    lacking = sorted(set(layers) - set(found.layers))
    if found.layers and lacking:
        raise InputError(
            f"{source} is hybrid in layers {list(found.layers)}, not in {lacking}: "
            "name a subset of its layers in --hybrid_layers"
        )
    rank, ffn_lora = wanted.lora_rank, wanted.ffn_lora
    if found.lora_rank is not None:
        if rank not in (None, found.lora_rank):
            raise InputError(f"{source} has adapters of rank {found.lora_rank}, --lora_rank says {rank}")
        rank, ffn_lora = found.lora_rank, found.ffn_lora
        if ffn_lora is FFNLoRA.HYBRID and layers != found.layers:
            raise InputError(
                f"{source} has feed-forward adapters on its hybrid layers {list(found.layers)}: "
                "they cannot be dropped, so --hybrid_layers must name all of them"
            )
    return replace(wanted, layers=layers, lora_rank=rank, ffn_lora=ffn_lora)


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
    if checkpoint is None or not _holds_hybrid_alone(Path(checkpoint)):
        return read_transformer(checkpoint or folder, use_ema)
    base, path = read_transformer(folder, use_ema), Path(checkpoint)
    if found_settings(base.state).layers:
        raise CheckpointError(
            f"{path} holds hybrid weights alone, but {folder} is hybrid already: give its softmax model"
        )
    with safe_open(path, "pt") as file:
        alpha = (file.metadata() or {}).get(ALPHA)
    config = base.config if alpha is None else base.config | {ALPHA: float(alpha)}
    state = base.state | as_state_dict(read_weights(path), path)
    return replace(base, state=state, config=config, source=f"{path} on {base.source}")


def _holds_hybrid_alone(path: Path) -> bool:
    """Whether a file has no other names; told by its header."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: it is damaged or no safetensors file") from error
    return bool(names) and all(_HYBRID_PART.match(name) or _FFN_ADAPTER.match(name) for name in names)


def save_hybrid_weights(model: HybridWanModel, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write what the softmax model does not have, about 2 % of the whole, under official names; atomic.

    Args:
        model: hybrid.
        path: of a .safetensors file, which `read_generator` puts on the weights that `model` was made from.
        dtype: of what is written, but A_log and dt_bias; None for what it has.
    """
    state = {
        name: value.to(value.dtype if dtype is None or name.endswith(("A_log", "dt_bias")) else dtype).contiguous()
        for name, value in ((name, model.get_parameter(name).detach()) for name in model.hybrid_parameter_names())
    }
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt", ALPHA: str(model.hybrid.lora_alpha)})


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


def build_hybrid(
    weights: TransformerWeights,
    config: dict[str, Any],
    wanted: HybridSettings,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    seed: int = 0,
) -> tuple[HybridWanModel, LoadReport]:
    """Build the model that weights and wishes describe, and load it strictly.

    Args:
        weights: from `wan.checkpoints.formats.read_transformer`.
        config: sizes of the transformer; entries in `weights.config` take precedence.
        wanted: see `resolve_settings`.
        dtype: of the model, A_log and dt_bias stay float32; None for what every weight has, new ones float32.
        device: of the model.
        seed: of the initial values of untrained parameters.

    Returns:
        the model in evaluation mode, and what was done.

    Raises:
        CheckpointError, InputError: names or shapes do not fit, or the wishes contradict the weights.
    """
    config = config | weights.config
    stored = {key: config.pop(key) for key in ("hybrid_layers", "lora_rank", ALPHA, "ffn_lora") if key in config}
    found = found_settings(weights.state)
    if found.lora_rank is not None and ALPHA in stored:
        if wanted.lora_alpha not in (DEFAULT_LORA_ALPHA, stored[ALPHA]):
            raise InputError(
                f"{weights.source} has adapters of alpha {stored[ALPHA]}, --lora_alpha says {wanted.lora_alpha}"
            )
        wanted = replace(wanted, lora_alpha=stored[ALPHA])
    wanted = replace(wanted, layers=check_layers(wanted.layers, config["num_layers"]))
    settings = resolve_settings(found, wanted, weights.source)
    with torch.device("meta"):
        model = _new_model(config, settings)
    state, dropped = _fit_names(weights.state, model, found, settings)
    untrained = sorted(name for name in model.hybrid_parameter_names() if name not in state)
    if untrained:
        state = state | _initial_values(config, settings, untrained, seed)
    state = {name: value.to(device) for name, value in state.items()}
    load_strict(model, state, weights.source)
    if dtype is not None:
        keep_gates_in_float32(model, dtype)
    _report(weights, settings, untrained, dropped)
    return model.eval().requires_grad_(False), LoadReport(settings, untrained, dropped)


def _new_model(config: dict[str, Any], settings: HybridSettings) -> HybridWanModel:
    try:
        return HybridWanModel(
            **config,
            hybrid_layers=list(settings.layers),
            lora_rank=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            ffn_lora=settings.ffn_lora.value,
        )
    except TypeError as error:
        raise CheckpointError(f"the model's config.json has a setting that we do not know: {error}") from error


def _fit_names(
    state: StateDict, model: HybridWanModel, found: HybridSettings, settings: HybridSettings
) -> tuple[StateDict, list[str]]:
    """Leave out hybrid parameters of layers that stay softmax, and move feed-forwards into their adapters' names."""
    unwanted = set(found.layers) - set(settings.layers)
    dropped = [name for name in state if (m := _HYBRID_PART.match(name)) and int(m[1]) in unwanted]
    adapted = set(settings.ffn_lora_layers(len(model.blocks)))

    def fitted(name: str) -> str:
        match = _PLAIN_FFN.match(name)
        if match and int(name.split(".")[1]) in adapted:
            return f"{match[1]}.linear.{match[2]}"
        return name

    return {fitted(name): value for name, value in state.items() if name not in dropped}, dropped


def _initial_values(config: dict[str, Any], settings: HybridSettings, names: list[str], seed: int) -> StateDict:
    """Initial values of the parameters called `names`: for a seed the same whichever other layers are hybrid.

    One layer is built at a time, with everything a layer can have new.
    """
    values: StateDict = {}
    every_part = replace(settings, layers=(0,), ffn_lora=FFNLoRA.ALL)
    with torch.random.fork_rng(devices=[]):
        for layer in range(config["num_layers"]):
            prefix = f"blocks.{layer}."
            wanted = [name for name in names if name.startswith(prefix)]
            if wanted:
                torch.manual_seed(seed * config["num_layers"] + layer)
                one_layer = _new_model(config | {"num_layers": 1}, every_part).state_dict()
                values |= {name: one_layer["blocks.0." + name.removeprefix(prefix)] for name in wanted}
    return values


def _report(weights: TransformerWeights, settings: HybridSettings, untrained: list[str], dropped: list[str]) -> None:
    if weights.causal is False:
        log.warning(
            "%s is the bidirectional Wan 2.1: it loads, but generates block by block only after causal training",
            weights.source,
        )
    if dropped:
        log.info("%s is hybrid in more layers than asked for: %d parameters left out", weights.source, len(dropped))
    if untrained:
        log.warning(
            "conversion: %d parameters of %d hybrid layers are UNTRAINED (%s): train them with train_stage1.py",
            len(untrained),
            len(settings.layers),
            summarize_names(untrained),
        )


def save_generator(model: HybridWanModel, path: Path) -> None:
    """Write weights as a Causal Forcing / ARL² `.pt`, or as `.safetensors` under the bare names; atomic.

    Raises:
        InputError: the path ends otherwise.
    """
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(state, temporary, metadata={"format": "pt"})
        elif path.suffix == ".pt":
            torch.save({"generator": {f"model.{name}": value for name, value in state.items()}}, temporary)
        else:
            raise InputError(f"cannot write {path}: give a name that ends in .pt or .safetensors")
