"""Which rows of every frame inside the decoder are computed where only a band of the video's rows is wanted.

A decoder of stages, each twice as large as the one before, is local in space: a layer's output depends on a few more
rows of its input on either side, its halo. Going from the wanted rows back to the latents, layer by layer, tells how
many rows each layer has to leave. More rows than that are cropped right after the layer, among them all that a
convolution computed beside zeros where the frame goes on.

Neighbouring bands compute some rows twice, and all bands compute the first layers whole. In the released decoder, at
480 × 832 pixels, the most that one band takes of the convolutions' multiplications (`tests/wan/vae/test_vae_bands.py`):

| bands | all stages | first stage | second | third | fourth |
|---|---|---|---|---|---|
| 2 | 54 % | 75 % | 58 % | 53 % | 51 % |
| 4 | 33 % | 70 % | 41 % | 32 % | 27 % |
| 8 | 21 % | 60 % | 28 % | 19 % | 15 % |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

ALL_ROWS = slice(None)


class Rows(NamedTuple):
    """Rows of a frame, from `begin` up to but without `end`."""

    begin: int
    end: int

    def grown(self, halo: int | None, height: int) -> "Rows":
        """These rows and `halo` more on either side, within a frame of `height` rows; the whole frame for None."""
        if halo is None:
            return Rows(0, height)
        return Rows(max(self.begin - halo, 0), min(self.end + halo, height))

    def halved(self) -> "Rows":
        """The rows of a frame of half the size that these rows are copies of."""
        return Rows(self.begin // 2, -(-self.end // 2))

    def within(self, outer: "Rows") -> slice:
        """Where these rows are in a tensor that holds the rows `outer`."""
        return ALL_ROWS if self == outer else slice(self.begin - outer.begin, self.end - outer.begin)


@dataclass(frozen=True)
class Band:
    """One of `count` bands of rows, as equal in height as can be, that together are a frame.

    Attributes:
        index: of this one from the top, from 0.
        count: of all.
    """

    index: int
    count: int

    def rows(self, height: int) -> Rows:
        """The band's rows of a frame of `height` rows."""
        return Rows(height * self.index // self.count, height * (self.index + 1) // self.count)


class StageHalos(NamedTuple):
    """Halos of the layers of a stage, in rows; None for a layer that needs the whole frame.

    Attributes:
        blocks: of the layers that keep the size.
        last: of the layer after them, in rows of the size that it leaves. In the last stage it makes the pixels; in the
            others it copies every row to two, of which what it leaves is computed.
    """

    blocks: Sequence[int | None]
    last: int | None


def plan_crops(band: Band, height: int, stages: Sequence[StageHalos]) -> list[list[slice]]:
    """Where to crop, so that the last stage leaves a band of its rows as if the whole frame had been computed.

    Args:
        height: rows of the first stage's frames, which enter whole.
        stages: from the first to the last.

    Returns:
        for each stage, rows of what each of its layers leaves. They count rows that are there, not those of the whole
        frame; for a layer that doubles the size they count pairs of rows.
    """
    plan: list[list[slice]] = []
    wanted = band.rows(height << (len(stages) - 1))
    for stage in reversed(range(len(stages))):
        (blocks, last), size = stages[stage], height << stage
        # What each layer leaves, from the last to the first, and what enters the stage.
        if stage < len(stages) - 1:
            left = [wanted.halved(), wanted.grown(last, 2 * size).halved()]
        else:
            left = [wanted, wanted.grown(last, size)]
        for halo in reversed(blocks):
            left.append(left[-1].grown(halo, size))
        wanted = left.pop()
        pairs = wanted.halved()  # the stage before leaves whole pairs of rows
        entering = Rows(2 * pairs.begin, 2 * pairs.end) if stage else Rows(0, size)
        computed = [entering, *left[:0:-1]]
        plan.append([rows.within(outer) for rows, outer in zip(reversed(left), computed, strict=True)])
    return plan[::-1]
