"""Components that come batch by batch are those of all rows at once."""

from __future__ import annotations

from functools import reduce
from itertools import permutations

import pytest
import torch
from torch import Tensor

from pissa.linalg import Components


def stream(rows: int = 60, columns: int = 12, seed: int = 0) -> Tensor:
    """Rows in float64 with a large mean and variances that fall."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return noise * torch.arange(1.0, columns + 1, dtype=torch.float64) ** -0.7 + 5


def pca(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of all rows at once, by LAPACK."""
    _, S, Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return S, Vh


def joined(parts: tuple[Tensor, ...], most: int) -> Components:
    return reduce(
        lambda one, other: one.joined(other, most), (Components.of(part, most) for part in parts)
    )


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_without_truncation_joining_in_any_order_is_the_decomposition_of_all_rows(
    order: tuple[int, ...],
) -> None:
    rows = stream()
    parts = rows.split([7, 30, 23])  # the first has fewer rows than columns
    seen = joined(tuple(parts[i] for i in order), 12)
    S, Vh = pca(rows)
    assert torch.allclose(seen.values, S, rtol=0, atol=1e-10)
    assert torch.allclose(
        (seen.vectors @ Vh.T).abs(), torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-10
    )
    assert torch.allclose(seen.mean, rows.mean(0), rtol=0, atol=1e-10)
    assert seen.rows == 60
    assert seen.energy == pytest.approx(float(S.square().sum()), rel=1e-12)


def test_the_energy_stays_exact_when_components_are_cut_off() -> None:
    rows = stream()
    seen = joined(rows.split(20), 3)
    S, Vh = pca(rows)
    assert seen.values.shape == (3,) and seen.vectors.shape == (3, 12)
    assert seen.energy == pytest.approx(float(S.square().sum()), rel=1e-12)
    assert 0.5 < float(seen.shares.sum()) <= float(S[:3].square().sum() / S.square().sum())
    assert float((seen.vectors @ Vh[:3].T).diagonal().abs().min()) > 0.95


def test_vectors_are_orthonormal_and_their_signs_fixed() -> None:
    one, other = Components.of(stream(), 5), Components.of(stream().flip(0), 5)
    assert torch.allclose(
        one.vectors @ one.vectors.T, torch.eye(5, dtype=torch.float64), atol=1e-12
    )
    assert torch.allclose(one.vectors, other.vectors, atol=1e-10)
    assert (one.vectors.gather(1, one.vectors.abs().argmax(1, keepdim=True)) > 0).all()


def test_rows_in_16_bits_are_computed_in_32() -> None:
    rows = stream().bfloat16()
    seen = Components.of(rows, 4)
    assert seen.values.dtype == seen.vectors.dtype == torch.float32
    assert torch.allclose(seen.values.double(), pca(rows.double())[0][:4], rtol=1e-5)


def test_the_same_batch_twice_converges_and_a_new_direction_does_not() -> None:
    rows = stream()
    once = Components.of(rows, 6)
    twice = once.joined(Components.of(rows, 6), 6)
    assert twice.converged(once).all()
    strange = torch.zeros(40, 12, dtype=torch.float64)
    strange[::2, 11] = 9.0  # along the column that varied least
    assert not twice.joined(Components.of(strange, 6), 6).converged(twice)[0]


def test_two_components_that_change_places_have_converged() -> None:
    first = Components(torch.zeros(3), torch.tensor([2.0, 1.9]), torch.eye(3)[:2], 10, 8.0)
    second = Components(torch.zeros(3), torch.tensor([2.1, 2.0]), torch.eye(3)[[1, 0]], 20, 9.0)
    assert second.converged(first).all()


def test_rows_that_are_all_equal_have_no_variance() -> None:
    seen = Components.of(torch.full((4, 3), 7.0), 2)
    assert seen.energy == 0 and not seen.shares.any() and seen.converged(seen).all()
