"""The transformer: hybrid against teacher, parallel against block by block, gradients of the fast paths."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import HYBRID, TINY, TOKENS_PER_FRAME, Video, new_memory, tiny_model, tiny_video
from torch import Tensor

import wan.parallel
from arl2.checkpoint import build_hybrid
from arl2.hybrid_attention import HybridAttention
from arl2.model import FFNLoRA, HybridSettings, HybridWanModel
from arl2.ops.gated_delta import WriteBackend
from arl2.rollout import predict_flow, remember_block
from wan.checkpoints.formats import TransformerWeights
from wan.flow import FlowSchedule
from wan.model import CausalWanModel
from wan.ops.rope import rotary_angles, rotate
from wan.teacher_forcing import teacher_forced_flow, teacher_forced_segment
from wan.utils.errors import CheckpointError, InputError


def block_by_block(
    model: CausalWanModel, video: object, remembered: Tensor, times: Tensor | None, **options: object
) -> Tensor:
    """The loop that the parallel forward must equal; `times` of what is remembered, 0 by default."""
    memory, text, flows = new_memory(model, **options), model.embed_text(video.text), []
    for start in range(0, video.noisy.shape[1], 3):
        frames = slice(start, start + 3)
        views = memory.read(3 * model.tokens_per_frame(*video.noisy.shape[-2:]))
        positions = torch.arange(start, start + 3)
        flows.append(model(video.noisy[:, frames], video.timesteps[:, frames], text, views, positions).flow)
        time = torch.zeros_like(video.timesteps[:, frames]) if times is None else times[:, frames]
        memory.commit(model(remembered[:, frames], time, text, views, positions, remember=True).updates)
    return torch.cat(flows, dim=1)


@pytest.mark.parametrize("hybrid", [HybridSettings(), HYBRID], ids=["softmax", "hybrid"])
def test_teacher_forcing_equals_the_loop_values_and_gradients(hybrid: HybridSettings) -> None:
    model, video = tiny_model(hybrid), tiny_video()
    model.requires_grad_(True)
    weight, gradients = torch.randn_like(video.noisy), []
    for flow in (
        block_by_block(model, video, video.clean, None, differentiable=True),
        teacher_forced_flow(model, video.noisy, video.timesteps, video.text, 3, video.clean),
    ):
        model.zero_grad()
        (flow * weight).sum().backward()
        gradients.append((flow.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (flow_a, grad_a), (flow_b, grad_b) = gradients
    torch.testing.assert_close(flow_a, flow_b, rtol=1e-10, atol=1e-11)
    for name in grad_a:
        torch.testing.assert_close(grad_a[name], grad_b[name], rtol=1e-7, atol=1e-9, msg=name)


def in_segments(
    model: HybridWanModel, video: Video, weight: Tensor, window: tuple[int | None, int], blocks_per_segment: int
) -> Tensor:
    """Flow of a video in segments, whose weighted sum is back-propagated segment by segment."""
    memory, flows = model.memory_for(video.clean, *window, differentiable=True), []
    for start in range(0, video.clean.shape[1], 3 * blocks_per_segment):
        frames = slice(start, start + 3 * blocks_per_segment)
        noisy, times, clean = (x[:, frames] for x in (video.noisy, video.timesteps, video.clean))
        flow, updates = teacher_forced_segment(model, noisy, times, video.text, 3, clean, memory, start, *window)
        assert flow is not None and updates is not None
        (flow * weight[:, frames]).sum().backward()
        memory.commit(updates)
        memory.detach()
        flows.append(flow.detach())
    return torch.cat(flows, dim=1)


def in_a_loop(
    model: HybridWanModel, video: Video, weight: Tensor, window: tuple[int | None, int], blocks_per_segment: int
) -> Tensor:
    """As `in_segments`, block by block: the memory is detached after the last write of every segment."""
    memory, flows, total = model.memory_for(video.clean, *window, differentiable=True), [], torch.zeros(())
    blocks = video.clean.shape[1] // 3
    for block in range(blocks):
        frames, positions = slice(3 * block, 3 * block + 3), torch.arange(3 * block, 3 * block + 3)
        views, times = memory.read(3 * TOKENS_PER_FRAME), video.timesteps[:, frames]
        flow = model(video.noisy[:, frames], times, video.text, views, positions).flow
        flows.append(flow.detach())
        total = total + (flow * weight[:, frames]).sum()
        clean = video.clean[:, frames]
        memory.commit(model(clean, torch.zeros_like(times), video.text, views, positions, remember=True).updates)
        if block % blocks_per_segment == blocks_per_segment - 1 or block + 1 == blocks:
            total.backward()
            total = torch.zeros(())
            memory.detach()
    return torch.cat(flows, dim=1)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("window", [(None, 0), (6, 0), (7, 2), (3, 0)])
@pytest.mark.parametrize("hybrid", [HybridSettings(), HYBRID], ids=["softmax", "hybrid"])
def test_segments_equal_the_loop_that_is_cut_between_them(
    hybrid: HybridSettings, window: tuple[int | None, int], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wan.parallel, "MAX_MASKED_TOKENS", 10**6 if masked else 1)
    model, video = tiny_model(hybrid), tiny_video(frames=15)
    model.requires_grad_(True)
    weight, both = torch.randn_like(video.noisy), []
    for computed in (in_segments, in_a_loop):
        model.zero_grad()
        flow = computed(model, video, weight, window, 2)  # the last segment is of one block
        both.append([flow, *(p.grad.clone() for p in model.parameters())])
    for found, expected in zip(*both, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        whole = teacher_forced_flow(model, video.noisy, video.timesteps, video.text, 3, video.clean, *window)
    torch.testing.assert_close(both[0][0], whole, rtol=1e-10, atol=1e-10)


def test_diffusion_forcing_in_a_window_with_a_sink_equals_the_loop() -> None:
    model, video = tiny_model(HYBRID), tiny_video(frames=15)
    with torch.no_grad():
        loop = block_by_block(model, video, video.noisy, video.timesteps, window=7, sink=2)
        parallel = teacher_forced_flow(model, video.noisy, video.timesteps, video.text, 3, None, 7, 2)
    torch.testing.assert_close(loop, parallel, rtol=1e-10, atol=1e-11)


def test_in_place_and_differentiable_memories_agree() -> None:
    model, video = tiny_model(HYBRID), tiny_video(frames=15)
    with torch.no_grad():
        for window, sink in ((None, 0), (6, 3), (7, 1)):
            flows = [
                block_by_block(model, video, video.clean, None, window=window, sink=sink, differentiable=differentiable)
                for differentiable in (False, True)
            ]
            torch.testing.assert_close(*flows, rtol=1e-11, atol=1e-12)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, video = tiny_model(HYBRID), tiny_video()
    model.requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
        block_by_block(model, video, video.clean, None, differentiable=True).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-11, msg=name)


def converted(layers: tuple[int, ...], rank: int | None = 3) -> tuple[HybridWanModel, HybridWanModel]:
    """A softmax model, and the same converted with parameters at their initial values."""
    teacher = tiny_model()
    weights = TransformerWeights(teacher.state_dict(), "test")
    settings = HybridSettings(layers, rank)
    cpu = torch.device("cpu")
    return teacher, build_hybrid(weights, dict(TINY), settings, dtype=torch.float64, device=cpu)[0]


def test_the_first_block_after_conversion_equals_the_teachers() -> None:
    teacher, hybrid = converted((0, 1, 2))
    video, timestep = tiny_video(), torch.tensor(700.0)
    with torch.no_grad():
        flows = [
            predict_flow(model, video.noisy[:, :3], timestep, model.embed_text(video.text), new_memory(model), 0)
            for model in (teacher, hybrid)
        ]
        later = [block_by_block(model, video, video.clean, None) for model in (teacher, hybrid)]
    assert torch.equal(*flows)
    assert not torch.allclose(later[0][:, 3:], later[1][:, 3:]), "later blocks read the state: they must differ"


def test_switched_off_the_hybrid_model_is_the_teacher_always() -> None:
    torch.manual_seed(3)
    hybrid, video = tiny_model(HYBRID), tiny_video()
    state = {name.replace(".linear.", "."): value for name, value in hybrid.state_dict().items()}
    new = {name.replace(".linear.", ".") for name in hybrid.hybrid_parameter_names()}
    teacher = tiny_model()
    teacher.load_state_dict({name: value for name, value in state.items() if name not in new})
    with torch.no_grad():
        expected = block_by_block(teacher, video, video.clean, None)
        with hybrid.as_teacher():
            assert torch.equal(block_by_block(hybrid, video, video.clean, None), expected)
        assert not torch.allclose(block_by_block(hybrid, video, video.clean, None), expected)


def test_the_updates_of_a_clean_pass_do_not_depend_on_what_it_skips() -> None:
    model, video = tiny_model(HYBRID), tiny_video()
    memory, text = new_memory(model), model.embed_text(video.text)
    with torch.no_grad():
        remember_block(model, video.clean[:, :3], text, memory, 0)
        views = memory.read(3 * model.tokens_per_frame(*video.clean.shape[-2:]))
        clean, time, frames = video.clean[:, 3:6], torch.zeros(2, 3), torch.arange(3, 6)
        skipping = model(clean, time, text, views, frames, remember=True).updates[-1]
        last = model.layers()[-1]
        seen = []
        last.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
        model(clean, time, text, views, frames)
        _, full = last(*seen[0], attend=True, remember=True)
    assert torch.equal(skipping, full)


def test_only_frames_see_their_own_timestep() -> None:
    model, video = tiny_model(), tiny_video(frames=3)
    with torch.no_grad():
        text, memory = model.embed_text(video.text), new_memory(model)
        views, frames = memory.read(18), torch.arange(3)
        mixed = model(video.noisy, torch.tensor([[900.0, 500.0, 0.0]] * 2), text, views, frames).flow
        same = model(video.noisy, torch.full((2, 3), 500.0), text, views, frames).flow
    assert not torch.allclose(mixed, same)


def test_merging_feed_forward_adapters_keeps_the_output() -> None:
    model, video = tiny_model(HYBRID), tiny_video()
    with torch.no_grad():
        before = block_by_block(model, video, video.clean, None)
        state, adapters = model.state_dict(), model.adapters()
        merged = model.merge_ffn_lora()
        after = block_by_block(model, video, video.clean, None)
        torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-11)
        assert not model.adapters() and model.config.ffn_lora == "none"
        assert "blocks.0.ffn.0.weight" in model.state_dict()
        model.blocks[0].ffn[0].bias.add_(1.0)  # shared with nothing
        model.unmerge_ffn_lora(merged)
        assert model.adapters() == adapters and model.config.ffn_lora == HYBRID.ffn_lora.value
        assert model.state_dict().keys() == state.keys()
        assert torch.equal(block_by_block(model, video, video.clean, None), before)


def test_layers_of_another_class_share_the_parameters_and_leave_the_old_ones_alone() -> None:
    class Silent(HybridAttention):
        def output_gate(self, x_BLD: Tensor) -> Tensor:
            return torch.zeros_like(x_BLD[..., : self.num_heads])

    model, video = tiny_model(HYBRID), tiny_video()
    model.use_write_backend(WriteBackend.RECURRENT)
    model.train()
    before, old = list(model.named_parameters()), model.hybrid_attentions()
    with torch.no_grad():
        expected = block_by_block(model, video, video.clean, None)
        new = model.replace_hybrid_attentions(Silent)
        assert not torch.allclose(block_by_block(model, video, video.clean, None), expected)
        assert [type(layer) for layer in model.hybrid_attentions().values()] == [Silent, Silent]
        assert new == model.hybrid_attentions() and {type(layer) for layer in old.values()} == {HybridAttention}
        for (name, one), (other_name, other) in zip(before, model.named_parameters(), strict=True):
            assert name == other_name and one is other
        assert new[0].write_backend is WriteBackend.RECURRENT and new[0].training and new[0].lora_scale == 2.0
        model.replace_hybrid_attentions(HybridAttention)
        assert torch.equal(block_by_block(model, video, video.clean, None), expected)


def test_without_adapters_the_model_is_the_one_that_never_had_any() -> None:
    model, video = tiny_model(HYBRID), tiny_video()
    plain = tiny_model(HybridSettings(HYBRID.layers))
    state = {name.replace(".linear.", "."): value for name, value in model.state_dict().items()}
    plain.load_state_dict({name: value for name, value in state.items() if "lora" not in name})
    with torch.no_grad():
        expected, adapted = (block_by_block(m, video, video.clean, None) for m in (plain, model))
        with model.without_lora():
            assert torch.equal(block_by_block(model, video, video.clean, None), expected)
        assert torch.equal(block_by_block(model, video, video.clean, None), adapted)
    assert not torch.allclose(adapted, expected)


def test_hybrid_parameter_names_are_the_official_ones() -> None:
    model = tiny_model(HybridSettings((1,), 2, ffn_lora=FFNLoRA.ALL))
    parts = {name.split("self_attn.")[-1] for name in model.hybrid_parameter_names() if "self_attn" in name}
    assert parts == {"A_log", "dt_bias", "a_proj.weight", "b_proj.weight", "gate_proj.weight"} | {
        f"phi_{x}.weight" for x in "qkv"
    } | {f"lora_{x}_{y}" for x in "qkv" for y in "AB"}
    ffn = {name for name in model.hybrid_parameter_names() if "ffn" in name}
    assert ffn == {f"blocks.{b}.ffn.{p}.lora_{y}" for b in range(3) for p in (0, 2) for y in "AB"}


def test_initial_values_are_those_of_the_method() -> None:
    torch.manual_seed(0)
    layer = HybridAttention(256, 128, True, 1e-6, 4, 8.0)
    rate = layer.A_log.exp()
    assert rate.min() > 0 and rate.max() < 16 and 6 < rate.mean() < 10
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert dt.min() > 0.0009 and dt.max() < 0.11
    assert torch.equal(layer.phi_q.weight[..., 0], torch.eye(2).repeat(128, 1))
    assert layer.lora_q_B is not None and not layer.lora_q_B.any()
    assert (layer.output_gate(torch.randn(1, 50, 256)) - 0.5).abs().mean() < 0.1


def test_rope_depends_only_on_distance_at_any_frame() -> None:
    q, k = torch.randn(2, 1, 1, 1, 32).unbind(0)

    def score(a: int, b: int) -> Tensor:
        rotated = [rotate(x, rotary_angles(torch.tensor([f]), 1, 1, 32)) for x, f in ((q, a), (k, b))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(7, 3), score(1_000_007, 1_000_003), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(score(7, 3), score(8, 3))


def test_sizes_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(InputError, match="heads"):
        CausalWanModel(**(TINY | {"num_heads": 5}))
    with pytest.raises(InputError, match="out of range"):
        HybridWanModel(**TINY, hybrid_layers=[3])
    with pytest.raises(InputError, match="more than once"):
        HybridWanModel(**TINY, hybrid_layers=[1, 1])
    with pytest.raises(InputError, match="patches"):
        tiny_model().tokens_per_frame(5, 6)


def test_save_and_load_in_shards_and_refuse_a_folder_that_does_not_fit(tmp_path: object) -> None:
    model = tiny_model(HYBRID, torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = HybridWanModel.from_pretrained(tmp_path)
    assert loaded.hybrid == model.hybrid
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    with pytest.raises(CheckpointError, match="does not hold a CausalWanModel"):
        CausalWanModel.from_pretrained(tmp_path)


def test_training_from_scratch_starts_at_zero_flow() -> None:
    model, video = tiny_model(), tiny_video(frames=3)
    model.init_weights(torch.Generator().manual_seed(0))
    assert not predict_flow(
        model, video.noisy, torch.tensor(1.0), model.embed_text(video.text), new_memory(model), 0
    ).any()


def test_the_schedule_agrees_with_diffusers() -> None:
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)
    torch.testing.assert_close(FlowSchedule(5.0).sigmas, theirs.sigmas[:1000], rtol=1e-6, atol=1e-6)
