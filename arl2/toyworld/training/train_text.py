"""Training of the toy world's text encoder: each word's embedding learns to represent the facts of the whole caption.

Random weights are not enough, because their attention hardly depends on word order. "A red ring above and a blue cross
below" and the same with exchanged colours have nearly equal embeddings. A transformer that reads them binds wrongly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arl2.toyworld.training.progress import is_reported, step_seed
from arl2.toyworld.world.captions import caption_scenes, names_answer
from arl2.toyworld.world.scenes import COLOURS, KINDS, SHAPES, WALLS, Scenes, sample_scenes
from wan.text import TextEncoder

FACTS = {
    "upper colour": len(COLOURS) + 1,
    "lower colour": len(COLOURS) + 1,
    "upper shape": len(SHAPES) + 1,
    "lower shape": len(SHAPES) + 1,
    "wall": len(WALLS) + 1,
    "kind": len(KINDS),
}
"""Facts of a caption and their numbers of classes; the last class of colours, shapes and walls is "not named"."""
FIRST_VALIDATION_SEED = -6_000_000


@dataclass(frozen=True)
class TextTraining:
    """Settings of text encoder training.

    Attributes:
        steps, batch: training steps, and captions per step.
        captions: number of scenes to draw from; captions of half of them name colours and shapes.
        lr: initial learning rate of Adam; decays linearly to zero.
        seed: seed of weights and batches.
    """

    steps: int = 600
    batch: int = 256
    captions: int = 16384
    lr: float = 3e-3
    seed: int = 0


@dataclass(frozen=True)
class Captions:
    """Token ids and masks of captions, [N, T] each, and their facts, [N, facts]."""

    ids_NT: Tensor
    mask_NT: Tensor
    facts_NK: Tensor

    def __getitem__(self, rows: Tensor) -> "Captions":
        return Captions(self.ids_NT[rows], self.mask_NT[rows], self.facts_NK[rows])


def facts_of(scenes: Scenes, captions: list[str]) -> Tensor:
    """Facts that captions state about their scenes, [B, len(FACTS)]: class indices."""
    named = torch.tensor([names_answer(caption) for caption in captions])[:, None] & scenes.exists
    colour = torch.where(named, scenes.colour, len(COLOURS))
    shape = torch.where(named, scenes.shape, len(SHAPES))
    walls = [
        next((row for row, name in enumerate(WALLS) if f"the {name} wall" in text), len(WALLS)) for text in captions
    ]
    return torch.cat([colour, shape, torch.tensor(walls)[:, None], scenes.kind[:, None]], dim=1)


def make_captions(encoder: TextEncoder, number: int, first_seed: int) -> Captions:
    """Make captions of scenes with seeds from `first_seed` on; half of them name nothing."""
    scenes = sample_scenes(torch.arange(first_seed, first_seed + number))
    captions = caption_scenes(scenes)
    tokens, device = encoder.tokens(captions), encoder.model.device
    facts = facts_of(scenes, captions)
    return Captions(*(x.to(device) for x in (tokens["input_ids"], tokens["attention_mask"], facts)))


class FactReader(nn.Module):
    """Linear classifier of every fact from one word's embedding; used only in training."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = nn.Linear(dim, sum(FACTS.values()))

    def forward(self, hidden_MD: Tensor) -> tuple[Tensor, ...]:
        """Compute the logits of each fact."""
        return self.heads(hidden_MD).split(list(FACTS.values()), dim=-1)


def read_words(encoder: TextEncoder, reader: FactReader, captions: Captions) -> tuple[tuple[Tensor, ...], Tensor]:
    """Logits of each fact for each word of all captions, and the true facts, [words, facts]."""
    words = captions.mask_NT.bool()
    hidden = encoder.model(input_ids=captions.ids_NT, attention_mask=captions.mask_NT).last_hidden_state
    return reader(hidden[words]), captions.facts_NK.repeat_interleave(words.sum(1), 0)


def train_text(encoder: TextEncoder, settings: TextTraining, report: Callable[[int, float], None]) -> FactReader:
    """Train an encoder in place so that each word's embedding represents every fact; a minute or two on a CPU.

    Args:
        encoder: encoder with any weights.
        report: called with step and loss, every hundredth step.

    Returns:
        the classifier trained with it, for `text_quality`.
    """
    torch.manual_seed(settings.seed)
    device = encoder.model.device
    reader = FactReader(encoder.model.config.d_model).to(device)
    captions = make_captions(encoder, settings.captions, 0)
    parameters = [*encoder.model.requires_grad_(True).parameters(), *reader.parameters()]
    optimizer = torch.optim.Adam(parameters, settings.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, settings.steps)
    for step in range(settings.steps):
        generator = torch.Generator().manual_seed(step_seed(settings.seed, step))
        batch = captions[torch.randint(settings.captions, (settings.batch,), generator=generator).to(device)]
        scores, facts = read_words(encoder, reader, batch)
        loss = torch.stack([F.cross_entropy(score, fact) for score, fact in zip(scores, facts.T, strict=True)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if is_reported(step, settings.steps):
            report(step + 1, loss.item())
    encoder.model.requires_grad_(False).eval()
    return reader


@torch.no_grad()
def text_quality(encoder: TextEncoder, reader: FactReader, captions: int = 2048) -> dict[str, float]:
    """Accuracy of each fact over the words of new captions, and the smallest of these as `least`."""
    scores, facts = read_words(encoder, reader, make_captions(encoder, captions, FIRST_VALIDATION_SEED))
    right = {
        name: float((score.argmax(-1) == fact).float().mean())
        for name, score, fact in zip(FACTS, scores, facts.T, strict=True)
    }
    return right | {"least": min(right.values())}
