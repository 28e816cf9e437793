"""Gradients of both stages where they are trained: a GPU in bfloat16 against a CPU in float32.

On shapes of the toy world, since kernels are chosen by shape.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from arl2.distillation.batch import BatchNoise, VideoBatch
from arl2.distillation.objective import ForwardMode, Objective
from arl2.distillation.stage1 import Stage1, Stage1Settings
from arl2.distillation.stage2 import Stage2, Stage2Settings
from arl2.model import HybridWanModel
from arl2.ops.compiling import compile_blocks
from arl2.toyworld.world.scenes import FRAMES_PER_BLOCK
from wan.config import wan_size
from wan.ops.attention import AttentionBackend

BLOCKS, CHANNELS, HEIGHT, WIDTH = 7, 16, 8, 12
HYBRID_LAYERS = [0, 1, 3]
CPU = torch.device("cpu")


def objective_of(stage: int, mode: ForwardMode, dtype: torch.dtype, device: torch.device) -> Objective:
    """An objective on a model of four layers of the toy world, none of whose parameters is at a special value."""
    torch.manual_seed(0)
    model = HybridWanModel(**wan_size("toy") | {"num_layers": 4}, hybrid_layers=HYBRID_LAYERS, lora_rank=4)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    if stage == 1:
        objective: Objective = Stage1(model, Stage1Settings(FRAMES_PER_BLOCK, forward_mode=mode))
    else:
        objective = Stage2(model, Stage2Settings(FRAMES_PER_BLOCK, forward_mode=mode))
    names = objective.parameters_to_train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        parameter.data = parameter.data.to(device, torch.float32 if name in names else dtype)
    return objective


def loss_and_gradients(objective: Objective, dtype: torch.dtype, videos: int = 2) -> tuple[float, dict[str, Tensor]]:
    """Of one batch, the same for all; under autocast where weights are rounded, as in the trainer."""
    device = objective.model.patch_embedding.weight.device
    generator = torch.Generator().manual_seed(1)
    size = wan_size("toy")
    latents = torch.randn(videos, BLOCKS * FRAMES_PER_BLOCK, CHANNELS, HEIGHT, WIDTH, generator=generator)
    batch = VideoBatch(latents, torch.randn(videos, 9, size["text_dim"], generator=generator))
    noise = BatchNoise(
        torch.rand(videos, BLOCKS, 1, generator=generator),
        torch.randn(videos, BLOCKS, 1, FRAMES_PER_BLOCK, CHANNELS, HEIGHT, WIDTH, generator=generator),
    )
    batch, noise = batch.to(device), noise.to(device)
    parts, total = objective.losses(replace(batch, text_BTD=batch.text_BTD.to(dtype)), noise), 0.0
    while True:
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            part = next(parts, None)
        if part is None:
            break
        part.backward()
        total += part.item()
    gradients = {name: p.grad for name, p in objective.model.named_parameters() if p.grad is not None}
    return total, {name: gradient.cpu() for name, gradient in gradients.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [AttentionBackend.AUTO, AttentionBackend.FLASH])
@pytest.mark.parametrize(
    ("stage", "mode"), [(1, ForwardMode.PARALLEL), (2, ForwardMode.SEQUENTIAL), (2, ForwardMode.PARALLEL)]
)
def test_a_gpu_has_the_gradients_of_a_cpu(stage: int, mode: ForwardMode, backend: AttentionBackend) -> None:
    exact_loss, exact = loss_and_gradients(objective_of(stage, mode, torch.float32, CPU), torch.float32)
    objective = objective_of(stage, mode, torch.bfloat16, torch.device("cuda"))
    objective.model.use_attention_backend(backend)
    loss, rounded = loss_and_gradients(objective, torch.bfloat16)
    assert loss == pytest.approx(exact_loss, rel=0.02)
    assert rounded.keys() == exact.keys()
    length = torch.stack([gradient.norm() for gradient in exact.values()]).norm()
    for name, gradient in exact.items():
        # bfloat16 moves the whole gradient by about 5 % on a CPU; small parts of it may move more of themselves.
        assert (rounded[name] - gradient).norm() < 0.1 * gradient.norm() + 0.01 * length, name


@pytest.mark.gpu
@pytest.mark.xfail(strict=False, reason="torch 2.11 with Triton 3.6 on an H100: docs/results/distillation.md")
def test_compiled_blocks_have_the_gradients_of_plain_ones() -> None:
    """On as many tokens as training has: the compiler sums many rows in other ways than few."""
    gpu, videos = torch.device("cuda"), 32
    exact = loss_and_gradients(objective_of(2, ForwardMode.PARALLEL, torch.float32, gpu), torch.float32, videos)[1]
    objective = objective_of(2, ForwardMode.PARALLEL, torch.bfloat16, gpu)
    compile_blocks(objective.model)
    rounded = loss_and_gradients(objective, torch.bfloat16, videos)[1]
    error, length = (
        torch.stack([x.norm() for x in values]).norm()
        for values in ([rounded[name] - exact[name] for name in exact], exact.values())
    )
    assert error < 0.1 * length
