"""The objectives of both stages: values, gradients, who is trained and who is not touched."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import HYBRID, TINY, tiny_model, tiny_video
from torch import Tensor

from arl2.distillation.batch import BatchNoise, VideoBatch
from arl2.distillation.losses import mean_squared_errors, mean_squares
from arl2.distillation.objective import ForwardMode, Objective, frozen_teacher
from arl2.distillation.stage1 import Pass, Stage1, Stage1Settings, observed, stage1_parameters
from arl2.distillation.stage2 import Context, Stage2, Stage2Settings, Target, stage2_parameters
from arl2.hybrid_attention import HybridAttention
from arl2.model import FFNLoRA, HybridSettings, HybridWanModel
from arl2.ops import offload
from arl2.ops.compiling import compile_blocks
from arl2.rollout import FewStepSampler
from wan.memory import LayerMemory
from wan.parallel import ParallelLayout
from wan.teacher_forcing import teacher_forced_flow
from wan.utils.errors import InputError

ALL = HybridSettings((0, 1, 2), 3, 6.0, FFNLoRA.HYBRID)
LEVELS = (0.9, 0.4)


def videos(frames: int = 9) -> VideoBatch:
    video = tiny_video(frames)
    return VideoBatch(video.clean, video.text)


def fixed_noise(batch: VideoBatch, levels: tuple[float, ...] = LEVELS) -> BatchNoise:
    """Noise of 9 blocks and 6 places, at the same levels for all."""
    videos, _, *shape = batch.latents_BFCHW.shape
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(videos, 9, 6, 3, *shape, dtype=torch.float64, generator=generator)
    levels_BNP = torch.tensor(levels).expand(videos, batch.latents_BFCHW.shape[1] // 3, -1)
    return BatchNoise(levels_BNP, noise, tuple(range(videos)))


def mixed_noise(batch: VideoBatch) -> BatchNoise:
    """One level a block, another for every block and video."""
    noise = fixed_noise(batch, (0.5,))
    levels = torch.rand(noise.levels_BNP.shape, generator=torch.Generator().manual_seed(6))
    return BatchNoise(levels, noise.noise_BNPFCHW, noise.seeds)


def trainable(model: HybridWanModel, parameters: dict[str, torch.nn.Parameter]) -> HybridWanModel:
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return model


def gradients(model: HybridWanModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(objective: Objective, batch: VideoBatch, noise: BatchNoise) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, part by part as a trainer takes them."""
    objective.model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for part in objective.losses(batch, noise):
        part.backward()
        total = total + part.detach()
    return total, {name: p.grad.clone() for name, p in objective.model.named_parameters() if p.grad is not None}


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=atol, msg=name)


def stage1_in_parallel(
    model: HybridWanModel, batch: VideoBatch, noise: BatchNoise, sigma: float, relative: bool
) -> Tensor:
    """Stage 1 at one noise level, dense: one masked teacher forward, every hybrid over all blocks at once."""
    clean, noise_BNPFCHW = batch.latents_BFCHW, noise.noise_BNPFCHW
    noisy = torch.cat([(1 - sigma) * clean[:, 3 * b : 3 * b + 3] + sigma * noise_BNPFCHW[:, b, 0] for b in range(3)], 1)
    times = torch.full(clean.shape[:2], 1000 * sigma)
    layers = model.hybrid_attentions()
    with torch.no_grad(), model.as_teacher(), observed(layers) as seen:
        teacher_forced_flow(model, noisy, times, batch.text_BTD, 3, clean)
    layout = ParallelLayout(9, 3, 6, 2, clean.device)
    errors = []
    for layer, one in seen.items():
        output, _ = layers[layer](
            one.x_BLD, one.rotary, layers[layer].parallel_view(layout), attend=True, remember=False
        )
        error = (output - one.output_BLD).square().reshape(2, 6, -1).mean(2)
        errors.append(error / (one.output_BLD.square().reshape(2, 6, -1).mean(2) if relative else 1))
    return torch.stack(errors).mean()


@pytest.mark.parametrize("relative", [False, True])
def test_stage_one_equals_a_dense_implementation(relative: bool) -> None:
    model, batch = tiny_model(ALL), videos()
    trainable(model, stage1_parameters(model))
    noise = fixed_noise(batch, (0.7,))
    # One noisy and one clean read of every block: the dense sequence holds both halves.
    loss, loop = trained(Stage1(model, Stage1Settings(3, relative=relative)), batch, noise)
    dense_loss = stage1_in_parallel(model, batch, noise, 0.7, relative)
    torch.testing.assert_close(loss, dense_loss.detach(), rtol=1e-7, atol=1e-10)
    assert loop.keys() == stage1_parameters(model).keys()
    assert_same_gradients(loop, gradients(model, dense_loss), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss_on_clean_pass", [False, True])
def test_the_parallel_path_of_stage_one_equals_the_loop(loss_on_clean_pass: bool) -> None:
    model, batch = tiny_model(ALL), videos()
    trainable(model, stage1_parameters(model))
    noise, both = mixed_noise(batch), []
    for mode in ForwardMode:
        objective = Stage1(model, Stage1Settings(3, forward_mode=mode, loss_on_clean_pass=loss_on_clean_pass))
        both.append((*trained(objective, batch, noise), objective.relative_errors()))
    torch.testing.assert_close(both[0][0], both[1][0], rtol=1e-5, atol=1e-8)
    assert_same_gradients(both[0][1], both[1][1], rtol=1e-4, atol=1e-7)
    assert both[0][2] == pytest.approx(both[1][2], rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_compiled_teacher_teaches_alike_and_the_student_is_not_compiled(stage: int) -> None:
    model, batch = tiny_model(ALL), videos()
    trainable(model, stage1_parameters(model) if stage == 1 else stage2_parameters(model))
    settings = (Stage1Settings if stage == 1 else Stage2Settings)(3, forward_mode=ForwardMode.PARALLEL)
    noise, both, graphs = mixed_noise(batch), [], 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        assert not torch.is_grad_enabled()
        graphs += 1
        return graph.forward

    for compile in (False, True):
        if compile:
            torch.compiler.reset()
            for block in model.layers():
                block.compile(dynamic=False, backend=backend)
        objective = Stage1(model, settings) if isinstance(settings, Stage1Settings) else Stage2(model, settings)
        with torch.compiler.set_stance("force_eager"):  # as in the trainer
            both.append(trained(objective, batch, noise))
    assert graphs
    torch.testing.assert_close(both[0][0], both[1][0])
    assert_same_gradients(both[0][1], both[1][1], rtol=1e-5, atol=1e-9)


def test_what_was_compiled_before_layers_are_observed_does_not_hide_them() -> None:
    model, batch = tiny_model(ALL), videos()
    trainable(model, stage1_parameters(model))
    noise, objective = mixed_noise(batch), Stage1(model, Stage1Settings(3, forward_mode=ForwardMode.PARALLEL))
    plain = trained(objective, batch, noise)
    torch.compiler.reset()
    compile_blocks(model, backend="eager")
    video = tiny_video()
    with frozen_teacher(model, compiled=True):
        teacher_forced_flow(model, video.noisy, video.timesteps, video.text, 3, video.clean)
    with torch.compiler.set_stance("force_eager"):
        compiled = trained(objective, batch, noise)
    torch.testing.assert_close(compiled[0], plain[0])
    assert_same_gradients(compiled[1], plain[1], rtol=1e-5, atol=1e-9)


def test_squared_errors_of_many_numbers_keep_their_digits() -> None:
    output, target = torch.randn(1, 6 * 800, 512), torch.randn(1, 6 * 800, 512)
    exact = (output.double() - target.double()).unflatten(1, (6, -1)).square().mean((2, 3))
    torch.testing.assert_close(mean_squared_errors(output, target, 6).double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.bfloat16, 0.01)])
def test_squared_errors_are_those_of_the_formula(dtype: torch.dtype, rtol: float) -> None:
    target = torch.randn(2, 15, 7).to(dtype)
    output = (target + 0.1 * torch.randn(2, 15, 7)).to(dtype).requires_grad_()
    exact = output.detach().double().requires_grad_()
    weight = torch.rand(2, 3)
    found = mean_squared_errors(output, target, 3)
    expected = (exact - target.double()).unflatten(1, (3, 5)).square().mean((2, 3))
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=0)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    assert output.grad is not None and exact.grad is not None and output.grad.dtype is dtype
    torch.testing.assert_close(output.grad.double(), exact.grad, rtol=rtol, atol=rtol * 1e-4)
    power = target.double().unflatten(1, (3, 5)).square().mean((2, 3))
    torch.testing.assert_close(mean_squares(target, 3).double(), power, rtol=rtol, atol=0)


def test_stage_one_trains_what_it_says_and_leaves_the_teacher_alone() -> None:
    model, batch = tiny_model(ALL), videos()
    parts = {name.split("self_attn.")[1] for name in stage1_parameters(model)}
    assert parts == {"a_proj.weight", "b_proj.weight", "gate_proj.weight", "A_log", "dt_bias"} | {
        f"phi_{x}.weight" for x in "qkv"
    }
    trainable(model, stage1_parameters(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    noise, objective = fixed_noise(batch), Stage1(model, Stage1Settings(3))
    optimizer = torch.optim.SGD(objective.parameters_to_train().values(), lr=0.3)
    losses = []
    for _ in range(6):
        losses.append(trained(objective, batch, noise)[0].item())
        optimizer.step()
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
        return Stage1(model, Stage1Settings(3)).reports(batch, noise)["relative_error"]

    one, other = relative(1.0), relative(5.0)
    assert one[0] != other[0] and (one[1], one[2]) == (other[1], other[2])
    assert all(0 < value < 2 for value in one.values())


def new_objective(stage: int, model: HybridWanModel, blocks_per_graph: int | None) -> Objective:
    if stage == 1:
        return Stage1(model, Stage1Settings(3, blocks_per_graph))
    return Stage2(model, Stage2Settings(3, blocks_per_graph))


@pytest.mark.parametrize("stage", [1, 2])
def test_truncated_graphs_keep_the_loss_and_the_gradient_of_what_is_written(stage: int) -> None:
    model, batch = tiny_model(ALL), videos()
    trainable(model, new_objective(stage, model, None).parameters_to_train())
    noise = fixed_noise(batch)
    (loss, whole), (other, cut) = (trained(new_objective(stage, model, n), batch, noise) for n in (None, 1))
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)
    name = "blocks.1.self_attn.b_proj.weight"
    assert cut[name].abs().max() > 0, "a block's write is read by the next one: it must get a gradient"
    assert not torch.allclose(whole[name], cut[name], rtol=1e-6, atol=0)
    # Three blocks: what the first writes is read by the second, and cut before the second writes.
    assert_same_gradients(whole, trained(new_objective(stage, model, 3), batch, noise)[1], rtol=1e-6, atol=1e-12)


def stage2_in_parallel(model: HybridWanModel, batch: VideoBatch, noise: BatchNoise) -> Tensor:
    """Stage 2 with context from data, dense: masked forwards of student and teacher."""
    clean, differences = batch.latents_BFCHW, []
    for place, sigma in enumerate(LEVELS):
        drawn = noise.noise_BNPFCHW[:, :, place]
        noisy = torch.cat([(1 - sigma) * clean[:, 3 * b : 3 * b + 3] + sigma * drawn[:, b] for b in range(3)], dim=1)
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
    loss, loop = trained(Stage2(model, Stage2Settings(3)), batch, noise)
    dense_loss = stage2_in_parallel(model, batch, noise)
    torch.testing.assert_close(loss, dense_loss.detach().double(), rtol=1e-4, atol=1e-8)
    assert loop.keys() == stage2_parameters(model).keys()
    assert_same_gradients(loop, gradients(model, dense_loss), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("context", Context)
@pytest.mark.parametrize("target", Target)
def test_the_parallel_path_of_stage_two_equals_the_loop(target: Target, context: Context) -> None:
    model, batch = tiny_model(ALL), videos()
    trainable(model, stage2_parameters(model))
    noise, both, sampler = mixed_noise(batch), [], FewStepSampler.from_steps([1000, 500], 5.0)
    for mode in ForwardMode:
        objective = Stage2(model, Stage2Settings(3, forward_mode=mode, target=target, context=context), sampler)
        both.append((*trained(objective, batch, noise), objective.metrics()["relative_error"]))
    torch.testing.assert_close(both[0][0], both[1][0], rtol=1e-4, atol=1e-8)
    assert_same_gradients(both[0][1], both[1][1], rtol=1e-3, atol=1e-6)
    assert both[0][2] == pytest.approx(both[1][2], rel=1e-4)


@pytest.mark.parametrize(("window", "sink"), [(3, 0), (6, 0), (6, 3), (9, 3)])
def test_a_student_that_sees_a_window(window: int, sink: int) -> None:
    model, batch = tiny_model(HYBRID), videos()
    trainable(model, stage2_parameters(model))
    noise, losses = mixed_noise(batch), {}
    for mode in ForwardMode:
        settings = Stage2Settings(3, forward_mode=mode, window_frames=window, sink_frames=sink)
        losses[mode] = trained(Stage2(model, settings), batch, noise)
    everything = trained(Stage2(model, Stage2Settings(3)), batch, noise)
    torch.testing.assert_close(losses[ForwardMode.SEQUENTIAL][0], losses[ForwardMode.PARALLEL][0], rtol=1e-4, atol=1e-8)
    assert_same_gradients(losses[ForwardMode.SEQUENTIAL][1], losses[ForwardMode.PARALLEL][1], rtol=1e-3, atol=1e-6)
    # Videos have 9 frames: a window of as many leaves nothing out.
    assert (losses[ForwardMode.SEQUENTIAL][0] == everything[0]).item() == (window == 9)


def test_a_window_must_hold_a_block() -> None:
    with pytest.raises(InputError, match="window"):
        Stage2Settings(3, window_frames=5, sink_frames=3)


@pytest.mark.parametrize("blocks_per_graph", [None, 1])
@pytest.mark.parametrize("context", Context)
def test_checkpointed_gradients_are_the_plain_ones(blocks_per_graph: int | None, context: Context) -> None:
    model, batch = tiny_model(ALL), videos()
    trainable(model, stage2_parameters(model))
    noise, sampler = fixed_noise(batch), FewStepSampler.from_steps([1000, 500], 5.0)
    plain, checkpointed = (
        trained(
            Stage2(model, Stage2Settings(3, blocks_per_graph, context=context, checkpointing=on), sampler), batch, n
        )
        for on, n in ((False, noise), (True, noise))
    )
    assert model.gradient_checkpointing
    torch.testing.assert_close(plain[0], checkpointed[0], rtol=0, atol=0)
    assert_same_gradients(plain[1], checkpointed[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ForwardMode)
def test_offloaded_checkpoints_leave_the_device_and_change_no_gradient(
    mode: ForwardMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_model(ALL), videos()
    trainable(model, stage2_parameters(model))
    noise, moved = fixed_noise(batch, (0.5,)), list[tuple[int, ...]]()
    to_host = offload.to_host

    def counted(tensor: Tensor, shape: torch.Size) -> Tensor | offload.OnHost:
        kept = to_host(tensor, shape)
        if isinstance(kept, offload.OnHost):
            assert kept.values.data_ptr() != tensor.data_ptr()
            moved.append(tuple(tensor.shape))
        return kept

    monkeypatch.setattr(offload, "to_host", counted)
    plain, offloaded = (
        trained(Stage2(model, Stage2Settings(3, None, mode, checkpointing=True, offload_checkpoints=on)), batch, noise)
        for on in (False, True)
    )
    tokens = 6 * 9 * 2 if mode is ForwardMode.PARALLEL else 6 * 3
    passes = 1 if mode is ForwardMode.PARALLEL else 3 + 2
    assert moved == [(2, tokens, TINY["dim"])] * passes * TINY["num_layers"]
    torch.testing.assert_close(plain[0], offloaded[0], rtol=0, atol=0)
    assert_same_gradients(plain[1], offloaded[1], rtol=0, atol=0)


def test_offloading_needs_checkpoints() -> None:
    with pytest.raises(InputError, match="checkpointing=true"):
        Stage2Settings(3, offload_checkpoints=True)


@pytest.mark.parametrize("kind", ["stage 1", *Context])
def test_mixed_precision_has_the_gradients_of_float32(kind: str) -> None:
    model, batch, found = tiny_model(ALL, torch.float32), videos(), []
    noise, sampler = fixed_noise(batch), FewStepSampler.from_steps([1000, 500], 5.0)

    def objective() -> Objective:
        if kind == "stage 1":
            return Stage1(model, Stage1Settings(3))
        return Stage2(model, Stage2Settings(3, 2, context=Context(kind)), sampler)

    names = objective().parameters_to_train()
    trainable(model, names)
    for dtype in (torch.float32, torch.bfloat16):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
        model.zero_grad()
        parts = objective().losses(VideoBatch(batch.latents_BFCHW.float(), batch.text_BTD.to(dtype)), noise)
        while True:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                part = next(parts, None)
            if part is None:
                break
            part.backward()
        found.append({name: parameter.grad for name, parameter in names.items()})
    for name, exact in found[0].items():
        assert exact is not None and found[1][name] is not None and found[1][name].dtype == torch.float32, name
        same = torch.nn.functional.cosine_similarity(exact.flatten(), found[1][name].flatten(), dim=0)
        assert same > 0.99, (name, same)


def test_stage_two_leaves_the_teacher_alone() -> None:
    model, batch = tiny_model(ALL), videos()
    noise, objective = fixed_noise(batch), Stage2(model, Stage2Settings(3))
    trainable(model, objective.parameters_to_train())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(objective.parameters_to_train().values(), lr=1.0)
    trained(objective, batch, noise)
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in objective.parameters_to_train()), name


def test_a_fresh_conversion_agrees_with_its_teacher_on_the_first_block() -> None:
    model = HybridWanModel(**TINY, hybrid_layers=[0, 1, 2], lora_rank=3).double()
    batch = videos(3)
    assert sum(Stage2(model, Stage2Settings(3)).losses(batch, fixed_noise(batch))).item() == 0


def test_targets_differ_by_the_noise_level() -> None:
    model, batch = tiny_model(ALL), videos()
    noise = fixed_noise(batch, (0.4,))
    losses = [sum(Stage2(model, Stage2Settings(3, target=target)).losses(batch, noise)) for target in Target]
    torch.testing.assert_close(losses[1], 0.4**2 * losses[0], rtol=1e-5, atol=0)


def test_context_from_the_students_own_rollout_does_not_read_the_data() -> None:
    model, batch = tiny_model(ALL), videos()
    noise, sampler = fixed_noise(batch), FewStepSampler.from_steps([1000, 500], 5.0)
    other = VideoBatch(torch.randn_like(batch.latents_BFCHW), batch.text_BTD)
    losses = {
        context: [
            sum(Stage2(model, Stage2Settings(3, context=context), sampler).losses(one, noise)).item()
            for one in (batch, other)
        ]
        for context in Context
    }
    assert losses[Context.SELF_ROLLOUT][0] == losses[Context.SELF_ROLLOUT][1]
    assert losses[Context.DATA][0] != losses[Context.DATA][1]


def test_reports_of_stage1_keep_one_block_and_say_the_same() -> None:
    model, batch = tiny_model(ALL), videos()
    noise, kept = fixed_noise(batch), list[int]()

    class Watched(Stage1):
        def _layer_error(self, layer: int, memory: LayerMemory, graph: list[Pass]) -> Tensor:
            kept.append(len(graph))
            return super()._layer_error(layer, memory, graph)

    objective = Watched(model, Stage1Settings(3))
    reports = objective.reports(batch, noise)
    assert max(kept) == 2 * len(LEVELS) + 1  # the passes between two writes, not those of three blocks
    with torch.no_grad():
        list(objective.losses(batch, noise))
    assert reports["relative_error"] == pytest.approx(objective.relative_errors(), rel=1e-9)


def test_reports_say_what_the_layers_do() -> None:
    model, batch = tiny_model(HybridSettings((0, 2))), videos()
    noise = fixed_noise(batch)
    with torch.no_grad():
        for layer, module in model.hybrid_attentions().items():
            module.gate_proj.weight.zero_()  # sigmoid(0): half open
            module.a_proj.weight.zero_()
            module.dt_bias.zero_()
            module.A_log.fill_(layer)  # g = -exp(layer)·ln 2: a half-life of exp(-layer) tokens
    for objective in (Stage1(model, Stage1Settings(3)), Stage2(model, Stage2Settings(3))):
        reports = objective.reports(batch, noise)
        assert all(set(values) == {0, 2} for values in reports.values())
        assert reports["gate_mean"] == {0: 0.5, 2: 0.5} and reports["gate_saturation"] == {0: 0, 2: 0}
        assert reports["half_life_tokens"] == pytest.approx({0: 1, 2: torch.e**-2}, rel=1e-5)
        assert reports["half_life_frames"] == pytest.approx({0: 1 / 6, 2: torch.e**-2 / 6}, rel=1e-5)
        for name in ("intra_rms", "inter_rms", "state_norm"):
            assert all(value > 0 for value in reports[name].values())


def test_settings_that_cannot_work_are_refused() -> None:
    model, batch = tiny_model(ALL), videos(8)
    with pytest.raises(InputError, match="do not divide"):
        next(Stage2(model, Stage2Settings(3)).losses(batch, fixed_noise(batch)))
    with pytest.raises(InputError, match="blocks_per_graph"):
        Stage1Settings(3, 2, ForwardMode.PARALLEL)
