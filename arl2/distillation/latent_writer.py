"""Training data on disk: the index of a data set, and its writer.

    folder/index.json                settings, and for every sample what it was made from and where it is
    folder/shard-00000.safetensors   latents.<content or key>, [F, C, h, w]
    folder/text/<hash>.safetensors   the embedding of a prompt, once

A shard is written whole, then named in the index: a killed writer loses at most the samples of one shard, and its
next run goes on after the last. Latents are found again by what they were made from: a sample that gets another
caption or another name keeps its latents. One process at a time writes a folder; several ranks have one each.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from wan.checkpoints.saving import stored_hash, write_safetensors
from wan.checkpoints.tensors import DTYPES
from wan.utils.errors import InputError
from wan.utils.files import read_json, remove, write_json
from wan.utils.locks import exclusive
from wan.utils.settings import plain, require_same_settings

log = logging.getLogger(__name__)

INDEX = "index.json"
LOCK, WHOLE = ".lock", "whole"
FORMAT = "arl2 latents, version 2"
FORMATS = ("arl2 latents, version 1", FORMAT)
"""What can be read; version 1 does not say what its samples were made from, and is not gone on with."""
MAKERS = "scripts/generate_latents.py, scripts/encode_videos.py or scripts/toyworld/draw_latents.py"
_SHARD = re.compile(r"shard-(\d{5,})\.safetensors")
LATENT_AXES, TEXT_AXES = 4, 2
CLOCK_STEPS = (0.05, 2.0)
"""Longest steps, in seconds, of the clocks of file systems: of those that tell fractions of a second, and of others."""


@dataclass(frozen=True)
class SampleInfo:
    """Description of a sample in an index.

    Attributes:
        key: unique in its data set.
        prompt, seed: what it was made from.
        shard: the file that holds its latents.
        content: hash of the clip that was encoded; empty for what the key identifies, such as a rollout.
        text: name of the file of its text embedding; empty in version 1, which names it by the prompt alone.
        stamp: size and times of the clip's file when it was hashed, see `file_stamp`; empty for unknown.
        latents_hash, text_hash: of the values as they were written, see `stored_hash`; empty for unknown.
    """

    key: str
    prompt: str
    seed: int
    shard: str = ""
    content: str = ""
    text: str = ""
    stamp: str = ""
    latents_hash: str = ""
    text_hash: str = ""

    @property
    def latents_name(self) -> str:
        """Name of its latents in the shard."""
        return f"latents.{self.content or self.key}"

    def text_file(self, folder: Path) -> Path:
        """File of its text embedding in a data set's folder."""
        return folder / "text" / (self.text or f"{_hash(self.prompt)}.safetensors")


class Counts(NamedTuple):
    """Samples of a data set compared with those that it had before."""

    kept: int
    new: int
    replaced: int
    removed: int

    def __str__(self) -> str:
        return ", ".join(f"{number} {name}" for name, number in self._asdict().items())


class LatentWriter:
    """Writes samples into shards; goes on where an earlier writer of the same folder was stopped.

    A context manager: inside, the folder is locked. At its end what waits is written; if it ended well, files that no
    sample needs are removed too.

    Args:
        folder: of the data set.
        settings: what made the samples; must be those of the samples that are there.
        samples_per_shard: how many samples wait in memory for one file.
        pending: names of settings that `complete` gives later, before the first sample.
        part: which part of a divided data set this folder is, "rank 2 of 8" for instance.

    Raises:
        InputError: on entering: another process writes the folder; its samples are of other settings, or of an
            earlier version, or its index is damaged.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        samples_per_shard: int = 64,
        *,
        pending: Collection[str] = (),
        part: str = WHOLE,
    ) -> None:
        self._folder, self._settings, self._part = folder, plain(settings), part
        self._samples_per_shard, self._pending = samples_per_shard, set(pending)
        self._held = ExitStack()
        self._index: dict[str, Any] = {}  # as it is on disk
        self._before: dict[str, SampleInfo] = {}
        self._samples: dict[str, SampleInfo] = {}
        self._order: list[str] | None = None
        self._shards: dict[str, set[str]] = {}  # names of the latents in each
        self._shard_of: dict[str, str] = {}  # and the other way round
        self._hashes: dict[str, str] = {}  # by name of the latents, and by name of the text's file
        self._shapes: dict[str, tuple[int, ...]] = {}  # the same way
        self._sound_texts: set[str] = set()
        self._spoiled: set[str] = set()  # shards that also hold what is damaged, or is in a later one
        self._waiting: dict[str, Tensor] = {}  # by name of the latents
        self._added: set[str] = set()
        self._has_news = False

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(exclusive(self._folder / LOCK, f"the data set {self._folder}"))
            self._open()
            self._held = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._held:
            if kind is None:
                self._finish()
            elif self._has_news:
                self.flush()

    def _open(self) -> None:
        if not (self._folder / INDEX).exists():
            return
        self._index = read_index(self._folder)
        if self._index["format"] != FORMAT:
            raise InputError(
                f"{self._folder} was written by an earlier version, which did not note what its samples were made "
                "from: it can be trained on, but not gone on with; choose another folder, or delete this one"
            )
        self._require_same({"part": self._part}, {"part": self._index.get("part", WHOLE)})
        there = self._index["settings"]
        now = {name: value for name, value in self._settings.items() if name not in self._pending}
        self._require_same(now, {name: there[name] for name in there.keys() - self._pending})
        self._before = {sample.key: sample for sample in samples_of(self._index)}
        for sample in self._before.values():
            self._hashes |= {sample.latents_name: sample.latents_hash, sample.text: sample.text_hash}
        self._read_shards()
        self._read_texts()
        self._samples = dict(self._before)
        self._drop_damaged()

    def _drop_damaged(self) -> None:
        """Forget samples that have lost a file, or whose values are damaged."""
        sound = {
            key: sample
            for key, sample in self._samples.items()
            if sample.latents_name in self._shard_of and self._has_text(sample.text)
        }
        damaged, self._samples = len(self._samples) - len(sound), sound
        if damaged:
            log.warning("%s: files of %d samples are damaged or missing", self._folder, damaged)

    def _require_same(self, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        require_same_settings(before, now, f"{self._folder} holds samples made", "use those, or choose another folder")

    def complete(
        self,
        settings: Mapping[str, Any],
        latents_shape: tuple[int, ...] | None = None,
        text_shape: tuple[int, int] | None = None,
    ) -> None:
        """Give the settings that were pending, such as fingerprints of weights; samples of other shapes are made again.

        Args:
            latents_shape: [F, C, h, w] of every sample; None for unknown.
            text_shape: [T, D] of every text embedding; None for unknown.

        Raises:
            InputError: the folder holds samples of others.
        """
        self._settings |= plain(settings)
        self._pending.clear()
        if self._index:
            self._require_same(self._settings, self._index["settings"])
            # What an earlier version did not note stays unknown: texts have their names by the settings.
            self._settings = self._index["settings"]
        for name in [name for name in self._shard_of if latents_shape not in (None, self._shapes[name])]:
            self._forget_latents(name)
        if text_shape is not None:
            texts = {name: self._shapes[name] for name in self._sound_texts}
            self._sound_texts = {name for name, shape in texts.items() if shape == text_shape}
        self._drop_damaged()

    def _forget_latents(self, name: str) -> None:
        shard = self._shard_of.pop(name)
        self._shards[shard].discard(name)
        self._spoiled.add(shard)
        del self._hashes[name]

    def _read_shards(self) -> None:
        """Note what every sound shard holds, also of those that a killed writer did not name in the index."""
        for file in sorted(self._folder.iterdir()):
            if _SHARD.fullmatch(file.name):
                found = self._read_sound(file, LATENT_AXES)
                if found is not None:
                    self._note_shard(file.name, found)

    def _read_texts(self) -> None:
        """Note which embeddings of prompts are sound."""
        for file in (self._folder / "text").glob("*.safetensors"):
            if "text" in (self._read_sound(file, TEXT_AXES, {"text": file.name}) or ()):
                self._sound_texts.add(file.name)

    def _read_sound(self, file: Path, axes: int, called: Mapping[str, str] | None = None) -> set[str] | None:
        """The sound tensors of a file; their hashes and shapes are noted. None for a damaged file.

        Args:
            axes: how many they have.
            called: names under which tensors are noted, where they are not their own.
        """
        found: set[str] = set()
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    value, known = opened.get_tensor(name), (called or {}).get(name, name)
                    is_sound = value.dim() == axes and value.dtype in DTYPES and _is_finite(value)
                    digest = stored_hash(value) if is_sound else ""
                    if digest and self._hashes.get(known) in (None, "", digest):
                        self._hashes.setdefault(known, digest)
                        self._shapes[known] = tuple(value.shape)
                        found.add(name)
                    else:
                        log.warning("%s of %s is not what was written: it is made again", name, file)
                        self._spoiled.add(file.name)
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged (%s): what it held is made again", file, error)
            return None
        return found

    def _note_shard(self, shard: str, names: set[str]) -> None:
        for name in names & self._shard_of.keys():
            earlier = self._shard_of[name]
            if earlier != shard:
                self._shards.get(earlier, set()).discard(name)
                self._spoiled.add(earlier)
        self._shards[shard] = names
        self._shard_of |= dict.fromkeys(names, shard)

    @property
    def keys(self) -> set[str]:
        """Samples that need not be made again."""
        return set(self._samples)

    @property
    def counts(self) -> Counts:
        """Comparison of the samples now with those that the folder held when it was opened."""
        now, before = self._samples, self._before
        common = now.keys() & before.keys()
        replaced = {key for key in common if key in self._added or _identity(now[key]) != _identity(before[key])}
        new, removed = now.keys() - before.keys(), before.keys() - now.keys()
        return Counts(len(common - replaced), len(new), len(replaced), len(removed))

    def known_content(self, key: str, stamp: str) -> str | None:
        """The content of a sample's clip if its file has the stamp of then."""
        before = self._before.get(key)
        return before.content if before is not None and stamp and before.stamp == stamp else None

    def missing(self, wanted: Sequence[SampleInfo], prune: bool) -> list[SampleInfo]:
        """Say what the data set is to hold; what is there of it is kept.

        Args:
            wanted: samples with key, prompt and seed, and with content and stamp if they have them.
            prune: hold these alone, in this order; the index loses all others when it is next written.

        Returns:
            those that must be added.
        """
        texts = {prompt: self._text_name(prompt) for prompt in {sample.prompt for sample in wanted}}
        sound = {prompt for prompt, name in texts.items() if self._has_text(name)}
        if prune:
            self._samples, self._order = {}, [sample.key for sample in wanted]
        missing = []
        for sample in wanted:
            if sample.latents_name in self._shard_of and sample.prompt in sound:
                self._samples[sample.key] = replace(sample, text=texts[sample.prompt])
            else:
                self._samples.pop(sample.key, None)
                missing.append(sample)
        return missing

    def has_latents(self, sample: SampleInfo) -> bool:
        """Whether a sample's latents are there, under whatever key or prompt."""
        return sample.latents_name in self._waiting or sample.latents_name in self._shard_of

    def text(self, prompt: str) -> Tensor | None:
        """The embedding of a prompt, [T, D], if it is there."""
        name = self._text_name(prompt)
        return load_file(self._folder / "text" / name)["text"] if self._has_text(name) else None

    def add(
        self,
        key: str,
        latents_FCHW: Tensor | None,
        prompt: str,
        seed: int,
        text_TD: Tensor,
        *,
        content: str = "",
        stamp: str = "",
    ) -> None:
        """Add one sample, and the embedding of its prompt if it is not there yet.

        Args:
            latents_FCHW: None for those that are there, see `has_latents`.
            key, prompt, seed, content, stamp: see `SampleInfo`.

        Raises:
            InputError: the key is taken, a value is not finite, or the disk is full.
        """
        assert not self._pending, "complete() comes first"
        sample = SampleInfo(key, prompt, seed, content=content, text=self._text_name(prompt), stamp=stamp)
        if key in self._samples:
            raise InputError(f"sample {key!r} is in {self._folder} already")
        for name, values in (("", latents_FCHW), ("text of ", text_TD)):
            if values is not None and not torch.isfinite(values).all():
                raise InputError(f"{name}sample {key!r} is not finite: check what makes it")
        if not self._has_text(sample.text):
            self._write_text(sample.text, text_TD.cpu())
        if latents_FCHW is None:
            assert self.has_latents(sample)
        else:
            self._waiting[sample.latents_name] = latents_FCHW.cpu()
            self._hashes[sample.latents_name] = stored_hash(latents_FCHW)
        self._samples[key] = sample
        self._added.add(key)
        self._has_news = True
        if len(self._waiting) >= self._samples_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what waits, and name it in the index."""
        if self._waiting:
            if not self._index:  # shards are those of an index, which says what made them
                self._write_index([])
            self._write_shard(self._waiting)
            self._waiting = {}
        self._write_index([self._placed(sample) for sample in self._samples.values()])
        self._has_news = False

    def _placed(self, sample: SampleInfo) -> SampleInfo:
        """With what says where its values are, and which they are."""
        latents = self._hashes.get(sample.latents_name, "")
        text = self._hashes.get(sample.text, "")
        return replace(sample, shard=self._shard_of[sample.latents_name], latents_hash=latents, text_hash=text)

    def _write_text(self, name: str, text_TD: Tensor) -> None:
        write_safetensors(self._folder / "text" / name, {"text": text_TD})
        self._sound_texts.add(name)
        self._hashes[name] = stored_hash(text_TD)

    def _write_shard(self, latents: Mapping[str, Tensor]) -> None:
        names = [file.name for file in self._folder.iterdir()] + [sample.shard for sample in self._before.values()]
        numbers = [int(found[1]) for found in map(_SHARD.fullmatch, names) if found]
        shard = f"shard-{max(numbers, default=-1) + 1:05d}.safetensors"
        write_safetensors(self._folder / shard, latents)
        self._note_shard(shard, set(latents))

    def _write_index(self, samples: Sequence[SampleInfo]) -> None:
        index = {"format": FORMAT, "settings": self._settings, "samples": [asdict(sample) for sample in samples]}
        index |= {"part": self._part} if self._part != WHOLE else {}
        if index != self._index:
            write_json(self._folder / INDEX, index)
            self._index = index

    def _finish(self) -> None:
        """Write what waits, and leave nothing that no sample needs."""
        if self._order is not None:
            self._samples = {key: self._samples[key] for key in self._order if key in self._samples}
        if not self._index and not self._samples:
            return
        if self._waiting:
            self.flush()
        self._drop_unneeded_latents()
        self.flush()
        texts = {sample.text for sample in self._samples.values()}
        for file in self._folder.iterdir():
            if _SHARD.fullmatch(file.name) and file.name not in self._shards:
                remove(file)
        for file in (self._folder / "text").glob("*.safetensors"):
            if file.name not in texts:
                remove(file)

    def _drop_unneeded_latents(self) -> None:
        """Write anew the shards that also hold latents of no sample or damaged ones, without them."""
        left = {sample.latents_name for sample in self._samples.values()}
        for shard, names in list(self._shards.items()):
            needed, left = names & left, left - names
            if needed == names and shard not in self._spoiled:
                continue
            del self._shards[shard]
            if needed:
                with safe_open(self._folder / shard, framework="pt") as file:
                    self._write_shard({name: file.get_tensor(name) for name in sorted(needed)})

    def _text_name(self, prompt: str) -> str:
        """Name of a prompt's embedding, which depends on all that made the data set: on the text encoder above all."""
        assert not self._pending, "complete() comes first"
        return f"{_hash(json.dumps([self._settings, prompt], sort_keys=True))}.safetensors"

    def _has_text(self, name: str) -> bool:
        return name in self._sound_texts


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _identity(sample: SampleInfo) -> tuple[str, int, str]:
    return sample.prompt, sample.seed, sample.content


def _is_finite(value: Tensor) -> bool:
    """Whether a tensor has values, all finite in float32."""
    return bool(value.numel()) and bool(torch.isfinite(value.float()).all())


def file_stamp(path: Path) -> str:
    """Size and times of a file, by which it is known to be the same without reading it.

    A file that changed a moment ago could change again without another time: then this waits for the next moment.

    Raises:
        OSError: there is no such file.
    """
    status = path.stat()
    step = CLOCK_STEPS[(status.st_ctime_ns % 10**9) == 0]
    if time.time() - status.st_ctime < step:
        time.sleep(step)
        return file_stamp(path) if path.stat().st_ctime_ns != status.st_ctime_ns else _stamp(status)
    return _stamp(status)


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a data set: format, settings, and samples, which `samples_of` takes.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if not os.path.lexists(folder / INDEX):
        parts = ",".join(sorted(str(index.parent) for index in folder.glob(f"*/{INDEX}")))
        cure = f"give its parts, data=[{parts}]" if parts else f"make some with {MAKERS}"
        raise InputError(f"no training data in {folder}: {cure}")
    index = read_json(folder / INDEX)
    if index.get("format") not in FORMATS:
        raise InputError(f"{folder / INDEX} is no index of latents ({', '.join(FORMATS)}): check the path")
    cure = "delete it and make the data again"
    settings, samples = index.get("settings"), index.get("samples")
    if not isinstance(settings, dict) or not isinstance(samples, list):
        raise InputError(f"{folder / INDEX} is damaged, it has no settings or no samples: {cure}")
    types = {field.name: field.type for field in fields(SampleInfo)}
    for number, sample in enumerate(samples):
        is_known = isinstance(sample, dict) and {"key", "prompt", "seed", "shard"} <= sample.keys() <= types.keys()
        if not is_known or not all(type(value) is types[name] for name, value in sample.items()):
            raise InputError(f"{folder / INDEX} is damaged, or of a later version, at sample {number}: {cure}")
    if len({sample["key"] for sample in samples}) < len(samples):
        raise InputError(f"{folder / INDEX} is damaged, it names a sample twice: {cure}")
    return index


def samples_of(index: Mapping[str, Any]) -> list[SampleInfo]:
    """The samples of an index that `read_index` read."""
    return [SampleInfo(**sample) for sample in index["samples"]]
