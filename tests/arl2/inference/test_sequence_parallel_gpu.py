"""One video over two GPUs: exchanges by stores into the other's memory, recorded passes, kernels and FP8."""

import multiprocessing
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from gpu_models import SIZES, gpu_blocks, gpu_model, gpu_text
from torch import Tensor, distributed

from arl2.inference.cuda_graphs import GraphedModel
from arl2.inference.memory_pool import MemoryPool
from arl2.inference.model import InferenceModel
from arl2.inference.parallel.factory import Exchange, new_sequence_parallel, new_sharded_weights
from arl2.inference.parallel.sequence_parallel import SequenceParallel
from arl2.ops.gated_delta import WriteBackend
from wan.memory import MemorySpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

RANKS = 2
ROUNDS = 100
LAYERS = {"hybrid": (0, 2), "softmax": ()}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def join(rank: int, folder: Path) -> torch.device:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = distributed.FileStore(str(folder / "store"), RANKS)
    distributed.init_process_group(
        "nccl", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60), device_id=device
    )
    return device


def in_two_processes(work: object, *arguments: object) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(RANKS)]  # type: ignore[arg-type]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


def compare_exchanges(rank: int, folder: Path) -> None:
    """Stores into peers deliver what collectives deliver, again and again, whatever is in the buffers."""
    device = join(rank, folder)
    for heads, frames, rows, batch in ((4, 3, 5, 1), (6, 1, 7, 2), (2, 4, 3, 3)):
        plain, peer = SequenceParallel(heads), new_sequence_parallel(heads, device, Exchange.PEER)
        generator = torch.Generator(device).manual_seed(rank)

        def draw(width: int, dtype: torch.dtype, shape: tuple[int, ...] = (batch, frames * rows, heads)) -> Tensor:
            return torch.randn(*shape, width, device=device, generator=generator).to(dtype)  # noqa: B023

        for _ in range(ROUNDS):
            peer.begin_pass(draw(heads * 20, torch.bfloat16, (batch, frames * rows)), 20)
            slices = draw(40, torch.bfloat16)[..., 13:33]  # rows that are no multiple of anything
            parts = [draw(20, torch.bfloat16), draw(20, torch.bfloat16), slices, draw(1, torch.float32)]
            exchanged = plain.to_heads(parts, frames), peer.to_heads(parts, frames)
            for expected, found in zip(*exchanged, strict=True):
                assert torch.equal(expected, found)
            mixed = draw(20, torch.bfloat16, (batch, 2 * frames * rows, heads // 2))
            assert torch.equal(plain.to_tokens(mixed, frames), peer.to_tokens(mixed, frames))
            rest = draw(9, torch.bfloat16, (batch, frames * rows))
            assert torch.equal(plain.gather(rest, frames), peer.gather(rest, frames))
    distributed.destroy_process_group()


def test_stores_into_peers_deliver_what_collectives_do(tmp_path: Path) -> None:
    in_two_processes(compare_exchanges, tmp_path)


def roll(rank: int, folder: Path, kind: str, dtype_name: str, window: int | None, fast: bool, fp8: bool) -> None:
    """Blocks of both forms, compared with the plain model's on one GPU, in float32."""
    device, dtype = join(rank, folder), DTYPES[dtype_name]
    exact, model = (
        gpu_model(torch.float32, WriteBackend.RECURRENT, LAYERS[kind]),
        gpu_model(dtype, WriteBackend.AUTO, LAYERS[kind]),
    )
    spec = MemorySpec(1, 24, device, torch.float32, 18, window, 3 if window else 0)
    expected = torch.stack(gpu_blocks(exact, exact.new_memory(spec), gpu_text(exact), 6))
    whole = InferenceModel(model, compile=fast, fp8=fp8, kernels=fast)
    usual = torch.stack(gpu_blocks(whole, model.new_memory(like(spec, dtype, 1)), gpu_text(model), 6)) - expected
    whole.release()
    model.head_shards = RANKS
    parallel = InferenceModel(model, fast, fp8, fast, new_sequence_parallel(SIZES["num_heads"], device, Exchange.PEER))
    graphed, pool = GraphedModel(parallel, device), MemoryPool(model)
    for video in range(3):
        found = torch.stack(gpu_blocks(graphed, pool.new_memory(like(spec, dtype, RANKS)), gpu_text(model), 6))
        if dtype is torch.float32:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        else:
            assert (found - expected).norm() < 1.2 * usual.norm(), (video, (found - expected).norm(), usual.norm())
        parts = [torch.empty_like(found) for _ in range(RANKS)]
        distributed.all_gather(parts, found.contiguous())
        assert torch.equal(*parts)
    assert graphed.num_graphs > 0
    distributed.destroy_process_group()


def like(spec: MemorySpec, dtype: torch.dtype, shards: int) -> MemorySpec:
    return MemorySpec(
        spec.batch_size,
        spec.tokens_per_frame,
        spec.device,
        dtype,
        spec.frames,
        spec.window_frames,
        spec.sink_frames,
        head_shards=shards,
    )


@pytest.mark.parametrize(
    ("kind", "dtype", "window", "fast", "fp8"),
    [
        ("hybrid", "float32", 9, False, False),
        ("softmax", "float32", None, False, False),
        ("hybrid", "bfloat16", 9, True, False),
        ("softmax", "bfloat16", 9, True, False),
        ("hybrid", "bfloat16", None, True, True),
    ],
)
def test_recorded_passes_over_two_gpus(
    kind: str, dtype: str, window: int | None, fast: bool, fp8: bool, tmp_path: Path
) -> None:
    in_two_processes(roll, tmp_path, kind, dtype, window, fast, fp8)


def shard(rank: int, folder: Path, fp8: bool, kernels: bool) -> None:
    """Blocks with sharded weights, and the model after it has them back, compared with whole ones."""
    device = join(rank, folder)
    model = gpu_model(torch.bfloat16, WriteBackend.AUTO, LAYERS["hybrid"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    parallel = new_sequence_parallel(SIZES["num_heads"], device, Exchange.PEER)
    model.head_shards, spec = RANKS, MemorySpec(1, 24, device, torch.bfloat16, 18, 9, 3, head_shards=RANKS)
    videos = []
    for sharded in (None, new_sharded_weights(parallel, device), None):
        form = InferenceModel(model, kernels, fp8, kernels, parallel, sharded)
        on_meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        assert bool(on_meta) == (sharded is not None and not fp8)
        graphed, pool = GraphedModel(form, device), MemoryPool(model)
        videos += [torch.stack(gpu_blocks(graphed, pool.new_memory(spec), gpu_text(model), 6)) for _ in range(2)]
        assert graphed.num_graphs > 0
        del graphed
        form.release()
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(video, videos[0]) for video in videos)
    distributed.destroy_process_group()


@pytest.mark.parametrize(("fp8", "kernels"), [(False, False), (False, True), (True, True)])
def test_sharded_weights_change_nothing(fp8: bool, kernels: bool, tmp_path: Path) -> None:
    in_two_processes(shard, tmp_path, fp8, kernels)
