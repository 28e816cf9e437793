"""Variants of the recurrent state: what each computes, that every path agrees, and that checkpoints say which it is."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HYBRID, TINY, TOKENS_PER_FRAME, new_memory, tiny_model, tiny_video
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import wan.parallel
from arl2.checkpoint import build_hybrid, read_generator, save_generator, save_hybrid_weights
from arl2.distillation.sharding import show_tensors
from arl2.hybrid_attention import SECOND_STATE_FACTOR, HybridAttention, StateMemory, combine
from arl2.inference.model import InferenceModel
from arl2.inference.parallel.sequence_parallel import SequenceParallel
from arl2.model import HybridSettings, HybridWanModel
from arl2.ops.gated_delta import WriteBackend, write_recurrent
from arl2.rollout import predict_flow, remember_block
from arl2.state_settings import Decay, Gate, Reads, Rotation, StateSettings
from pipelines.config import SpeedConfig
from pipelines.generation.random_model import random_pipeline
from wan.checkpoints.fields import STATE_VARIANT, StateRecord
from wan.checkpoints.formats import WEIGHT_FILES, transformer_config
from wan.checkpoints.record import RECORD
from wan.memory import MemorySpec
from wan.model import FlowModel
from wan.ops.attention import attention
from wan.ops.rope import rotary_angles
from wan.teacher_forcing import teacher_forced_flow, teacher_forced_segment
from wan.utils.errors import CheckpointError, InputError

PAPER = StateSettings()
VARIANTS = {
    "none": StateSettings(Rotation.NONE),
    "spatial": StateSettings(Rotation.SPATIAL),
    "wrapped": StateSettings(Rotation.WRAPPED, rotation_period=4),
    "slow": StateSettings(Rotation.SLOW, rotation_rate=0.25),
    "slow decay": StateSettings(decay=Decay.SLOW, decay_block_tokens=18),
    "wide": StateSettings(value_expansion=2),
    "two states": StateSettings(num_states=2),
    "all": StateSettings(Rotation.WRAPPED, 5, decay=Decay.SLOW, decay_block_tokens=18, value_expansion=2, num_states=2),
    "window": StateSettings(local_frames=4),
    "short window": StateSettings(local_frames=2),
    "long window": StateSettings(Rotation.SPATIAL, value_expansion=2, num_states=2, local_frames=7),
    "no gate": StateSettings(gate=Gate.NONE),
    "token reads": StateSettings(Rotation.SPATIAL, reads=Reads.TOKEN),
    "linear": StateSettings(rule="gated_linear"),
    "wide linear": StateSettings(value_expansion=2, num_states=2, local_frames=2, rule="gated_linear"),
}
UNSET: dict[str, Any] = {"rotation_period": None, "rotation_rate": None}
ALONE = HybridSettings((0, 1, 2))
FRAMES = 12
"""Beyond every rotation period, in four blocks of 18 tokens."""


def model_of(variant: str, hybrid: HybridSettings = HYBRID, dtype: torch.dtype = torch.float64) -> HybridWanModel:
    torch.manual_seed(3)
    return tiny_model(replace(hybrid, state=VARIANTS[variant]), dtype)


def looped(model: HybridWanModel, passes: FlowModel, dtype: torch.dtype = torch.float64) -> Tensor:
    """Flows of all blocks, each remembered after it."""
    torch.manual_seed(2)
    video, memory, flows = tiny_video(FRAMES, dtype=dtype), new_memory(model, differentiable=passes is model), []
    text = model.embed_text(video.text)
    for start in range(0, FRAMES, 3):
        block = slice(start, start + 3)
        flows.append(predict_flow(passes, video.noisy[:, block], torch.tensor(500.0), text, memory, start).clone())
        remember_block(passes, video.clean[:, block], text, memory, start)
    return torch.cat(flows, dim=1)


def in_segments(model: HybridWanModel, ends: tuple[int, ...]) -> Tensor:
    """The same by all blocks of a segment at once, with gradients through the states between segments."""
    torch.manual_seed(2)
    video, memory, flows, start = tiny_video(FRAMES), new_memory(model, differentiable=True), [], 0
    for end in ends:
        part, times = slice(start, end), torch.full((2, end - start), 500.0)
        inputs = (video.noisy[:, part], times, video.text, 3, video.clean[:, part])
        flow, updates = teacher_forced_segment(model, *inputs, memory, start)
        memory.commit(updates)
        flows.append(flow)
        start = end
    return torch.cat(flows, dim=1)


def with_gradients(flow: Tensor, model: HybridWanModel) -> list[Tensor]:
    """A flow, and the gradients of all parameters with respect to it."""
    weight = torch.randn(flow.shape, generator=torch.Generator().manual_seed(4), dtype=flow.dtype)
    names = set(model.hybrid_parameter_names())
    parameters = [value for name, value in model.named_parameters() if name in names]
    return [flow.detach(), *torch.autograd.grad((flow * weight).sum(), parameters)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_blocks_at_once_and_in_segments_are_the_loop(variant: str) -> None:
    model = model_of(variant)
    expected = with_gradients(looped(model, model), model)
    torch.manual_seed(2)
    video = tiny_video(FRAMES)
    at_once = teacher_forced_flow(model, video.noisy, torch.full((2, FRAMES), 500.0), video.text, 3, video.clean)
    for flow in (at_once, in_segments(model, (3, 12)), in_segments(model, (6, 9, 12))):
        torch.testing.assert_close(with_gradients(flow, model), expected, rtol=1e-8, atol=1e-9)
    assert all(gradient.abs().max() > 0 for gradient in expected), "nothing is left out of the loss"


@pytest.mark.parametrize("variant", ["window", "short window", "long window"])
def test_long_blocks_attend_to_their_window_one_by_one(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(variant)
    expected = with_gradients(looped(model, model), model)
    monkeypatch.setattr(wan.parallel, "MAX_MASKED_TOKENS", 17)
    torch.testing.assert_close(with_gradients(in_segments(model, (6, 12)), model), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_matters_and_every_writer_computes_it(variant: str) -> None:
    model = model_of(variant)
    flow = looped(model, model).detach()
    model.use_write_backend(WriteBackend.RECURRENT)
    torch.testing.assert_close(looped(model, model).detach(), flow, rtol=1e-8, atol=1e-9)
    if VARIANTS[variant].rotation is not Rotation.ABSOLUTE:
        plain = tiny_model(replace(HYBRID, state=replace(VARIANTS[variant], rotation=Rotation.ABSOLUTE, **UNSET)))
        plain.load_state_dict(model.state_dict())
        assert not torch.allclose(looped(plain, plain), flow, atol=1e-4)


def test_rotations_are_what_they_say() -> None:
    frames, size = torch.tensor([0, 3, 9, 10]), (2, 3, 12)
    places: dict[str, Tensor] = {
        "spatial": torch.zeros(4),
        "wrapped": torch.tensor([0, 3, 1, 2]),
        "slow": torch.tensor([0, 0.75, 2.25, 2.5]),
    }
    for variant in ("none", *places):
        model = model_of(variant)
        rotary = model.rotary(frames, 2, 3)
        torch.testing.assert_close(rotary[:2], rotary_angles(frames, *size))
        layer = model.hybrid_attentions()[0]
        cos, sin = layer.state_rotary(rotary)
        if variant == "none":
            assert (cos == 1).all() and (sin == 0).all()
        else:
            torch.testing.assert_close((cos, sin), rotary_angles(places[variant], *size))
        with pytest.raises(ValueError, match=f"rotation {variant} needs"):
            layer.state_rotary(rotary[:2])
    assert len(tiny_model(HYBRID).rotary(frames, 2, 3)) == 2


def test_a_wrapped_rotation_meets_no_new_angle_however_long_the_video_is() -> None:
    model, period = model_of("wrapped"), 4
    met = model.rotary(torch.arange(period), 2, 3)[2]
    far = model.rotary(torch.arange(10**6, 10**6 + period), 2, 3)[2]
    torch.testing.assert_close(far, met, rtol=0, atol=0)


def half_lives(layer: HybridAttention) -> Tensor:
    """Half-lives of all states in tokens, where W_a·x is 0."""
    return math.log(2) / -layer.log_decay_of(torch.zeros(len(layer.A_log), dtype=torch.float64))


def layer_of(state: StateSettings, heads: int = 3) -> HybridAttention:
    torch.manual_seed(0)
    return HybridAttention(12 * heads, heads, True, 1e-6, None, 1.0, state)


def test_initial_half_lives() -> None:
    slow = StateSettings(decay=Decay.SLOW, decay_block_tokens=100)
    expected = 100 * torch.tensor([4.0, 40.0, 400.0], dtype=torch.float64)
    torch.testing.assert_close(half_lives(layer_of(slow)), expected, rtol=1e-4, atol=0)
    both = half_lives(layer_of(replace(slow, num_states=2)))
    torch.testing.assert_close(both, torch.cat([expected, SECOND_STATE_FACTOR * expected]), rtol=1e-4, atol=0)
    of_paper = half_lives(layer_of(StateSettings(num_states=2), 500))
    assert of_paper[500:].median() > 20 * of_paper[:500].median()


@pytest.mark.parametrize("variant", ["wide", "two states", "all"])
def test_bytes_grow_by_the_variant_and_not_with_the_video(variant: str) -> None:
    state = VARIANTS[variant]
    paper, model = tiny_model(ALONE), model_of(variant, ALONE)
    factor = state.value_expansion * state.num_states
    memory = new_memory(model)
    assert memory.num_bytes == factor * new_memory(paper).num_bytes == 3 * factor * 2 * 2 * 12 * 12 * 8
    sizes = [model.memory_bytes(frames, 4, 6, torch.float32) for frames in (3, 300)]
    assert sizes == [factor * paper.memory_bytes(3, 4, 6, torch.float32)] * 2
    torch.manual_seed(2)
    video, text = tiny_video(6), None
    text = model.embed_text(video.text)
    remember_block(model, video.clean[:, :3], text, memory, 0)
    held = [layer._state for layer in memory.layers if isinstance(layer, StateMemory)]
    assert len(held) == 3 and memory.num_bytes == sum(one.untyped_storage().nbytes() for one in held)


def test_expanded_values_start_as_the_paper_and_every_map_learns() -> None:
    torch.manual_seed(0)
    wide = HybridWanModel(**TINY, hybrid_layers=[0, 1, 2], state={"value_expansion": 2}).double()
    paper = HybridWanModel(**TINY, hybrid_layers=[0, 1, 2]).double()
    common = {name: value for name, value in wide.state_dict().items() if "phi_v" not in name and "phi_o" not in name}
    missing = paper.load_state_dict(common | {k: v for k, v in paper.state_dict().items() if "phi_v" in k})
    assert not missing.missing_keys
    for model in (wide, paper):  # the output head is zero at first
        torch.manual_seed(1)
        torch.nn.init.normal_(model.head.head.weight)
    torch.testing.assert_close(looped(wide, wide), looped(paper, paper), rtol=1e-10, atol=1e-11)
    layer = wide.hybrid_attentions()[0]
    assert layer.phi_o is not None
    maps = (layer.phi_v.weight, layer.phi_o.weight)

    def gradients() -> tuple[Tensor, Tensor]:
        phi_v, phi_o = torch.autograd.grad(looped(wide, wide).square().sum(), maps)
        return phi_v.view(2, 2, 12, 12)[:, 1], phi_o.view(2, 12, 24)[..., 12:]

    further_v, further_o = gradients()
    assert further_v.abs().max() == 0 and further_o.abs().max() > 0
    with torch.no_grad():
        layer.phi_o.weight.view(2, 12, 24)[..., 12:] -= 0.1 * further_o
    assert gradients()[0].abs().max() > 0, "as an adapter: from the second step on"


def test_expanded_values_hold_more_than_the_heads_own() -> None:
    """A state is linear in its values: maps of the same D channels would leave it of rank D in them."""
    model, head_dim = model_of("wide", ALONE), 12
    torch.manual_seed(2)
    video, memory = tiny_video(FRAMES), new_memory(model)
    text = model.embed_text(video.text)
    for start in range(0, FRAMES, 3):
        remember_block(model, video.clean[:, start : start + 3], text, memory, start)
    layer = model.hybrid_attentions()[0]
    maps = layer.phi_v.weight.view(2, 2 * head_dim, head_dim)
    (state, *_) = memory.read(18)
    for head in range(2):
        values = state.state_BHKV[0, head].T  # [2D, K]: in the image of φ_v, if they were of the head's own value
        inside = maps[head] @ torch.linalg.lstsq(maps[head], values).solution
        assert (values - inside).norm() > 0.1 * values.norm()


def test_more_values_than_heads_are_refused() -> None:
    with pytest.raises(InputError, match="value_expansion 3 is above the model's 2 heads"):
        tiny_model(replace(HYBRID, state=StateSettings(value_expansion=3)))


@pytest.mark.parametrize("hybrid", [HYBRID, ALONE], ids=["adapted", "alone"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fast_form_computes_what_the_plain_model_does(variant: str, hybrid: HybridSettings) -> None:
    model = model_of(variant, hybrid).requires_grad_(False)
    expected = looped(model, model)
    fast = InferenceModel(model)
    torch.testing.assert_close(looped(model, fast), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(looped(model, fast.without_kernels()), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", ["wrapped", "all"])
def test_the_compiled_form_and_fp8_take_variants(variant: str) -> None:
    model = model_of(variant, dtype=torch.float32).requires_grad_(False)
    expected = looped(model, model, torch.float32)
    found = looped(model, InferenceModel(model, compile=True), torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    rounded = looped(model, InferenceModel(model, fp8=True), torch.float32)
    assert 0 < (rounded - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("variant", ["none", "all"])
def test_optimize_for_inference_gives_the_plain_result(variant: str) -> None:
    hybrid = HybridSettings((0, 2), 4, 8.0, state=VARIANTS[variant])
    pipeline = random_pipeline("toy", hybrid)
    pictures = []
    for speed in (None, SpeedConfig(compile=True, fast_vae=False)):
        if speed is not None:
            pipeline.optimize_for_inference(speed)
        generator = torch.Generator().manual_seed(1)
        arguments: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9, "output_type": "latent"}
        pictures.append(pipeline("a red ball", generator=generator, **arguments).frames)
    torch.testing.assert_close(*pictures, rtol=1e-3, atol=1e-3)


def test_states_without_a_fused_form_are_not_divided_over_processes() -> None:
    parallel: Any = object.__new__(SequenceParallel)
    with pytest.raises(InputError, match="states of num_states 2 cannot be divided over processes"):
        InferenceModel(model_of("two states"), parallel=parallel)
    pipeline = random_pipeline("toy", HybridSettings((0,), state=VARIANTS["wide"]))
    with pytest.raises(InputError, match="value_expansion 2 cannot be divided"):
        pipeline.parallelize()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rotation": "wrapped"}, "rotation wrapped needs state.rotation_period: give it"),
        ({"rotation": "slow"}, "rotation slow needs state.rotation_rate"),
        ({"decay": "slow"}, "decay slow needs state.decay_block_tokens"),
        ({"rotation_period": 3}, "rotation_period 3 would do nothing with state.rotation absolute"),
        ({"rotation": "none", "rotation_rate": 0.5}, "rotation_rate 0.5 would do nothing"),
        ({"decay_block_tokens": 18}, "decay_block_tokens 18 would do nothing"),
        ({"rotation": "twisted"}, "rotation 'twisted' does not fit: give 'absolute' or"),
        ({"rotation": "wrapped", "rotation_period": 0}, "rotation_period 0 is out of range"),
        ({"num_states": 3}, "num_states 3 is out of range"),
        ({"reads": "token", "num_states": 2}, "reads token is for one state of the paper's size without a window"),
        ({"reads": "token", "local_frames": 3}, "reads token is for one state"),
        ({"writes": "noisy", "local_frames": 3}, "writes noisy would do nothing with state.local_frames"),
        ({"gate": "scalar"}, "gate 'scalar' does not fit: give 'headwise' or"),
        ({"value_expansion": 0}, "value_expansion 0 is out of range"),
        ({"half_life": 3}, "unknown setting 'state.half_life'"),
        ([], "state '\\[\\]' does not fit: give settings by name|does not fit"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        StateSettings.from_plain(settings, "a file")
    assert "\n" not in str(caught.value)
    folder = saved(model_of("none", dtype=torch.float32), tmp_path / "model")
    restated(folder, settings, settings)
    with pytest.raises(CheckpointError, match=reason) as caught:
        loaded(folder)
    assert "\n" not in str(caught.value)


def test_the_record_declares_what_the_settings_have() -> None:
    assert StateSettings(**vars(StateRecord())) == PAPER
    assert [each.name for each in fields(StateRecord)] == [each.name for each in fields(StateSettings)]


def saved(model: HybridWanModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def restated(folder: Path, in_config: Any, in_record: Any) -> None:
    """Let config.json and the record of the weights say something else of the state; None for nothing."""
    page, file = folder / "config.json", folder / WEIGHT_FILES[0]
    config = json.loads(page.read_text())
    record = dict(HybridWanModel.from_pretrained(folder).record())
    for said, value in ((config, in_config), (record, in_record)):
        said.pop(STATE_VARIANT, None)
        said |= {} if value is None else {STATE_VARIANT: value}
    state = {name: value.clone() for name, value in load_file(file).items()}
    file.unlink()
    save_file(state, file, {"format": "pt", RECORD: json.dumps(record)})
    page.write_text(json.dumps(config))


def loaded(path: Path, wanted: HybridSettings = HybridSettings(), folder: Path | None = None) -> HybridWanModel:
    weights = read_generator(folder or path, None if folder is None else path)
    config = transformer_config(folder or path) if folder is not None or path.is_dir() else dict(TINY)
    return build_hybrid(weights, config, wanted, dtype=None, device=torch.device("cpu"))[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_loads_as_the_variant_that_it_says(variant: str, tmp_path: Path) -> None:
    model, state = model_of(variant, dtype=torch.float32), VARIANTS[variant]
    with torch.no_grad():
        expected = looped(model, model, torch.float32)
    folder = saved(model, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())[STATE_VARIANT] == state.as_plain()
    save_generator(model, tmp_path / "a.pt")
    save_generator(model, tmp_path / "a.safetensors")
    softmax = tiny_model(HybridSettings(), torch.float32)
    own = set(model.hybrid_parameter_names())
    plain = {name.replace(".linear.", "."): value for name, value in model.state_dict().items() if name not in own}
    softmax.load_state_dict(plain)
    base = saved(softmax, tmp_path / "base")
    save_hybrid_weights(model, tmp_path / "hybrid.safetensors")
    found = {
        "diffusers": HybridWanModel.from_pretrained(folder),
        "folder": loaded(folder),
        "pt": loaded(tmp_path / "a.pt"),
        "safetensors": loaded(tmp_path / "a.safetensors"),
        "hybrid alone": loaded(tmp_path / "hybrid.safetensors", folder=base),
        "asked for": loaded(folder, HybridSettings(state=state)),
    }
    for name, other in found.items():
        assert other.hybrid.state == state, name
        with torch.no_grad():
            torch.testing.assert_close(looped(other.eval(), other, torch.float32), expected, rtol=0, atol=0, msg=name)
    with pytest.raises(InputError, match=r"has states of .*, not of rotation slow, rotation_rate 0.5: ask"):
        loaded(folder, HybridSettings(state=StateSettings(Rotation.SLOW, rotation_rate=0.5)))


def test_the_paper_is_written_nowhere(tmp_path: Path) -> None:
    model = tiny_model(replace(HYBRID, state=PAPER), torch.float32)
    stated = HybridWanModel(**TINY, hybrid_layers=[0], state={"rotation": "absolute", "num_states": 1})
    assert (
        STATE_VARIANT not in model.config
        and STATE_VARIANT not in model.record()
        and STATE_VARIANT not in stated.record()
    )
    folder = saved(model, tmp_path / "model")
    assert f'"{STATE_VARIANT}"' not in (folder / "config.json").read_text()
    assert f'"{STATE_VARIANT}"' not in (folder / WEIGHT_FILES[0]).read_bytes()[:4096].decode(errors="replace")
    assert loaded(folder).hybrid.state == PAPER


@pytest.mark.parametrize(
    ("in_config", "in_record", "reason"),
    [
        (None, {"rotation": "none"}, "was made with states of rotation none, the config says of the paper's kind"),
        ({"rotation": "none"}, None, "was made with states of the paper's kind, the config says of rotation none"),
        ({"rotation": "none"}, {"rotation": "spatial"}, "rotation"),
        ({"rotation": "none", "num_states": 2}, {"rotation": "none", "num_states": 2}, "shape|A_log"),
        ({"value_expansion": 2}, {"value_expansion": 2}, "phi_o|phi_v"),
    ],
)
def test_config_record_and_weights_must_agree(in_config: Any, in_record: Any, reason: str, tmp_path: Path) -> None:
    folder = saved(model_of("none", dtype=torch.float32), tmp_path / "model")
    restated(folder, in_config, in_record)
    for load in (loaded, HybridWanModel.from_pretrained):
        with pytest.raises(CheckpointError, match=reason) as caught:
            load(folder)
        assert "\n" not in str(caught.value), load


def test_weights_with_expanded_values_do_not_load_as_the_paper(tmp_path: Path) -> None:
    folder = saved(model_of("wide", dtype=torch.float32), tmp_path / "model")
    restated(folder, None, None)
    with pytest.raises(CheckpointError, match="says value_expansion 1, the weights have phi_o"):
        loaded(folder)


def test_a_softmax_model_becomes_any_variant_and_none_without_layers(tmp_path: Path) -> None:
    folder = saved(tiny_model(HybridSettings(), torch.float32), tmp_path / "softmax")
    for state in VARIANTS.values():
        model = loaded(folder, HybridSettings((1,), 2, 4.0, state=state))
        layer = model.hybrid_attentions()[1]
        assert model.hybrid.state == layer.state == state and layer.A_log.isfinite().all()
        assert (layer.phi_o is None) == (state.value_expansion == 1)
    with pytest.raises(InputError, match=r"state would do nothing: .* has no hybrid layers"):
        loaded(folder, HybridSettings(state=VARIANTS["none"]))
    page = folder / "config.json"
    page.write_text(json.dumps(json.loads(page.read_text()) | {STATE_VARIANT: {"rotation": "none"}}))
    with pytest.raises(CheckpointError, match="the config says of rotation none"):
        loaded(folder)


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("variant", ["window", "short window", "long window"])
def test_a_window_sees_its_frames_and_the_state_has_all_before(variant: str, differentiable: bool) -> None:
    """Against the definition: softmax over frames s - w to the block, and a state of frames 0 to s - w - 1."""
    model, window = model_of(variant, ALONE).requires_grad_(False), VARIANTS[variant].local_frames
    layer = model.hybrid_attentions()[1]
    spec = MemorySpec(2, TOKENS_PER_FRAME, torch.device("cpu"), torch.float64, 3, differentiable=differentiable)
    memory = layer.new_memory(spec)
    clean, noisy = (torch.randn(2, FRAMES * TOKENS_PER_FRAME, TINY["dim"], dtype=torch.float64) for _ in range(2))
    heads = VARIANTS[variant].num_states * layer.num_heads
    values = VARIANTS[variant].value_expansion * layer.head_dim
    for start in range(0, FRAMES, 3):
        first, end = max(0, start - window), start + 3
        before, seen, block = (
            slice(*(TOKENS_PER_FRAME * frame for frame in frames))
            for frames in ((0, first), (first, start), (start, end))
        )
        inputs = layer.delta_inputs(
            clean[:, before],
            layer.k(clean[:, before]),
            layer.v(clean[:, before]),
            model.rotary(torch.arange(first), 2, 3),
        )
        state = write_recurrent(torch.zeros(2, heads, layer.head_dim, values, dtype=torch.float64), *inputs)
        tokens = torch.cat([clean[:, seen], noisy[:, block]], dim=1)
        rotary = model.rotary(torch.arange(first, end), 2, 3)
        keys, v = layer.rotated(layer.k(tokens), layer.norm_k, rotary), layer.heads(layer.v(tokens))
        x, own = noisy[:, block], model.rotary(torch.arange(start, end), 2, 3)
        local = attention(layer.rotated(layer.q(x), layer.norm_q, own), keys, v)
        read = layer.read(state, layer.state_query(x, layer.q(x), own))
        expected = layer.o(combine(local, read, layer.output_gate(x)).flatten(2))
        found, nothing = layer(x, own, memory.read(18), attend=True, remember=False)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
        assert nothing is None
        with_update, update = layer(clean[:, block], own, memory.read(18), attend=True, remember=True)
        alone = layer(clean[:, block], own, memory.read(18), attend=False, remember=True)[1]
        again = layer(clean[:, block], own, memory.read(18), attend=True, remember=False)[0]
        torch.testing.assert_close(with_update, again, rtol=0, atol=0)  # to remember is no write yet
        torch.testing.assert_close(alone.tensors(), update.tensors(), rtol=0, atol=0)
        memory.commit(update)


def test_a_window_has_bytes_of_its_own_which_do_not_grow() -> None:
    model = model_of("window", ALONE)
    memory, state = new_memory(model), new_memory(tiny_model(ALONE)).num_bytes
    waiting = 3 * 2 * 4 * TOKENS_PER_FRAME * (4 * 24 + 2 * 2) * 8  # k, v, k̂, v̂ and two gates of four frames
    assert memory.num_bytes == state + waiting
    torch.manual_seed(2)
    video = tiny_video(FRAMES)
    text = model.embed_text(video.text)
    for start in range(0, FRAMES, 3):
        remember_block(model, video.clean[:, start : start + 3], text, memory, start)
        assert memory.num_bytes == state + waiting
    held = [layer.read(18) for layer in memory.layers]
    assert all(part.shape[1] == 4 * TOKENS_PER_FRAME for view in held for part in view.tensors()[1:])
    stored = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for v in held for part in v.tensors()}
    assert sum(stored.values()) == memory.num_bytes
    for layer in memory.layers:
        layer.reset()
    empty = [layer.read(18) for layer in memory.layers]
    assert all(view.waiting.k.shape[1] == 0 and not view.state_BHKV.any() for view in empty)


def test_a_window_refuses_an_update_of_other_shape_and_passes_through_a_tree() -> None:
    model = model_of("window", ALONE)
    layer, memory = model.hybrid_attentions()[0], new_memory(model).layers[0]
    x = torch.randn(2, 18, 24, dtype=torch.float64)
    _, update = layer(x, model.rotary(torch.arange(3), 2, 3), memory.read(18), attend=False, remember=True)
    for part in range(7):
        tensors = update.tensors()
        tensors[part] = tensors[part][:1]
        with pytest.raises(ValueError, match="an update of shape"):
            memory.commit(update.with_tensors(*tensors))
    memory.commit(update)
    show_tensors()
    leaves, tree = tree_flatten(update)
    again = tree_unflatten(leaves, tree)
    torch.testing.assert_close(again.tensors(), update.tensors())
    assert again.capacity == 24 and sum(isinstance(leaf, Tensor) for leaf in leaves) == 7


def test_memory_of_a_rank_is_its_share() -> None:
    model = model_of("all", ALONE)
    spec = MemorySpec(1, TOKENS_PER_FRAME, torch.device("cpu"), torch.float64, 3, head_shards=2)
    assert 2 * model.new_memory(spec).num_bytes == new_memory(model, batch=1).num_bytes
