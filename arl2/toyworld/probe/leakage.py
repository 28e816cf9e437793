"""Leakage probe: accuracy of a classifier that reads a hidden object from latents.

The VAE is causal, and its features carry the past for a while. The memory of a model that sees only some earlier blocks
can be measured only where the classifier is at chance on these blocks.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arl2.toyworld.world.render import STRIDE, visible_fraction
from arl2.toyworld.world.scenes import COLOURS, FRAMES_PER_BLOCK, SHAPES, Scenes


def hidden_blocks(scenes: Scenes) -> Tensor:
    """Mask of the latent blocks that show no pixel of the first object, [B, N], bool."""
    visible = visible_fraction(scenes)[:, 0] > 0
    latents = torch.cat([visible[:, :1], visible[:, 1:].unflatten(1, (-1, STRIDE)).any(-1)], dim=1)
    return ~latents.unflatten(1, (-1, FRAMES_PER_BLOCK)).any(-1)


def leakage_by_block(
    latents_BFCHW: Tensor, scenes: Scenes, steps: int = 400, seed: int = 0
) -> list[dict[str, float | int]]:
    """Accuracy of a small classifier for the first object's colour and shape on each of its hidden blocks.

    Args:
        latents_BFCHW: latents of whole videos of the scenes.
        scenes: the first half trains the classifier, the second half tests it.
        steps: training steps.

    Returns:
        for each block that is hidden in some videos: index, number of test videos, and accuracies.
    """
    hidden = hidden_blocks(scenes)
    blocks = latents_BFCHW.unflatten(1, (-1, FRAMES_PER_BLOCK)).flatten(2).float()
    half = len(scenes) // 2
    results: list[dict[str, float | int]] = []
    for index in range(hidden.shape[1]):
        rows = hidden[:, index]
        train, test = rows.clone(), rows.clone()
        train[half:], test[:half] = False, False
        if train.sum() < len(COLOURS) * 4 or not test.any():
            continue
        row: dict[str, float | int] = {"block": index, "videos": int(test.sum())}
        for name, labels, classes in (
            ("colour", scenes.colour[:, 0], len(COLOURS)),
            ("shape", scenes.shape[:, 0], len(SHAPES)),
        ):
            x, y = blocks[:, index], labels
            row[name] = _classify(x[train], y[train], x[test], y[test], classes, steps, seed)
        results.append(row)
    return results


def _classify(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, classes: int, steps: int, seed: int) -> float:
    """Train a small network; returns its accuracy on the test rows."""
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.enable_grad():
        torch.manual_seed(seed)
        mean, std = x.mean(0), x.std(0) + 1e-6
        network = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(x.shape[1], 128), nn.GELU(), nn.Dropout(0.2), nn.Linear(128, classes)
        ).to(x.device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)
        for _ in range(steps):
            picked = torch.randint(len(x), (min(256, len(x)),), device=x.device)
            loss = F.cross_entropy(network((x[picked] - mean) / std), y[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            return (network((x_test - mean) / std).argmax(1) == y_test).float().mean().item()
