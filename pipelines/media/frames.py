"""Decoded frames of videos as a player shows them: upright, in the right colours.

- Colours: the matrix and the range are those that the frame is tagged with. Where the matrix is missing it is BT.709
  from `HD_LINES` lines upward and BT.601 below, as browsers do; where the range is missing it is limited for YUV and
  full for RGB and grey. Primaries are not converted. HDR is refused, since no tone mapping is done.
- Transparency: composited over white, as in pictures.
- Orientation: quarter turns and mirrorings of the display matrix are applied, other angles refused.
"""

import struct

import av
import numpy as np
from av.video.reformatter import ColorRange, ColorTrc, Interpolation
from numpy.typing import NDArray
from PIL import Image

from pipelines.media import images
from wan.utils.errors import InputError

Picture = NDArray[np.uint8]

HD_LINES = 720
BT709, BT601 = 1, 6
MATRICES = (BT709, 4, 5, BT601, 7, 9)
"""Numbers in ITU-T H.273 of the matrices that can be converted: BT.709, FCC, BT.601 twice, SMPTE 240M, BT.2020."""
NO_MATRICES = (0, 2, 3)
"""Numbers that name no matrix: RGB (on a YUV format, a wrong tag), unspecified, reserved."""
HDR_TRANSFERS = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
"""Colours to within 2 of 255; the plain conversion is off by 3."""


class UnusableVideoError(InputError):
    """A video that cannot become a sample: unreadable, without pictures or times, or too short."""


def upright(frame: av.VideoFrame) -> tuple[Picture, bool]:
    """A frame as a player shows it, [H, W, 3], and whether its rows and columns were exchanged.

    Raises:
        UnusableVideoError: colours that cannot be converted, or a turn by another angle than a multiple of 90 degrees.
    """
    transposed, mirrored_x, mirrored_y = _orientation(frame)
    picture = to_rgb(frame)
    picture = picture.transpose(1, 0, 2) if transposed else picture
    return picture[:: -1 if mirrored_y else 1, :: -1 if mirrored_x else 1], transposed


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How to show a frame: exchange rows and columns, then mirror left to right, then top to bottom."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    # Row vectors times [[a, b, u], [c, d, v], [x, y, w]]; a to d as 16.16.
    numbers = struct.unpack_from("=5i", matrix)
    corner = np.array([numbers[0], numbers[1], numbers[3], numbers[4]], dtype=float)
    a, b, c, d = np.round(corner / max(np.abs(corner).max(), 1), 2)
    if (abs(a), abs(b), abs(c), abs(d)) not in ((1, 0, 0, 1), (0, 1, 1, 0)):
        if (abs(a), abs(b)) != (abs(d), abs(c)) or a * d == b * c:
            raise UnusableVideoError("has a display matrix that does more than turn and mirror, or shows nothing")
        raise UnusableVideoError(f"is turned by {frame.rotation} degrees, not by a multiple of 90")
    return (True, c < 0, b < 0) if a == 0 else (False, a < 0, d < 0)


def to_rgb(frame: av.VideoFrame) -> Picture:
    """A frame's pixels in RGB as they are stored, [H, W, 3]; the module says how colours are chosen.

    Raises:
        UnusableVideoError: a matrix that cannot be converted, or HDR.
    """
    if frame.color_trc in HDR_TRANSFERS:
        raise UnusableVideoError(f"is HDR ({HDR_TRANSFERS[frame.color_trc]}): convert it to SDR in BT.709 first")
    form = frame.format
    if not form.is_rgb and frame.colorspace not in MATRICES:
        if frame.colorspace not in NO_MATRICES:
            raise UnusableVideoError(
                f"has a colour matrix that cannot be converted (number {frame.colorspace} in H.273)"
            )
        frame.colorspace = BT709 if frame.height >= HD_LINES else BT601
    has_alpha = any(component.is_alpha for component in form.components) or form.name == "pal8"
    pixels: Picture = frame.reformat(format="rgba" if has_alpha else "rgb24", interpolation=EXACT).to_ndarray()
    if form.name.startswith(("gray", "ya")) and frame.color_range == ColorRange.MPEG:
        # The converter takes all grey for full range.
        grey = np.clip((pixels[..., :3].astype(np.float32) - 16) * (255 / 219), 0, 255)
        pixels[..., :3] = np.rint(grey).astype(np.uint8)
    return np.asarray(images.to_rgb(Image.fromarray(pixels))) if has_alpha else pixels
