"""The former place of `pipelines.generation.pipeline`, for code that was written for it."""

import warnings

from pipelines.generation.blocks import NonFiniteBlockError, VideoBlock, VideoOutput
from pipelines.generation.pipeline import CausalVideoPipeline

__all__ = ["CausalVideoPipeline", "NonFiniteBlockError", "VideoBlock", "VideoOutput"]

warnings.warn(
    "pipelines.text_to_video is now pipelines.generation.pipeline: import that", DeprecationWarning, stacklevel=2
)
