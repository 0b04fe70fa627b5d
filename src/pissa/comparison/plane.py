"""The plane in which several paths of changes lie best.

A run is a path of changes ``D_i = B_i A_i`` of all adapted weights together, from the start, where
D = 0. The two leading directions of all points of all paths come from the Gram matrix ``<D_i, D_j>
= sum (B_i^T B_j) * (A_i A_j^T)``, so nothing larger than a factor is formed for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pissa.checkpoint.targets import Target
from pissa.errors import InputError
from pissa.splits import Lora

Changes = dict[Target, Lora]


def plane_of(points: list[Changes]) -> tuple[Tensor, Tensor, float]:
    """The plane of the two leading directions.

    Returns:
        Coordinates [n, 2] of the points, the directions as sums of points [n, 2], the share of
        squared lengths held.

    Raises:
        InputError: points that span no plane.
    """
    gram = torch.tensor([[_inner(a, b) for b in points] for a in points], dtype=torch.float64)
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if len(points) < 2 or values[1] <= 1e-12 * values[0]:
        raise InputError(
            "the paths lie on one line: take two runs, or runs with checkpoints between start and end"
        )
    root, leading = values[:2].sqrt(), vectors[:, :2]
    # Most paths go right and up.
    vectors[:, :2] = leading * leading.sum(0).sign().where(leading.sum(0) != 0, 1.0)
    return vectors[:, :2] * root, vectors[:, :2] / root, float(values[:2].sum() / values.sum())


def direction_of(points: list[Changes], weights: Tensor) -> dict[Target, Tensor]:
    """``sum_i w_i D_i`` [out, in] in float32, by target."""
    total: dict[Target, Tensor] = {}
    for changes, weight in zip(points, weights.tolist(), strict=True):
        for target, change in changes.items():
            delta = weight * change.delta().float()
            total[target] = total[target].add_(delta) if target in total else delta
    return total


def _inner(one: Changes, other: Changes) -> float:
    """``<D, D'>`` over all weights; a weight that only one of them changes adds nothing."""
    total = 0.0
    for target in one.keys() & other.keys():
        a, b = one[target], other[target]
        total += float(((a.B.double().T @ b.B.double()) * (a.A.double() @ b.A.double().T)).sum())
    return total
