"""What commands left behind: is every file whole, and is it what an unbroken run leaves."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from arl2.distillation.data import LatentDataset
from arl2.distillation.latent_writer import INDEX
from pipelines.media.video import read_video

DATA, CHECKPOINTS, LOSSES = "data", "checkpoints", "losses.jsonl"
TIMES = {
    *("seconds", "load_seconds", "warm_up_seconds", "block_seconds", "time_to_first_frame", "fps", "started"),
    *("peak_memory_bytes", "allocated_bytes_after_block"),
}
"""What JSON records say of time and machine; it differs from run to run."""
Tree = dict[str, bytes]


@dataclass(frozen=True)
class Problem:
    """Something that is not as it must be.

    Attributes:
        kind: one word or two, the same for all of the kind.
        text: what and where.
    """

    kind: str
    text: str


def files_of(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files below a folder by relative path, those without a hidden part in it."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), path


def hidden(folder: Path) -> list[str]:
    """Relative paths of what is there but not meant to stay: temporary files and locks."""
    names = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(
        name.as_posix() for name in names if name.name.startswith(".") or name.suffix in (".part", ".lock", ".tmp")
    )


def tree_of(folder: Path, by_sample: bool = False, last_checkpoint: bool = False) -> Tree:
    """The content of all files by relative path; of JSON what does not tell of time.

    Args:
        by_sample: take data sets sample by sample, however they are divided into shards.
        last_checkpoint: leave out checkpoints but the last.
    """
    found = {name: _content(path) for name, path in files_of(folder)}
    if by_sample and f"{DATA}/{INDEX}" in found:
        shards = {name for name in found if name.startswith(f"{DATA}/") and "/" not in name[len(DATA) + 1 :]}
        found = {name: content for name, content in found.items() if name not in shards} | _samples(folder / DATA)
    if last_checkpoint:
        steps = sorted({name.split("/")[2] for name in found if f"/{CHECKPOINTS}/" in name})
        old = tuple(f"/{CHECKPOINTS}/{step}/" for step in steps[:-1])
        found = {name: content for name, content in found.items() if not any(part in name for part in old)}
    return found


def _content(path: Path) -> bytes:
    raw = path.read_bytes()
    try:
        if path.suffix == ".json":
            return _without_times(raw.decode())
        if path.suffix == ".jsonl":
            return b"\n".join(_without_times(line) for line in raw.decode().splitlines())
    except ValueError:  # damaged: as it is
        return raw
    return raw


def _without_times(text: str) -> bytes:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: clean(one) for name, one in value.items() if name not in TIMES}
        return [clean(one) for one in value] if isinstance(value, list) else value

    return json.dumps(clean(json.loads(text))).encode()


def _samples(folder: Path) -> Tree:
    """Every sample of a data set, their order if it matters, and which shards nobody names."""
    index = json.loads((folder / INDEX).read_text())
    data, found = LatentDataset([folder]), dict[str, bytes]()
    for place, sample in enumerate(index["samples"]):
        name = f"{DATA}/sample {sample['key']}"
        while name in found:
            name += " again"
        parts = [json.dumps({key: value for key, value in sample.items() if key != "shard"}, sort_keys=True).encode()]
        for tensor in data[place]:
            parts += [
                str((tensor.dtype, tuple(tensor.shape))).encode(),
                tensor.contiguous().view(torch.uint8).numpy().tobytes(),
            ]
        found[name] = b"".join(parts)
    named = {sample["shard"] for sample in index["samples"]}
    return found | {
        f"{DATA}/unnamed {path.name}": b"" for path in folder.glob("*.safetensors") if path.name not in named
    }


def order_of(folder: Path) -> list[str]:
    """Keys of a data set's samples as the index has them; training takes them by number."""
    path = folder / DATA / INDEX
    return [sample["key"] for sample in json.loads(path.read_text())["samples"]] if path.is_file() else []


def differences(found: Tree, expected: Tree) -> list[Problem]:
    """What is missing, extra or of other content."""
    problems = [Problem("missing", name) for name in sorted(expected.keys() - found.keys())]
    problems += [Problem("extra", name) for name in sorted(found.keys() - expected.keys())]
    problems += [
        Problem("differs", f"{name} ({len(found[name])} bytes, {len(expected[name])} expected)")
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    return problems


def damage(folder: Path, references: Sequence[Tree]) -> list[Problem]:
    """What lies under its final name without being whole.

    Args:
        references: what unbroken runs leave, one of which this is on its way to.
    """
    found = dict(files_of(folder))
    problems = []
    for name, path in found.items():
        if any(reference.get(name) == _content(path) for reference in references):
            continue
        if reason := _reason(path, [reference[name] for reference in references if name in reference]):
            problems.append(Problem("partial", f"{name}: {reason}"))
    names: dict[str, set[str]] = {}
    for name in found:
        names.setdefault(name.rpartition("/")[0], set()).add(name.rpartition("/")[2])
    for parent, inside in names.items():
        if missing := _missing(parent, inside, references):
            problems.append(Problem("partial", f"{parent} lacks {', '.join(sorted(missing))}"))
    if f"{DATA}/{INDEX}" in found and not problems:
        problems += _unreadable(folder)
    return problems


def _reason(path: Path, expected: list[bytes]) -> str | None:
    """Why a file is not whole; None if it is."""
    readers: dict[str, Callable[[], object]] = {
        ".mp4": lambda: read_video(path),
        ".safetensors": lambda: load_file(path),
        ".json": lambda: json.loads(path.read_text()),
        ".jsonl": lambda: _lines(path, expected),
        ".yaml": lambda: _yaml(path),
        ".png": lambda: Image.open(path).load(),
        ".pt": lambda: torch.load(path, weights_only=True),
    }
    try:
        readers[path.suffix]()
    except Exception as error:  # whatever a reader of damaged files raises is what is wanted here
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    if path.suffix == ".mp4" and expected:
        return "decodes, but is not the unbroken run's"
    return None


def _fail(reason: str) -> None:
    raise ValueError(reason)


def _yaml(path: Path) -> None:
    if not yaml.safe_load(path.read_text()):
        _fail("empty")


def _lines(path: Path, expected: list[bytes]) -> None:
    """A log grows line by line, and a killed run may leave half of its last one."""
    lines = path.read_text().split("\n")[:-1]
    content = [_without_times(line) for line in lines]
    if expected and not any(one.split(b"\n")[: len(content)] == content for one in expected):
        _fail("its lines are not the first of the unbroken run's")


def _missing(parent: str, inside: set[str], references: Sequence[Tree]) -> set[str]:
    """Files that a folder which gets its name as a whole lacks; a checkpoint without state.json counts as none."""
    is_checkpoint = f"/{CHECKPOINTS}/step-" in f"/{parent}"
    if is_checkpoint and "state.json" not in inside:
        return set()
    if not (is_checkpoint or "config.json" in inside):
        return set()
    candidates = []
    for reference in references:
        alike = [name for name in reference if _alike(name.rpartition("/")[0], parent, is_checkpoint)]
        if alike:
            candidates.append({name.rpartition("/")[2] for name in alike} - inside)
    return min(candidates, key=len, default=set())


def _alike(one: str, other: str, is_checkpoint: bool) -> bool:
    return one.rpartition("/")[0] == other.rpartition("/")[0] if is_checkpoint else one == other


def _unreadable(folder: Path) -> list[Problem]:
    """What an index names and nobody can read."""
    try:
        if not json.loads((folder / DATA / INDEX).read_text())["samples"]:
            return []  # what another list made is removed, and of this one's nothing is made yet
        data = LatentDataset([folder / DATA])
        for place in range(len(data)):
            data[place]
    except Exception as error:  # as above
        return [Problem("partial", f"{DATA}: {' '.join(str(error).split())[:200]}")]
    return []
