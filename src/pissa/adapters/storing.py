"""A split as files hold it, and what that keeps and loses: a line of `pissa.json`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pissa.errors import InputError
from pissa.linalg import frobenius, product_singular_values
from pissa.records import Layer
from pissa.splits import Split

ROWS = 256
"""Rows that are worked on at a time, so that they stay in the cache."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A split in the dtypes of its files.

    Attributes:
        frozen: [out, in] in its own dtype; of a quantised one what it stands for.
        split: with factors that are representable in theirs.
        layer: what was kept and lost.
    """

    frozen: Tensor
    split: Split
    layer: Layer


def store(name: str, split: Split, factor_dtype: torch.dtype, frozen_dtype: torch.dtype) -> Stored:
    """Round a split: factors first, then the frozen part, taken against the rounded factors.

    In that order only the frozen part's own rounding remains. The error is measured on what is
    stored.

    Args:
        name: of the tensor.
        split: of the weight in its own dtype.
        factor_dtype: of left, right and core in the file.
        frozen_dtype: of the frozen part in the file.

    Raises:
        InputError: the frozen part overflows its dtype.
    """
    split = split.rounded(factor_dtype)
    quantised = split.quantised
    frozen = (
        quantised.dense.to(frozen_dtype)
        if quantised
        else torch.empty_like(split.weight, dtype=frozen_dtype)
    )
    lost = 0.0
    parts = (torch.split(part, ROWS) for part in (split.weight, split.left_core, frozen))
    for weight, left, rows in zip(*parts, strict=True):
        product = split.scale * (left @ split.right)
        if not quantised:
            rows.copy_(weight - product)
        lost += frobenius(product.add_(rows).sub_(weight)) ** 2
    if not lost < float("inf"):
        raise InputError(
            f"the frozen part of `{name}` overflows {str(frozen_dtype).removeprefix('torch.')}: store it in float32"
        )
    return Stored(frozen, split, describe(name, split, lost**0.5))


def describe(name: str, split: Split, lost: float = 0.0) -> Layer:
    """A split's line in `pissa.json`.

    Args:
        name: of the tensor.
        split: what trains.
        lost: Frobenius norm of what the weight lost on the way; 0 where the weight is kept as it
            is.
    """
    pieces = torch.split(split.weight, ROWS)
    squares: list[float] = [frobenius(rows.to(split.left.dtype)) ** 2 for rows in pieces]
    norm: float = sum(squares) ** 0.5
    values = product_singular_values(split.left_core, split.right, split.scale)
    energy = float(values.square().sum()) / norm**2 if norm > 0 else 0.0
    error = lost / norm if norm > 0 else lost
    kept = [float(f"{value:.6g}") for value in values]
    return Layer(name, list(split.weight.shape), split.rank, energy, error, kept)
