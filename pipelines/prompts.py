"""Prompt files, and what each prompt becomes: a seed and a file name that depend on nothing but itself."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wan.utils.errors import InputError

SLUG_LENGTH = 60
HASH_LENGTH = 16


@dataclass(frozen=True)
class PromptJob:
    """One video to make.

    Attributes:
        prompt: as given.
        occurrence: how many equal prompts came before it.
        seed: of its noise.
        name: of its files, without an ending; safe on every file system.
    """

    prompt: str
    occurrence: int
    seed: int
    name: str


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line; blank lines are skipped.

    Raises:
        InputError: the file is missing, not text, or without prompts.
    """
    try:
        # Path.is_file itself raises for names that are too long and folders that may not be entered.
        if not path.is_file():
            raise InputError(f"no prompt file {path}: give a text file with one prompt a line")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): give a text file with one prompt a line") from error
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path} as UTF-8 text: give a text file with one prompt a line") from error
    if "\0" in text:
        raise InputError(f"{path} is a binary file: give a text file with one prompt a line")
    # read_text made every line end a line feed; str.splitlines would also split at characters that prompts may hold.
    prompts = [line.strip() for line in text.split("\n")]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise InputError(f"{path} holds no prompts: write one a line")
    return prompts


def _digest(seed: int, prompt: str, occurrence: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{occurrence}\0{prompt}".encode("utf-8", "surrogatepass")).digest()


def prompt_seed(seed: int, prompt: str, occurrence: int = 0) -> int:
    """A 63-bit seed for one prompt of a run, independent of the other prompts."""
    return int.from_bytes(_digest(seed, prompt, occurrence)[:8], "big") >> 1


def output_name(seed: int, prompt: str, occurrence: int = 0) -> str:
    """A file name for one prompt: what can be read of it in ASCII, then a hash of prompt, seed and occurrence."""
    ascii_text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_text)[:SLUG_LENGTH].strip("-") or "video"
    return f"{slug}-{_digest(seed, prompt, occurrence).hex()[:HASH_LENGTH]}"


def plan_jobs(prompts: Sequence[str], seed: int) -> list[PromptJob]:
    """One job a prompt; equal prompts get different seeds and names."""
    seen: Counter[str] = Counter()
    jobs = []
    for prompt in prompts:
        occurrence = seen[prompt]
        seen[prompt] += 1
        seed_of_job, name = prompt_seed(seed, prompt, occurrence), output_name(seed, prompt, occurrence)
        jobs.append(PromptJob(prompt, occurrence, seed_of_job, name))
    return jobs


def shard_jobs(jobs: Sequence[PromptJob], rank: int, world_size: int) -> list[PromptJob]:
    """The jobs of one rank; over all ranks every job comes once."""
    return list(jobs[rank::world_size])
