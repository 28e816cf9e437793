"""Classifier-free guidance of a model that was trained with it: two predictions in one pass, in one memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wan.model import FlowModel, PassOutput, TextKV


class GuidedModel:
    """Extrapolates from the prediction for one text to that for another, as Ho and Salimans (arXiv 2207.12598) do.

    Every pass computes 2·B videos: the first B read their prompts, the others the negative prompts. So text and memory
    are those of 2·B videos, and both halves remember the same blocks, each as its text has them. Latents are those of
    the B guided videos.

    Args:
        model: computes the passes.
        scale: 1 for the prediction for the prompt alone, 0 for that for the negative prompt.
    """

    def __init__(self, model: FlowModel, scale: float) -> None:
        self._model = model
        self._scale = scale

    def tokens_per_frame(self, height: int, width: int) -> int:
        """See `wan.model.CausalWanModel.tokens_per_frame`."""
        return self._model.tokens_per_frame(height, width)

    def __call__(
        self,
        latents_BFCHW: Tensor,
        timesteps_BF: Tensor,
        text: TextKV,
        views: Sequence[Any],
        frames_F: Tensor,
        remember: bool = False,
    ) -> PassOutput:
        """See `wan.model.CausalWanModel.forward`; `text` and `views` are those of 2·B videos, prompts first."""
        latents, timesteps = (torch.cat([each, each]) for each in (latents_BFCHW, timesteps_BF))
        flow, updates = self._model(latents, timesteps, text, views, frames_F, remember=remember)
        if flow is None:
            return PassOutput(None, updates)
        positive, negative = flow.chunk(2)
        return PassOutput(negative + self._scale * (positive - negative), updates)
