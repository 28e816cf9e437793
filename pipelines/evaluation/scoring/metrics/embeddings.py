"""Metrics of embeddings of frames: consistency by DINO and CLIP, likeness to the prompt, the LAION aesthetic head.

Frames are resized as VBench does it: as floats, without antialiasing, neither rounded nor clamped.
"""

from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.evaluation.scoring.metric import Clip, Direction, Frames, Measure, Metric, NotMeasuredError, Rows, Spec
from pipelines.evaluation.scoring.weights import (
    AESTHETIC,
    CLIP_B,
    CLIP_L,
    DINO,
    WeightFolder,
    WeightSource,
    library,
    load_weights,
)
from wan.utils.files import content_hash

CLIP_B_NAME, CLIP_L_NAME, DINO_NAME = "ViT-B-32", "ViT-L-14", "vit_base_patch16_224"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_BYTE = 255.0
MAX_AESTHETIC = 10.0


def shorter_side_to(frames: Frames, size: int, mode: str, device: torch.device) -> Tensor:
    """Resize frames so that the shorter side is `size`: [T, H, W, 3] to floats [T, 3, h, w], about 0 to 255.

    The same numbers as torchvision's `Resize(size, antialias=False)` of a tensor of floats.

    Args:
        mode: "bilinear" or "bicubic".
    """
    pixels = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float()
    height, width = pixels.shape[-2:]
    short = min(height, width)
    target = [size * height // short, size * width // short]
    return F.interpolate(pixels, target, mode=mode, align_corners=False, antialias=False)


def centre(pixels_TCHW: Tensor, size: int) -> Tensor:
    """Cut the square in the middle of frames."""
    top, left = (round((length - size) / 2) for length in pixels_TCHW.shape[-2:])
    return pixels_TCHW[..., top : top + size, left : left + size]


def normalised(pixels_TCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Scale floats from 0 to 255 to what a network takes."""
    shift, scale = (pixels_TCHW.new_tensor(values)[:, None, None] for values in (mean, std))
    return (pixels_TCHW / MAX_BYTE - shift) / scale


class Encoder(ABC):
    """A network that makes one embedding per frame.

    Attributes:
        device: where it lies.
        weights: hash of its file.
    """

    def __init__(self, device: torch.device, weights: str) -> None:
        self.device, self.weights = device, weights

    @abstractmethod
    def prepare(self, frames: Frames) -> Tensor:
        """Turn frames [T, H, W, 3] into the network's input."""

    @abstractmethod
    def encode(self, pixels_TCHW: Tensor) -> Tensor:
        """Embeddings [T, D]."""

    @torch.inference_mode()
    def __call__(self, frames: Frames) -> Tensor:
        """Embeddings of frames, of length one: [T, H, W, 3] to [T, D]."""
        return F.normalize(self.encode(self.prepare(frames)).float(), dim=-1)


class DinoEncoder(Encoder):
    """DINO's class token, of whole frames whose shorter side fits the network.

    Args:
        model: a vision transformer of timm that takes any size which its patches divide.
        size: of the shorter side.
    """

    def __init__(self, model: Any, size: int, device: torch.device, weights: str) -> None:
        super().__init__(device, weights)
        self._model, self._size = model.to(device).eval(), size

    def prepare(self, frames: Frames) -> Tensor:
        """See `Encoder`. What the patches do not cover on the right and below is left out, as DINO does."""
        pixels = shorter_side_to(frames, self._size, "bilinear", self.device)
        height, width = (
            length // patch * patch
            for length, patch in zip(pixels.shape[-2:], self._model.patch_embed.patch_size, strict=True)
        )
        return normalised(pixels[..., :height, :width], IMAGENET_MEAN, IMAGENET_STD)

    def encode(self, pixels_TCHW: Tensor) -> Tensor:
        """See `Encoder`."""
        found: Tensor = self._model(pixels_TCHW)
        return found


class ClipEncoder(Encoder):
    """CLIP's embedding of the middle of frames.

    Args:
        model: of open_clip.
        tokenizer: of texts to tokens [1, length].
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, weights: str) -> None:
        super().__init__(device, weights)
        self._model, self._tokenizer = model.to(device).eval(), tokenizer

    def prepare(self, frames: Frames) -> Tensor:
        """See `Encoder`."""
        visual = self._model.visual
        size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
        pixels = centre(shorter_side_to(frames, size, "bicubic", self.device), size)
        constants = library("open_clip.constants", "open_clip_torch")
        return normalised(pixels, constants.OPENAI_DATASET_MEAN, constants.OPENAI_DATASET_STD)

    def encode(self, pixels_TCHW: Tensor) -> Tensor:
        """See `Encoder`."""
        found: Tensor = self._model.encode_image(pixels_TCHW)
        return found

    @property
    def width(self) -> int:
        """Size of an embedding."""
        return int(self._model.visual.output_dim)

    @torch.inference_mode()
    def encode_text(self, prompt: str) -> Tensor:
        """Embedding of a prompt, of length one, [D]; tokens beyond CLIP's length are cut."""
        tokens = self._tokenizer([prompt]).to(self.device)
        return F.normalize(self._model.encode_text(tokens).float(), dim=-1)[0]


@lru_cache(maxsize=4)
def clip_encoder(name: str, path: Path, device: torch.device) -> ClipEncoder:
    """An encoder of OpenAI's CLIP, shared by the metrics that use it.

    Raises:
        NotMeasuredError: no open_clip.
        CheckpointError: weights that do not fit.
    """
    open_clip = library("open_clip", "open_clip_torch")
    model = open_clip.create_model(name, pretrained=None, force_quick_gelu=True)
    load_weights(model, path)
    return ClipEncoder(model, open_clip.get_tokenizer(name), device, content_hash(path))


def _clip(source: WeightSource, name: str, weights: WeightFolder, device: torch.device) -> ClipEncoder:
    library("open_clip", "open_clip_torch")
    return clip_encoder(name, weights.find(source), device)


class _Consistency(Metric):
    """Likeness of each frame's embedding to that of the frame before and to that of the first one.

    Args:
        encoder: of frames.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def identity(self) -> dict[str, Any]:
        """See `Metric`."""
        return {"weights": self._encoder.weights}

    def begin(self, clip: Clip) -> Measure:
        """See `Metric`; rows are embeddings."""
        return lambda frames: self._encoder(frames).double().cpu().numpy()

    def summarise(self, rows: Rows) -> float:
        """See `Metric`."""
        if len(rows) < 2:
            raise NotMeasuredError("the video has a single frame")
        before = (rows[1:] * rows[:-1]).sum(axis=1).clip(min=0)
        first = (rows[1:] @ rows[0]).clip(min=0)
        return float((before + first).mean() / 2)


class SubjectConsistency(_Consistency):
    """Consistency of DINO's embeddings."""

    SPEC = Spec(
        "subject_consistency",
        f"timm, {DINO.file}",
        Direction.HIGHER,
        "0 to 1",
        "mean cosine of DINO embeddings of a frame with the frame before and with the first frame",
        "vbench 0.1.5, vbench/subject_consistency.py",
    )

    @classmethod
    def load(cls, weights: WeightFolder, device: torch.device) -> "SubjectConsistency":
        """Load DINO ViT-B/16."""
        timm = library("timm", "timm")
        path = weights.find(DINO)
        model = timm.create_model(DINO_NAME, num_classes=0, dynamic_img_size=True)
        load_weights(model, path)
        return cls(DinoEncoder(model, model.default_cfg["input_size"][-1], device, content_hash(path)))


class BackgroundConsistency(_Consistency):
    """Consistency of CLIP's embeddings."""

    SPEC = Spec(
        "background_consistency",
        f"open_clip_torch, {CLIP_B.file}",
        Direction.HIGHER,
        "0 to 1",
        "mean cosine of CLIP ViT-B/32 embeddings of a frame with the frame before and with the first frame",
        "vbench 0.1.5, vbench/background_consistency.py",
    )

    @classmethod
    def load(cls, weights: WeightFolder, device: torch.device) -> "BackgroundConsistency":
        """Load CLIP ViT-B/32."""
        return cls(_clip(CLIP_B, CLIP_B_NAME, weights, device))


class TextAlignment(Metric):
    """Likeness of frames to the prompt."""

    SPEC = Spec(
        "text_alignment",
        f"prompts, open_clip_torch, {CLIP_B.file}",
        Direction.HIGHER,
        "-1 to 1",
        "mean cosine of CLIP ViT-B/32 embeddings of frames and of the short prompt; not VBench's overall_consistency",
        "CLIPSIM of Wu et al. 2021, arXiv 2104.14806",
    )

    def __init__(self, encoder: ClipEncoder) -> None:
        self._encoder = encoder

    @classmethod
    def load(cls, weights: WeightFolder, device: torch.device) -> "TextAlignment":
        """Load CLIP ViT-B/32."""
        return cls(_clip(CLIP_B, CLIP_B_NAME, weights, device))

    def identity(self) -> dict[str, Any]:
        """See `Metric`."""
        return {"weights": self._encoder.weights}

    def begin(self, clip: Clip) -> Measure:
        """See `Metric`.

        Raises:
            NotMeasuredError: no prompt is known.
        """
        if clip.prompt is None:
            raise NotMeasuredError(
                "nothing says its prompt: give a folder of scripts/sample_suite.py, or --prompts_from_names"
            )
        text = self._encoder.encode_text(clip.prompt)
        return lambda frames: (self._encoder(frames) @ text).double().cpu().numpy()[:, None]


class AestheticQuality(Metric):
    """Score of the LAION aesthetic head.

    Args:
        encoder: of frames.
        head: of embeddings to a score from 0 to 10.
        head_weights: hash of the head's file.
    """

    SPEC = Spec(
        "aesthetic_quality",
        f"open_clip_torch, {CLIP_L.file}, {AESTHETIC.file}",
        Direction.HIGHER,
        "0 to 1",
        "score of the LAION aesthetic head on CLIP ViT-L/14 embeddings, divided by 10, mean over frames",
        "vbench 0.1.5, vbench/aesthetic_quality.py",
    )

    def __init__(self, encoder: Encoder, head: nn.Linear, head_weights: str) -> None:
        self._encoder, self._head, self._head_weights = encoder, head.to(encoder.device).eval(), head_weights

    @classmethod
    def load(cls, weights: WeightFolder, device: torch.device) -> "AestheticQuality":
        """Load CLIP ViT-L/14 and the head."""
        library("open_clip", "open_clip_torch")
        head_path, _ = weights.find(AESTHETIC), weights.find(CLIP_L)
        encoder = _clip(CLIP_L, CLIP_L_NAME, weights, device)
        head = nn.Linear(encoder.width, 1)
        load_weights(head, head_path)
        return cls(encoder, head, content_hash(head_path))

    def identity(self) -> dict[str, Any]:
        """See `Metric`."""
        return {"weights": self._encoder.weights, "head": self._head_weights}

    def begin(self, clip: Clip) -> Measure:
        """See `Metric`."""

        @torch.inference_mode()
        def measure(frames: Frames) -> Rows:
            found: Rows = (self._head(self._encoder(frames)) / MAX_AESTHETIC).double().cpu().numpy()
            return found

        return measure
