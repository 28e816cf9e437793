"""Blocks of frames, gauges and messages as HTML that needs nothing from elsewhere."""

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from pipelines.app.live import LaneBlock

SMALL_PIXELS = 256 * 256
"""Size of a picture up to which it is encoded without loss, and shown with sharp pixels."""
QUALITY = 85
STYLE = """
.arl2-lanes { display: flex; flex-wrap: wrap; gap: 1rem; }
.arl2-lane { flex: 1 1 18rem; max-width: 52rem; }
.arl2-lane img { width: 100%; display: block; background: #000; }
.arl2-lane img.sharp { image-rendering: pixelated; }
.arl2-bar { height: .5rem; background: #8884; }
.arl2-bar div { height: 100%; background: #2a7de1; }
.arl2-error { color: #c22; }
"""


def animation(frames_THWC: Tensor, fps: int) -> bytes:
    """Frames as a WebP that plays once and stands on the last one.

    Args:
        frames_THWC: bytes, [T, H, W, 3].
    """
    pictures = [Image.fromarray(frame) for frame in frames_THWC.cpu().numpy()]
    ends = [round(1000 * (index + 1) / fps) for index in range(len(pictures))]
    durations = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=durations,
        loop=1,
        lossless=_is_small(frames_THWC),
        quality=QUALITY,
        method=0,
    )
    return buffer.getvalue()


def _is_small(frames_THWC: Tensor) -> bool:
    return frames_THWC.shape[1] * frames_THWC.shape[2] <= SMALL_PIXELS


def lanes_html(blocks: Sequence[LaneBlock], fps: int) -> str:
    """Videos side by side, each with its newest frames, and a gauge of what it remembers against the largest."""
    largest = max((block.remembered for block in blocks), default=1)
    return f'<div class="arl2-lanes">{"".join(_lane_html(block, fps, largest) for block in blocks)}</div>'


def _lane_html(block: LaneBlock, fps: int, largest: int) -> str:
    encoded = base64.b64encode(animation(block.frames_THWC, fps)).decode()
    kind = ' class="sharp"' if _is_small(block.frames_THWC) else ""
    kept = "" if block.is_recorded else " (the file is full, and ends before these)"
    return (
        '<div class="arl2-lane">'
        f"<b>{block.lane + 1}. {html.escape(block.title)}</b>"
        f'<img{kind} alt="frames" src="data:image/webp;base64,{encoded}">'
        f'<div class="arl2-bar"><div style="width: {100 * block.remembered / max(largest, 1):.1f}%"></div></div>'
        f"<div>{block.remembered:,} bytes remembered, {block.fps:.1f} fps, {block.total_frames} frames{kept}</div>"
        f"<div>{html.escape(block.prompt)}</div></div>"
    )


def message_html(text: str, is_error: bool = False) -> str:
    """A message for the visitor."""
    return f'<div class="{"arl2-error" if is_error else "arl2-note"}">{html.escape(text)}</div>'
