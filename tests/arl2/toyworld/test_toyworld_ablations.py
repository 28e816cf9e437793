"""Variants of the hybrid layer: equal to it where they must be, and to plain formulas where they are not."""

import pytest
import torch
from tiny_models import TINY, new_memory, tiny_model, tiny_video
from torch import Tensor

from arl2.distillation.batch import BatchNoise, VideoBatch
from arl2.distillation.objective import ForwardMode
from arl2.distillation.stage2 import Stage2, Stage2Settings, stage2_parameters
from arl2.hybrid_attention import HybridAttention, StateView
from arl2.model import FFNLoRA, HybridSettings, HybridWanModel
from arl2.ops.gated_delta import DeltaInputs, write_recurrent
from arl2.ops.token_reads import read_while_written
from arl2.rollout import FewStepSampler, denoise_block, predict_flow, remember_block, rollout
from arl2.toyworld.study.ablations import NoisyWrites, TokenReads, Variant, install
from arl2.toyworld.study.delta_segments import states_before
from arl2.toyworld.study.objectives import NoisyWriteStage2, WindowStudent
from wan.ops.rope import rotary_angles
from wan.teacher_forcing import teacher_forced_flow

ALL = HybridSettings((0, 1, 2), 3, 6.0, FFNLoRA.HYBRID)
SAMPLER = FewStepSampler.from_steps([1000, 750, 500, 250], 5.0)
UNLIKE = [Variant.NOISY_WRITES, Variant.TOKEN_READS, Variant.NO_GATE, Variant.GATE_ZERO, Variant.NO_ROPE]


def model_of(variant: Variant | None) -> HybridWanModel:
    """The same weights for every variant; None for the product's own layer."""
    torch.manual_seed(1)
    model = tiny_model(ALL)
    return model if variant is None else install(model, variant)


def looped(model: HybridWanModel, frames: int = 9) -> Tensor:
    """Flow block by block, remembering the clean latents."""
    torch.manual_seed(2)
    video = tiny_video(frames)
    memory, text, flows = new_memory(model, differentiable=True), model.embed_text(video.text), []
    for start in range(0, frames, 3):
        block = slice(start, start + 3)
        flows.append(predict_flow(model, video.noisy[:, block], video.timesteps[:, start, None], text, memory, start))
        remember_block(model, video.clean[:, block], text, memory, start)
    return torch.cat(flows, dim=1)


def parallel(model: HybridWanModel, frames: int = 9) -> Tensor:
    torch.manual_seed(2)
    video = tiny_video(frames)
    return teacher_forced_flow(model, video.noisy, video.timesteps, video.text, 3, video.clean)


@pytest.mark.parametrize("variant", Variant)
def test_all_blocks_at_once_equal_the_loop(variant: Variant) -> None:
    model = model_of(variant)
    torch.testing.assert_close(looped(model), parallel(model), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("run", [looped, parallel])
def test_the_plain_variant_is_the_products_layer_also_in_gradients(run: object) -> None:
    assert callable(run)
    results = []
    for variant in (None, Variant.PLAIN):
        model = model_of(variant)
        flow = run(model)
        flow.square().mean().backward()
        results.append([flow, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 30
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("variant", UNLIKE)
def test_variants_differ_after_the_first_block(variant: Variant) -> None:
    plain, other = looped(model_of(Variant.PLAIN)), looped(model_of(variant))
    same_first = variant is not Variant.TOKEN_READS  # which reads within the block, too
    assert torch.allclose(plain[:, :3], other[:, :3], rtol=1e-9, atol=1e-10) == same_first
    assert not torch.allclose(plain[:, 3:], other[:, 3:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", Variant)
def test_a_variant_is_the_teacher_when_it_is_off(variant: Variant) -> None:
    model, expected = model_of(variant), model_of(None)
    with model.as_teacher(), expected.as_teacher():
        torch.testing.assert_close(looped(model), looped(expected), rtol=0, atol=0)


def test_without_a_gate_is_with_a_gate_of_one_and_zero_is_local_attention() -> None:
    torch.manual_seed(3)
    x, rotary = torch.randn(2, 12, 24, dtype=torch.float64), rotary_angles(torch.arange(2), 2, 3, 12)
    view = StateView(torch.randn(2, 2, 12, 12, dtype=torch.float64))
    outputs = {}
    for variant in (Variant.PLAIN, Variant.NO_GATE, Variant.GATE_ZERO):
        layer = model_of(variant).hybrid_attentions()[0]
        outputs[variant] = layer(x, rotary, view, attend=True, remember=False)[0]
        empty = layer(x, rotary, StateView(torch.zeros_like(view.state_BHKV)), attend=True, remember=False)[0]
        assert torch.equal(outputs[variant], empty) == (variant is Variant.GATE_ZERO)
    layer = model_of(Variant.PLAIN).hybrid_attentions()[0]
    layer.output_gate = lambda x: torch.ones_like(x[..., :2])  # type: ignore[method-assign]
    torch.testing.assert_close(
        layer(x, rotary, view, attend=True, remember=False)[0], outputs[Variant.NO_GATE], rtol=0, atol=0
    )


def test_unrotated_branches_equal_plain_ones_at_position_zero() -> None:
    torch.manual_seed(4)
    x, rotary = torch.randn(2, 1, 24, dtype=torch.float64), rotary_angles(torch.tensor([0]), 1, 1, 12)
    view = StateView(torch.randn(2, 2, 12, 12, dtype=torch.float64))
    plain, unrotated = (
        model_of(v).hybrid_attentions()[0](x, rotary, view, attend=True, remember=True) for v in ("plain", "no_rope")
    )
    torch.testing.assert_close(plain, unrotated, rtol=0, atol=0)
    moved = rotary_angles(torch.tensor([5]), 1, 1, 12)
    plain, unrotated = (
        model_of(v).hybrid_attentions()[0](x, moved, view, attend=True, remember=True) for v in ("plain", "no_rope")
    )
    assert not torch.allclose(plain[1], unrotated[1])


def test_segments_equal_the_recurrence() -> None:
    torch.manual_seed(5)
    batch, number, tokens, heads, size = 2, 3, 7, 2, 4
    k = torch.nn.functional.normalize(torch.randn(batch, number * tokens, heads, size, dtype=torch.float64), dim=-1)
    v, q = torch.randn_like(k), torch.randn_like(k)
    log_decay, beta = -torch.rand(k.shape[:3]).double(), 2 * torch.rand(k.shape[:3]).double()
    start = torch.randn(batch, heads, size, size, dtype=torch.float64)
    states, reads = [start], []
    for t in range(number * tokens):
        one = slice(t, t + 1)
        states.append(write_recurrent(states[-1], k[:, one], v[:, one], log_decay[:, one], beta[:, one]))
        reads.append(torch.einsum("bhk,bhkv->bhv", q[:, t], states[-1]))
    segments = DeltaInputs(k, v, log_decay, beta).segments(number)
    before = states_before(start, segments, ends=True)
    torch.testing.assert_close(before, torch.stack(states[::tokens], 1), rtol=1e-10, atol=1e-12)
    read = read_while_written(before[:, :-1], q.unflatten(1, (number, tokens)), segments)
    torch.testing.assert_close(read.flatten(1, 2), torch.stack(reads, 1), rtol=1e-10, atol=1e-12)


def test_a_token_reads_what_was_written_before_it_in_its_pass() -> None:
    model = model_of(Variant.TOKEN_READS)
    with torch.no_grad():
        for layer in model.hybrid_attentions().values():
            layer.b_proj.weight.zero_()
    plain = model_of(Variant.PLAIN)
    plain.load_state_dict(model.state_dict())
    # Nothing written and nothing forgotten within a pass: nothing differs.
    for module in (*model.hybrid_attentions().values(), *plain.hybrid_attentions().values()):
        module.beta = lambda x: torch.zeros_like(x[..., :2])  # type: ignore[method-assign]
        module.log_decay = lambda x: torch.zeros_like(x[..., :2])  # type: ignore[method-assign]
    torch.testing.assert_close(looped(model), looped(plain), rtol=1e-9, atol=1e-11)
    assert isinstance(model.hybrid_attentions()[0], TokenReads)


@torch.no_grad()
def test_every_denoising_pass_writes_on_top_of_those_before() -> None:
    model, video = model_of(Variant.NOISY_WRITES), tiny_video(3)
    layer, seen = model.hybrid_attentions()[0], []
    assert isinstance(layer, NoisyWrites)

    def note(module: HybridAttention, arguments: tuple[object, ...], result: object) -> None:
        seen.append(arguments[0])

    memory, text = new_memory(model), model.embed_text(video.text)
    handle = layer.register_forward_hook(note)  # type: ignore[arg-type]
    made = denoise_block(model, SAMPLER, lambda step: video.noisy * (step + 1), text, memory, 0)
    remember_block(model, made, text, memory, 0)
    handle.remove()
    state, rotary = torch.zeros(2, 2, 12, 12, dtype=torch.float64), rotary_angles(torch.arange(3), 2, 3, 12)
    assert len(seen) == 5
    for x in seen:
        assert isinstance(x, Tensor)
        state = HybridAttention.write(layer, state, x, layer.k(x), layer.v(x), rotary)
    torch.testing.assert_close(memory.layers[0].read(1).state_BHKV, state, rtol=1e-9, atol=1e-11)


def noise_of(places: int, levels: Tensor) -> BatchNoise:
    generator = torch.Generator().manual_seed(7)
    shape = (2, 3, places, 3, TINY["in_dim"], 4, 6)
    return BatchNoise(levels, torch.randn(shape, generator=generator, dtype=torch.float64))


def test_the_noisy_write_objective_equals_its_loop() -> None:
    """Block by block: four passes that attend and write, from most to least noise, and the clean pass."""
    model, video = model_of(Variant.NOISY_WRITES), tiny_video()
    batch = VideoBatch(video.clean, video.text)
    sigmas = torch.tensor(SAMPLER.sigmas)
    order = torch.stack([torch.randperm(4) for _ in range(6)]).reshape(2, 3, 4)
    noise = noise_of(4, sigmas[order])
    names = stage2_parameters(model)
    model.requires_grad_(False)
    for parameter in names.values():
        parameter.requires_grad_(True)
    (loss,) = NoisyWriteStage2(model, Stage2Settings(3, forward_mode=ForwardMode.PARALLEL)).losses(batch, noise)
    (gradient,) = torch.autograd.grad(loss, [names["blocks.0.self_attn.phi_k.weight"]])

    memory, text, errors = new_memory(model, differentiable=True), model.embed_text(video.text), []
    with model.as_teacher():
        teacher_memory = new_memory(model)
    for block in range(3):
        clean = video.clean[:, 3 * block : 3 * block + 3]
        ranks = noise.levels_BNP[:, block].argsort(dim=1, descending=True)
        for place in range(4):
            rows = [(video_, int(ranks[video_, place])) for video_ in range(2)]
            level = torch.stack([noise.levels_BNP[v, block, r] for v, r in rows])
            drawn = noise.noise_BNPFCHW[:, block, place]
            noisy = ((1 - level.double()).reshape(2, 1, 1, 1, 1)) * clean + level.reshape(2, 1, 1, 1, 1) * drawn
            times = 1000 * level[:, None]
            with torch.no_grad(), model.as_teacher():
                wanted = predict_flow(model, noisy, times, text, teacher_memory, 3 * block)
            flow = predict_flow(model, noisy, times, text, memory, 3 * block)
            for row, (_, rank) in enumerate(rows):
                if rank == 0:
                    errors.append((flow[row] - wanted[row]).square().mean())
        with torch.no_grad(), model.as_teacher():
            remember_block(model, clean, text, teacher_memory, 3 * block)
        remember_block(model, clean, text, memory, 3 * block)
    assert len(errors) == 6
    looped_loss = torch.stack(errors).mean()
    torch.testing.assert_close(loss.double(), looped_loss, rtol=1e-5, atol=1e-8)
    (expected,) = torch.autograd.grad(looped_loss, [names["blocks.0.self_attn.phi_k.weight"]])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_a_window_student_learns_from_a_teacher_that_sees_everything() -> None:
    torch.manual_seed(6)
    teacher, video = tiny_model(), tiny_video()
    student = tiny_model()
    student.load_state_dict(teacher.state_dict())
    batch, noise = VideoBatch(video.clean, video.text), noise_of(1, torch.full((2, 3, 1), 0.5))

    def loss(window: int) -> float:
        objective = WindowStudent(student, teacher, Stage2Settings(3, forward_mode=ForwardMode.PARALLEL), window, 0)
        assert len(objective.parameters_to_train()) == len(list(student.parameters()))
        return sum(objective.losses(batch, noise)).item()

    assert loss(9) < 1e-20 < loss(6) and loss(3) > 0
    student.requires_grad_(True)
    part = next(
        iter(
            WindowStudent(student, teacher, Stage2Settings(3, forward_mode=ForwardMode.PARALLEL), 3, 0).losses(
                batch, noise
            )
        )
    )
    part.backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("variant", Variant)
def test_variants_generate(variant: Variant) -> None:
    model, video = model_of(variant), tiny_video(3)
    with torch.no_grad():
        memory, text = new_memory(model), model.embed_text(video.text)
        blocks = list(rollout(model, SAMPLER, lambda block, step: video.noisy, text, memory, 3))
    assert len(blocks) == 3 and all(torch.isfinite(block.latents_BFCHW).all() for block in blocks)


def test_blocks_that_train_can_be_compiled_whole() -> None:
    """The study trains plain hybrids so. Without code generation, which takes a minute on a CPU."""
    video, noise, found = tiny_video(), noise_of(1, torch.full((2, 3, 1), 0.5)), []
    for compiled in (False, True):
        model = model_of(Variant.PLAIN)
        for block in model.layers() if compiled else ():
            block.compile(dynamic=False, backend="aot_eager", fullgraph=True)
        (loss,) = Stage2(model, Stage2Settings(3, forward_mode=ForwardMode.PARALLEL)).losses(
            VideoBatch(video.clean, video.text), noise
        )
        loss.backward()
        found.append((loss, model.hybrid_attentions()[0].phi_k.weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_a_variant_trains_like_any_hybrid() -> None:
    video = tiny_video()
    noise = noise_of(1, torch.full((2, 3, 1), 0.5))
    for variant in Variant:
        model = model_of(variant)
        (loss,) = Stage2(model, Stage2Settings(3, forward_mode=ForwardMode.PARALLEL)).losses(
            VideoBatch(video.clean, video.text), noise
        )
        loss.backward()
        gradient = model.hybrid_attentions()[0].phi_v.weight.grad
        assert gradient is not None
        assert (gradient.abs().max() > 0) == (variant is not Variant.GATE_ZERO)
