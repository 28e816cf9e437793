"""Training on long videos: segments, targets of the data, windows of the teacher, and contexts with errors."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import HYBRID, tiny_model, tiny_video
from torch import Tensor
from training_world import build_world, losses, one_line, run_and_kill, train

from arl2.distillation.batch import BatchNoise, TrainingBlock, VideoBatch, noisy_video, video_blocks
from arl2.distillation.objective import ForwardMode
from arl2.distillation.stage2 import Context, Stage2, Stage2Settings, Trainable, stage2_parameters
from arl2.model import HybridSettings, HybridWanModel
from arl2.rollout import FewStepSampler, denoise_block, generator_for, predict_flow, remember_block
from arl2.trained_memory import TrainedMemory
from wan.teacher_forcing import teacher_forced_flow
from wan.utils.errors import InputError

SAMPLER = FewStepSampler.from_steps([1000, 500], 5.0)
PARALLEL = ForwardMode.PARALLEL
WINDOWS = {"window_frames": 7, "sink_frames": 1, "teacher_window_frames": 6}


def video_of(blocks: int, batch: int = 2) -> tuple[VideoBatch, BatchNoise]:
    """Random videos, and noise at one level per block, with that of two steps of a self-rollout."""
    torch.manual_seed(blocks)
    video = tiny_video(3 * blocks, batch)
    noise = torch.randn(batch, blocks, 3, 3, *video.clean.shape[2:], dtype=torch.float64)
    levels = torch.rand(batch, blocks, 1, dtype=torch.float64)
    return VideoBatch(video.clean, video.text), BatchNoise(levels, noise, tuple(range(batch)))


def student() -> HybridWanModel:
    model = tiny_model(HYBRID).requires_grad_(False)
    for parameter in stage2_parameters(model).values():
        parameter.requires_grad_(True)
    return model


def trained(
    model: HybridWanModel, settings: Stage2Settings, blocks: int = 5
) -> tuple[Tensor, dict[str, Tensor], float]:
    """Loss, gradients and relative error."""
    objective, total = Stage2(model, settings, SAMPLER), torch.zeros(())
    model.zero_grad()
    for part in objective.losses(*video_of(blocks)):
        part.backward()
        total = total + part.detach()
    gradients = {name: p.grad.clone() for name, p in stage2_parameters(model).items() if p.grad is not None}
    return total, gradients, objective.metrics()["relative_error"]


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize(
    ("context", "sigma"),
    [(Context.DATA, 0.0), (Context.DATA, 0.4), (Context.SELF_ROLLOUT, 0.0), (Context.RESAMPLED, 0.0)],
)
def test_segments_and_the_whole_video_at_once_have_the_loss_of_the_loop(
    context: Context, sigma: float, weights: tuple[float, float]
) -> None:
    model = student()
    options = {"context": context, "context_sigma": sigma, "teacher_weight": weights[0], "data_weight": weights[1]}
    loop, whole, segments, one = (
        trained(model, Stage2Settings(3, blocks, mode, **options, **WINDOWS))
        for mode, blocks in ((ForwardMode.SEQUENTIAL, None), (PARALLEL, None), (PARALLEL, 2), (PARALLEL, 9))
    )
    for other in (whole, segments, one):
        torch.testing.assert_close(other[0], loop[0], rtol=1e-4, atol=1e-8)
        assert other[2] == pytest.approx(loop[2], rel=1e-4)
    for name, gradient in loop[1].items():
        torch.testing.assert_close(whole[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
        torch.testing.assert_close(one[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert any(not torch.allclose(segments[1][name], loop[1][name], rtol=1e-3, atol=1e-6) for name in loop[1])


def test_the_target_of_the_data_is_its_velocity() -> None:
    model, (batch, noise) = student(), video_of(3)
    objective = Stage2(model, Stage2Settings(3, forward_mode=PARALLEL, teacher_weight=0.0, data_weight=3.0))
    seen: list[Tensor] = []
    errors = objective._passes_error
    objective._passes_error = lambda flow, target, levels: seen.append(target) or errors(flow, target, levels)  # type: ignore[method-assign,func-returns-value]
    model.as_teacher = None  # type: ignore[assignment,method-assign]  # which is not asked
    with pytest.raises(TypeError):
        list(objective.losses(batch, noise))
    del model.as_teacher
    (loss,) = objective.losses(batch, noise)
    (target,) = seen
    torch.testing.assert_close(target, noise.noise_BNPFCHW[:, :, 0].flatten(1, 2) - batch.latents_BFCHW)
    assert loss > 0


def test_noise_on_the_context_changes_what_is_remembered_alone() -> None:
    """The first block remembers nothing, so that its error does not change; later ones do."""
    model, (batch, noise) = student(), video_of(3)
    errors = []
    for sigma in (0.0, 0.5):
        settings = Stage2Settings(3, 1, PARALLEL, context_sigma=sigma, teacher_weight=0.0, data_weight=1.0)
        errors.append([float(part.detach()) for part in Stage2(model, settings).losses(batch, noise)])
    assert errors[0][0] == errors[1][0] and all(a != b for a, b in zip(errors[0][1:], errors[1][1:], strict=True))


@pytest.mark.parametrize("steps", [1, 2])
def test_the_resampled_context_is_what_the_last_steps_of_the_sampler_make_after_the_data(steps: int) -> None:
    """Against a loop over blocks whose memory holds the data."""
    model, (batch, noise) = student(), video_of(4)
    settings = Stage2Settings(
        3, 3, PARALLEL, context=Context.RESAMPLED, resample_steps=steps, teacher_weight=0.0, data_weight=1.0, **WINDOWS
    )
    objective = Stage2(model, settings, SAMPLER)
    with torch.no_grad():
        found = objective._resampled_video(batch, noise)
        text, memory = model.embed_text(batch.text_BTD), objective.new_memory(batch, *settings.window)
        for block in video_blocks(batch, 3):
            made = block.clean
            for step in range(steps):
                sigma, timestep = SAMPLER.sigmas[step - steps], SAMPLER.timesteps[step - steps]
                generators = [generator_for(seed, "resampled", step, block.number) for seed in noise.seeds]
                eps = torch.stack([torch.randn(made.shape[1:], generator=one) for one in generators])
                noisy = (1 - sigma) * made + sigma * eps
                times = torch.full((len(made), 1), timestep, dtype=torch.float64)
                flow = predict_flow(model, noisy, times, text, memory, block.start)
                made = noisy - sigma * flow
            expected = made if block.number else block.clean
            torch.testing.assert_close(found[:, block.start : block.start + 3], expected, rtol=1e-5, atol=1e-6)
            remember_block(model, block.clean, text, memory, block.start)


def test_rounds_of_resampling_become_a_rollout_from_the_first_block() -> None:
    """After r rounds, blocks 0 to r are the sampler's, each after its own; later ones are not yet."""
    model, (batch, noise) = student(), video_of(4)
    made = []
    for rounds in (1, 2, 3, 4):
        settings = Stage2Settings(
            3,
            3,
            PARALLEL,
            context=Context.RESAMPLED,
            resample_steps=len(SAMPLER.sigmas),
            resample_rounds=rounds,
            teacher_weight=0.0,
            data_weight=1.0,
            **WINDOWS,
        )
        objective = Stage2(model, settings, SAMPLER)
        made.append(objective._resampled_video(batch, noise))
    with torch.no_grad():
        text, memory = model.embed_text(batch.text_BTD), objective.new_memory(batch, *settings.window)
        for block in video_blocks(batch, 3):

            def fresh(step: int, block: TrainingBlock = block) -> Tensor:
                of_videos = (generator_for(seed, "resampled", step, block.number) for seed in noise.seeds)
                return torch.stack([torch.randn(block.clean.shape[1:], generator=one) for one in of_videos]).double()

            own = denoise_block(model, SAMPLER, fresh, text, memory, block.start)
            expected = own if block.number else block.clean
            part = slice(block.start, block.start + 3)
            for rounds, found in enumerate(made, 1):
                is_equal = torch.allclose(found[:, part], expected, rtol=1e-5, atol=1e-6)
                assert is_equal == (block.number <= rounds), (rounds, block.number)
            remember_block(model, expected, text, memory, block.start)
    torch.testing.assert_close(made[2], made[3], rtol=1e-6, atol=1e-7)


def test_the_resampled_context_does_not_change_the_target() -> None:
    """The first two blocks remember nothing but data, so that their errors do not change; later ones do."""
    model, (batch, noise) = student(), video_of(4)
    errors = []
    for context in (Context.DATA, Context.RESAMPLED):
        settings = Stage2Settings(3, 1, PARALLEL, context=context, teacher_weight=0.0, data_weight=1.0)
        errors.append([float(part.detach()) for part in Stage2(model, settings, SAMPLER).losses(batch, noise)])
    assert errors[0][:2] == errors[1][:2] and all(a != b for a, b in zip(errors[0][2:], errors[1][2:], strict=True))


def test_noise_on_the_context_is_a_function_of_seed_and_block() -> None:
    batch, noise = video_of(3)
    clean = batch.latents_BFCHW[:, :3]
    once, again = (noise.disturbed(clean, 1, 0.5) for _ in range(2))
    assert torch.equal(once, again) and not torch.equal(once, noise.disturbed(clean, 2, 0.5))
    second = BatchNoise(noise.levels_BNP[1:], noise.noise_BNPFCHW[1:], noise.seeds[1:])
    assert torch.equal(second.disturbed(clean[1:], 1, 0.5), once[1:]), "whatever else is in the batch"
    assert torch.equal(noise.disturbed(clean, 1, 0.0), clean)


@pytest.mark.parametrize(("checkpointing", "data_weight"), product([False, True], [0.0, 1.0]))
def test_what_a_graph_keeps_does_not_grow_with_the_video(checkpointing: bool, data_weight: float) -> None:
    model = student()
    settings = Stage2Settings(3, 2, PARALLEL, checkpointing=checkpointing, data_weight=data_weight, **WINDOWS)
    most = []
    for blocks in (6, 12):
        kept: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()  # noqa: B023
            return x

        sizes = []
        objective = Stage2(model, settings)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            for part in objective.losses(*video_of(blocks)):
                sizes.append(sum(kept.values()))
                part.backward()
                kept.clear()
        most.append(set(sizes[1:-1]))  # once the windows are full; the last segment is not remembered
    # The latents and the noise of the whole video are there, but no graph keeps them.
    assert len(most[0]) == 1 and most[0] == most[1]


def test_settings_that_would_train_nothing_or_mean_two_things_are_refused() -> None:
    with pytest.raises(InputError, match="nothing would train"):
        Stage2Settings(3, teacher_weight=0.0)
    with pytest.raises(InputError, match="context_sigma is for context data"):
        Stage2Settings(3, context=Context.SELF_ROLLOUT, context_sigma=0.1)
    with pytest.raises(InputError, match="resample_steps would do nothing with context data"):
        Stage2Settings(3, resample_steps=2)
    with pytest.raises(InputError, match="resample_rounds would do nothing with context data"):
        Stage2Settings(3, resample_rounds=2)
    with pytest.raises(InputError, match="resample_steps 3 of a sampler of 2"):
        Stage2(student(), Stage2Settings(3, context=Context.RESAMPLED, resample_steps=3), SAMPLER)
    with pytest.raises(InputError, match="window"):
        Stage2Settings(3, teacher_window_frames=2)
    with pytest.raises(InputError, match="teacher shares"):
        Stage2Settings(3, forward_mode=PARALLEL, trainable=Trainable.ALL)
    with pytest.raises(InputError, match="forward_mode parallel"):
        Stage2Settings(3, teacher_weight=0.0, data_weight=1.0, trainable=Trainable.ALL)


@pytest.mark.parametrize("layers", [(), (0, 2)])
def test_all_parameters_learn_from_the_data_in_segments_too(layers: tuple[int, ...]) -> None:
    """With gradients of the loss written out: one forward over all blocks, with the text's embedding inside."""
    model = tiny_model(replace(HYBRID, layers=layers) if layers else HybridSettings()).requires_grad_(True)
    batch, noise = video_of(4)
    options = {"teacher_weight": 0.0, "data_weight": 1.0, "trainable": Trainable.ALL, "window_frames": 7}
    gradients = []
    for blocks in (None, 4, 3):
        objective = Stage2(model, Stage2Settings(3, blocks, PARALLEL, **options))
        assert objective.parameters_to_train().keys() == dict(model.named_parameters()).keys()
        model.zero_grad()
        for part in objective.losses(batch, noise):
            part.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    noisy, times = noisy_video(batch, noise, 3)
    model.zero_grad()
    flow = teacher_forced_flow(model, noisy, times, batch.text_BTD, 3, batch.latents_BFCHW, 7, 0)
    (flow - (noise.noise_BNPFCHW[:, :, 0].flatten(1, 2) - batch.latents_BFCHW)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and name in gradients[2], f"{name} learns nothing"
        for found in gradients[:2]:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)
    changed = [not torch.allclose(gradients[2][name], gradients[0][name], rtol=1e-3) for name in gradients[0]]
    assert any(changed), "segments cut gradients"


LONG = ("teacher_weight=0", "data_weight=1", "blocks_per_graph=2", "forward_mode=parallel", "levels.per_block=1")
LONG_MEMORY = ("memory.kind=window", "memory.window_frames=6", "memory.sink_frames=0", "context_sigma=0.2")


@pytest.fixture(scope="module")
def trained_stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny world with a run of stage 1, and one of stage 2 that starts from it."""
    root = build_world(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as patch:
        assert train(patch, root, 1) == 0
        assert train(patch, root, 2, f"run_folder={root / 'two'}", f"init_from={root / 'run'}") == 0
    return root


def test_long_training_starts_from_stage_two_with_its_adapters_and_goes_on_after_a_kill(
    trained_stages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = trained_stages
    settings = (f"init_from={root / 'two'}", *LONG, *LONG_MEMORY)
    assert train(monkeypatch, root, 2, f"run_folder={root / 'whole'}", *settings) == 0
    run_and_kill(root, root / "broken", 2, *settings)
    assert train(monkeypatch, root, 2, f"run_folder={root / 'broken'}", *settings) == 0
    assert losses(root / "broken") == losses(root / "whole")
    # One step of no size: what is exported is what was started from, adapters included.
    still = (*settings, "steps=1", "optimizer.lr=1.0e-12", "save_every=1", "ema_decay=null")
    assert train(monkeypatch, root, 2, f"run_folder={root / 'still'}", *still) == 0
    before, after = (
        load_file(root / run / "checkpoints" / step / "trainables.safetensors")
        for run, step in (("two", "step-00000006"), ("still", "step-00000001"))
    )
    assert any("lora_" in name for name in before) and before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-9)
    assert HybridWanModel.from_pretrained(root / "whole" / "export").hybrid.layers == (0, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("lora_alpha=7.0",), "lora_alpha"),
        (("lora_rank=2",), "lora_rank"),
        (("lora=false",), "lora"),
        (("ffn_lora=none",), "ffn_lora"),
    ],
)
def test_another_form_of_adapters_than_those_to_start_from_is_refused(
    trained_stages: Path,
    settings: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = trained_stages
    capsys.readouterr()
    given = (f"run_folder={root / 'other'}", f"init_from={root / 'two'}", *LONG, *settings)
    assert train(monkeypatch, root, 2, *given) == 2
    assert message in one_line(capsys)
    file = root / "two" / "export" / "diffusion_pytorch_model.safetensors"
    given = (f"run_folder={root / 'other'}", f"init_from={file}", *LONG, *settings)
    assert train(monkeypatch, root, 2, *given) == 2
    one_line(capsys)


ALL = (
    *LONG,
    "trainable=all",
    "memory.kind=window",
    "memory.window_frames=6",
    "memory.sink_frames=0",
    "hybrid_layers=[]",
)


def test_a_softmax_model_is_trained_alike(
    trained_stages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All parameters change, a killed run goes on, and the export stands alone with its memory."""
    root = trained_stages
    assert train(monkeypatch, root, 2, f"run_folder={root / 'all'}", *ALL) == 0
    run_and_kill(root, root / "all_broken", 2, *ALL)
    assert train(monkeypatch, root, 2, f"run_folder={root / 'all_broken'}", *ALL) == 0
    assert losses(root / "all_broken") == losses(root / "all")
    model, base = (HybridWanModel.from_pretrained(path) for path in (root / "all" / "export", root / "model"))
    assert model.hybrid.layers == () and model.trained_memory == TrainedMemory(6, 0, 9)
    before = dict(base.named_parameters())
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())
    capsys.readouterr()
    given = (f"run_folder={root / 'other'}", f"init_from={root / 'all'}", *LONG)
    assert train(monkeypatch, root, 2, *given) == 2
    assert "give its export as checkpoint_path" in one_line(capsys)


@pytest.mark.parametrize("setting", ["shard=true", "sample_every=3", "teacher_weight=1", "forward_mode=sequential"])
def test_what_cannot_go_with_all_parameters_is_refused(
    trained_stages: Path, setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    root = trained_stages
    assert train(monkeypatch, root, 2, f"run_folder={root / 'refused'}", *ALL, setting) == 2
    one_line(capsys)
    assert not (root / "refused").exists()
