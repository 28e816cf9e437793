"""The objectives of both stages: values, gradients, who is trained and who is not touched."""

import pytest
import torch
from models import TINY, tiny_model, tiny_video
from torch import Tensor

from arl2.distillation.batch import VideoBatch
from arl2.distillation.stage1 import Stage1Settings, observed, stage1_errors, stage1_parameters
from arl2.distillation.stage2 import Context, Stage2Settings, Target, stage2_loss, stage2_parameters
from arl2.hybrid_attention import HybridAttention
from arl2.model import FFNLoRA, HybridSettings, HybridWanModel
from arl2.rollout import FewStepSampler
from wan.errors import InputError
from wan.parallel import ParallelLayout
from wan.teacher_forcing import teacher_forced_flow

ALL = HybridSettings((0, 1, 2), 3, 6.0, FFNLoRA.HYBRID)
LEVELS = (0.9, 0.4)


def videos(frames: int = 9) -> VideoBatch:
    video = tiny_video(frames)
    return VideoBatch(video.clean, video.text)


def fixed_noise(batch: VideoBatch) -> Tensor:
    """Noise of 9 blocks and 6 places, [block, place, B, 3, C, h, w]."""
    shape = batch.latents_BFCHW[:, :3].shape
    return torch.randn(9, 6, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def trainable(model: HybridWanModel, parameters: dict[str, torch.nn.Parameter]) -> HybridWanModel:
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return model


def gradients(model: HybridWanModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stage1_in_parallel(model: HybridWanModel, batch: VideoBatch, noise: Tensor, sigma: float) -> Tensor:
    """Stage 1 at one noise level, dense: one masked teacher forward, every hybrid over all blocks at once."""
    clean = batch.latents_BFCHW
    noisy = torch.cat([(1 - sigma) * clean[:, 3 * b : 3 * b + 3] + sigma * noise[b, 0] for b in range(3)], dim=1)
    times = torch.full(clean.shape[:2], 1000 * sigma)
    layers = model.hybrid_attentions()
    with torch.no_grad(), model.as_teacher(), observed(layers) as seen:
        teacher_forced_flow(model, noisy, times, batch.text_BTD, 3, clean)
    layout = ParallelLayout(9, 3, 6, 2, clean.device)
    errors = []
    for layer, one in seen.items():
        output, _ = layers[layer](one.x_BLD, one.rotary, layers[layer].parallel_view(layout), True, False)
        errors.append((output - one.output_BLD).float().square().mean())
    return torch.stack(errors).mean()


def test_stage_one_equals_a_dense_implementation() -> None:
    model, batch = tiny_model(ALL), videos()
    trainable(model, stage1_parameters(model))
    noise = fixed_noise(batch)
    # One noisy and one clean read of every block: the dense sequence holds both halves.
    errors = stage1_errors(model, batch, Stage1Settings(3, (0.7,)), lambda block, place: noise[block, place])
    loop = gradients(model, errors.loss())
    dense_loss = stage1_in_parallel(model, batch, noise, 0.7)
    dense = gradients(model, dense_loss)
    torch.testing.assert_close(errors.loss(), dense_loss, rtol=1e-5, atol=1e-8)
    assert loop.keys() == dense.keys() == stage1_parameters(model).keys()
    for name in loop:
        torch.testing.assert_close(loop[name], dense[name], rtol=1e-4, atol=1e-7, msg=name)


def test_stage_one_trains_what_it_says_and_leaves_the_teacher_alone() -> None:
    model, batch = tiny_model(ALL), videos()
    parts = {name.split("self_attn.")[1] for name in stage1_parameters(model)}
    assert parts == {"a_proj.weight", "b_proj.weight", "gate_proj.weight", "A_log", "dt_bias"} | {
        f"phi_{x}.weight" for x in "qkv"
    }
    trainable(model, stage1_parameters(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    noise = fixed_noise(batch)
    optimizer = torch.optim.SGD(stage1_parameters(model).values(), lr=0.3)
    losses = []
    for _ in range(6):
        errors = stage1_errors(model, batch, Stage1Settings(3, LEVELS), lambda block, place: noise[block, place])
        optimizer.zero_grad()
        errors.loss().backward()
        optimizer.step()
        losses.append(errors.loss().item())
    assert losses[-1] < losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in stage1_parameters(model)), name


def test_the_layers_of_stage_one_do_not_depend_on_one_another() -> None:
    batch = videos()
    noise = fixed_noise(batch)

    def relative(scale: float) -> dict[int, float]:
        torch.manual_seed(0)
        model = tiny_model(ALL)
        with torch.no_grad():
            first = model.blocks[0].self_attn
            assert isinstance(first, HybridAttention)
            first.gate_proj.weight.mul_(scale)
        settings = Stage1Settings(3, LEVELS)
        return stage1_errors(model, batch, settings, lambda block, place: noise[block, place]).relative()

    one, other = relative(1.0), relative(5.0)
    assert one[0] != other[0] and (one[1], one[2]) == (other[1], other[2])
    assert all(0 < value < 2 for value in one.values())


@pytest.mark.parametrize("stage", [1, 2])
def test_truncated_graphs_keep_the_loss_and_the_gradient_of_what_is_written(stage: int) -> None:
    model, batch = tiny_model(ALL), videos()
    trainable(model, stage1_parameters(model) if stage == 1 else stage2_parameters(model))
    noise = fixed_noise(batch)
    losses, grads = [], []
    for blocks_per_graph in (None, 1):
        if stage == 1:
            settings = Stage1Settings(3, LEVELS, blocks_per_graph=blocks_per_graph)
            loss = stage1_errors(model, batch, settings, lambda block, place: noise[block, place]).loss()
        else:
            settings2 = Stage2Settings(3, LEVELS, blocks_per_graph=blocks_per_graph)
            loss = stage2_loss(model, batch, settings2, lambda block, place: noise[block, place])
        grads.append(gradients(model, loss))
        losses.append(loss.item())
    assert losses[0] == losses[1]
    name = "blocks.1.self_attn.b_proj.weight"
    assert grads[1][name].abs().max() > 0, "a block's write is read by the next one: it must get a gradient"
    assert not torch.allclose(grads[0][name], grads[1][name], rtol=1e-6, atol=0)


def stage2_in_parallel(model: HybridWanModel, batch: VideoBatch, noise: Tensor) -> Tensor:
    """Stage 2 with context from data, dense: masked forwards of student and teacher."""
    clean, differences = batch.latents_BFCHW, []
    for place, sigma in enumerate(LEVELS):
        noisy = torch.cat(
            [(1 - sigma) * clean[:, 3 * b : 3 * b + 3] + sigma * noise[b, place] for b in range(3)], dim=1
        )
        times = torch.full(clean.shape[:2], 1000 * sigma)
        with torch.no_grad(), model.as_teacher():
            wanted = teacher_forced_flow(model, noisy, times, batch.text_BTD, 3, clean)
        flow = teacher_forced_flow(model, noisy, times, batch.text_BTD, 3, clean)
        differences.append((flow - wanted).float().square().mean())
    return torch.stack(differences).mean()


def test_stage_two_equals_a_dense_implementation() -> None:
    model, batch = tiny_model(ALL), videos()
    trainable(model, stage2_parameters(model))
    noise = fixed_noise(batch)
    loss = stage2_loss(model, batch, Stage2Settings(3, LEVELS), lambda block, place: noise[block, place])
    dense_loss = stage2_in_parallel(model, batch, noise)
    torch.testing.assert_close(loss, dense_loss, rtol=1e-4, atol=1e-8)
    loop, dense = gradients(model, loss), gradients(model, dense_loss)
    assert loop.keys() == dense.keys() == stage2_parameters(model).keys()
    for name in loop:
        torch.testing.assert_close(loop[name], dense[name], rtol=1e-3, atol=1e-6, msg=name)


def test_a_fresh_conversion_agrees_with_its_teacher_on_the_first_block() -> None:
    model = HybridWanModel(**TINY, hybrid_layers=[0, 1, 2], lora_rank=3).double()
    batch = videos(3)
    noise = fixed_noise(batch)
    assert stage2_loss(model, batch, Stage2Settings(3, LEVELS), lambda block, place: noise[block, place]).item() == 0


def test_targets_differ_by_the_noise_level() -> None:
    model, batch = tiny_model(ALL), videos()
    noise = fixed_noise(batch)
    losses = [
        stage2_loss(model, batch, Stage2Settings(3, (0.4,), target=target), lambda block, place: noise[block, place])
        for target in (Target.FLOW, Target.X0)
    ]
    torch.testing.assert_close(losses[1], 0.4**2 * losses[0], rtol=1e-5, atol=0)


def test_context_from_the_students_own_rollout_does_not_read_the_data() -> None:
    model, batch = tiny_model(ALL), videos()
    noise, sampler = fixed_noise(batch), FewStepSampler.from_steps([1000, 500], 5.0)
    other = VideoBatch(torch.randn_like(batch.latents_BFCHW), batch.text_BTD)
    losses = {
        context: [
            stage2_loss(
                model,
                one,
                Stage2Settings(3, LEVELS, context=context),
                lambda block, place: noise[block, place],
                sampler,
            ).item()
            for one in (batch, other)
        ]
        for context in Context
    }
    assert losses[Context.STUDENT][0] == losses[Context.STUDENT][1]
    assert losses[Context.DATA][0] != losses[Context.DATA][1]


def test_frames_must_divide_into_blocks() -> None:
    model, batch = tiny_model(ALL), videos(8)
    with pytest.raises(InputError, match="do not divide"):
        stage2_loss(model, batch, Stage2Settings(3, LEVELS), lambda block, place: torch.zeros(1))
