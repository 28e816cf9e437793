"""Training data read from disk; `arl2.distillation.latent_writer` says how it lies there."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from arl2.distillation.latent_writer import SampleInfo, read_index, samples_of
from wan.checkpoints.loading import as_state_dict, fingerprint_of, read_weights
from wan.checkpoints.saving import stored_hash
from wan.utils.errors import InputError
from wan.utils.settings import require_same_settings

log = logging.getLogger(__name__)

LATENT_AXES, TEXT_AXES = "F, C, h, w", "T, D"
BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
"""Of a value, by the types that samples may have, as headers name them."""
READING_THREADS = 16
"""A disk in the network answers many requests at once."""
MAX_HASHED_BYTES = 4 << 30
PIECE_BYTES = 1 << 16
SAMPLES_AT_A_TIME = 64


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
        longest_text: name of the sample that has it.
    """

    latents_shape: tuple[int, ...]
    text_shape: tuple[int, ...]
    longest_text: str

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
        """A hash of which samples there are, to be kept beside a training run."""

    def values_fingerprint(self) -> str:
        """A hash of what the samples hold, wherever and in whatever files they lie.

        Raises:
            InputError: a file cannot be read.
        """


class LatentDataset(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Samples of one or more folders, read when they are asked for.

    All but the values is checked when the data set is opened, by the headers of its files. Values are checked as they
    are read.

    Args:
        folders: data sets; all samples must have one shape.

    Attributes:
        settings: what made the samples.
        latents_shape, text_shape, longest_text: see `Samples`.

    Raises:
        InputError: there is nothing, a file is missing or damaged, a sample is unlike the others, settings
            differ, or a folder is a copy of another.
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
            self._samples += [(folder, sample) for sample in samples_of(index)]
        files = [file for sample in self._samples for file in _files_of(*sample)]
        self._files = list(dict.fromkeys(files))
        self.latents_shape, texts = self._check_headers()
        self._require_distinct()
        longest = max(range(len(texts)), key=lambda number: texts[number][0])
        folder, sample = self._samples[longest]
        self._unchecked = {n for n, (_, one) in enumerate(self._samples) if one.latents_hash or one.text_hash}
        self.text_shape, self.longest_text = texts[longest], f"{sample.key!r} of {folder}"

    def _check_headers(self) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """Check every sample by the headers of its files; returns the shape of latents, and those of all texts."""
        with ThreadPoolExecutor(READING_THREADS) as pool:
            headers = dict(zip(self._files, pool.map(_headers_or_error, self._files), strict=True))
        latents, texts = [], []
        for folder, sample in self._samples:
            shard, embedding = _files_of(folder, sample)
            try:
                latents.append(_checked_shape(headers[shard], sample.latents_name, LATENT_AXES))
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
        return shape, texts

    def _require_distinct(self) -> None:
        """Refuse a folder whose samples are all in another one, and warn of samples that two have in common."""
        sizes = Counter(folder for folder, _ in self._samples)
        common: Counter[tuple[Path, Path]] = Counter()
        first: dict[tuple[str, str, int, str], tuple[Path, SampleInfo]] = {}
        for place in self._samples:
            folder, sample = place
            before = first.setdefault((sample.key, sample.prompt, sample.seed, sample.content), place)
            if before[0] != folder and _start_of_latents(*before) == _start_of_latents(*place):
                common[before[0], folder] += 1
        for (one, other), number in common.items():
            if number == min(sizes[one], sizes[other]):
                raise InputError(
                    f"all {number} samples of one are in both {one} and {other}, and would count double: name one"
                )
            log.warning("%d samples are in both %s and %s: they count double", number, one, other)

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
                latents = file.get_tensor(sample.latents_name)
            text = load_file(embedding)["text"]
        except (SafetensorError, OSError, KeyError) as error:
            raise _bad_sample(folder, sample, f"cannot be read ({error})") from error
        if latents.shape != self.latents_shape or text.shape[1:] != self.text_shape[1:]:
            raise _bad_sample(folder, sample, "its files were changed while they were in use")
        for name, value in (("latents", latents), ("text", text)):
            if not torch.isfinite(value.float()).all():
                raise _bad_sample(folder, sample, f"not all values of its {name} are finite")
        if index in self._unchecked:
            self._require_written(index, stored_hash(latents), stored_hash(text))
        return latents, text

    def _require_written(self, index: int, latents_hash: str, text_hash: str) -> None:
        """Hold a sample to what its writer noted, if it did; then it need not be checked again.

        Raises:
            InputError: it is not what was written.
        """
        folder, sample = self._samples[index]
        for name, now, before in (
            ("latents", latents_hash, sample.latents_hash),
            ("text", text_hash, sample.text_hash),
        ):
            if before and now != before:
                raise _bad_sample(folder, sample, f"the values of its {name} are not what was written")
        self._unchecked.discard(index)

    def gather(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `Samples.gather`; on the CPU."""
        samples = [self[index] for index in indices]
        latents = torch.stack([latents.float() for latents, _ in samples])
        return latents, pad_sequence([text.float() for _, text in samples], batch_first=True)

    def fingerprint(self) -> str:
        """A hash of which samples there are and what made them."""
        samples = [[one.key, one.prompt, one.seed, *filter(None, [one.content])] for _, one in self._samples]
        return _digest_of([self.settings, samples])

    def values_fingerprint(self) -> str:
        """A hash of the samples' values: of all, or of pieces from everywhere in each if they are very many.

        Samples that are hashed whole are held to what was written.

        Raises:
            InputError: a file cannot be read, or a sample is not what was written.
        """
        parts = [(_files_of(*sample), sample[1].latents_name) for sample in self._samples]
        tensors = [tensor for files, name in parts for tensor in ((files[0], name), (files[1], "text"))]
        distinct = list(dict.fromkeys(tensors))
        most = max(PIECE_BYTES, MAX_HASHED_BYTES // len(distinct))
        with ThreadPoolExecutor(READING_THREADS) as pool:
            hashes = dict(zip(distinct, pool.map(partial(values_hash, most=most), distinct), strict=True))
            whole = dict(zip(distinct, pool.map(partial(is_within, most=most), distinct), strict=True))
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        for index, (latents, text) in enumerate(pairs):
            if index in self._unchecked and whole[latents] and whole[text]:
                self._require_written(index, hashes[latents], hashes[text])
        return _digest_of([hashes[tensor] for tensor in tensors])


def _files_of(folder: Path, sample: SampleInfo) -> tuple[Path, Path]:
    """Where the latents and the text embedding of a sample are.

    Raises:
        InputError: one would be outside of the folder.
    """
    for name in (sample.shard or ".", sample.text):
        if Path(name).name != name or name == ".." or "\0" in name:
            raise _bad_sample(folder, sample, f"its index names {name!r}, which is no name of a file")
    try:
        return folder / sample.shard, sample.text_file(folder)
    except UnicodeEncodeError as error:
        raise _bad_sample(folder, sample, "its prompt is no valid text") from error


def _start_of_latents(folder: Path, sample: SampleInfo) -> str:
    return values_hash((_files_of(folder, sample)[0], sample.latents_name), PIECE_BYTES)


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
    if dtype not in BYTES:
        raise InputError(f"{name!r} is of type {dtype}, not one of {', '.join(BYTES)}")
    return shape


def values_hash(tensor: tuple[Path, str], most: int) -> str:
    """A hash of a tensor's type, shape, and at most `most` of its bytes, evenly spread.

    Args:
        tensor: a sound safetensors file, and a name in it.

    Raises:
        InputError: the file cannot be read.
    """
    path, name = tensor
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            about = json.loads(file.read(length))[name]
            first, end = about["data_offsets"]
            size = end - first
            digest = hashlib.sha256(json.dumps([about["dtype"], about["shape"]]).encode())
            if size <= most:
                pieces = [(0, size)]
            else:
                number = max(1, most // PIECE_BYTES)
                starts = ((size - PIECE_BYTES) * n // max(1, number - 1) for n in range(number))
                pieces = [(start, PIECE_BYTES) for start in starts]
            for start, count in pieces:
                file.seek(8 + length + first + start)
                digest.update(file.read(count))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read {name} in {path} ({error}): make the data again") from error
    return digest.hexdigest()


def is_within(tensor: tuple[Path, str], most: int) -> bool:
    """Whether a tensor has at most `most` bytes, so that `values_hash` takes all of it.

    Raises:
        InputError: the file cannot be read.
    """
    dtype, shape = read_headers(tensor[0])[tensor[1]]
    return prod(shape) * BYTES[dtype] <= most


def _digest_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class ResidentLatents:
    """All samples of one file in a device's memory: a batch costs no reading and no copying.

    Args:
        file: safetensors with "latents" [N, F, C, h, w] and "text" [N, T, D], in half precision for example; what else
            it holds is left alone.
        device: where they stay.

    Attributes:
        latents_shape, text_shape, longest_text: see `Samples`.

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
        self.latents_shape, self.text_shape, self.longest_text = shapes[0][1:], shapes[1][1:], "0"
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
        """A hash of the numbers of samples and of a few of their values."""
        some = [self._latents_NFCHW[:, 0, 0, 0, 0], self._text_NTD[:, 0, 0]]
        return _digest_of([list(self._latents_NFCHW.shape), *(values[:256].tolist() for values in some)])

    def values_fingerprint(self) -> str:
        """See `Samples.values_fingerprint`."""
        return fingerprint_of({"latents": self._latents_NFCHW, "text": self._text_NTD})


def first_not_finite(values: Tensor) -> int | None:
    """The first row of a tensor that holds a value which is not finite in float32; None if there is none."""
    finite = [part.float().isfinite().flatten(1).all(1) for part in values.split(SAMPLES_AT_A_TIME)]
    bad = torch.cat(finite).logical_not().nonzero()
    return int(bad[0]) if len(bad) else None
