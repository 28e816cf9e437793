"""A picture of some videos: one row of frames each, enlarged, with a title."""

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP, LINE = 8, 30
PAGE, INK, FAINT = (255, 255, 255), (36, 41, 47), (110, 119, 129)


def enlarge(frames_TCHW: Tensor, scale: int) -> Tensor:
    """Repeat every pixel `scale` times each way: [T, 3, H, W] to [T, H, W, 3]."""
    return frames_TCHW.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1).contiguous()


def contact_sheet(samples: list[tuple[Tensor, str]], columns: int = 9, scale: int = 2) -> Image.Image:
    """One row of frames for each video, its title above and the frames' numbers below.

    Args:
        samples: videos of bytes, [T, 3, H, W], all of one size, and their titles.
        columns: frames of a row, evenly spread from the first to the last.
        scale: how often each pixel is repeated.
    """
    height, width = (size * scale for size in samples[0][0].shape[-2:])
    row_height = LINE + height + LINE
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, len(samples) * row_height + GAP), PAGE)
    page, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(18), ImageFont.load_default(13)
    for row, (video, title) in enumerate(samples):
        top = row * row_height
        page.text((GAP, top + LINE / 2 + 2), title, INK, font, anchor="lm")
        numbers = torch.linspace(0, len(video) - 1, columns).round().long()
        for column, (number, frame) in enumerate(zip(numbers.tolist(), enlarge(video[numbers], scale), strict=True)):
            left = GAP + column * (width + GAP)
            sheet.paste(Image.fromarray(frame.numpy()), (left, top + LINE))
            page.text((left, top + LINE + height + 4), f"frame {number}", FAINT, small)
    return sheet
