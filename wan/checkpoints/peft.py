"""Settings of peft's LoRA adapters: the scale of every layer, and what is refused by name."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan.checkpoints.configs import read_config
from wan.checkpoints.formats import unwrapped_name
from wan.checkpoints.tensors import printable
from wan.utils.errors import CheckpointError
from wan.utils.files import parse_json
from wan.utils.ranges import shown

MAX_ALPHA = 1e6
"""Of an adapter; a larger one is damage."""
CONFIG_FILE = "adapter_config.json"
HEADER_KEY = "lora_adapter_metadata"
"""Where diffusers puts peft's settings in the header of a file, each behind the name of the model's part."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None,),
    "arrow_config": (None,),
}
"""Settings that change what an adapter computes, with the values under which they do not."""
_CHANGE_THE_MODEL = re.compile(r"(pissa|olora|corda|loftq|lora_ga)", re.IGNORECASE)
"""Ways of peft to begin an adapter that take its initial product off the model's own weights."""
_WITHOUT_EFFECT = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("lora_dropout", "inference_mode", "task_type", "base_model_name_or_path", "revision", "auto_mapping"),
    *("peft_version", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "megatron_core"),
)
"""Settings that are read above, or that say where and how an adapter was trained, not what it computes."""
_PLAIN_NAME = re.compile(r"\^?[\w.]+\$?")


@dataclass(frozen=True)
class PeftSettings:
    """Rank and alpha of the layers of an adapter.

    Attributes:
        rank, alpha: of all layers but those of the patterns.
        rank_pattern, alpha_pattern: of single layers, by the end of their names.
        rslora: whether the scale is alpha / √rank.
        source: for messages.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    source: str = CONFIG_FILE

    def require_known(self, modules: Iterable[str], weights: str) -> None:
        """Make sure that the patterns are of layers that the weights have.

        Args:
            modules: their names in the file.
            weights: where they come from, for messages.

        Raises:
            CheckpointError: a name of a pattern is none of theirs, so that its value would go unused.
        """
        known = set(modules)
        for key in (*self.rank_pattern, *self.alpha_pattern):
            if not any(_is_of(key, module) for module in known):
                raise CheckpointError(
                    f"{self.source}: a pattern names {printable(key)}, which {weights} does not adapt: correct the name"
                )

    def scale(self, module: str, rank: int, weights: str) -> float:
        """The scale of a layer.

        Args:
            module: its name in the file, without wrappers.
            rank: of its weights, which must be that of the settings.
            weights: where they come from, for messages.

        Raises:
            CheckpointError: weights and settings are of two adapters.
        """
        said = _of_pattern(self.rank_pattern, module, self.rank)
        if said != rank:
            raise CheckpointError(f"{weights}: the adapter of {module} has rank {rank}, {self.source} says {said}")
        alpha = _of_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_peft_settings(path: Path) -> PeftSettings:
    """Read an adapter_config.json.

    Raises:
        CheckpointError: malformed, or a setting that changes what is computed and is not supported; its name is said.
    """
    return _checked(read_config(path), str(path))


def settings_in_header(metadata: Mapping[str, str], source: Path) -> PeftSettings | None:
    """The settings in a header that diffusers wrote; None without any.

    Raises:
        CheckpointError: see `read_peft_settings`.
    """
    if HEADER_KEY not in metadata:
        return None
    try:
        found = parse_json(metadata[HEADER_KEY].encode())
    except ValueError as error:
        raise CheckpointError(f"{source}: {HEADER_KEY} in its header is no JSON: save it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{source}: {HEADER_KEY} in its header is no object of settings: save it again")
    prefix = "transformer."
    mine = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    return _checked(mine, str(source)) if mine else None


def _checked(config: Mapping[str, Any], source: str) -> PeftSettings:
    for name, admitted in _NEUTRAL.items():
        if name in config and not any(config[name] == value for value in admitted):
            raise CheckpointError(
                f"{source}: {name} {shown(config[name])} is not supported: merge the adapter with peft, or train "
                "without it"
            )
    unknown = [name for name in config if name not in _WITHOUT_EFFECT and name not in _NEUTRAL and config[name]]
    if unknown:
        raise CheckpointError(
            f"{source}: {printable(unknown[0])} {shown(config[unknown[0]])} is a setting that we do not know: merge "
            "the adapter with peft, or remove it if it changes nothing"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and _CHANGE_THE_MODEL.match(start):
        raise CheckpointError(
            f"{source}: init_lora_weights {shown(start)} changed the model's own weights too: save the adapter with "
            "peft's path_initial_model_for_weight_conversion"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{source}: r is {shown(rank)}, it must be a positive integer")
    rslora = config.get("use_rslora") or False
    if type(rslora) is not bool:
        raise CheckpointError(f"{source}: use_rslora is {shown(rslora)}, it must be true or false")
    ranks = _pattern(config, "rank_pattern", source)
    alphas = _pattern(config, "alpha_pattern", source)
    odd = next((value for value in ranks.values() if type(value) is not int or value < 1), None)
    if odd is not None:
        raise CheckpointError(f"{source}: rank_pattern has {shown(odd)}, it must have positive integers")
    numbers = {name: _number(value, "alpha_pattern", source) for name, value in alphas.items()}
    return PeftSettings(rank, _number(alpha, "lora_alpha", source), ranks, numbers, rslora, source)


def _number(value: Any, name: str, source: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) <= MAX_ALPHA:
        raise CheckpointError(f"{source}: {name} has {shown(value)}, it must be a number up to {MAX_ALPHA:g}, not 0")
    return float(value)


def _pattern(config: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    """Values of single layers by the ends of their names.

    Regular expressions are refused: a file of unknown origin could hold one that takes for ever.
    """
    found = config.get(name) or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{source}: {name} is {shown(found)}, it must be an object of names")
    for key in found:
        if not _PLAIN_NAME.fullmatch(key):
            raise CheckpointError(f"{source}: {name} has the expression {printable(key)}: give plain names of layers")
    return dict(found)


def _of_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first name of a pattern that is the module's, or ends it."""
    return next((value for key, value in pattern.items() if _is_of(key, module)), default)


def _is_of(key: str, module: str) -> bool:
    """Whether a name of a pattern is the module's, or ends it."""
    name = unwrapped_name(key.removeprefix("^").removesuffix("$"))
    return module == name or (not key.startswith("^") and module.endswith(f".{name}"))
