"""Update rules: gated linear attention against its recurrence, and rules that users register."""

import pytest
import torch
from tiny_models import HYBRID, new_memory, tiny_model, tiny_video
from torch import Tensor

from arl2.model import HybridSettings
from arl2.ops import update_rules
from arl2.ops.gated_delta import DeltaInputs, WriteBackend
from arl2.ops.update_rules import UpdateRule, register_rule, rule_named
from arl2.rollout import predict_flow, remember_block
from arl2.state_settings import Reads, StateSettings
from wan.utils.errors import CheckpointError, InputError

BLOCKS, TOKENS = 3, 7


def drawn(tokens: int = BLOCKS * TOKENS) -> tuple[Tensor, DeltaInputs]:
    """A state and inputs of two heads, whose values are wider than the keys."""
    torch.manual_seed(0)
    k, v = (torch.randn(2, tokens, 2, width, dtype=torch.float64) for width in (5, 6))
    log_decay, beta = -torch.rand(2, tokens, 2, dtype=torch.float64), 2 * torch.rand(2, tokens, 2, dtype=torch.float64)
    inputs = DeltaInputs(*(x.requires_grad_() for x in (k, v, log_decay, beta)))
    return torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True), inputs


def recurrent(state: Tensor, inputs: DeltaInputs) -> Tensor:
    """Gated linear attention, token by token."""
    for k, v, log_decay, beta in zip(*(x.unbind(1) for x in inputs), strict=True):
        state = log_decay.exp()[..., None, None] * state + torch.einsum("bh,bhk,bhv->bhkv", beta, k, v)
    return state


def gradients(of: Tensor, state: Tensor, inputs: DeltaInputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        (of * torch.linspace(-1, 1, of.numel(), dtype=of.dtype).view_as(of)).sum(), [state, *inputs]
    )


def test_gated_linear_is_its_recurrence() -> None:
    state, inputs = drawn()
    rule, wanted = rule_named("gated_linear"), recurrent(state, inputs)
    found = rule.write(state, inputs, WriteBackend.AUTO)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    for one, other in zip(gradients(found, state, inputs), gradients(wanted, state, inputs), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-11)


def test_states_between_blocks_are_those_of_writing_one_after_the_other() -> None:
    state, inputs = drawn()
    for name in ("gated_delta", "gated_linear"):
        rule, states = rule_named(name), [state]
        for place in range(BLOCKS):
            block = DeltaInputs(*(x[:, place * TOKENS : (place + 1) * TOKENS] for x in inputs))
            states.append(rule.write(states[-1], block, WriteBackend.AUTO))
        wanted, found = torch.stack(states, 1), rule.states_between(state, inputs.segments(BLOCKS))
        assert torch.allclose(found, wanted, rtol=0, atol=1e-10)
        for one, other in zip(gradients(found, state, inputs), gradients(wanted, state, inputs), strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-9)


def test_the_rules_differ() -> None:
    state, inputs = drawn()
    delta, linear = (
        rule_named(name).write(state, inputs, WriteBackend.AUTO) for name in ("gated_delta", "gated_linear")
    )
    assert (delta - linear).abs().max() > 0.1


def test_a_registered_rule_writes_in_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_rules, "_RULES", dict(update_rules._RULES))

    def write(state: Tensor, inputs: DeltaInputs, backend: WriteBackend) -> Tensor:
        return state + 1

    def between(state: Tensor, segments: DeltaInputs) -> Tensor:
        return torch.stack([state + n for n in range(segments.k.shape[1] + 1)], 1)

    register_rule("counts blocks", UpdateRule(write, between))
    model = tiny_model(HybridSettings((0, 2), state=StateSettings(rule="counts blocks")))
    video, memory = tiny_video(6), new_memory(model)
    text = model.embed_text(video.text)
    for start in (0, 3):
        predict_flow(model, video.noisy[:, start : start + 3], torch.tensor(500.0), text, memory, start)
        remember_block(model, video.clean[:, start : start + 3], text, memory, start)
    assert all(float(memory.layers[layer].read(1).state_BHKV.unique()) == 2 for layer in (0, 2))
    assert model.record()["state"] == {"rule": "counts blocks"}


def test_unknown_and_taken_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"state\.rule .mamba. is not known: give one of gated_delta, gated_linear"):
        StateSettings(rule="mamba")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: state\.rule 'mamba' is not known"):
        StateSettings.from_plain({"rule": "mamba"}, "model.safetensors")
    with pytest.raises(InputError, match="'gated_delta' is taken"):
        register_rule("gated_delta", rule_named("gated_linear"))
    with pytest.raises(InputError, match=r"reads token is built for state\.rule gated_delta"):
        StateSettings(rule="gated_linear", reads=Reads.TOKEN)


def test_the_fast_form_computes_other_rules_plainly() -> None:
    assert HYBRID.state.has_fused_form and not StateSettings(rule="gated_linear").has_fused_form
