"""The fast path computes what the plain model computes: fused, compiled, recorded, and in FP8 within its rounding."""

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import HYBRID, TOKENS_PER_FRAME, new_memory, tiny_model, tiny_video
from torch import Tensor, nn

from arl2.inference.cuda_graphs import GraphedModel, pass_key, recurs
from arl2.inference.fused_ops import FusedOps, Operand
from arl2.inference.linear import FP8Linear, FusedLinear, quantized, require_fp8
from arl2.inference.memory_pool import MemoryPool
from arl2.inference.model import InferenceModel, new_fused_ops
from arl2.model import HybridSettings, HybridWanModel
from arl2.rollout import predict_flow, remember_block
from pipelines.config import MemoryConfig, MemoryKind, SpeedConfig
from pipelines.generation.random_model import random_pipeline
from wan.memory import Memory, MemorySpec
from wan.model import FlowModel, PassOutput
from wan.utils.errors import InputError

ALL = HybridSettings((0, 1, 2))
CASES = {"softmax": HybridSettings(), "hybrid": HYBRID, "hybrid without adapters": HybridSettings((0, 2)), "all": ALL}
MEMORIES = {"full": (None, 0), "window": (6, 0), "sink": (9, 3), "odd": (7, 2)}


@torch.no_grad()
def flows(
    model: FlowModel, plain: HybridWanModel, memory: Memory, frames: int, dtype: torch.dtype, seed: int = 1
) -> Tensor:
    """What every block of a video looks like to a model over its own memory."""
    torch.manual_seed(seed)
    video, seen = tiny_video(frames, dtype=dtype), []
    text = plain.embed_text(video.text)
    for start in range(0, frames, 3):
        block = slice(start, start + 3)
        for level in (900.0, 400.0):
            seen.append(predict_flow(model, video.noisy[:, block], torch.tensor(level), text, memory, start).clone())
        remember_block(model, video.clean[:, block], text, memory, start)
    return torch.stack(seen)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("case", CASES)
def test_fused_projections_change_nothing(case: str, memory: str) -> None:
    model, (window, sink) = tiny_model(CASES[case]), MEMORIES[memory]
    frames = 9 if window is None else 3 * (2 + 2 * window // 3)
    expected = flows(model, model, new_memory(model, window=window, sink=sink), frames, torch.float64)
    fast = InferenceModel(model)
    found = flows(fast, model, new_memory(model, window=window, sink=sink), frames, torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("together", [1, 2])
def test_states_are_written_together_in_any_number(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arl2.inference.model.WRITES_TOGETHER", together)
    model = tiny_model(ALL)
    expected = flows(model, model, new_memory(model), 9, torch.float64)
    torch.testing.assert_close(
        flows(InferenceModel(model), model, new_memory(model), 9, torch.float64), expected, rtol=1e-10, atol=1e-11
    )


def test_switches_are_taken_as_they_are() -> None:
    model = tiny_model(HYBRID)
    for switched in (model.as_teacher, model.without_lora):
        with switched():
            expected = flows(model, model, new_memory(model), 9, torch.float64)
            found = flows(InferenceModel(model), model, new_memory(model), 9, torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_the_model_and_its_file_stay_what_they_are(tmp_path: object) -> None:
    model = tiny_model(HYBRID, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = flows(model, model, new_memory(model), 9, torch.float32)
    InferenceModel(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    torch.testing.assert_close(flows(model, model, new_memory(model), 9, torch.float32), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in before.items())


def test_weights_are_not_stored_twice() -> None:
    model = tiny_model(HybridSettings((0,)))
    fast, layer = InferenceModel(model), model.blocks[1].self_attn
    held = fast._blocks[1].projections.product.weight_NK
    assert {x.weight.untyped_storage().data_ptr() for x in (layer.q, layer.k, layer.v)} == {
        held.untyped_storage().data_ptr()
    }


def test_parts_of_a_fused_product() -> None:
    parts = {"a": torch.nn.Linear(8, 5), "b": torch.nn.Linear(8, 16, bias=False), "c": torch.nn.Linear(8, 3)}
    x = torch.randn(2, 7, 8)
    expected = {name: linear(x) for name, linear in parts.items()}
    fused = FusedLinear(parts, fp8=False)
    for names in (("a",), ("b", "c"), ("a", "b", "c"), ("c",)):
        for name, y in zip(names, fused(x, names), strict=True):
            torch.testing.assert_close(y, expected[name])
            torch.testing.assert_close(parts[name](x), expected[name])


def compiled_by(backend: str) -> Callable[..., Any]:
    """As `arl2.inference.blocks.compiled`, by another compiler."""
    return functools.cache(lambda function: torch.compile(function, backend=backend, dynamic=False, fullgraph=True))


@pytest.mark.parametrize("case", ["softmax", "hybrid"])
def test_nothing_is_compiled_after_the_first_block(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiler's first half, which finds graphs and guards them: the second takes minutes and does not matter here.
    monkeypatch.setattr("arl2.inference.model.compiled", compiled_by("eager"))
    torch._dynamo.reset()
    model = tiny_model(CASES[case])
    fast, memory = InferenceModel(model, compile=True), MemoryPool(model)
    spec = MemorySpec(2, TOKENS_PER_FRAME, torch.device("cpu"), torch.float64, 3, 9, 3)
    flows(fast, model, memory.new_memory(spec), 3, torch.float64)
    with torch.compiler.set_stance("fail_on_recompile"):
        found = flows(fast, model, memory.new_memory(spec), 24, torch.float64)
    expected = flows(model, model, new_memory(model, window=9, sink=3), 24, torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_compiled_blocks_change_nothing() -> None:
    model, video = tiny_model(HybridSettings((0,), 3), torch.float32), tiny_video(3, dtype=torch.float32)
    model.blocks = model.blocks[:1]
    text, timestep = model.embed_text(video.text), torch.tensor(500.0)
    with torch.no_grad():
        memory = new_memory(model)
        remember_block(model, video.clean, text, memory, 0)
        expected, found = (
            predict_flow(each, video.noisy, timestep, text, memory, 3)
            for each in (model, InferenceModel(model, compile=True))
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_passes_that_come_again_have_the_same_key() -> None:
    """Two slots in a ring of six frames, and the blocks that fill the window; of a full memory all are different."""
    for window, sink, distinct in ((9, 3, 4), (6, 0, 3), (7, 1, 4), (None, 0, 10)):
        model = tiny_model(HYBRID)
        memory, keys = new_memory(model, window=window, sink=sink), []
        with torch.no_grad():
            text, video = model.embed_text(tiny_video().text), tiny_video(30)
            for start in range(0, 30, 3):
                views = memory.read(3 * TOKENS_PER_FRAME)
                keys.append(pass_key(views))
                assert recurs(views) is (window is not None)
                remember_block(model, video.clean[:, start : start + 3], text, memory, start)
        assert None not in keys and len(set(keys)) == distinct, (window, sink)
    states = new_memory(tiny_model(ALL)).read(18)
    assert pass_key(states) is not None and recurs(states)
    assert pass_key(new_memory(tiny_model(HYBRID), differentiable=True).read(18)) is None


class Rerun:
    """Stands in for a recorded pass where there is no GPU: the pass over the views that it was recorded with."""

    def __init__(self, graphed: GraphedModel, *arguments: Any) -> None:
        self.graphed, self.arguments = graphed, arguments

    def replay(self) -> None:
        kind, (latents, timesteps, frames), text, views, remember = self.arguments
        self.graphed._hold_output(kind, self.graphed._model(latents, timesteps, text, views, frames, remember))


@pytest.mark.parametrize("memory", ["window", "sink", "odd", "full"])
@pytest.mark.parametrize("case", ["softmax", "hybrid", "all"])
def test_a_recorded_pass_serves_all_that_have_its_key(case: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("graph_pool_handle", "Stream"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *arguments: None)
    monkeypatch.setattr(GraphedModel, "_record", lambda *arguments: Rerun(*arguments))
    model, (window, sink) = tiny_model(CASES[case]), MEMORIES[memory]
    graphed, pool = GraphedModel(InferenceModel(model), torch.device("cpu")), MemoryPool(model)
    for seed in range(3):
        spec = MemorySpec(2, TOKENS_PER_FRAME, torch.device("cpu"), torch.float64, 18, window, sink)
        expected = flows(model, model, new_memory(model, window=window, sink=sink), 18, torch.float64, seed)
        found = flows(graphed, model, pool.new_memory(spec), 18, torch.float64, seed)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    # Each is recorded for denoising and for remembering; states are always in the same place.
    slots = {"full": 6, "window": 3, "sink": 4, "odd": 6}
    assert graphed.num_graphs == 2 * (1 if case == "all" else slots[memory])


def counted_graphs(model: HybridWanModel, called: list[str], monkeypatch: pytest.MonkeyPatch) -> GraphedModel:
    """A stand-in, on a CPU, that notes which of its two models computes a pass, and when one is recorded."""
    for name in ("graph_pool_handle", "Stream"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *arguments: None)

    def record(graphed: GraphedModel, *arguments: Any) -> Rerun:
        called.append("record")
        return Rerun(graphed, *arguments)

    class Counted(InferenceModel):
        def __init__(self, name: str) -> None:
            super().__init__(model)
            self.name = name

        def __call__(self, *arguments: Any) -> PassOutput:
            called.append(self.name)
            return super().__call__(*arguments)

    monkeypatch.setattr(GraphedModel, "_record", record)
    return GraphedModel(Counted("recorded"), torch.device("cpu"), Counted("launched"))


@pytest.mark.parametrize("kind", [MemoryKind.full, MemoryKind.window])
def test_warming_up_calls_all_that_generating_will(kind: MemoryKind, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, called = random_pipeline("toy", HybridSettings((0, 1)), words=["a"]), list[str]()
    pipeline._fast = counted_graphs(pipeline.transformer, called, monkeypatch)
    pipeline.warm_up(16, 16, MemoryConfig(kind))
    warm = set(called)
    called.clear()
    for _ in pipeline.stream("a", 33, 16, 16, seeds=[0], memory=MemoryConfig(kind)):
        pass
    assert set(called) <= warm | ({"record"} if kind is MemoryKind.window else set())
    assert ("launched" in called) is (kind is MemoryKind.full)


def test_over_a_full_memory_the_second_pass_of_a_block_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    model, video = tiny_model(HYBRID), tiny_video()
    graphed, pool = counted_graphs(model, called, monkeypatch), MemoryPool(model)
    text, spec = model.embed_text(video.text), MemorySpec(2, TOKENS_PER_FRAME, torch.device("cpu"), torch.float64, 6)

    @torch.no_grad()
    def generate() -> list[list[str]]:
        memory, blocks = pool.new_memory(spec), []
        for start in (0, 3):
            called.clear()
            for _ in range(4):
                predict_flow(graphed, video.clean[:, :3], torch.tensor(500.0), text, memory, start)
            remember_block(graphed, video.clean[:, :3], text, memory, start)
            blocks.append(called.copy())
        return blocks

    # What is replayed is "recorded" here. The first pass of a kind goes through what will be recorded, so that its
    # kernels are compiled.
    first = ["recorded", "record", *["recorded"] * 3, "recorded"]
    assert generate() == [first, ["launched", "record", *["recorded"] * 3, "launched"]]
    assert generate() == [["recorded"] * 4 + ["record", "recorded"]] * 2
    assert generate() == [["recorded"] * 5] * 2
    # Without room a block's denoising is recorded for that block.
    monkeypatch.setattr("arl2.inference.cuda_graphs.MAX_GRAPHS", 4)
    spec = replace(spec, frames=9)
    assert generate() == [["launched", "record", *["recorded"] * 3, "launched"]] * 2
    assert generate() == [["record", *["recorded"] * 4, "launched"]] * 2
    assert graphed.num_graphs == 5


def test_recordings_in_use_stay_and_forgotten_ones_go(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("graph_pool_handle", "Stream"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *arguments: None)
    made = []
    monkeypatch.setattr(GraphedModel, "_record", lambda *arguments: made.append(0) or Rerun(*arguments))
    monkeypatch.setattr("arl2.inference.cuda_graphs.MAX_GRAPHS", 4)
    monkeypatch.setattr("arl2.inference.cuda_graphs.EVICT_AFTER", 12)
    model = tiny_model()
    graphed = GraphedModel(InferenceModel(model), torch.device("cpu"))
    # A ring of five slots, of which four passes fit: they are recorded once, and the rest goes on unrecorded.
    flows(graphed, model, new_memory(model, window=7, sink=2), 90, torch.float64)
    assert len(made) == graphed.num_graphs == 4
    memory = new_memory(model, window=3)
    flows(graphed, model, memory, 60, torch.float64)
    assert len(made) == 6 and graphed.num_graphs == 4


def test_a_memory_is_used_again_only_when_nobody_holds_it() -> None:
    model = tiny_model(HYBRID)
    pool, spec = MemoryPool(model), MemorySpec(2, TOKENS_PER_FRAME, torch.device("cpu"), torch.float64, 3, 9, 3)
    first = pool.new_memory(spec)
    key, video = pass_key(first.read(18)), tiny_video()
    expected = flows(model, model, first, 9, torch.float64)
    second = pool.new_memory(spec)
    assert pass_key(second.read(18)) != key
    key = pass_key(second.read(18))
    remember_block(model, video.clean[:, :3], model.embed_text(video.text), second, 0)
    del second
    third = pool.new_memory(MemorySpec(2, TOKENS_PER_FRAME, torch.device("cpu"), torch.float64, 30, 9, 3))
    assert pass_key(third.read(18)) == key
    torch.testing.assert_close(flows(model, model, third, 9, torch.float64), expected, rtol=0, atol=0)


def test_fp8_rounds_each_row_by_its_own_scale() -> None:
    x = torch.randn(6, 64) * torch.tensor([1e-3, 1, 50, 1e4, 1e-6, 0])[:, None]
    values, scales = quantized(x)
    error = (values.float() * scales - x).norm(dim=1) / x.norm(dim=1).clamp(min=1e-30)
    assert values.dtype is torch.float8_e4m3fn and (error < 0.035).all() and torch.isfinite(values.float()).all()
    linear = torch.nn.Linear(256, 96)
    fp8, tokens = FP8Linear(linear.weight, linear.bias, [(32, 64)]), torch.randn(3, 5, 256)
    for rows in (slice(None), slice(32, 64)):
        expected = linear(tokens)[..., rows]
        assert 1e-3 < ((fp8(tokens, rows) - expected).norm() / expected.norm()) < 0.04


def test_fp8_stays_close_to_the_model() -> None:
    model = tiny_model(HYBRID, torch.float32)
    expected = flows(model, model, new_memory(model, window=9, sink=3), 12, torch.float32)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    found = flows(InferenceModel(model, fp8=True), model, new_memory(model, window=9, sink=3), 12, torch.float32)
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.15
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("merged", [False, True])
def test_fp8_does_not_need_the_weights_that_wait_on_the_host(merged: bool) -> None:
    """Stands in for another device: what is parked may have any values meanwhile."""
    model = tiny_model(HYBRID, torch.float32)
    if merged:
        model.merge_ffn_lora()
    fast, memory = InferenceModel(model, fp8=True), new_memory(model, window=9, sink=3)
    expected = flows(fast, model, memory, 12, torch.float32)
    parked = [weight for weight, _ in fast._parked._parked]
    assert sum(map(torch.numel, parked)) > 0.5 * sum(map(torch.numel, model.parameters()))
    kept = [weight.data.clone() for weight in parked]
    for weight in parked:
        weight.data.fill_(torch.nan)
    memory.reset()
    assert torch.equal(flows(fast, model, memory, 12, torch.float32), expected)
    for weight, value in zip(parked, kept, strict=True):
        weight.data.copy_(value)
    fast.release()
    assert not fast._parked._parked


def test_what_a_device_lacks_is_an_error() -> None:
    pipeline = random_pipeline("toy")
    with pytest.raises(InputError, match="fp8 needs"):
        pipeline.optimize_for_inference(SpeedConfig(fp8=True))
    for switch in ("cuda_graphs", "overlap_decoding"):
        with pytest.raises(InputError, match=f"{switch} needs a GPU"):
            pipeline.optimize_for_inference(SpeedConfig(**{switch: True}))
    with pytest.raises(InputError, match="kernels need a GPU"):
        pipeline.optimize_for_inference(SpeedConfig(kernels=True))
    with pytest.raises(InputError, match="compute capability"):
        require_fp8(torch.device("cpu"), 64)
    pipeline.optimize_for_inference(SpeedConfig())
    assert pipeline.flow_model is pipeline.transformer, "the plain model computes unless told otherwise"


class Marked(FusedOps):
    """FusedOps that tell when they were taken."""

    taken = 0

    def hidden(self, ffn_in: nn.Module, gelu: nn.Module, tokens: Operand) -> Operand:
        Marked.taken += 1
        return super().hidden(ffn_in, gelu, tokens)


def test_without_kernels_the_weights_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(HYBRID)
    plain = new_fused_ops

    def marked(fp8: bool, kernels: bool) -> FusedOps:
        return Marked(fp8) if kernels else plain(fp8, kernels)

    monkeypatch.setattr("arl2.inference.model.new_fused_ops", marked)
    fast = InferenceModel(model, kernels=True)
    other = fast.without_kernels()
    video, text = tiny_video(), model.embed_text(tiny_video().text)
    views = new_memory(model).read(18)
    given = (video.noisy[:, :3], video.timesteps[:, :3], text, views, torch.arange(3))
    flows = [one(*given).flow for one in (fast, other)]
    assert Marked.taken == len(model.layers()), "those of the first alone"
    assert flows[0] is not None and flows[1] is not None
    torch.testing.assert_close(*flows)
    for mine, theirs in zip(fast._blocks, other._blocks, strict=True):
        assert mine.projections is theirs.projections and mine.ops is not theirs.ops


def test_switches_left_open_are_thrown_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu, half = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
    off = SpeedConfig(compile=False, cuda_graphs=False, kernels=False, overlap_decoding=False)
    on = SpeedConfig(compile=True, cuda_graphs=True, kernels=True, overlap_decoding=True)
    assert SpeedConfig().on(cpu, torch.float32) == SpeedConfig().on(cpu, half) == off
    monkeypatch.setattr("pipelines.config.triton_installed", lambda: True)
    assert SpeedConfig().on(gpu, half) == on
    assert SpeedConfig(cuda_graphs=False).on(gpu, half) == replace(on, cuda_graphs=False, kernels=False)
    assert SpeedConfig().on(gpu, torch.float32) == replace(on, kernels=False)
    assert off.on(gpu, half) == off
    monkeypatch.setattr("pipelines.config.triton_installed", lambda: False)
    assert SpeedConfig().on(gpu, half) == replace(on, compile=False, kernels=False)


def test_a_pipeline_computes_the_same_video_with_compiled_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arl2.inference.model.compiled", compiled_by("eager"))
    pipeline = random_pipeline("toy", HybridSettings((0,), 4), denoising_steps=[1000, 500])
    window = MemoryConfig(MemoryKind.window, 6, 3)

    def video() -> Tensor:
        return pipeline("a red shape", 33, 32, 32, seeds=[1], memory=window, output_type="latent").frames

    expected = video()
    pipeline.optimize_for_inference(SpeedConfig(compile=True))
    assert pipeline.flow_model is not pipeline.transformer
    begin = time.perf_counter()
    assert pipeline.warm_up(32, 32, window) == pipeline.warm_up_seconds
    assert 0 < pipeline.warm_up_seconds < time.perf_counter() - begin
    with torch.compiler.set_stance("fail_on_recompile"):
        found = video()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert pipeline._pool is not None and pipeline._pool._last() is None


def test_a_pipeline_can_be_plain_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arl2.inference.model.compiled", lambda function: function)
    pipeline = random_pipeline("toy", HybridSettings((0,), 4), denoising_steps=[1000, 500])
    model = pipeline.transformer
    with torch.no_grad():
        for adapter in model.adapters():
            adapter.lora_B.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers, config = model.adapters(), model.config.ffn_lora

    def video() -> Tensor:
        return pipeline("a red shape", 9, 32, 32, seeds=[1], output_type="latent").frames

    expected = video()
    for _ in range(2):
        pipeline.optimize_for_inference(SpeedConfig(compile=True))
        assert not model.adapters() and model.config.ffn_lora == "none"
        torch.testing.assert_close(video(), expected, rtol=1e-4, atol=1e-4)
        pipeline.optimize_for_inference(SpeedConfig(compile=False))
        assert pipeline.flow_model is model and pipeline._pool is None
        assert model.adapters() == layers and model.config.ffn_lora == config
        after = model.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters()), "no larger tensor is held"
    torch.testing.assert_close(video(), expected, rtol=1e-6, atol=1e-6)
