"""Maps one of their tensors to one of our parameters: a row of a family's table, used in both directions.

Axes: D model width, N query heads, K key/value heads, H head width, F feed-forward width, V vocabulary, P positions,
E experts
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Sizes = Mapping[str, int]  # of the axes, by letter
Index = Mapping[str, slice]  # a part of each axis, by letter


class Tensor(NamedTuple):
    """ours: path of a parameter, without the layer axis; theirs: name of a tensor, {l} the layer, {e} the expert.

    axes: "theirs->ours"; an axis of theirs may merge several of ours: "NH,D->DNH" is a matrix [N * H, D]. "3NH" is the
    axis of three concatenated tensors, of which this is number `part`. If theirs has {e}, each expert is a separate tensor,
    and our axis E does not appear in theirs.
    """

    ours: str
    theirs: str
    axes: str
    part: int = 0

    @property
    def their_axes(self) -> list[str]:
        return self.axes.split("->")[0].split(",")

    @property
    def our_axes(self) -> str:
        return self.axes.split("->")[1]

    @property
    def expert(self) -> bool:
        return "{e}" in self.theirs

    def name(self, layer: int | None = None, expert: int | None = None) -> str:
        return self.theirs.format(l=layer, e=expert)

    def their_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(parts * math.prod(sizes[a] for a in letters) for parts, letters in map(_parts, self.their_axes))

    def their_slices(self, index: Index, sizes: Sizes) -> tuple[slice, ...]:
        """The part of their tensor that holds `index` of ours. Of merged axes only the first may be partial, else ValueError."""
        return tuple(self._span(*_parts(axis), index, sizes) for axis in self.their_axes)

    def _span(self, parts: int, letters: str, index: Index, sizes: Sizes) -> slice:
        inner = math.prod(sizes[a] for a in letters[1:])
        if any(index[a] != slice(0, sizes[a]) for a in letters[1:]):
            raise ValueError(f"{self.theirs}: a part of {letters} that is not contiguous")
        first = index[letters[0]]
        start = (self.part if parts > 1 else 0) * math.prod(sizes[a] for a in letters)
        return slice(start + first.start * inner, start + first.stop * inner)

    def to_ours(self, theirs: np.ndarray, index: Index) -> np.ndarray:
        """The part of their tensor given by `their_slices`, with our axes. A view."""
        letters = "".join(_parts(axis)[1] for axis in self.their_axes)
        theirs = theirs.reshape([index[a].stop - index[a].start for a in letters])
        return theirs.transpose([letters.index(a) for a in self.our_axes if a in letters])

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """A whole parameter of one layer (and one expert) with their axes; of a concatenated tensor, only this part."""
        letters = "".join(_parts(axis)[1] for axis in self.their_axes)
        axes = [a for a in self.our_axes if a in letters]
        sizes = dict(zip(axes, ours.shape, strict=True))
        shape = [math.prod(sizes[a] for a in _parts(axis)[1]) for axis in self.their_axes]
        return np.ascontiguousarray(ours.transpose([axes.index(a) for a in letters]).reshape(shape))

    @property
    def joined_axis(self) -> int:
        """The axis of theirs along which several of ours are concatenated; -1: none."""
        return next((i for i, axis in enumerate(self.their_axes) if _parts(axis)[0] > 1), -1)


def _parts(axis: str) -> tuple[int, str]:
    """'3NH' -> (3, 'NH')."""
    number, letters = re.fullmatch(r"(\d*)([A-Z]+)", axis).groups()
    return int(number or 1), letters
