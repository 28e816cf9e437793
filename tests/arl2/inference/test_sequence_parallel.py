"""One video over several processes equals one process: softmax and hybrid, full and windowed memory, any batch."""

import multiprocessing
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
from tiny_models import TINY
from torch import Tensor, distributed

from arl2.inference.model import InferenceModel
from arl2.inference.parallel.sequence_parallel import SequenceParallel, check_divides
from arl2.model import FFNLoRA, HybridSettings, HybridWanModel
from arl2.rollout import predict_flow, remember_block
from arl2.state_settings import Rotation, StateSettings
from wan.model import FlowModel
from wan.utils.errors import InputError

HEADS, HEIGHT, WIDTH, BLOCKS, FRAMES = 12, 4, 12, 4, 3
SIZES = TINY | {"dim": 12 * HEADS, "num_heads": HEADS}
LAYERS = {
    "softmax": HybridSettings(),
    "hybrid": HybridSettings((0, 2), 3, 6.0, FFNLoRA.HYBRID),
    "without adapters": HybridSettings((0, 1, 2)),
    "another rotation": HybridSettings((0, 2), 3, 6.0, state=StateSettings(Rotation.WRAPPED, 4)),
}
WINDOWS = ((None, 0), (6, 0), (7, 1))
BATCHES = (1, 2)
CASES = list(product(LAYERS, WINDOWS, BATCHES))


def new_model(hybrid: HybridSettings) -> HybridWanModel:
    """A model whose every parameter matters, the same in all processes."""
    torch.manual_seed(0)
    model = HybridWanModel(
        **SIZES,
        hybrid_layers=list(hybrid.layers),
        lora_rank=hybrid.lora_rank,
        lora_alpha=hybrid.lora_alpha,
        ffn_lora=hybrid.ffn_lora.value,
        state=hybrid.state.as_plain(),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def rolled(
    model: HybridWanModel, fast: FlowModel, window: tuple[int | None, int], batch: int
) -> tuple[list[Tensor], int]:
    """Flows of all blocks, each remembered after it, and the bytes that were remembered."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(BLOCKS, batch, FRAMES, SIZES["in_dim"], HEIGHT, WIDTH, generator=generator)
    text = model.embed_text(torch.randn(batch, 4, SIZES["text_dim"], generator=generator))
    memory = model.memory_for(latents[0].expand(batch, -1, -1, -1, -1), *window)
    flows = []
    for number, block in enumerate(latents):
        flows.append(predict_flow(fast, block, torch.full((), 700.0), text, memory, number * FRAMES).clone())
        remember_block(fast, block - flows[-1], text, memory, number * FRAMES)
    return flows, memory.num_bytes


def results(parallel: SequenceParallel | None) -> dict[str, tuple[list[Tensor], int]]:
    """Flows and bytes of all cases."""
    found = {}
    for kind, window, batch in CASES:
        model = new_model(LAYERS[kind])
        model.head_shards = 1 if parallel is None else parallel.size
        found[str((kind, window, batch))] = rolled(model, InferenceModel(model, parallel=parallel), window, batch)
    return found


def compute(rank: int, size: int, folder: Path) -> None:
    """What a process of several does."""
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    torch.save(results(SequenceParallel(HEADS)), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one() -> dict[str, tuple[list[Tensor], int]]:
    return results(None)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_several_processes_compute_what_one_does(
    size: int, one: dict[str, tuple[list[Tensor], int]], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.training.run"])
    processes = [context.Process(target=compute, args=(rank, size, tmp_path)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    for rank in range(size):
        many = torch.load(tmp_path / f"{rank}.pt")
        for case, (flows, num_bytes) in one.items():
            for flow, other in zip(flows, many[case][0], strict=True):
                torch.testing.assert_close(other, flow, rtol=1e-5, atol=1e-5, msg=case)
            assert many[case][1] * size == num_bytes


def test_the_fast_form_that_is_compared_with_equals_the_plain_model(one: dict[str, tuple[list[Tensor], int]]) -> None:
    for kind, window, batch in CASES:
        model = new_model(LAYERS[kind])
        flows, _ = rolled(model, model, window, batch)
        for flow, other in zip(flows, one[str((kind, window, batch))][0], strict=True):
            torch.testing.assert_close(other, flow, rtol=1e-4, atol=1e-4)


def test_heads_and_tokens_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="12 heads do not divide over 5 processes: start 1, 2, 3, 4, 6 or 12"):
        check_divides(HEADS, 10, 5)
    with pytest.raises(InputError, match="10 tokens per frame do not divide over 4"):
        check_divides(HEADS, 10, 4)
    check_divides(HEADS, 12, 6)
