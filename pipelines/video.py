"""The former place of `pipelines.media.video`, for code that was written for it."""

import warnings

from pipelines.media.video import VideoWriter, read_video, to_uint8

__all__ = ["VideoWriter", "read_video", "to_uint8"]

warnings.warn("pipelines.video is now pipelines.media.video: import that", DeprecationWarning, stacklevel=2)
