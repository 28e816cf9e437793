"""Training data against the model and the settings, before anything loads."""

from typing import Any

from arl2.distillation.data import Samples
from arl2.rollout import num_blocks
from pipelines.config import check_size
from wan.utils.errors import InputError


def check_data(data: Samples, sizes: dict[str, Any], frames_per_block: int) -> None:
    """Make sure that training data fits a model, and that there is something to learn from it.

    Args:
        data: all samples have one shape.
        sizes: of the transformer.
        frames_per_block: latent frames per block.

    Raises:
        InputError: it does not fit, or its videos are a single block: a hybrid layer over an empty state is the
            teacher's layer exactly, so every objective's gradient is zero.
    """
    frames, channels, height, width = data.latents_shape
    tokens, text_dim = data.text_shape
    blocks = num_blocks(frames, frames_per_block)
    check_size(height, width, 1, sizes["patch_size"])
    if channels != sizes["in_dim"] or text_dim != sizes["text_dim"] or tokens > sizes["text_len"]:
        raise InputError(
            f"data of {channels} channels and text {(tokens, text_dim)} does not fit a model of {sizes['in_dim']} "
            f"channels and at most {sizes['text_len']} tokens of {sizes['text_dim']} (the longest text is that of "
            f"sample {data.longest_text}): check data and model_folder, or make the data again"
        )
    if blocks < 2:
        raise InputError(
            f"videos of {frames} latent frames are a single block of {frames_per_block}, from which a memory has "
            "nothing to learn: train on videos of at least two blocks, or on smaller blocks (frames_per_block)"
        )
