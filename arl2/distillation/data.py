"""Training data on disk: latents of videos in safetensors shards, with an index that says what each sample is.

    folder/index.json            settings, and for every sample its key, prompt, seed and shard
    folder/shard-00000.safetensors   latents.<key>, [F, C, h, w]
    folder/text/<hash>.safetensors   the embedding of a prompt, once

A shard is written whole, then named in the index: a killed writer loses at most the samples of one shard, and its
next run goes on after the last. Several ranks write to folders of their own.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from wan.checkpoints.loading import as_state_dict, read_weights
from wan.utils.errors import InputError
from wan.utils.files import atomic_path, write_json

INDEX = "index.json"
FORMAT = "arl2 latents, version 1"


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
    """The index of a data set.

    Raises:
        InputError: there is none, or it is damaged.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
    except FileNotFoundError as error:
        raise InputError(f"no training data in {folder}: make some with scripts/generate_latents.py") from error
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read {folder / INDEX}: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise InputError(f"{folder / INDEX} is no index of latents ({FORMAT})")
    return index


class Samples(Protocol):
    """Training data, however it is kept; all samples have one shape."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Latents [F, C, h, w] and text embedding [T, D] of a sample."""

    def gather(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents [B, F, C, h, w] in float32 and text embeddings [B, T, D], short ones padded with zeros."""

    def fingerprint(self) -> str:
        """A hash of which samples there are, to be kept beside a training run."""


class LatentDataset(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Samples of one or more folders, read when they are asked for.

    Args:
        folders: data sets; all samples must have one shape.

    Raises:
        InputError: nothing there, a shard or an embedding is missing, or the settings differ.
    """

    def __init__(self, folders: list[Path]) -> None:
        indices = [read_index(folder) for folder in folders]
        self.settings: dict[str, Any] = indices[0]["settings"]
        if any(index["settings"] != self.settings for index in indices):
            raise InputError(f"{', '.join(map(str, folders))} were made with different settings: train on one kind")
        self._samples = [
            (folder, SampleInfo(**sample))
            for folder, index in zip(folders, indices, strict=True)
            for sample in index["samples"]
        ]
        if not self._samples:
            raise InputError(f"no samples in {', '.join(map(str, folders))}: generate some")
        needed = {folder / sample.shard for folder, sample in self._samples}
        needed |= {text_file(folder, sample.prompt) for folder, sample in self._samples}
        missing = sorted(str(file) for file in needed if not file.is_file())
        if missing:
            raise InputError(f"{len(missing)} files of the training data are missing, first {missing[0]}")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Latents [F, C, h, w] and text embedding [T, D] of a sample.

        Raises:
            InputError: a file is damaged.
        """
        folder, sample = self._samples[index]
        try:
            with safe_open(folder / sample.shard, framework="pt") as shard:
                latents = shard.get_tensor(f"latents.{sample.key}")
            return latents, load_file(text_file(folder, sample.prompt))["text"]
        except (SafetensorError, OSError, KeyError) as error:
            raise InputError(f"sample {sample.key!r} of {folder} cannot be read ({error}): make it again") from error

    def gather(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `Samples.gather`; on the CPU."""
        samples = [self[index] for index in indices]
        latents = torch.stack([latents for latents, _ in samples]).float()
        return latents, pad_sequence([text for _, text in samples], batch_first=True)

    def fingerprint(self) -> str:
        """A hash of which samples there are and what made them."""
        content = [self.settings, [[sample.key, sample.prompt, sample.seed] for _, sample in self._samples]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class ResidentLatents:
    """All samples of one file in a device's memory: a batch costs no reading and no copying.

    Args:
        file: safetensors with "latents" [N, F, C, h, w] and "text" [N, T, D], in half precision for example; what else
            it holds is left alone.
        device: where they stay.

    Raises:
        CheckpointError, InputError: no such file, or one of other content.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        stored = as_state_dict(read_weights(file), file)
        if not stored.keys() >= {"latents", "text"} or stored["latents"].ndim != 5 or stored["text"].ndim != 3:
            raise InputError(f"{file} holds {sorted(stored)}: expected latents [N, F, C, h, w] and text [N, T, D]")
        if len(stored["latents"]) != len(stored["text"]) or not len(stored["text"]):
            raise InputError(f"{file} holds {len(stored['latents'])} latents and {len(stored['text'])} texts")
        self._latents_NFCHW, self._text_NTD = stored["latents"].to(device), stored["text"].to(device)

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
        content = [list(self._latents_NFCHW.shape), *(values[:256].tolist() for values in some)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
