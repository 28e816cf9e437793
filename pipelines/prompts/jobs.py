"""Jobs from prompts: a seed and a file name that depend on nothing but itself."""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.prompts.files import PromptRequest, read_prompt_file
from pipelines.prompts.schedules import Script, Switch
from wan.utils.errors import InputError

SLUG_LENGTH = 60
HASH_LENGTH = 16


@dataclass(frozen=True)
class PromptJob:
    """One video to make.

    Attributes:
        prompt: as given.
        occurrence: how many equal prompts (with an equal seed, where one is given) came before it.
        seed: of its noise.
        name: of its files, without an ending; safe on every file system.
        image: its first frame, if the request names one.
        prompts: all prompts of the video, `prompt` first, where there are several.
    """

    prompt: str
    occurrence: int
    seed: int
    name: str
    image: Path | None = None
    prompts: tuple[Switch, ...] = ()


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file alone; see `read_requests`."""
    return [request.prompt for request in read_requests(path)]


def read_requests(path: Path) -> list[PromptRequest]:
    """The requests of a prompt file for text to video; `pipelines.prompts.files` describes the formats.

    Raises:
        InputError: the file cannot be read, is broken, or names images.
    """
    requests = read_prompt_file(path)
    for request in requests:
        if request.image is not None:
            raise InputError(f"{request.where} names an image, which only inference.py with --i2v takes: remove it")
    return requests


def repeat_requests(requests: Sequence[PromptRequest], times: int) -> list[PromptRequest]:
    """All requests, then all of them again, and so on, so that every repetition is another video.

    A repetition of a request that has a seed or a name of its own gets another one, which follows from it.
    """
    repeated = list(requests)
    for number in range(1, times):
        for request in requests:
            seed = None if request.seed is None else prompt_seed(request.seed, request.prompt, number)
            name = None if request.name is None else f"{request.name}-{number + 1}"
            repeated.append(replace(request, seed=seed, name=name))
    return repeated


def _digest(seed: int | str, prompt: str, occurrence: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{occurrence}\0{prompt}".encode("utf-8", "surrogatepass")).digest()


def prompt_seed(seed: int, prompt: str, occurrence: int = 0) -> int:
    """A 63-bit seed for one prompt of a run, independent of the other prompts."""
    return int.from_bytes(_digest(seed, prompt, occurrence)[:8], "big") >> 1


def output_name(seed: int | str, prompt: str, occurrence: int = 0) -> str:
    """A file name for one prompt: what can be read of it in ASCII, then a hash of prompt, seed and occurrence."""
    ascii_text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_text)[:SLUG_LENGTH].strip("-") or "video"
    return f"{slug}-{_digest(seed, prompt, occurrence).hex()[:HASH_LENGTH]}"


def plan_jobs(requests: Sequence[str | PromptRequest], seed: int) -> list[PromptJob]:
    """One job per request; equal prompts get different seeds and names.

    A request's own seed is the seed of the noise, whatever `seed` is; its own name is the name.

    Raises:
        InputError: two jobs would write one file.
    """
    seen: Counter[tuple[str, int | None]] = Counter()
    jobs = []
    for request in (PromptRequest(item) if isinstance(item, str) else item for item in requests):
        key = (request.prompt, request.seed)
        occurrence = seen[key]
        seen[key] += 1
        if request.seed is None:
            own, automatic = (
                prompt_seed(seed, request.prompt, occurrence),
                output_name(seed, request.prompt, occurrence),
            )
        else:
            own, automatic = request.seed, output_name(f"seed {request.seed}", request.prompt, occurrence)
        jobs.append(PromptJob(request.prompt, occurrence, own, request.name or automatic, request.image))
    names = Counter(job.name.casefold() for job in jobs)
    for job in jobs:
        if names[job.name.casefold()] > 1:
            raise InputError(f"two videos would be named {job.name}: give every request a name of its own")
    return jobs


def plan_scripts(scripts: Sequence[Script], seed: int) -> list[PromptJob]:
    """One job per video of a schedule.

    The seed is that of the first prompt alone, so that both videos are the same before the first switch. The name
    depends on all prompts and when they begin.
    """
    seen: Counter[str] = Counter()
    jobs = []
    for script in scripts:
        first = script.prompts[0].prompt
        whole = json.dumps([each.as_plain() for each in script.prompts])
        occurrence = seen[whole]
        seen[whole] += 1
        jobs.append(
            PromptJob(
                prompt=first,
                occurrence=occurrence,
                seed=prompt_seed(seed, first, occurrence),
                name=output_name(f"{seed} {whole}", first, occurrence),
                prompts=script.prompts if len(script.prompts) > 1 else (),
            )
        )
    return jobs


def shard_jobs(jobs: Sequence[PromptJob], rank: int, world_size: int) -> list[PromptJob]:
    """The jobs of one rank; over all ranks every job comes once."""
    return list(jobs[rank::world_size])
