"""Weights and libraries of metrics: where they are looked for, and what is said where they are missing.

Nothing is downloaded. Files are tensors only: safetensors, or pickles that are read with `weights_only`.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pipelines.evaluation.scoring.metric import NotMeasuredError
from pipelines.prompts.names import shown
from wan.checkpoints.loading import as_state_dict, read_weights
from wan.utils.errors import CheckpointError, InputError

INSTALL = "run make eval-env, and evaluate.py by .venv-eval/bin/python (docs/evaluation.md)"
DEFAULT_FOLDER = Path("checkpoints/evaluation")


@dataclass(frozen=True)
class WeightSource:
    """A file of public weights.

    Attributes:
        name: for `--weights NAME=FILE`.
        file: its name in the folder of weights.
        url: where it comes from.
        caches: folders below the home folder in which other programs keep it.
    """

    name: str
    file: str
    url: str
    caches: tuple[str, ...] = ()


TORCH_HUB, VBENCH = ".cache/torch/hub", ".cache/vbench"
CLIP_B = WeightSource(
    "clip_b",
    "vit_base_patch32_clip_224.openai.safetensors",
    "https://huggingface.co/timm/vit_base_patch32_clip_224.openai (open_clip_model.safetensors)",
)
CLIP_L = WeightSource(
    "clip_l",
    "vit_large_patch14_clip_224.openai.safetensors",
    "https://huggingface.co/timm/vit_large_patch14_clip_224.openai (open_clip_model.safetensors)",
)
DINO = WeightSource(
    "dino",
    "dino_vitbase16_pretrain.pth",
    "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    (f"{TORCH_HUB}/checkpoints", f"{VBENCH}/dino_model"),
)
AESTHETIC = WeightSource(
    "aesthetic",
    "sa_0_4_vit_l_14_linear.pth",
    "https://github.com/LAION-AI/aesthetic-predictor (sa_0_4_vit_l_14_linear.pth)",
    (f"{VBENCH}/aesthetic_model/emb_reader",),
)
MUSIQ = WeightSource(
    "musiq",
    "musiq_spaq_ckpt-358bb6af.pth",
    "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
    (f"{TORCH_HUB}/pyiqa", f"{VBENCH}/pyiqa_model"),
)
RAFT = WeightSource(
    "raft",
    "raft_large_C_T_V1-22a6c225.pth",
    "https://download.pytorch.org/models/raft_large_C_T_V1-22a6c225.pth",
    (f"{TORCH_HUB}/checkpoints",),
)
R3D = WeightSource(
    "r3d",
    "r3d_18-b3b3357e.pth",
    "https://download.pytorch.org/models/r3d_18-b3b3357e.pth",
    (f"{TORCH_HUB}/checkpoints",),
)
AMT = WeightSource(
    "amt",
    "amt-s.pth",
    "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth",
    (f"{VBENCH}/amt_model",),
)
SOURCES = {source.name: source for source in (CLIP_B, CLIP_L, DINO, AESTHETIC, MUSIQ, RAFT, R3D, AMT)}


@dataclass(frozen=True)
class WeightFolder:
    """Places of weights: files that were named, then a folder, then the caches of other programs.

    Attributes:
        folder: of files under their publishers' names.
        files: files by the names of `SOURCES`.
    """

    folder: Path = DEFAULT_FOLDER
    files: Mapping[str, Path] | None = None

    def find(self, source: WeightSource) -> Path:
        """The file of some weights.

        Raises:
            NotMeasuredError: there is none; the message says where it comes from.
        """
        named = (self.files or {}).get(source.name)
        if named is not None:
            return named
        folders = (self.folder, *(Path.home() / cache for cache in source.caches))
        found = next((folder / source.file for folder in folders if (folder / source.file).is_file()), None)
        if found is None:
            raise NotMeasuredError(
                f"no weights {source.file}: fetch {source.url}, put it into {shown(self.folder)} under that name, "
                f"or give --weights {source.name}=FILE"
            )
        return found


def named_files(texts: list[str]) -> dict[str, Path]:
    """Read `NAME=FILE` of `--weights`.

    Raises:
        InputError: not of that form, an unknown name, or no such file.
    """
    files: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or name not in SOURCES:
            raise InputError(f"--weights {shown(text)}: give NAME=FILE, NAME being one of {', '.join(SOURCES)}")
        if not Path(file).is_file():
            raise InputError(f"--weights {name}: no file {shown(file)}; it comes from {SOURCES[name].url}")
        files[name] = Path(file)
    return files


def library(module: str, package: str) -> Any:
    """Import a module of an optional library.

    Raises:
        NotMeasuredError: it is not installed, or does not import beside this PyTorch.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # torchvision without its operators is a RuntimeError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotMeasuredError(f"{package} does not import ({reason}): {INSTALL}") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of weights into a model, every name and shape as the model has them.

    Raises:
        CheckpointError: the file is damaged or belongs to another model.
    """
    state = as_state_dict(read_weights(path), path)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{shown(path)} does not fit {type(model).__name__} ({reason}): fetch it again"
        ) from error
