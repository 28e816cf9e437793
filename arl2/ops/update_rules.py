"""Update rules of the recurrent state by name: what the tokens of a block do to it.

The layer computes keys, values, log decays and write strengths; a rule turns a state and these into the next state.
`docs/extend.md` adds one.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from arl2.ops.gated_delta import DeltaInputs, WriteBackend, gated_delta_write, states_between
from arl2.ops.gated_linear import linear_states_between, write_linear
from wan.utils.errors import InputError
from wan.utils.ranges import shown

GATED_DELTA = "gated_delta"
"""The rule of the paper, and the only one that the fast form computes."""


class UpdateRule(NamedTuple):
    """An update rule. Both functions are differentiable in all tensors, and neither changes its arguments.

    Attributes:
        write: function from a state [B, H, K, V], the inputs of L tokens, and the choice among implementations, to the
            state after them in the same dtype.
        states_between: function from a state and the inputs of N blocks, [B, N, L, …], to the states before, between
            and after them, [B, N + 1, H, K, V]: `write` block by block, for training on all blocks at once.
    """

    write: Callable[[Tensor, DeltaInputs, WriteBackend], Tensor]
    states_between: Callable[[Tensor, DeltaInputs], Tensor]


def _delta_write(state_BHKV: Tensor, inputs: DeltaInputs, backend: WriteBackend) -> Tensor:
    return gated_delta_write(state_BHKV, *inputs, backend=backend)


def _delta_between(state_BHKV: Tensor, segments: DeltaInputs) -> Tensor:
    return states_between(state_BHKV, *segments)


def _linear_write(state_BHKV: Tensor, inputs: DeltaInputs, backend: WriteBackend) -> Tensor:
    return write_linear(state_BHKV, inputs)


_RULES: dict[str, UpdateRule] = {
    GATED_DELTA: UpdateRule(_delta_write, _delta_between),
    "gated_linear": UpdateRule(_linear_write, linear_states_between),
}


def register_rule(name: str, rule: UpdateRule) -> None:
    """Make a rule known under a name, for `state.rule=NAME`. Call it before a model is built or loaded.

    Raises:
        InputError: the name is taken by another rule.
    """
    if _RULES.setdefault(name, rule) is not rule:
        raise InputError(f"state.rule {shown(name)} is taken: choose another name")


def rule_named(name: str) -> UpdateRule:
    """The rule of a name.

    Raises:
        InputError: there is none.
    """
    if name not in _RULES:
        known = ", ".join(_RULES)
        raise InputError(f"state.rule {shown(name)} is not known: give one of {known}, or register it (docs/extend.md)")
    return _RULES[name]
