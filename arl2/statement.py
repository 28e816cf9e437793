"""config.json, weights and request as one statement: they agree, or nothing loads.

- A hybrid layer is whole: all of `LAYER_PARTS`, and of `ADAPTER_PARTS` all or none, as every other hybrid layer of the
  model. Or it has nothing of the hybrid's. Anything between is an error that names the parameter.
- Of `GATE_PARTS`, all hybrid layers have all, unless the state is said to have no gate.
- Of `EXPANDED_PARTS`, all hybrid layers have all, if the state is said to have expanded values, or none.
- Feed-forward adapters come in pairs, on both linears of a block, and sit on all blocks or on the hybrid ones.
- What config.json claims (hybrid_layers, lora_rank, ffn_lora, sizes) is what the weights hold. A claim alone converts
  nothing. Files without a config are told by their names.
- Without a record, which would say the number of heads, sizes of a known model come with its heads.
- What a file of ours records of itself (`HybridWanModel.record`) agrees with both.
- A variant of the state (`arl2.state_settings`) is what record and config say, both the same; without a word, the
  paper's.
- The request (`HybridSettings` from a user) agrees with what the weights hold: a subset of their hybrid layers, their
  rank, their alpha, their feed-forward adapters, their variant of the state. Only on weights without hybrid layers it
  is a conversion.
- A parameter has one type in all blocks, and the hybrid's own have one type but for A_log and dt_bias.
"""

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from arl2.model import DEFAULT_LORA_ALPHA, FFNLoRA, HybridSettings, check_layers
from arl2.state_settings import PAPER_STATE, Gate, StateSettings, stated_state
from arl2.trained_memory import TrainedMemory
from wan.checkpoints.configs import check_settings
from wan.checkpoints.fields import TRAINED_MEMORY, UNTRAINED, LoRAAlpha
from wan.checkpoints.formats import TransformerWeights, num_blocks_in
from wan.checkpoints.identify import FFN_ADAPTER, HYBRID_PART, is_hybrid_part
from wan.checkpoints.loading import StateDict
from wan.checkpoints.record import ALPHA
from wan.checkpoints.tensors import printable, require_same_type, summarize_names
from wan.config import WAN_SIZES
from wan.utils.errors import CheckpointError, InputError
from wan.utils.ranges import shown

log = logging.getLogger(__name__)

GATES = ("A_log", "dt_bias")
GATE_PARTS = ("gate_proj.weight",)
"""Parameters of the output gate."""
LAYER_PARTS = (
    *("a_proj.weight", "b_proj.weight", *GATE_PARTS, *GATES),
    *("phi_q.weight", "phi_k.weight", "phi_v.weight"),
)
"""Parameters that every hybrid self-attention has, and a softmax one has not; `GATE_PARTS` only with a gate."""
EXPANDED_PARTS = ("phi_o.weight",)
"""Parameters of a hybrid self-attention whose states have expanded values."""
ADAPTER_PARTS = tuple(f"lora_{name}_{letter}" for name in "qkv" for letter in "AB")
FFN_ADAPTER_PARTS = tuple(f"ffn.{place}.lora_{letter}" for place in (0, 2) for letter in "AB")


def hybrid_layer_of(name: str) -> int | None:
    """The layer whose hybrid self-attention a parameter belongs to; None for what a softmax model has too."""
    match = HYBRID_PART.match(name)
    return int(match[1]) if match else None


def found_settings(state: StateDict, source: str | Path = "the checkpoint") -> HybridSettings:
    """What weights say of themselves by their names and shapes; alpha is not among it.

    Raises:
        CheckpointError: a layer is neither whole nor without anything of the hybrid's, or adapters do not match.
    """
    parts = _parts_by_block(state, HYBRID_PART)
    layers = sorted(parts)
    gated, adapted, expanded = (
        any(parts[layer] & set(names) for layer in layers) for names in (GATE_PARTS, ADAPTER_PARTS, EXPANDED_PARTS)
    )
    expected = set(LAYER_PARTS) if gated else set(LAYER_PARTS) - set(GATE_PARTS)
    expected |= (set(ADAPTER_PARTS) if adapted else set()) | (set(EXPANDED_PARTS) if expanded else set())
    for layer in layers:
        _require_whole(layer, "self_attn.", parts[layer], expected, source)
    ffn_parts = _parts_by_block(state, FFN_ADAPTER)
    for block in ffn_parts:
        _require_whole(block, "", ffn_parts[block], set(FFN_ADAPTER_PARTS), source)
    if ffn_parts and layers and not adapted:
        raise CheckpointError(
            f"{source} has feed-forward adapters, and none in its hybrid layers: it is damaged or not complete"
        )
    ffn_lora = _ffn_lora(sorted(ffn_parts), layers, num_blocks_in(state), source)
    return HybridSettings(tuple(layers), _rank(state, source), ffn_lora=ffn_lora)


def _parts_by_block(state: Collection[str], pattern: re.Pattern[str]) -> dict[int, set[str]]:
    parts: dict[int, set[str]] = {}
    for match in filter(None, map(pattern.match, state)):
        parts.setdefault(int(match[1]), set()).add(match["part"])
    return parts


def _require_whole(block: int, prefix: str, has: set[str], expected: set[str], source: str | Path) -> None:
    missing, unexpected = expected - has, has - expected
    for names, fault in ((missing, "lacks"), (unexpected, "has")):
        if names:
            full = [f"blocks.{block}.{prefix}{name}" for name in names]
            raise CheckpointError(
                f"{source}: block {block} is neither hybrid nor softmax, it {fault} {summarize_names(full)}: the file "
                "is damaged or not complete; download or convert it again"
            )


def _rank(state: StateDict, source: str | Path) -> int | None:
    """The rank of all adapters; None without any."""
    ranks: dict[int, str] = {}
    for name, value in state.items():
        if is_hybrid_part(name) and name.endswith(("_A", "_B")) and "lora_" in name:
            if value.ndim != 2 or not value.numel():
                raise CheckpointError(
                    f"{source}: adapter {printable(name)} has the shape {tuple(value.shape)}, it must be a matrix"
                )
            ranks.setdefault(value.shape[1 if name.endswith("_A") else 0], name)
    if len(ranks) > 1:
        (one, first), (other, second), *_ = ranks.items()
        raise CheckpointError(
            f"{source}: adapters of several ranks are not supported, {first} has {one} and {second} {other}"
        )
    return next(iter(ranks), None)


def _ffn_lora(blocks: list[int], layers: list[int], num_layers: int, source: str | Path) -> FFNLoRA:
    """Which feed-forwards have adapters."""
    if not blocks:
        return FFNLoRA.NONE
    if blocks == layers:
        return FFNLoRA.HYBRID
    # Hybrid weights alone, without their base, do not tell the number of blocks.
    if blocks == list(range(max(num_layers, blocks[-1] + 1))):
        return FFNLoRA.ALL
    odd = sorted(set(blocks) ^ set(layers))[0]
    raise CheckpointError(
        f"{source}: feed-forward adapters in blocks {blocks} are neither on the hybrid layers {layers} nor on all "
        f"blocks, see blocks.{odd}: the file is damaged or not complete"
    )


def require_hybrid_types(state: StateDict, source: str | Path) -> None:
    """Make sure that the hybrid's own parameters have one type; A_log and dt_bias may have a wider one.

    Raises:
        CheckpointError: they have several.
    """
    names = [name for name in state if is_hybrid_part(name)]
    gates = [name for name in names if name.endswith(GATES)]
    require_same_type(gates, state, source)
    require_same_type([name for name in names if name not in gates], state, source)


def require_claims(
    config: Mapping[str, Any], found: HybridSettings, state: Collection[str], source: str | Path
) -> None:
    """Make sure that a config's claims are what the weights hold.

    Args:
        config: of the weights; nothing is compared that it does not say.
        found: from `found_settings`.
        state: names of the weights.

    Raises:
        CheckpointError: they differ; the message names the setting and both values.
    """
    blocks = num_blocks_in(state)
    if config["num_layers"] != blocks:
        raise CheckpointError(
            f"{source} does not fit: the config says num_layers {config['num_layers']}, the weights hold {blocks}"
        )
    if "hybrid_layers" not in config:
        return
    claimed = HybridSettings(
        tuple(sorted(config["hybrid_layers"])),
        config.get("lora_rank"),
        ffn_lora=FFNLoRA(config.get("ffn_lora", FFNLoRA.NONE)),
    )
    adapted = claimed.ffn_lora_layers(blocks)
    pairs = (
        ("hybrid_layers", list(claimed.layers), list(found.layers)),
        ("lora_rank", claimed.lora_rank, found.lora_rank),
        ("ffn_lora (its blocks)", list(adapted), list(found.ffn_lora_layers(blocks))),
    )
    for name, said, held in pairs:
        if said != held:
            raise CheckpointError(
                f"{source}: the config says {name} {said}, the weights hold {held}: they are of two models, or one is "
                "damaged; download or convert them again together"
            )
    if claimed.ffn_lora is FFNLoRA.ALL and not claimed.layers and not adapted:
        raise CheckpointError(
            f"{source}: the config says ffn_lora all, the weights have no adapters: correct it, or use the config of "
            "these weights"
        )


def state_of(
    record: Mapping[str, Any], config: Mapping[str, Any], state: Collection[str], source: str | Path
) -> StateSettings:
    """The variant of the state that weights say they have.

    Args:
        record, config: what is said of them.
        state: names of the weights.

    Raises:
        CheckpointError: what is said is unknown or contradicts itself, or the weights.
    """
    said = stated_state(record, config, source)
    layers = _parts_by_block(state, HYBRID_PART)
    if said != PAPER_STATE and not layers:
        raise CheckpointError(
            f"{source}: the config says states of {said}, the weights have no hybrid layers: correct the config"
        )
    expanded = any(parts & set(EXPANDED_PARTS) for parts in layers.values())
    if expanded != (said.value_expansion > 1):
        held = "have" if expanded else "lack"
        raise CheckpointError(
            f"{source}: the config says value_expansion {said.value_expansion}, the weights {held} phi_o: they are of "
            "two models, or one is damaged; download or convert them again together"
        )
    gated = any(parts & set(GATE_PARTS) for parts in layers.values())
    if layers and gated != (said.gate is Gate.HEADWISE):
        held, name = "have" if gated else "lack", f"blocks.{min(layers)}.self_attn.{GATE_PARTS[0]}"
        raise CheckpointError(
            f"{source}: the config says gate {said.gate}, the weights {held} {name}: they are of two "
            "models, or one is damaged; download or convert them again together"
        )
    return said


def trained_memory_of(config: Mapping[str, Any], source: str | Path) -> dict[str, Any] | None:
    """The checked record of the memory in training, as plain values; None where it is not said."""
    settings = config.get(TRAINED_MEMORY)
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{source}: trained_memory is {shown(settings)}, it must be an object of settings")
    return TrainedMemory.from_plain(settings, source).as_plain()


def untrained_layers_of(
    config: Mapping[str, Any], found: HybridSettings, num_layers: int, source: str | Path
) -> set[int]:
    """The layers that a conversion wrote and no training has met since; none where it is not said.

    Args:
        config: what is said of the weights.
        found: what the weights have; a layer without anything of the hybrid's cannot be untrained.

    Raises:
        CheckpointError: the model has no such layers, or they are softmax.
    """
    try:
        marked = set(check_layers(config.get(UNTRAINED) or (), num_layers))
    except InputError as error:
        raise CheckpointError(f"{source}: {UNTRAINED}: {error}") from error
    odd = sorted(marked - set(found.layers) - set(found.ffn_lora_layers(num_layers)))
    if odd:
        raise CheckpointError(
            f"{source}: {UNTRAINED} names layer {odd[0]}, which is softmax in these weights: convert them again"
        )
    return marked


def resolve_settings(
    found: HybridSettings,
    wanted: HybridSettings,
    source: str,
    *,
    num_layers: int | None = None,
    alpha: float | None = None,
) -> HybridSettings:
    """The settings to build a model with: those asked for, completed by what the weights have.

    Args:
        found: from `found_settings`.
        wanted: from the user; no layers means those of the weights, no rank the rank of the weights.
        num_layers: of the model; None to compare names of settings alone.
        alpha: of the adapters, if the weights or their config say it.

    Raises:
        InputError: what is asked for contradicts the weights.
    """
    layers = wanted.layers or found.layers
    lacking = sorted(set(layers) - set(found.layers))
    if found.layers:
        if wanted.state not in (PAPER_STATE, found.state):
            raise InputError(f"{source} has states of {found.state}, not of {wanted.state}: ask for what it has")
        wanted = replace(wanted, state=found.state)
    all_or_none = found.ffn_lora is FFNLoRA.HYBRID and found.lora_rank is not None
    if found.layers and lacking:
        some = "all of these, or name none" if all_or_none else "a subset of these"
        raise InputError(f"{source} is hybrid in layers {list(found.layers)}, not in {lacking}: ask for {some}")
    if found.lora_rank is None:
        if found.layers and wanted.lora_rank is not None:
            raise InputError(
                f"{source} has hybrid layers without adapters, lora_rank says {wanted.lora_rank}: ask for no adapters, "
                "or train them from the softmax model (train_stage2.py)"
            )
        return replace(wanted, layers=layers)
    if wanted.lora_rank not in (None, found.lora_rank):
        raise InputError(
            f"{source} has adapters of rank {found.lora_rank}, lora_rank says {wanted.lora_rank}: give what it has"
        )
    if alpha is not None:
        if wanted.lora_alpha not in (DEFAULT_LORA_ALPHA, alpha):
            raise InputError(
                f"{source} has adapters of alpha {alpha}, lora_alpha says {wanted.lora_alpha}: give what it has"
            )
        wanted = replace(wanted, lora_alpha=alpha)
    on_all = found.ffn_lora is FFNLoRA.ALL or len(found.ffn_lora_layers(0)) == num_layers
    if wanted.ffn_lora is FFNLoRA.ALL and not on_all:
        raise InputError(
            f"{source} has no adapters on the feed-forward of every block: do not ask for them (ffn_lora all)"
        )
    if all_or_none and layers != found.layers:
        raise InputError(
            f"{source} has feed-forward adapters on its hybrid layers {list(found.layers)}, which cannot be dropped: "
            "ask for all of these layers, or name none"
        )
    return replace(wanted, layers=layers, lora_rank=found.lora_rank, ffn_lora=found.ffn_lora)


def stored_alpha(weights: TransformerWeights) -> float | None:
    """The scale of a checkpoint's adapters times their rank, as its config or its file says it; None if neither does.

    Raises:
        CheckpointError: it is no positive number.
    """
    said = (weights.record | weights.config).get(ALPHA)
    return None if said is None else float(check_settings({ALPHA: said}, {ALPHA: LoRAAlpha}, weights.source)[ALPHA])


def check_heads(config: Mapping[str, Any], record: Mapping[str, Any], source: str | Path) -> None:
    """Compare the number of heads, which weights do not show, with that of known models of the same sizes.

    A record of the weights has been compared with the config already; then nothing is left to guess.

    Args:
        config: all sizes of the model.
        record: of the weight file, empty for files of other origin.

    Raises:
        CheckpointError: the sizes are those of a known model, but for the heads.
    """
    if "num_heads" in record:
        return
    heads, dim = config["num_heads"], config["dim"]
    for name, known in WAN_SIZES.items():
        others = known.keys() - {"num_heads", "text_len"}
        if known["num_heads"] != heads and all(config[size] == dict(known)[size] for size in others):
            raise CheckpointError(
                f"{source}: the config says num_heads {heads}, the {name} model of these sizes has "
                f"{known['num_heads']}: correct num_heads, or use the config of these weights"
            )
    widths = {known["dim"] // known["num_heads"] for known in WAN_SIZES.values() if known["dim"] == dim}
    widths = widths or {known["dim"] // known["num_heads"] for known in WAN_SIZES.values()}
    if dim // heads not in widths:
        log.warning(
            "%s: num_heads %d gives heads of %d channels, known models have %s; weights do not show it, so check "
            "num_heads in their config.json",
            source,
            heads,
            dim // heads,
            " or ".join(map(str, sorted(widths))),
        )
