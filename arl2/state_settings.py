"""Variants of the recurrent state of hybrid layers. The defaults are the paper's and are stored nowhere."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from arl2.ops.update_rules import GATED_DELTA, rule_named
from wan.checkpoints.configs import check_settings
from wan.checkpoints.fields import (
    STATE_VARIANT,
    LocalFrames,
    NumStates,
    RotationPeriod,
    RotationRate,
    StateRecord,
    TokensPerBlock,
    ValueExpansion,
)
from wan.utils.errors import CheckpointError, InputError


class Rotation(StrEnum):
    """Rotation of the queries q̂ and keys k̂ of the state; softmax inside the block always rotates as in Wan.

    - `ABSOLUTE`: by frame, row and column, as in the softmax.
    - `NONE`: not at all.
    - `SPATIAL`: by row and column only.
    - `WRAPPED`: as `ABSOLUTE`, with the frame's index modulo `rotation_period`: no angle is new beyond the period.
    - `SLOW`: as `ABSOLUTE`, with the frame's index times `rotation_rate`.
    """

    ABSOLUTE = "absolute"
    NONE = "none"
    SPATIAL = "spatial"
    WRAPPED = "wrapped"
    SLOW = "slow"


class Decay(StrEnum):
    """Initial half-lives of the heads; see `arl2.hybrid_attention.HybridAttention.init_hybrid_weights`."""

    PAPER = "paper"
    SLOW = "slow"


class Gate(StrEnum):
    """Weight of a read in the layer's output: sigmoid(W_gate·x) per head, or 1 (an ablation)."""

    HEADWISE = "headwise"
    NONE = "none"


class Reads(StrEnum):
    """State that a token of block b reads.

    - `BLOCK`: the state after block b - 1, for every token.
    - `TOKEN`: that state after tokens 1 … t of the same pass were written to it, for token t. This is the read of Gated
      DeltaNet (arXiv 2412.06464), an ablation. What a pass writes for its own reads is not kept.
    """

    BLOCK = "block"
    TOKEN = "token"


NOISY_WRITES = "states of writes noisy take every pass, which a fast form only lets attend"
"""Why only the plain model computes `Writes.NOISY`."""


class Writes(StrEnum):
    """Passes of a block that are written to the state.

    - `CLEAN`: the clean pass.
    - `NOISY`: every denoising pass too, after it has read; the clean pass is written on top (an ablation).
    """

    CLEAN = "clean"
    NOISY = "noisy"


@dataclass(frozen=True)
class StateSettings:
    """How the states of all hybrid layers of a model work.

    Attributes:
        rotation: rotation of the state's queries and keys, see `Rotation`.
        rotation_period: latent frames after which the rotation of `WRAPPED` repeats.
        rotation_rate: factor on the frame's index of `SLOW`.
        decay: initial half-lives; trained weights are not changed by it.
        decay_block_tokens: tokens of a block, in which the half-lives of `Decay.SLOW` are measured.
        value_expansion: channels of a value per channel of a head. The further channels hold the values of the next
            heads; at most as many as there are heads.
        num_states: states per head. They share keys, queries and values, and differ in decay, write strength and gate.
        local_frames: latent frames before a block that its softmax sees. They are written to the state when they leave
            this window, see `arl2.state_memory`; 0 for none, as in the paper.
        gate: weight of a read in the output: headwise for a learned one per head, none for 1. Without a gate the layer
            has no `gate_proj`.
        reads: state that a token reads: block for the state after the block before, token for that state with the
            pass's tokens up to it written.
        writes: passes that are written: clean for the clean pass alone, noisy for every denoising pass too.
        rule: name of the update rule, see `arl2.ops.update_rules`.

    Raises:
        InputError: a setting that another one needs is missing, one is given that does nothing, or the rule is unknown.
    """

    rotation: Rotation = Rotation.ABSOLUTE
    rotation_period: RotationPeriod | None = None
    rotation_rate: RotationRate | None = None
    decay: Decay = Decay.PAPER
    decay_block_tokens: TokensPerBlock | None = None
    value_expansion: ValueExpansion = 1
    num_states: NumStates = 1
    local_frames: LocalFrames = 0
    gate: Gate = Gate.HEADWISE
    reads: Reads = Reads.BLOCK
    writes: Writes = Writes.CLEAN
    rule: str = GATED_DELTA

    def __post_init__(self) -> None:
        rule_named(self.rule)
        if self.reads is Reads.TOKEN and self.rule != GATED_DELTA:
            raise InputError(f"{STATE_VARIANT}.reads token is built for {STATE_VARIANT}.rule {GATED_DELTA}: drop one")
        if self.reads is Reads.TOKEN and not (self.has_one_plain_state and not self.local_frames):
            raise InputError(
                f"{STATE_VARIANT}.reads token is for one state of the paper's size without a window: drop "
                f"{STATE_VARIANT}.value_expansion, num_states and local_frames, or it"
            )
        if self.writes is Writes.NOISY and self.local_frames:
            raise InputError(
                f"{STATE_VARIANT}.writes noisy would do nothing with {STATE_VARIANT}.local_frames, whose window delays "
                "every write: drop one of them"
            )
        pairs = (
            ("rotation", self.rotation, Rotation.WRAPPED, "rotation_period", self.rotation_period),
            ("rotation", self.rotation, Rotation.SLOW, "rotation_rate", self.rotation_rate),
            ("decay", self.decay, Decay.SLOW, "decay_block_tokens", self.decay_block_tokens),
        )
        for name, chosen, needing, needed, value in pairs:
            if chosen is needing and value is None:
                raise InputError(f"{STATE_VARIANT}.{name} {chosen} needs {STATE_VARIANT}.{needed}: give it")
            if chosen is not needing and value is not None:
                raise InputError(
                    f"{STATE_VARIANT}.{needed} {value} would do nothing with {STATE_VARIANT}.{name} {chosen}: drop it, "
                    f"or set {STATE_VARIANT}.{name} to {needing}"
                )

    @classmethod
    def from_plain(cls, settings: Mapping[str, Any] | None, source: str | Path) -> Self:
        """The settings as a config.json, a header or a `.pt` holds them; what they leave out is the paper's.

        Raises:
            CheckpointError: a name or value is unknown, or they contradict one another; the message names `source`.
        """
        check_settings({STATE_VARIANT: settings}, {STATE_VARIANT: StateRecord | None}, source)
        plain = dict(settings or {})
        for name, kind in ENUMS.items():
            if name in plain:
                plain[name] = kind(plain[name])
        try:
            return cls(**plain)
        except InputError as error:
            raise CheckpointError(f"{source}: {error}") from error

    def as_plain(self) -> dict[str, Any] | None:
        """The settings that differ from the paper's, as plain values; None if none does."""
        differing = {each.name: vars(self)[each.name] for each in fields(self) if vars(self)[each.name] != each.default}
        return {name: str(value) if isinstance(value, StrEnum) else value for name, value in differing.items()} or None

    def __str__(self) -> str:
        """For messages: "rotation wrapped, rotation_period 21", or "the paper's kind"."""
        return ", ".join(f"{name} {value}" for name, value in (self.as_plain() or {}).items()) or "the paper's kind"

    @property
    def has_one_plain_state(self) -> bool:
        """Whether a state has the paper's size and is the only one of its head."""
        return self.value_expansion == 1 and self.num_states == 1

    @property
    def has_fused_form(self) -> bool:
        """Whether `arl2.inference` has a form of such layers that is faster than the plain one."""
        as_usual = self.gate is Gate.HEADWISE and self.reads is Reads.BLOCK and self.writes is Writes.CLEAN
        as_usual = as_usual and self.rule == GATED_DELTA
        return self.has_one_plain_state and not self.local_frames and as_usual

    def rotation_frames(self, frames_F: Tensor) -> Tensor:
        """Indices of latent frames as the state's rotation takes them; zeros where time does not rotate."""
        if self.rotation_period is not None:
            return frames_F % self.rotation_period
        if self.rotation_rate is not None:
            return frames_F.to(torch.float64) * self.rotation_rate
        return frames_F if self.rotation is Rotation.ABSOLUTE else torch.zeros_like(frames_F)


ENUMS: dict[str, type[StrEnum]] = {
    "rotation": Rotation,
    "decay": Decay,
    "gate": Gate,
    "reads": Reads,
    "writes": Writes,
}
"""Fields whose plain values are names."""
PAPER_STATE = StateSettings()
"""The state of the paper."""


def stated_state(record: Mapping[str, Any], config: Mapping[str, Any], source: str | Path) -> StateSettings:
    """The variant that weights have by their own record and by their config; the paper's where neither says one.

    Args:
        record, config: those that say which layers are hybrid count, also if they say nothing of the state.

    Raises:
        CheckpointError: the two differ, or what they say is unknown.
    """
    said = [
        StateSettings.from_plain(settings.get(STATE_VARIANT), place)
        for settings, place in ((record, f"the record in {source}"), (config, source))
        if "hybrid_layers" in settings or STATE_VARIANT in settings
    ]
    if len(said) == 2 and said[0] != said[1]:
        raise CheckpointError(
            f"{source} was made with states of {said[0]}, the config says of {said[1]}: use the config of these "
            "weights, or correct it"
        )
    return said[0] if said else PAPER_STATE
