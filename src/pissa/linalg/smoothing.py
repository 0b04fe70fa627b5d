"""Smoothing: moving the range of outlying input channels from the activations into the weight.

    X W^T  =  (X diag(1 / smooth)) (W diag(smooth))^T        smooth_j = max|X_j|^a / max|W_j|^b

SmoothQuant (arXiv 2211.10438, equation 4) with the grid of SVDQuant (arXiv 2411.05007;
deepcompressor): a and b are not set, the caller takes the candidate whose layer output is nearest.
Deviation: each candidate is divided by the middle of its range, which changes no quotient between
channels and keeps all of them inside float16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

STEPS = 20
"""Exponents are multiples of 1 / 20."""
FLOOR = 1e-2
"""A channel counts as at least this share of the mean one: one that is dead on the calibration rows may yet wake."""


def exponents() -> Iterator[tuple[float, float]]:
    """The 39 pairs (a, b): no smoothing first, then (a, 0) and (a, 1 - a) for a = 1/20, ..., 19/20."""
    yield 0.0, 0.0
    for step in range(1, STEPS):
        yield step / STEPS, 0.0
        yield step / STEPS, 1 - step / STEPS


def smoothings(inputs: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """The candidates, float16 [in], finite and above zero.

    Args:
        inputs: X [rows, in], what enters the layer.
        weight: W [out, in].
    """
    ranges = _range(inputs), _range(weight)
    for a, b in exponents():
        factors = ranges[0] ** a / ranges[1] ** b
        yield (factors / (factors.max() * factors.min()).sqrt()).to(torch.float16)


def _range(matrix: Tensor) -> Tensor:
    """The largest absolute value of each column, at least `FLOOR` of their mean, float64; ones for a zero matrix."""
    largest = matrix.abs().amax(0).double()
    mean = largest.mean()
    return largest.clamp_min(FLOOR * mean) if mean > 0 else torch.ones_like(largest)
