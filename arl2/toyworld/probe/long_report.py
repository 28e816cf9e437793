"""Figures of the long memory probe from its answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from arl2.toyworld.probe.memory_probe import accuracies
from arl2.toyworld.probe.passes import Answer

AGES = (0, 5, 10, 15, 21, 28)
"""First latent frames of the bins of ages; the window of the shipped models holds 21."""
Accuracies = dict[str, dict[str, float | int | list[float]]]


def report(videos: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """Accuracies of colour, shape and both, with intervals and chance.

    Args:
        videos: answers of each video.

    Returns:
        `after_last`: after the last re-emergence of each object. `passes`: after the first, the second, and so on.
        `ages`: by latent frames since the object was last in sight. `loads`: by number of objects to be remembered at
        that moment. `all`: of all answers.
    """
    last: dict[tuple[int, int], Answer] = {}
    for video, answers in enumerate(videos):
        for answer in answers:
            before = last.get((video, answer.thing))
            if before is None or before.number < answer.number:
                last[video, answer.thing] = answer
    everything = [answer for answers in videos for answer in answers]
    highest = max((answer.number for answer in everything), default=0)
    passes = _grouped(everything, lambda answer: answer.number, range(1, highest + 1))
    ages = _grouped(everything, _age_bin, range(len(AGES)))
    loads = _grouped(everything, lambda answer: answer.load, sorted({answer.load for answer in everything}))
    return {
        "after_last": accuracy_of(list(last.values())),
        "all": accuracy_of(everything),
        "passes": [passes[number] for number in range(1, highest + 1)],
        "ages": {age_name(index): figures for index, figures in ages.items()},
        "loads": {str(load): figures for load, figures in loads.items()},
    }


def age_name(index: int) -> str:
    """Name of a bin of ages, such as "5 to 9"."""
    if index + 1 == len(AGES):
        return f"{AGES[index]} or more"
    return f"{AGES[index]} to {AGES[index + 1] - 1}"


def accuracy_of(answers: Sequence[Answer]) -> Accuracies:
    """Accuracies among some answers."""
    colour = torch.tensor([answer.colour for answer in answers], dtype=torch.bool)
    shape = torch.tensor([answer.shape for answer in answers], dtype=torch.bool)
    return accuracies({"colour": colour, "shape": shape, "both": colour & shape}, torch.ones_like(colour))


def _age_bin(answer: Answer) -> int:
    return sum(answer.age >= first for first in AGES[1:])


def _grouped(
    answers: Sequence[Answer], key: Callable[[Answer], int], values: Sequence[int]
) -> Mapping[int, Accuracies]:
    return {value: accuracy_of([answer for answer in answers if key(answer) == value]) for value in values}
