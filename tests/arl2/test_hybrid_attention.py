"""The layer's formula stands once: what is changed in one of its parts changes in every path that computes it."""

import pytest
import torch
from tiny_models import new_memory, tiny_model, tiny_video
from torch import Tensor

import arl2.hybrid_attention
from arl2.distillation.diagnostics import measured
from arl2.hybrid_attention import HybridAttention
from arl2.inference.model import InferenceModel
from arl2.model import FFNLoRA, HybridSettings, HybridWanModel
from arl2.rollout import predict_flow, remember_block
from arl2.toyworld.study.ablations import Variant, install
from wan.model import FlowModel
from wan.teacher_forcing import teacher_forced_flow

ALL = HybridSettings((0, 1, 2), 3, 6.0, FFNLoRA.HYBRID)
READING = [variant for variant in Variant if variant is not Variant.TOKEN_READS]
"""Variants that read a state as the layer does; the other reads while it writes."""


def new_model(variant: Variant | None = None) -> HybridWanModel:
    torch.manual_seed(1)
    model = tiny_model(ALL)
    return model if variant is None else install(model, variant)


@torch.no_grad()
def looped(model: HybridWanModel, passes: FlowModel) -> Tensor:
    """Flows of three blocks, each remembered."""
    torch.manual_seed(2)
    video, memory, flows = tiny_video(), new_memory(model), []
    text = model.embed_text(video.text)
    for start in range(0, 9, 3):
        block = slice(start, start + 3)
        flows.append(predict_flow(passes, video.noisy[:, block], torch.tensor(500.0), text, memory, start))
        remember_block(passes, video.clean[:, block], text, memory, start)
    return torch.cat(flows, dim=1)


@torch.no_grad()
def parallel(model: HybridWanModel) -> Tensor:
    torch.manual_seed(2)
    video = tiny_video()
    return teacher_forced_flow(model, video.noisy, torch.full((2, 9), 500.0), video.text, 3, video.clean)


def read_nothing(self: HybridAttention, state: Tensor, q: Tensor) -> Tensor:
    return q.new_zeros(*q.shape[:-1], state.shape[-1])


def every_path() -> dict[str, Tensor]:
    """The flows of every path that computes the layer."""
    model = new_model()
    paths = {"loop": looped(model, model), "parallel": parallel(model), "fused": looped(model, InferenceModel(model))}
    for variant in READING:
        model = new_model(variant)
        paths |= {f"{variant} loop": looped(model, model), f"{variant} parallel": parallel(model)}
    return paths


def test_a_read_is_written_down_once(monkeypatch: pytest.MonkeyPatch) -> None:
    local_only = every_path()[f"{Variant.GATE_ZERO} loop"]
    monkeypatch.setattr(HybridAttention, "read", read_nothing)
    for name, flow in every_path().items():
        torch.testing.assert_close(flow, local_only, rtol=1e-9, atol=1e-10, msg=name)
    model = new_model()
    with measured(model, 6) as reports:
        looped(model, model)
    assert set(reports["inter_rms"].values()) == {0.0} and min(reports["intra_rms"].values()) > 0


@pytest.mark.parametrize("part", ["local_attention", "state_query_of", "state_key_of"])
def test_the_other_parts_are_written_down_once(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, original, calls = every_path(), vars(HybridAttention)[part], []

    def opposite(self: HybridAttention, *arguments: object) -> Tensor:
        calls.append(part)
        changed: Tensor = -original(self, *arguments)
        return changed

    monkeypatch.setattr(HybridAttention, part, opposite)
    after = every_path()
    unchanged = {name for name in before if torch.allclose(before[name], after[name])}
    # A fused block shares norms and rotations of local attention with its other branch; without a gate nothing is read.
    expected = {"fused"} if part == "local_attention" else {name for name in before if "gate_zero" in name}
    assert calls and unchanged == expected


def test_local_and_remembered_are_combined_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arl2.hybrid_attention, "gated", lambda remembered, gate: torch.zeros_like(remembered))
    paths = every_path()
    local_only = paths[f"{Variant.GATE_ZERO} loop"]
    for name, flow in paths.items():
        torch.testing.assert_close(flow, local_only, rtol=1e-9, atol=1e-10, msg=name)
