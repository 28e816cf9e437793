"""The fast path on a GPU: recorded passes, compiled blocks, kernels and FP8 compute what the plain model computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from gpu_models import GPU, SAMPLER, SIZES, gpu_blocks, gpu_memory, gpu_model, gpu_text

from arl2.inference.cuda_graphs import GraphedModel
from arl2.inference.linear import require_fp8
from arl2.inference.memory_pool import MemoryPool
from arl2.inference.model import InferenceModel
from arl2.ops.gated_delta import WriteBackend
from arl2.rollout import SeededNoise, rollout
from wan.memory import Memory, MemorySpec
from wan.model import FlowModel


@contextmanager
def without_waiting() -> Iterator[None]:
    """Whatever makes the CPU wait for the GPU is an error inside."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("layers", "graphs"), [((0, 2), 4), ((0, 1, 2), 2)])
def test_recorded_passes_change_nothing(layers: tuple[int, ...], graphs: int) -> None:
    model = gpu_model(torch.float32, WriteBackend.RECURRENT, layers)
    fast, pool = GraphedModel(InferenceModel(model), GPU), MemoryPool(model)
    # The second video and the third replay what the first recorded, over other text and noise.
    for video in range(3):
        text = gpu_text(model, seed=video)
        expected = gpu_blocks(model, gpu_memory(model, torch.float32), text, 6, seed=video)
        found = gpu_blocks(fast, gpu_memory(pool, torch.float32), text, 6, seed=video)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
        if video == 0:
            assert fast.num_graphs == graphs


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "sink", "decay", "recomputed"), [(9, 3, 0.7, 0), (8, 2, 0.7, 0), (6, 0, None, 3)])
def test_recorded_passes_over_averages_and_memories_made_anew(
    window: int, sink: int, decay: float | None, recomputed: int
) -> None:
    model = gpu_model(torch.float32, WriteBackend.RECURRENT, layers=())
    fast, pool = GraphedModel(InferenceModel(model), GPU), MemoryPool(model)
    spec = MemorySpec(1, 24, GPU, torch.float32, 3, window, sink, sink_decay=decay)

    def blocks(runs: FlowModel, memory: Memory, seed: int) -> list[torch.Tensor]:
        noise, text = SeededNoise([seed], (3, 16, 8, 12), GPU), gpu_text(model, seed)
        made = rollout(runs, SAMPLER, noise, text, memory, 12, recomputed_frames=recomputed)
        return [block.latents_BFCHW for block in made]

    with torch.no_grad():
        for video in range(2):
            expected, found = blocks(model, model.new_memory(spec), video), blocks(fast, pool.new_memory(spec), video)
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert fast.num_graphs


@pytest.mark.gpu
@pytest.mark.parametrize(("most", "graphs"), [(64, 12), (4, 5)])
def test_passes_over_a_full_memory_are_recorded(most: int, graphs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arl2.inference.cuda_graphs.MAX_GRAPHS", most)
    model = gpu_model(torch.float32, WriteBackend.RECURRENT)
    fast, pool = GraphedModel(InferenceModel(model), GPU), MemoryPool(model)
    full = MemorySpec(1, 24, GPU, torch.float32, 18)
    for video in range(4):
        text = gpu_text(model, seed=video)
        expected = gpu_blocks(model, model.new_memory(full), text, 6, seed=video)
        found = gpu_blocks(fast, pool.new_memory(full), text, 6, seed=video)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert fast.num_graphs == graphs


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_the_whole_fast_path_in_half_precision(fp8: bool, kernels: bool) -> None:
    exact = gpu_model(torch.float32, WriteBackend.RECURRENT)
    model = gpu_model(torch.bfloat16, WriteBackend.AUTO)
    if fp8:
        require_fp8(GPU, SIZES["dim"], SIZES["ffn_dim"])
    text = gpu_text(model)
    plain = gpu_blocks(model, gpu_memory(model, torch.bfloat16), text, 6)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    recorded = InferenceModel(model, compile=True, fp8=fp8, kernels=kernels)
    fast, pool = GraphedModel(recorded, GPU, recorded.without_kernels()), MemoryPool(model)
    found = gpu_blocks(fast, gpu_memory(pool, torch.bfloat16), text, 6)
    expected = gpu_blocks(exact, gpu_memory(exact, torch.float32), gpu_text(exact), 6)
    on_host = sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_cuda)
    assert (on_host > 0.5 * sum(parameter.nbytes for parameter in model.parameters())) == fp8
    recorded.release()
    for name, parameter in model.named_parameters():
        assert parameter.is_cuda and torch.equal(parameter, before[name]), name
    error, usual = ((torch.stack(x) - torch.stack(expected)).norm() for x in (found, plain))
    assert fast.num_graphs == 4
    # No further from float32 than plain bfloat16 is, give or take; FP8 rounds 16 times as coarsely.
    assert error < (16 if fp8 else 1.5) * usual


@pytest.mark.gpu
@pytest.mark.parametrize(("compile_blocks", "kernels"), [(False, False), (True, False), (True, True)])
def test_within_a_block_nothing_waits_and_nothing_is_compiled(compile_blocks: bool, kernels: bool) -> None:
    model = gpu_model(torch.bfloat16, WriteBackend.AUTO)
    recorded, text = InferenceModel(model, compile=compile_blocks, kernels=kernels), gpu_text(model)
    fast = GraphedModel(recorded, GPU, recorded.without_kernels())
    memory = gpu_memory(model, torch.bfloat16)
    gpu_blocks(fast, memory, text, 4)
    torch.cuda.synchronize()
    with torch.compiler.set_stance("fail_on_recompile"), without_waiting():
        gpu_blocks(fast, memory, text, 5)
    assert fast.num_graphs == 4


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", [False, True])
def test_over_a_full_memory_too(kernels: bool) -> None:
    """Two blocks warm everything up; what is launched, recorded and replayed after them computes what is right."""
    exact, model = gpu_model(torch.float32, WriteBackend.RECURRENT), gpu_model(torch.bfloat16, WriteBackend.AUTO)
    recorded, text = InferenceModel(model, compile=True, kernels=kernels), gpu_text(model)
    fast, pool = GraphedModel(recorded, GPU, recorded.without_kernels()), MemoryPool(model)
    full = MemorySpec(1, 24, GPU, torch.bfloat16, 15)
    gpu_blocks(fast, pool.new_memory(full), text, 2)
    expected = gpu_blocks(exact, exact.new_memory(replace(full, dtype=torch.float32)), gpu_text(exact), 5)
    usual = (torch.stack(gpu_blocks(model, model.new_memory(full), text, 5)) - torch.stack(expected)).norm()
    torch.cuda.synchronize()
    with torch.compiler.set_stance("fail_on_recompile"), without_waiting():
        videos = [gpu_blocks(fast, pool.new_memory(full), text, 5) for _ in range(3)]
    assert fast.num_graphs == 10
    for found in videos:
        assert (torch.stack(found) - torch.stack(expected)).norm() < 1.5 * usual
