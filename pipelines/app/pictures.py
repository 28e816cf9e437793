"""Blocks of frames, gauges and messages as HTML that needs nothing from elsewhere."""

import base64
import html
import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from pipelines.app.live import LaneBlock
from pipelines.app.memory_test import GIVEN_FRAMES, NUM_FRAMES, RIGHT, Findings, Moment, Verdict

SMALL_PIXELS = 256 * 256
"""Size of a picture up to which it is encoded without loss, and shown with sharp pixels."""
QUALITY = 85
MARK_FRAMES, MARK_PIXELS, MARK_COLOUR = 8, 3, (255, 0, 255)
"""Frames from a moment on that have a border, its width, and its colour, which no scene has."""
STYLE = """
.arl2-lanes { display: flex; flex-wrap: wrap; gap: 1rem; }
.arl2-lane { flex: 1 1 18rem; max-width: 52rem; }
.arl2-lane img { width: 100%; display: block; background: #000; }
.arl2-lane img.sharp { image-rendering: pixelated; }
.arl2-bar { height: .5rem; background: #8884; }
.arl2-bar div { height: 100%; background: #2a7de1; }
.arl2-error { color: #c22; }
.arl2-time { position: relative; height: 1rem; margin: .2rem 0; background: #8884; }
.arl2-time div { position: absolute; top: 0; bottom: 0; }
.arl2-given { background: #8888; }
.arl2-hidden { background: repeating-linear-gradient(45deg, #8888 0 4px, #8882 4px 8px); }
.arl2-back { width: 3px; background: #f0f; }
.arl2-now { width: 2px; background: #2a7de1; }
.arl2-verdict { font-weight: bold; color: #c22; }
.arl2-verdict.right { color: #183; }
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
    encoded = base64.b64encode(animation(marked(block), fps)).decode()
    kind = ' class="sharp"' if _is_small(block.frames_THWC) else ""
    kept = "" if block.is_recorded else " (the file is full, and ends before these)"
    return (
        '<div class="arl2-lane">'
        f"<b>{block.lane + 1}. {html.escape(block.title)}</b>"
        f'<img{kind} alt="frames" src="data:image/webp;base64,{encoded}">'
        f'<div class="arl2-bar"><div style="width: {100 * block.remembered / max(largest, 1):.1f}%"></div></div>'
        f"<div>{block.remembered:,} bytes remembered, {block.fps:.1f} fps, {block.total_frames} frames{kept}</div>"
        f"<div>{html.escape(block.prompt)}</div>"
        f"{'' if block.findings is None else _findings_html(block.findings, block.total_frames)}</div>"
    )


def marked(block: LaneBlock) -> Tensor:
    """Frames of a block, bytes [T, H, W, 3], with a border for a while from when an object should be seen again."""
    if block.findings is None:
        return block.frames_THWC
    first = block.total_frames - len(block.frames_THWC)
    frames, width = block.frames_THWC.clone(), MARK_PIXELS
    colour = torch.tensor(MARK_COLOUR, dtype=frames.dtype)
    for moment in block.findings.moments:
        shown = frames[max(moment.back - first, 0) : max(moment.back + MARK_FRAMES - first, 0)]
        for edge in (shown[:, :width], shown[:, -width:], shown[:, :, :width], shown[:, :, -width:]):
            edge.copy_(colour)
    return frames


def _findings_html(findings: Findings, now: int) -> str:
    """A line of time per object, and what came back of it."""
    verdicts = findings.verdicts or (None,) * len(findings.moments)
    return "".join(
        _time_html(moment, now) + _verdict_html(moment, verdict)
        for moment, verdict in zip(findings.moments, verdicts, strict=True)
    )


def _time_html(moment: Moment, now: int) -> str:
    def span(kind: str, begin: int, end: int | None = None) -> str:
        width = "" if end is None else f"; width: {100 * (end - begin) / NUM_FRAMES:.1f}%"
        return f'<div class="arl2-{kind}" style="left: {100 * begin / NUM_FRAMES:.1f}%{width}"></div>'

    parts = span("given", 0, GIVEN_FRAMES) + span("hidden", moment.hidden_from, moment.back)
    return f'<div class="arl2-time">{parts}{span("back", moment.back)}{span("now", min(now, NUM_FRAMES - 1))}</div>'


def _verdict_html(moment: Moment, verdict: Verdict | None) -> str:
    name = html.escape(moment.name)
    about = f"{name}: out of sight from frame {moment.hidden_from}, to be seen again from frame {moment.back}"
    if verdict is None:
        return f"<div>{about}</div>"
    seen = "nothing came back" if verdict.seen is None else f"a {html.escape(verdict.seen)} came back"
    kind = " right" if verdict.word == RIGHT else ""
    return f'<div>{about}</div><div class="arl2-verdict{kind}">{html.escape(verdict.word)}: {seen}</div>'


def message_html(text: str, is_error: bool = False) -> str:
    """A message for the visitor."""
    return f'<div class="{"arl2-error" if is_error else "arl2-note"}">{html.escape(text)}</div>'
