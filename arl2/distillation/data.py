"""Training data read from disk; `arl2.distillation.latent_writer` says how it lies there."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from arl2.distillation.latent_writer import read_index, samples_of
from wan.checkpoints.loading import as_state_dict, read_weights
from wan.utils.errors import InputError


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
            (folder, sample) for folder, index in zip(folders, indices, strict=True) for sample in samples_of(index)
        ]
        if not self._samples:
            raise InputError(f"no samples in {', '.join(map(str, folders))}: generate some")
        needed = {folder / sample.shard for folder, sample in self._samples}
        needed |= {sample.text_file(folder) for folder, sample in self._samples}
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
                latents = shard.get_tensor(sample.latents_name)
            return latents, load_file(sample.text_file(folder))["text"]
        except (SafetensorError, OSError, KeyError) as error:
            raise InputError(f"sample {sample.key!r} of {folder} cannot be read ({error}): make it again") from error

    def gather(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `Samples.gather`; on the CPU."""
        samples = [self[index] for index in indices]
        latents = torch.stack([latents for latents, _ in samples]).float()
        return latents, pad_sequence([text for _, text in samples], batch_first=True)

    def fingerprint(self) -> str:
        """A hash of which samples there are and what made them."""
        samples = [[one.key, one.prompt, one.seed, *filter(None, [one.content])] for _, one in self._samples]
        content = [self.settings, samples]
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
