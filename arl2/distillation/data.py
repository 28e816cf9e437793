"""Training data on disk: latents of videos in safetensors shards, with an index that says what each sample is.

    folder/index.json            settings, and for every sample its key, prompt, seed and shard
    folder/shard-00000.safetensors   latents.<key>, [F, C, h, w]
    folder/text/<hash>.safetensors   the embedding of a prompt, once

A shard is written whole, then named in the index: a killed writer loses at most the samples of one shard, and its
next run goes on after the last. Several ranks write to folders of their own.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from wan.checkpoints.loading import as_state_dict, fingerprint_of, read_weights
from wan.utils.errors import InputError
from wan.utils.files import atomic_path, read_json, write_json
from wan.utils.settings import require_same_settings

INDEX = "index.json"
FORMAT = "arl2 latents, version 1"
LATENT_AXES, TEXT_AXES = "F, C, h, w", "T, D"
FLOATS = ("BF16", "F16", "F32", "F64")
"""Types of samples, by their names in headers."""
READING_THREADS = 16
"""A disk in the network answers many requests at once."""
MAX_HASHED_BYTES = 4 << 30
PIECE_BYTES = 1 << 16
SAMPLES_AT_A_TIME = 64


@dataclass(frozen=True)
class SampleInfo:
    """What a sample is.

    Attributes:
        key: unique in its data set.
        prompt, seed: what it was made from.
        shard: the file that holds it.
    """

    key: str
    prompt: str
    seed: int
    shard: str


def text_file(folder: Path, prompt: str) -> Path:
    """Where the embedding of a prompt is."""
    return folder / "text" / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"


class LatentWriter:
    """Writes samples into shards; goes on where an earlier writer of the same folder was stopped.

    Args:
        folder: of the data set.
        settings: what made the samples; must be those of the samples that are there.
        samples_per_shard: how many samples wait in memory for one file.

    Raises:
        InputError: the folder holds samples of other settings, or cannot be read.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], samples_per_shard: int = 64) -> None:
        self._folder, self._settings, self._most = folder, dict(settings), samples_per_shard
        self._waiting: dict[str, tuple[Tensor, str, int]] = {}
        self._samples: list[SampleInfo] = []
        if (folder / INDEX).is_file():
            index = read_index(folder)
            if index["settings"] != json.loads(json.dumps(self._settings)):
                raise InputError(f"{folder} holds samples made with other settings: choose another folder")
            self._samples = [SampleInfo(**sample) for sample in index["samples"]]

    @property
    def keys(self) -> set[str]:
        """Samples that need not be made again."""
        return {sample.key for sample in self._samples} | self._waiting.keys()

    def add(self, key: str, latents_FCHW: Tensor, prompt: str, seed: int, text_TD: Tensor) -> None:
        """Add one sample, and the embedding of its prompt if it is not there yet.

        Raises:
            InputError: the key is taken, the latents are not finite, or the disk is full.
        """
        if key in self.keys:
            raise InputError(f"sample {key!r} is in {self._folder} already")
        if not torch.isfinite(latents_FCHW).all():
            raise InputError(f"sample {key!r} is not finite: check what makes it")
        embedding = text_file(self._folder, prompt)
        if not embedding.is_file():
            with atomic_path(embedding) as temporary:
                save_file({"text": text_TD.cpu().contiguous()}, temporary)
        self._waiting[key] = (latents_FCHW.cpu(), prompt, seed)
        if len(self._waiting) >= self._most:
            self.flush()

    def flush(self) -> None:
        """Write what waits, and name it in the index."""
        if not self._waiting:
            return
        shard = f"shard-{len({sample.shard for sample in self._samples}):05d}.safetensors"
        with atomic_path(self._folder / shard) as temporary:
            save_file({f"latents.{key}": one[0].contiguous() for key, one in self._waiting.items()}, temporary)
        self._samples += [SampleInfo(key, prompt, seed, shard) for key, (_, prompt, seed) in self._waiting.items()]
        index = {"format": FORMAT, "settings": self._settings, "samples": [asdict(one) for one in self._samples]}
        write_json(self._folder / INDEX, index)
        self._waiting.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a data set, with its settings and its samples checked.

    Raises:
        InputError: there is none, it is damaged, or a sample in it is not described as `SampleInfo` says.
    """
    path = folder / INDEX
    if not path.exists():
        raise InputError(f"no training data in {folder}: make some with scripts/generate_latents.py")
    index = read_json(path)
    if index.get("format") != FORMAT:
        raise InputError(f"{path} is no index of latents ({FORMAT}): check the folder, or make the data again")
    for name, kind in (("settings", dict), ("samples", list)):
        if not isinstance(index.get(name), kind):
            raise InputError(f"{path} is damaged ({_misfit(name, index, kind)}): make the data again")
    keys: set[str] = set()
    for number, sample in enumerate(index["samples"]):
        reason = _sample_fault(sample)
        if reason is None and sample["key"] in keys:
            reason = "its key stands twice"
        if reason is not None:
            name = repr(sample["key"]) if isinstance(sample, dict) and "key" in sample else f"number {number}"
            raise InputError(f"{path} is damaged (sample {name}: {reason}): make the data again")
        keys.add(sample["key"])
    return index


def _sample_fault(sample: object) -> str | None:
    """What is wrong with a sample's entry in an index; None if nothing is."""
    if not isinstance(sample, dict):
        return f"a JSON {type(sample).__name__}, not an object"
    types = get_type_hints(SampleInfo)
    needed = {one.name for one in fields(SampleInfo) if one.default is MISSING}
    if unknown := sample.keys() - types.keys():
        return f"{min(unknown)!r} is unknown"
    for name, kind in types.items():
        if (name in sample or name in needed) and not _is_a(sample.get(name), kind):
            return _misfit(name, sample, kind)
    shard = sample["shard"]
    if Path(shard).name != shard or shard in ("", "..") or "\0" in shard:
        return f"shard {shard!r} is no name of a file in the folder"
    try:
        sample["prompt"].encode()
    except UnicodeEncodeError:
        return "its prompt is no valid text"
    return None


def _is_a(value: object, kind: Any) -> bool:
    """Whether a JSON value is of a type; true is no integer."""
    return isinstance(value, kind) and (not isinstance(value, bool) or kind is bool)


def _misfit(name: str, page: Mapping[str, object], kind: Any) -> str:
    wanted = getattr(kind, "__name__", str(kind))
    return f"{name!r} is a {type(page[name]).__name__}, not a {wanted}" if name in page else f"{name!r} is missing"


class Header(NamedTuple):
    """What a safetensors file says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


def read_headers(file: Path) -> dict[str, Header]:
    """Types and shapes of the tensors of a safetensors file, whose values are not read.

    Raises:
        InputError: it is missing, truncated, or no such file.
    """
    if not file.is_file():
        raise InputError(f"{file} is missing")
    try:
        with safe_open(file, framework="pt") as content:
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118 - no mapping
            return {name: Header(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read ({error})") from error


class Samples(Protocol):
    """Training data, however it is kept; all samples have one shape.

    Attributes:
        latents_shape: [F, C, h, w] of every sample.
        text_shape: [T, D] of the longest text embedding.
    """

    latents_shape: tuple[int, ...]
    text_shape: tuple[int, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Latents [F, C, h, w] and text embedding [T, D] of a sample.

        Raises:
            InputError: it cannot be read, or holds values that are not finite.
        """

    def gather(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents [B, F, C, h, w] and text embeddings [B, T, D] in float32, short texts padded with zeros.

        Raises:
            InputError: a sample cannot be read, or holds values that are not finite.
        """

    def fingerprint(self) -> str:
        """A hash of which samples there are and what they hold, to be kept beside a training run."""


class LatentDataset(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Samples of one or more folders, read when they are asked for.

    All but the values is checked when the data set is opened, by the headers of its files. Values are checked as they
    are read.

    Args:
        folders: data sets; all samples must have one shape.

    Attributes:
        settings: what made the samples.
        latents_shape, text_shape: see `Samples`.

    Raises:
        InputError: there is nothing, a file is missing or damaged, a sample is unlike the others, or settings differ.
    """

    def __init__(self, folders: list[Path]) -> None:
        if not folders:
            raise InputError("data names no folder: give some that scripts/generate_latents.py made")
        self._samples: list[tuple[Path, SampleInfo]] = []
        for number, folder in enumerate(folders):
            index = read_index(folder)
            if number == 0:
                self.settings: dict[str, Any] = index["settings"]
            cure = f"train on one kind of data, {folders[0]} is of another"
            require_same_settings(index["settings"], self.settings, f"{folder} was made", cure)
            if not index["samples"]:
                raise InputError(f"no samples in {folder}: generate some")
            self._samples += [(folder, SampleInfo(**sample)) for sample in index["samples"]]
        files = [file for sample in self._samples for file in _files_of(*sample)]
        self._files = list(dict.fromkeys(files))
        self.latents_shape, self.text_shape = self._check_headers()

    def _check_headers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Check every sample by the headers of its files; returns the shapes of latents and of the longest text."""
        with ThreadPoolExecutor(READING_THREADS) as pool:
            headers = dict(zip(self._files, pool.map(_headers_or_error, self._files), strict=True))
        latents, texts = [], []
        for folder, sample in self._samples:
            shard, embedding = _files_of(folder, sample)
            try:
                latents.append(_checked_shape(headers[shard], f"latents.{sample.key}", LATENT_AXES))
                texts.append(_checked_shape(headers[embedding], "text", TEXT_AXES))
            except InputError as error:
                raise _bad_sample(folder, sample, str(error)) from error
        shape = Counter(latents).most_common(1)[0][0]
        width = Counter(text[1] for text in texts).most_common(1)[0][0]
        for (folder, sample), latent, text in zip(self._samples, latents, texts, strict=True):
            if latent != shape:
                raise _bad_sample(folder, sample, f"its latents are {list(latent)}, those of most are {list(shape)}")
            if text[1] != width:
                raise _bad_sample(folder, sample, f"its text is {text[1]} wide, that of most is {width}")
        return shape, (max(text[0] for text in texts), width)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Latents [F, C, h, w] and text embedding [T, D] of a sample.

        Raises:
            InputError: a file is damaged, or holds values that are not finite.
        """
        folder, sample = self._samples[index]
        shard, embedding = _files_of(folder, sample)
        try:
            with safe_open(shard, framework="pt") as file:
                latents = file.get_tensor(f"latents.{sample.key}")
            text = load_file(embedding)["text"]
        except (SafetensorError, OSError, KeyError) as error:
            raise _bad_sample(folder, sample, f"cannot be read ({error})") from error
        if latents.shape != self.latents_shape or text.shape[1:] != self.text_shape[1:]:
            raise _bad_sample(folder, sample, "its files were changed while they were in use")
        for name, value in (("latents", latents), ("text", text)):
            if not torch.isfinite(value.float()).all():
                raise _bad_sample(folder, sample, f"not all values of its {name} are finite")
        return latents, text

    def gather(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `Samples.gather`; on the CPU."""
        samples = [self[index] for index in indices]
        latents = torch.stack([latents.float() for latents, _ in samples])
        return latents, pad_sequence([text.float() for _, text in samples], batch_first=True)

    def fingerprint(self) -> str:
        """A hash of which samples there are, what made them, and what their files hold, wherever they are.

        Raises:
            InputError: a file cannot be read.
        """
        pages = [[sample.key, sample.prompt, sample.seed] for _, sample in self._samples]
        return _digest_of([self.settings, pages, content_hashes(self._files)])


def _files_of(folder: Path, sample: SampleInfo) -> tuple[Path, Path]:
    """Where the latents and the text embedding of a sample are."""
    return folder / sample.shard, text_file(folder, sample.prompt)


def _bad_sample(folder: Path, sample: SampleInfo, reason: str) -> InputError:
    return InputError(f"sample {sample.key!r} of {folder}: {reason}: make it again")


def _headers_or_error(file: Path) -> dict[str, Header] | InputError:
    try:
        return read_headers(file)
    except InputError as error:
        return error


def _checked_shape(headers: dict[str, Header] | InputError, name: str, axes: str) -> tuple[int, ...]:
    """The shape of a tensor by its file's headers.

    Raises:
        InputError: the file cannot be read, or the tensor is not there or no such tensor.
    """
    if isinstance(headers, InputError):
        raise headers
    if name not in headers:
        raise InputError(f"its file holds no {name!r}")
    dtype, shape = headers[name]
    if len(shape) != len(axes.split()) or min(shape) < 1:
        raise InputError(f"{name!r} is of shape {list(shape)}, not [{axes}]")
    if dtype not in FLOATS:
        raise InputError(f"{name!r} is of type {dtype}, not one of {', '.join(FLOATS)}")
    return shape


def content_hashes(files: Sequence[Path]) -> list[str]:
    """A hash of each file's content: of all of it, or of pieces everywhere in it if the files are very large.

    Raises:
        InputError: a file cannot be read.
    """
    most = max(PIECE_BYTES, MAX_HASHED_BYTES // max(1, len(files)))
    with ThreadPoolExecutor(READING_THREADS) as pool:
        return list(pool.map(partial(_content_hash, most=most), files))


def _content_hash(path: Path, most: int) -> str:
    """A hash of a file's size and of at most `most` bytes, evenly spread."""
    try:
        size = path.stat().st_size
        pieces = max(1, min(most, size) // PIECE_BYTES)
        starts = [0, *(PIECE_BYTES * n for n in range(1, pieces))]
        if size > most:
            starts = [(size - PIECE_BYTES) * n // max(1, pieces - 1) for n in range(pieces)]
        digest = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            for number, start in enumerate(starts):
                file.seek(start)
                digest.update(file.read(PIECE_BYTES if number + 1 < pieces or size > most else -1))
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): check the path and its permissions") from error
    return digest.hexdigest()


def _digest_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class ResidentLatents:
    """All samples of one file in a device's memory: a batch costs no reading and no copying.

    Args:
        file: safetensors with "latents" [N, F, C, h, w] and "text" [N, T, D], in half precision for example; what else
            it holds is left alone.
        device: where they stay.

    Attributes:
        latents_shape, text_shape: see `Samples`.

    Raises:
        CheckpointError, InputError: no such file, one of other content, or values that are not finite.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        try:
            headers = read_headers(file)
            shapes = [_checked_shape(headers, *one) for one in (("latents", f"N, {LATENT_AXES}"), ("text", "N, T, D"))]
        except InputError as error:
            raise InputError(f"{file} holds no training data ({error}): make it again") from error
        if shapes[0][0] != shapes[1][0]:
            raise InputError(f"{file} holds {shapes[0][0]} latents and {shapes[1][0]} texts: make it again")
        stored = as_state_dict(read_weights(file), file)
        self._latents_NFCHW, self._text_NTD = stored["latents"].to(device), stored["text"].to(device)
        self.latents_shape, self.text_shape = shapes[0][1:], shapes[1][1:]
        for name, values in (("latents", self._latents_NFCHW), ("text", self._text_NTD)):
            sample = first_not_finite(values)
            if sample is not None:
                raise InputError(f"{file}: not all values of the {name} of sample {sample} are finite: make it again")

    def __len__(self) -> int:
        return len(self._latents_NFCHW)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """See `Samples.__getitem__`."""
        return self._latents_NFCHW[index].float(), self._text_NTD[index].float()

    def gather(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `Samples.gather`; on the device."""
        rows = torch.tensor(list(indices), device=self._latents_NFCHW.device)
        return self._latents_NFCHW[rows].float(), self._text_NTD[rows].float()

    def fingerprint(self) -> str:
        """A hash of all values."""
        return fingerprint_of({"latents": self._latents_NFCHW, "text": self._text_NTD})


def first_not_finite(values: Tensor) -> int | None:
    """The first row of a tensor that holds a value which is not finite in float32; None if there is none."""
    finite = [part.float().isfinite().flatten(1).all(1) for part in values.split(SAMPLES_AT_A_TIME)]
    bad = torch.cat(finite).logical_not().nonzero()
    return int(bad[0]) if len(bad) else None
