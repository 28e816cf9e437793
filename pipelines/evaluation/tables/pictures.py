"""A contact sheet beside tables: the same prompts by every model."""

from collections.abc import Sequence
from pathlib import Path

import torch

from pipelines.evaluation.tables.sources import Kind, Source
from pipelines.media.contact_sheet import contact_sheet
from pipelines.media.video import read_video
from wan.utils.errors import InputError
from wan.utils.files import atomic_path

MOST_PROMPTS = 6
COLUMNS = 7
TITLE_CHARACTERS = 100
SMALL = 256
"""Pictures lower than this, in pixels, are shown twice as large."""


def write_pictures(sources: Sequence[Source], path: Path) -> int:
    """Draw frames of the first prompts that all files of scores share, a row per prompt and model.

    Returns:
        number of prompts.

    Raises:
        InputError: no file of scores, no prompt in common, or videos that are gone or of several sizes.
    """
    scored = [source for source in sources if source.kind is Kind.SCORES]
    if not scored:
        raise InputError("--pictures needs files of scripts/evaluate.py, which say where videos are")
    clips = [{(v["group"], v.get("index", 0)): name for name, v in source.page["videos"].items()} for source in scored]
    shared = [key for key in clips[0] if all(key in others for others in clips)][:MOST_PROMPTS]
    if not shared:
        raise InputError("the files of scores share no prompt: there is nothing to show side by side")
    rows = []
    for key in shared:
        for source, names in zip(scored, clips, strict=True):
            video = Path(source.page["folder"]) / names[key]
            if not video.is_file():
                raise InputError(f"{source.path} has scores of {video}, which is gone: leave --pictures out")
            frames = torch.from_numpy(read_video(video)).permute(0, 3, 1, 2)
            rows.append((frames, f"{source.label}: {key[0]}"[:TITLE_CHARACTERS]))
    sizes = {frames.shape[-2:] for frames, _ in rows}
    if len(sizes) > 1:
        raise InputError(f"the videos have {len(sizes)} sizes: leave --pictures out, or sample them alike")
    with atomic_path(path) as temporary:
        contact_sheet(rows, COLUMNS, 2 if next(iter(sizes))[0] < SMALL else 1).save(temporary, format="png")
    return len(shared)
