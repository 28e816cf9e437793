"""File names of a suite's videos: VBench's `{prompt}-{index}.mp4` where that can be a file name, else a safe one.

VBench finds a video by the short prompt and an index from 0, and nothing else: `vbench/__init__.py` of vbench 0.1.5
looks for exactly that name in a flat folder. A prompt is text that others wrote, so it may be no file name, or lead out
of the folder. Such a prompt gets a name of letters, digits and a hash; the manifest says which.
"""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from pipelines.prompts.jobs import output_name

MAX_SAMPLES = 9999
MAX_STEM_BYTES = 255 - len("..lock") - len(f"-{MAX_SAMPLES}")
"""Longest prompt that is a name: file systems take 255 bytes, and of a video's files its lock's name is the longest."""
_SEPARATORS = re.compile(r"[/\\]")


def file_stems(prompts: Sequence[str], ignores_case: bool) -> list[str]:
    """One name per prompt, to which `-{index}` and an ending are added. No two are one file.

    Args:
        prompts: all of a suite, each once, so that a subset has the same names.
        ignores_case: whether the file system takes names that differ in case alone for one, see `ignores_case`.
    """
    stems: list[str | None] = []
    taken: set[str] = set()
    for prompt in prompts:
        is_free = can_be_name(prompt) and _key(prompt, ignores_case) not in taken
        stems.append(prompt if is_free else None)
        if is_free:
            taken.add(_key(prompt, ignores_case))
    return [
        _safe_stem(prompt, taken, ignores_case) if stem is None else stem
        for prompt, stem in zip(prompts, stems, strict=True)
    ]


def can_be_name(prompt: str) -> bool:
    """Whether a prompt is the name of a file in any folder, as it stands.

    It holds no separator, nothing that is not printed and no surrogate, begins with no dot, dash or space, is in the
    normal form NFC (other forms are changed by some file systems) and fits the length.
    """
    return (
        prompt.isprintable()
        and _SEPARATORS.search(prompt) is None
        and prompt[:1] not in ("", ".", "-", " ")
        and unicodedata.is_normalized("NFC", prompt)
        and len(prompt.encode("utf-8", "surrogatepass")) <= MAX_STEM_BYTES
    )


def _key(stem: str, ignores_case: bool) -> str:
    """What is equal for names of one file."""
    return unicodedata.normalize("NFC", stem.casefold()) if ignores_case else stem


def _safe_stem(prompt: str, taken: set[str], ignores_case: bool) -> str:
    """A name that no other prompt has; it depends on the prompt, unless another prompt is such a name itself."""
    turn = 0
    while _key(stem := output_name("suite", prompt, turn), ignores_case) in taken:
        turn += 1
    taken.add(_key(stem, ignores_case))
    return stem


def ignores_case(folder: Path) -> bool:
    """Whether names that differ in case alone are one file where a folder lies.

    Args:
        folder: one that is there; its name holds a letter.
    """
    other = folder.with_name(folder.name.swapcase())
    return other.exists() and other.samefile(folder)
