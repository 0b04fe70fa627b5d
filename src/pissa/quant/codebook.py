"""The nearest of a few values by table: on a processor four times as fast as a search among their midpoints."""

from __future__ import annotations

import torch
from torch import Tensor

CELLS = 2048


class Codebook:
    """Values in [-1, 1], by code.

    The range is cut into cells so narrow that none holds two midpoints between neighbouring values.
    The cell of a number says how many midpoints lie in the cells below; one comparison tells on
    which side of its cell's own midpoint it is. Numbers and midpoints find their cells by the same
    arithmetic, in which a larger number never comes first, so no rounding puts a number on the
    wrong side.

    Args:
        values: float32 [codes], in any order.
    """

    def __init__(self, values: Tensor) -> None:
        order = values.argsort()
        midpoints = (values[order[:-1]] + values[order[1:]]) / 2
        cells = _cells(midpoints)
        assert len(torch.unique(cells)) == len(midpoints), "two midpoints in one cell"
        self._order = order.to(torch.uint8)
        self._below = torch.bucketize(torch.arange(CELLS + 1, dtype=torch.int32), cells).to(
            torch.uint8
        )
        self._midpoint = torch.full((CELLS + 1,), torch.inf)
        self._midpoint[cells] = midpoints

    def codes(self, numbers: Tensor) -> Tensor:
        """uint8: the code of the value nearest to each number in [-1, 1], of the lower one at a midpoint."""
        cells = _cells(numbers)
        places = self._below.index_select(0, cells) + (
            numbers > self._midpoint.index_select(0, cells)
        )
        return self._order.index_select(0, places.int())


def _cells(numbers: Tensor) -> Tensor:
    return ((numbers + 1) * (CELLS / 2)).int()
