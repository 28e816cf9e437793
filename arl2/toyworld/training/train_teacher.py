"""Training of the toy world's transformer: a multi-step teacher, then the few-step generator.

The teacher is trained by teacher-forced flow matching over all blocks at once, each block at its own noise level. The
generator is trained by regression on the teacher's trajectories, starting from the teacher's weights (as CausVid and
Causal Forcing initialise theirs).
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from arl2.model import HybridWanModel
from arl2.ops.compiling import compile_blocks
from arl2.rollout import FewStepSampler
from arl2.toyworld.training.muon import MuonWithAdam
from arl2.toyworld.training.progress import Progress, is_reported, step_seed
from arl2.toyworld.world.latents import LatentVideos
from arl2.toyworld.world.scenes import FRAMES_PER_BLOCK
from wan.config import wan_size
from wan.flow import NUM_TRAIN_TIMESTEPS, add_noise, flow_to_x0, shift_sigma
from wan.teacher_forcing import teacher_forced_flow

Report = Callable[[int, float], None]
OUTER_LAYERS = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "head")
"""Name prefixes of the input and output layers, which Adam trains."""


@dataclass(frozen=True)
class TransformerTraining:
    """Settings of transformer training.

    Attributes:
        steps, batch: training steps, and videos per step.
        openings: additional videos per step of which only the first block is trained on. The prompt matters only there;
            later blocks follow from earlier ones.
        muon_lr, adam_lr: peak learning rates; both decay to zero along a cosine after a warm-up.
        shift: timestep shift of the teacher's noise levels.
        guidance: guidance of the teacher in openings, for the few-step generator.
        seed: seed of weights, batches and noise.
    """

    steps: int = 4500
    batch: int = 64
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    shift: float = 3.0
    seed: int = 0
    openings: int = 0
    guidance: float = 1.0


FIRST = TransformerTraining()
PROMPTED = TransformerTraining(steps=2000, batch=32, muon_lr=0.015, adam_lr=2e-3, seed=2, openings=448)
FEW_STEP = TransformerTraining(steps=500, batch=48, muon_lr=0.005, adam_lr=5e-4, seed=1, openings=256, guidance=2.0)


def per_frame(values_BN: Tensor) -> Tensor:
    """Repeat a value per block to a value per latent frame."""
    return values_BN.repeat_interleave(FRAMES_PER_BLOCK, dim=1)


def flow_after_clean(model: HybridWanModel, x_t: Tensor, sigma_BF: Tensor, text: Tensor, clean: Tensor) -> Tensor:
    """Flow of every block after the clean blocks before it, in float32; a single block has no context."""
    remembered = clean if clean.shape[1] > FRAMES_PER_BLOCK else None
    times = sigma_BF * NUM_TRAIN_TIMESTEPS
    return teacher_forced_flow(model, x_t, times, text, FRAMES_PER_BLOCK, remembered).float()


def teacher_loss(model: HybridWanModel, clean: Tensor, text: Tensor, noise: Tensor, sigma_BN: Tensor) -> Tensor:
    """Mean squared error of the flow, with block n of every video at noise level `sigma_BN[:, n]`."""
    sigma = per_frame(sigma_BN)
    flow = flow_after_clean(model, add_noise(clean, noise, sigma), sigma, text, clean)
    return (flow - (noise - clean)).square().mean()


def train(
    model: HybridWanModel,
    settings: TransformerTraining,
    data: LatentVideos,
    loss_of: Callable[[LatentVideos, torch.Generator], Tensor],
    report: Report,
    progress: Progress = Progress(),
) -> HybridWanModel:
    """Train for `settings.steps` steps; on a GPU in bfloat16 with compiled blocks.

    Args:
        loss_of: function from a batch and a CPU generator for noise to the loss.
        report: called with step and loss, every hundredth step.
        progress: storage from which a killed run resumes.
    """
    device = data.latents_NFCHW.device
    if device.type == "cuda":
        compile_blocks(model)
    optimizer = MuonWithAdam(model.train(), settings.steps, settings.muon_lr, settings.adam_lr, OUTER_LAYERS)
    for step in range(progress.resume(model, optimizer), settings.steps):
        torch.manual_seed(step_seed(settings.seed, step))
        generator = torch.Generator().manual_seed(step_seed(settings.seed, step))
        loss = torch.zeros((), device=device)
        for batch, weight in batches(settings, data, generator):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                part = weight * loss_of(batch, generator)
            part.backward()
            loss += part.detach()
        optimizer.step(step)
        if is_reported(step, settings.steps):
            report(step + 1, loss.item())
        progress.save(step + 1, settings.steps, model, optimizer)
    return model.eval()


def batches(
    settings: TransformerTraining, data: LatentVideos, generator: torch.Generator
) -> Iterator[tuple[LatentVideos, float]]:
    """Iterate over a step's whole videos and its openings, each weighted by its number of blocks."""
    videos = data.batch(generator, settings.batch)
    whole, openings = settings.batch * _blocks(videos)[1], settings.openings
    yield videos, whole / (whole + openings)
    if openings:
        yield data.batch(generator, openings, FRAMES_PER_BLOCK), openings / (whole + openings)


def _blocks(batch: LatentVideos) -> tuple[int, int]:
    """Number of videos and of blocks of a batch."""
    return len(batch), batch.latents_NFCHW.shape[1] // FRAMES_PER_BLOCK


def new_transformer(seed: int) -> HybridWanModel:
    """New softmax transformer with random weights."""
    torch.manual_seed(seed)
    model = HybridWanModel(**wan_size("toy"))
    model.init_weights()
    return model


def train_teacher(
    model: HybridWanModel,
    settings: TransformerTraining,
    data: LatentVideos,
    report: Report,
    progress: Progress = Progress(),
) -> HybridWanModel:
    """Train a softmax transformer on full memory, in place."""
    device = data.latents_NFCHW.device
    model.to(device)

    def loss_of(batch: LatentVideos, generator: torch.Generator) -> Tensor:
        sigma = shift_sigma(torch.rand(_blocks(batch), generator=generator), settings.shift).to(device)
        clean = batch.latents_NFCHW
        return teacher_loss(model, clean, batch.text_NTD, torch.randn_like(clean), sigma)

    return train(model, settings, data, loss_of, report, progress)


@torch.no_grad()
def validation_loss(
    model: HybridWanModel, data: LatentVideos, shift: float, batches: int = 8, batch: int = 64
) -> float:
    """Teacher-forced loss on a few batches, with the same noise and levels for every model."""
    device, losses = data.latents_NFCHW.device, []
    generator = torch.Generator().manual_seed(0)
    for _ in range(batches):
        videos = data.batch(generator, min(batch, len(data)))
        sigma = shift_sigma(torch.rand(_blocks(videos), generator=generator), shift).to(device)
        noise = torch.randn(videos.latents_NFCHW.shape, generator=generator).to(device)
        losses.append(teacher_loss(model, videos.latents_NFCHW, videos.text_NTD, noise, sigma).item())
    return sum(losses) / len(losses)


@torch.no_grad()
def trajectories(
    teacher: HybridWanModel, batch: LatentVideos, noise: Tensor, sigmas: list[float], guidance: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Integrate the teacher's flow from noise to data in all blocks at once, each after clean blocks.

    Args:
        sigmas: decreasing noise levels from 1; the last step goes to 0.
        guidance: scale of classifier-free guidance (Ho and Salimans, 2022), against the caption that names nothing;
            1 for none.

    Returns:
        the latents at each level, [S, B, F, C, h, w], and the final latents.
    """
    visited, x_t, clean = [], noise, batch.latents_NFCHW
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        visited.append(x_t)
        levels = torch.full(clean.shape[:2], sigma, device=clean.device)
        flow = flow_after_clean(teacher, x_t, levels, batch.text_NTD, clean)
        if guidance != 1:
            untold = flow_after_clean(teacher, x_t, levels, batch.untold_NTD, clean)
            flow = untold + guidance * (flow - untold)
        x_t = x_t + (following - sigma) * flow
    return torch.stack(visited), x_t


def taught(error_BFCHW: Tensor, settings: TransformerTraining) -> Tensor:
    """Part of the error that trains the few-step generator; first blocks are left to openings if there are any."""
    whole = error_BFCHW.shape[1] > FRAMES_PER_BLOCK
    return error_BFCHW[:, FRAMES_PER_BLOCK:] if whole and settings.openings else error_BFCHW


def distil_few_step(
    settings: TransformerTraining,
    teacher: HybridWanModel,
    data: LatentVideos,
    sampler: FewStepSampler,
    report: Report,
    progress: Progress = Progress(),
    solver_steps: int = 8,
) -> HybridWanModel:
    """Train a generator to predict the end of the teacher's flow from each of the sampler's noise levels.

    Openings, if any, train first blocks, with guidance; whole videos train the other blocks.

    Args:
        settings: see `TransformerTraining`; its shift is not used.
        teacher: the multi-step model; its weights are not changed.
        sampler: denoising steps of the generator.
        report, progress: as in `train`.
        solver_steps: Euler steps of the teacher, a multiple of the sampler's steps, whose levels it visits.
    """
    device = data.latents_NFCHW.device
    student = copy.deepcopy(teacher).requires_grad_(True)
    teacher.requires_grad_(False)
    if data.latents_NFCHW.device.type == "cuda":
        compile_blocks(teacher)
    sigmas, places = solver_levels(sampler, solver_steps)
    levels = torch.tensor(sampler.sigmas, device=device)

    def loss_of(batch: LatentVideos, generator: torch.Generator) -> Tensor:
        clean = batch.latents_NFCHW
        guidance = settings.guidance if clean.shape[1] == FRAMES_PER_BLOCK else 1.0
        visited, target = trajectories(teacher, batch, torch.randn_like(clean), sigmas, guidance)
        step = torch.randint(len(places), _blocks(batch), generator=generator).to(device)
        frames = per_frame(step)
        picked = torch.stack([visited[place] for place in places])
        x_t = picked.gather(0, frames[None, :, :, None, None, None].expand_as(picked[:1]))[0]
        sigma = levels[frames]
        flow = flow_after_clean(student, x_t, sigma, batch.text_NTD, clean)
        return taught(flow_to_x0(flow, x_t, sigma) - target, settings).square().mean()

    return train(student, settings, data, loss_of, report, progress)


def solver_levels(sampler: FewStepSampler, solver_steps: int) -> tuple[list[float], list[int]]:
    """Noise levels of a finer solver that visits those of the sampler, and the indices of the latter."""
    parts = solver_steps // len(sampler.sigmas)
    ends = [*sampler.sigmas, 0.0]
    sigmas = [start + (stop - start) * part / parts for start, stop in pairwise(ends) for part in range(parts)]
    return sigmas, list(range(0, len(sigmas), parts))
