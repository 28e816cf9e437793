"""Deviation from the teacher: nothing where nothing differs, exact where it can be computed by hand."""

import math

import pytest
import torch
from tiny_models import HEIGHT, HYBRID, TINY, WIDTH, tiny_model
from torch import Tensor

from arl2.evaluation.deviation import (
    latent_deviation,
    pixel_deviation,
    roll_out,
    rollout_deviation,
    teacher_forced_deviation,
    temporal_flicker,
)
from arl2.evaluation.eval_setup import EvalSetup
from arl2.model import HybridSettings, HybridWanModel
from arl2.rollout import FewStepSampler
from wan.flow import flow_to_x0
from wan.utils.errors import InputError

SAMPLER = FewStepSampler.from_steps([1000, 500], 5.0)
BATCH, FRAMES = 2, 3


def noise(block: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * block + step)
    return torch.randn(BATCH, FRAMES, TINY["in_dim"], HEIGHT, WIDTH, generator=generator, dtype=torch.float64)


def text() -> Tensor:
    return torch.randn(BATCH, 4, TINY["text_dim"], dtype=torch.float64)


@pytest.mark.parametrize("blocks", [3, 12])
def test_a_model_does_not_deviate_from_itself(blocks: int) -> None:
    deviation = rollout_deviation(EvalSetup(tiny_model(), SAMPLER), text(), noise, blocks)
    assert deviation.by_block == [0.0] * blocks and deviation.mean == 0.0
    assert deviation.student_BFCHW.shape == (BATCH, FRAMES * blocks, TINY["in_dim"], HEIGHT, WIDTH)
    forced = teacher_forced_deviation(EvalSetup(tiny_model(), SAMPLER), deviation.teacher_BFCHW, text(), noise)
    assert forced.by_block == [0.0] * blocks


def test_a_conversion_deviates_from_the_second_block_on() -> None:
    student = EvalSetup(HybridWanModel(**TINY, hybrid_layers=[0, 2]).double().eval(), SAMPLER)
    torch.nn.init.normal_(student.transformer.head.head.weight)
    words = text()
    deviation = rollout_deviation(student, words, noise, 4)
    forced = teacher_forced_deviation(student, deviation.teacher_BFCHW, words, noise)
    for errors in (deviation, forced):
        assert errors.mse_BN.shape == (BATCH, 4)
        assert errors.by_block[0] == 0.0 and all(error > 0 for error in errors.by_block[1:])
    assert torch.equal(deviation.student_BFCHW[:, :3], deviation.teacher_BFCHW[:, :3])


def test_the_teacher_is_the_softmax_model_with_full_memory() -> None:
    model, words = tiny_model(HYBRID), text()
    softmax = tiny_model()
    names = softmax.state_dict().keys()
    weights = {name.replace(".linear.", "."): value for name, value in model.state_dict().items()}
    softmax.load_state_dict({name: weights[name] for name in names})
    windowed = EvalSetup(model, SAMPLER, window_frames=6, sink_frames=3)
    deviation = rollout_deviation(windowed, words, noise, 4)
    torch.testing.assert_close(deviation.teacher_BFCHW, roll_out(EvalSetup(softmax, SAMPLER), words, noise, 4))
    torch.testing.assert_close(deviation.student_BFCHW, roll_out(windowed, words, noise, 4), rtol=0, atol=0)
    other = rollout_deviation(windowed, words, noise, 4, teacher=EvalSetup(softmax, SAMPLER))
    torch.testing.assert_close(other.mse_BN, deviation.mse_BN)


def test_a_window_deviates_once_it_forgets() -> None:
    student = EvalSetup(tiny_model(), SAMPLER, window_frames=6)
    errors = rollout_deviation(student, text(), noise, 4).by_block
    assert errors[:2] == [0.0, 0.0] and min(errors[2:]) > 0


def test_teacher_forced_errors_are_those_of_x0() -> None:
    """Of the last of two blocks, computed by hand over all blocks in one batch of one level."""
    model, words = tiny_model(HybridSettings((1,))), text()
    clean = torch.randn(BATCH, 6, TINY["in_dim"], HEIGHT, WIDTH, dtype=torch.float64)
    one_level = FewStepSampler((500.0,), (0.5,))
    errors = teacher_forced_deviation(EvalSetup(model, one_level), clean, words, noise)
    x0 = []
    for manager in (model.as_teacher(), model.without_lora()):
        with manager, torch.no_grad():
            memory = model.memory_for(clean)
            positions, views = torch.arange(6), lambda memory=memory: memory.read(18)
            times = torch.zeros(BATCH, 3)
            updates = model(clean[:, :3], times, words, views(), positions[:3], remember=True).updates
            memory.commit(updates)
            noisy = 0.5 * clean[:, 3:] + 0.5 * noise(1, 0)
            flow = model(noisy, times + 500, words, views(), positions[3:]).flow
            x0.append(flow_to_x0(flow, noisy, torch.tensor(0.5)))
    expected = (x0[0] - x0[1]).square().flatten(1).mean(1)
    assert expected.min() > 0
    torch.testing.assert_close(errors.mse_BN[:, 1], expected)


def test_latents_are_compared_block_by_block() -> None:
    teacher = torch.zeros(2, 6, 1, 1, 1)
    student = teacher.clone()
    student[1, 3:] = 2.0
    deviation = latent_deviation(student, teacher, 3)
    assert deviation.mse_BN.tolist() == [[0.0, 0.0], [0.0, 4.0]]
    assert (deviation.by_block, deviation.by_video, deviation.mean) == ([0.0, 2.0], [0.0, 2.0], 1.0)
    with pytest.raises(InputError, match="one shape"):
        latent_deviation(student, teacher[:1], 3)
    with pytest.raises(InputError, match="blocks of 4"):
        latent_deviation(student, teacher, 4)


def test_pixels_are_compared_over_the_frames_of_a_block() -> None:
    teacher = torch.zeros(1, 21, 3, 2, 2)
    student = teacher.clone()
    student[:, 9:] = 0.2
    deviation = pixel_deviation(student, teacher, 3)
    assert deviation.psnr == [math.inf, pytest.approx(20.0, abs=1e-4)]
    student[:, 8] = 0.2
    assert math.isfinite(pixel_deviation(student, teacher, 3).psnr[0])
    assert pixel_deviation(student * 100, teacher + 7, 3).psnr[1] == math.inf, "beyond white is white"
    with pytest.raises(InputError, match="whole latents"):
        pixel_deviation(student[:, :20], teacher[:, :20], 3)
    with pytest.raises(InputError, match="blocks of 3"):
        pixel_deviation(student[:, :17], teacher[:, :17], 3)


def test_flicker_is_that_of_bytes() -> None:
    still = torch.full((1, 9, 3, 4, 4), 0.3)
    blinking = torch.ones(1, 9, 3, 4, 4)
    blinking[:, ::2] = -1
    half = still.clone()
    half[:, 1::2, :, :2] += 10 / 127.5
    flicker = temporal_flicker(torch.cat([still, blinking, half]))
    assert flicker.tolist() == pytest.approx([1.0, 0.0, 1 - 5 / 255])
    deviation = pixel_deviation(blinking, still, 3)
    assert (deviation.student_flicker, deviation.teacher_flicker) == (pytest.approx(0.0), pytest.approx(1.0))
    with pytest.raises(InputError, match="two at least"):
        temporal_flicker(still[:, :1])
