"""Ablations of the hybrid layer as settings of the product: the study's variants, and what refuses them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import HYBRID, new_memory, tiny_model, tiny_video
from torch import Tensor
from torch.nn import functional as F

from arl2.distillation.batch import BatchNoise, VideoBatch
from arl2.distillation.objective import ForwardMode
from arl2.distillation.stage2 import Context, Stage2, Stage2Settings, stage2_parameters
from arl2.inference.model import InferenceModel
from arl2.model import FFNLoRA, HybridSettings, HybridWanModel
from arl2.ops.gated_delta import DeltaInputs, write_recurrent
from arl2.ops.token_reads import read_while_written
from arl2.rollout import FewStepSampler, denoise_block, predict_flow, remember_block
from arl2.state_settings import Gate, Reads, StateSettings, Writes
from arl2.statement import GATE_PARTS
from arl2.toyworld.study.ablations import Variant, install
from pipelines.config import SpeedConfig
from pipelines.generation.blocks import VideoOutput
from pipelines.generation.random_model import random_pipeline
from wan.utils.errors import InputError

ALL = HybridSettings((0, 1, 2), 3, 6.0, FFNLoRA.HYBRID)
SAMPLER = FewStepSampler.from_steps([1000, 750, 500, 250], 5.0)
NOISY = StateSettings(writes=Writes.NOISY)
ABLATIONS = {
    Variant.NO_GATE: StateSettings(gate=Gate.NONE),
    Variant.TOKEN_READS: StateSettings(reads=Reads.TOKEN),
    Variant.NOISY_WRITES: NOISY,
}


def both(variant: Variant) -> tuple[HybridWanModel, HybridWanModel]:
    """The product's form of a variant and the study's, of the same weights."""
    torch.manual_seed(1)
    study = tiny_model(ALL)
    product = tiny_model(replace(ALL, state=ABLATIONS[variant]))
    dropped = GATE_PARTS[0] if variant is Variant.NO_GATE else None
    product.load_state_dict({n: v for n, v in study.state_dict().items() if dropped is None or dropped not in n})
    return product, install(study, variant)


def generated(model: HybridWanModel, frames: int = 9) -> Tensor:
    """Blocks made by the sampler, each remembered."""
    torch.manual_seed(2)
    video = tiny_video(frames)
    memory, text, made = new_memory(model, differentiable=True), model.embed_text(video.text), []
    noise = torch.randn(len(SAMPLER.sigmas), *video.noisy.shape, dtype=torch.float64)
    for start in range(0, frames, 3):
        of_block = noise[:, :, start : start + 3]
        made.append(denoise_block(model, SAMPLER, of_block.__getitem__, text, memory, start))
        remember_block(model, made[-1], text, memory, start)
    return torch.cat(made, dim=1)


@pytest.mark.parametrize("variant", ABLATIONS)
def test_settings_compute_what_the_study_did_also_in_gradients(variant: Variant) -> None:
    results = []
    for model in both(variant):
        out = generated(model)
        parameters = {n: p for n, p in model.named_parameters() if GATE_PARTS[0] not in n}
        gradients = torch.autograd.grad(out.square().sum(), list(parameters.values()), allow_unused=True)
        results.append([out.detach(), *(g for g in gradients if g is not None)])
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(results[0][0], generated(tiny_model(ALL)).detach(), atol=1e-3)


@pytest.mark.parametrize("tokens", [7, 64, 150])
def test_token_reads_are_the_recurrence_in_any_number_of_chunks(tokens: int) -> None:
    torch.manual_seed(3)
    batch, number, heads, size = 2, 3, 2, 4
    shape = (batch, number, tokens, heads, size)
    k = F.normalize(torch.randn(shape, dtype=torch.float64), dim=-1).requires_grad_()
    v, q = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    log_decay = (-torch.rand(shape[:-1], dtype=torch.float64)).requires_grad_()
    beta = (2 * torch.rand(shape[:-1], dtype=torch.float64)).requires_grad_()
    states = torch.randn(batch, number, heads, size, size, dtype=torch.float64, requires_grad=True)
    inputs = (states, q, k, v, log_decay, beta)
    expected = []
    for segment in range(number):
        state = states[:, segment]
        for t in range(tokens):
            written = (x[:, segment, t : t + 1] for x in (k, v, log_decay, beta))
            state = write_recurrent(state, *written)
            expected.append(torch.einsum("bhk,bhkv->bhv", q[:, segment, t], state))
    reads = torch.stack(expected, 1).unflatten(1, (number, tokens))
    found = read_while_written(states, q, DeltaInputs(k, v, log_decay, beta), chunk=16)
    torch.testing.assert_close(found, reads, rtol=1e-9, atol=1e-11)
    weight = torch.randn_like(reads)
    gradients = [torch.autograd.grad((x * weight).sum(), inputs) for x in (found, reads)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


def test_noisy_passes_are_written_to_states_and_to_nothing_else() -> None:
    torch.manual_seed(1)
    model = tiny_model(replace(HYBRID, state=NOISY))
    video, memory = tiny_video(3), new_memory(model, differentiable=True)
    text = model.embed_text(video.text)

    def held() -> list[Tensor]:
        views = memory.read(18)
        return [view.state_BHKV.clone() if hasattr(view, "state_BHKV") else view.keys_BMHD.clone() for view in views]

    states = sorted(model.hybrid_attentions())
    before = held()
    predict_flow(model, video.noisy, torch.tensor(500.0), text, memory, 0)
    for layer, (one, other) in enumerate(zip(before, held(), strict=True)):
        assert torch.equal(one, other) == (layer not in states)
    with model.as_teacher():
        teachers = new_memory(model, differentiable=True)
        predict_flow(model, video.noisy, torch.tensor(500.0), text, teachers, 0)
        assert all(view.keys_BMHD.shape[1] == 0 for view in teachers.read(18))


def test_training_goes_through_the_passes_in_the_order_of_sampling() -> None:
    torch.manual_seed(1)
    model = tiny_model(replace(HYBRID, state=NOISY))
    video = tiny_video(9)
    levels = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64).expand(2, 3, 3).clone()
    levels[1, 1] = torch.tensor([0.9, 0.5, 0.2])
    noise = BatchNoise(levels, torch.randn(2, 3, 4, 3, *video.noisy.shape[2:], dtype=torch.float64))
    ordered = noise.in_order_of_sampling()
    assert (ordered.levels_BNP.diff(dim=2) < 0).all()
    torch.testing.assert_close(ordered.noise_BNPFCHW[0, 0], noise.noise_BNPFCHW[0, 0, [1, 2, 0, 3]])
    torch.testing.assert_close(ordered.noise_BNPFCHW[1, 1], noise.noise_BNPFCHW[1, 1])
    batch, losses = VideoBatch(video.clean, video.text), []
    for given in (noise, ordered):
        objective = Stage2(model, Stage2Settings(frames_per_block=3))
        losses.append(torch.stack(list(objective.losses(batch, given))).sum())
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    gradients = torch.autograd.grad(losses[0], list(stage2_parameters(model).values()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    "settings",
    [
        {"forward_mode": ForwardMode.PARALLEL},
        {"context": Context.SELF_ROLLOUT},
        {"context": Context.RESAMPLED, "data_weight": 1.0},
    ],
)
def test_training_that_cannot_write_noisy_passes_is_refused(settings: dict[str, object]) -> None:
    model = tiny_model(replace(HYBRID, state=NOISY))
    with pytest.raises(InputError, match="writes noisy trains block by block on the data: set forward_mode=sequential"):
        Stage2(model, Stage2Settings(frames_per_block=3, **settings), SAMPLER)  # type: ignore[arg-type]


def test_the_fast_form_refuses_noisy_writes_and_the_pipeline_says_why() -> None:
    with pytest.raises(InputError, match=r"writes noisy take every pass.*compute plainly"):
        InferenceModel(tiny_model(replace(HYBRID, state=NOISY)))
    pipeline = random_pipeline("toy", HybridSettings((0, 2), 4, 8.0, state=NOISY))
    with pytest.raises(InputError, match="writes noisy"):
        pipeline.optimize_for_inference(SpeedConfig(compile=True, fast_vae=False))
    video = pipeline("a ball", height=64, width=64, num_frames=9, output_type="latent")
    assert isinstance(video, VideoOutput) and video.frames.isfinite().all()


def test_weights_with_noisy_writes_say_so(tmp_path: Path) -> None:
    model = tiny_model(replace(HYBRID, state=NOISY), torch.float32)
    model.save_pretrained(tmp_path)
    assert HybridWanModel.from_pretrained(tmp_path).hybrid.state == NOISY
