"""Prompts of one video that follow one another: as a call gives them, and what the memory does at a switch."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from pipelines.config import MemoryConfig, SinkKind
from pipelines.generation.inputs.request import Prompts, Texts, as_list, require_floats
from pipelines.prompts.files import check_prompt
from pipelines.prompts.schedules import OnSwitch
from wan.utils.errors import InputError

Schedule = Sequence[tuple[int, Prompts]]
"""(latent frame, prompt) in order; the first frame is 0. A prompt is one for all videos, or one per video."""


def split_schedule(prompt: Prompts | Schedule | None) -> tuple[Prompts | None, list[tuple[int, Prompts]]]:
    """The prompt that a video begins with, and those that follow with their latent frames.

    Raises:
        InputError: moments that are no latent frames, or that do not rise from 0.
    """
    if prompt is None or isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return prompt, []
    if not any(isinstance(each, tuple) for each in prompt):
        return prompt, []  # type: ignore[return-value]
    found: list[tuple[int, Prompts]] = []
    for each in prompt:
        pair = each if isinstance(each, tuple) and len(each) == 2 else None
        if pair is None or isinstance(pair[0], bool) or not isinstance(pair[0], int) or pair[0] < 0:
            raise InputError(
                f"a schedule holds {str(each)[:40]!r}: give pairs of a latent frame from 0 and a prompt, such as "
                '[(0, "a red ball"), (40, "a blue cube")]'
            )
        found.append((pair[0], pair[1]))
    frames = [frame for frame, _ in found]
    if frames[0] != 0 or any(b <= a for a, b in pairwise(frames)):
        raise InputError(f"prompts begin at latent frames {frames}: the first must be 0, and each later than the last")
    return found[0][1], found[1:]


def with_prompt(texts: Texts, prompt: Prompts | None, prompt_embeds: Tensor | None = None) -> Texts:
    """Texts of the same videos and guidance, with other prompts.

    Args:
        prompt: one for all videos, or one per video; with several videos per prompt, one per prompt.
        prompt_embeds: in its place, likewise.

    Raises:
        InputError: none or both are given, or their number does not fit.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise InputError("give a prompt or prompt_embeds" + (", not both" if prompt is not None else ""))
    if prompt_embeds is not None:
        require_floats(prompt_embeds, "prompt_embeds", "embeddings from encode_prompt, [videos, tokens, channels]")
        times = _times(len(prompt_embeds), texts.batch)
        return replace(texts, prompts=None, prompt_embeds=prompt_embeds.repeat_interleave(times, dim=0))
    assert prompt is not None
    prompts = as_list(prompt, "prompt")
    for one in prompts:
        check_prompt(one, "the prompt")
    times = _times(len(prompts), texts.batch)
    return replace(texts, prompts=[one for one in prompts for _ in range(times)], prompt_embeds=None)


def _times(count: int, batch: int) -> int:
    if not count or batch % count:
        raise InputError(f"{count} prompts for {batch} videos: give one, or one per video")
    return batch // count


def check_on_switch(on_switch: OnSwitch | str, memory: MemoryConfig) -> OnSwitch:
    """What happens to a memory when the prompt changes.

    Args:
        on_switch: by its name, or as it is.
        memory: of the softmax layers.

    Raises:
        InputError: an unknown name, or the memory cannot be made anew: its sink is an average, or it is made anew
            before every block anyway.
    """
    if on_switch not in list(OnSwitch):
        raise InputError(f"on_switch {on_switch!r} is unknown: give {' or '.join(OnSwitch)}")
    chosen = OnSwitch(on_switch)
    if chosen is OnSwitch.recompute and (memory.sink is SinkKind.average or memory.recompute):
        why = "is computed anew before every block" if memory.recompute else "has a sink of frames that are gone"
        raise InputError(f"on_switch=recompute does not go with this memory, which {why}: give on_switch=keep")
    return chosen
