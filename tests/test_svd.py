"""The truncated SVD: exact against LAPACK in float64, fast close to the best energy, no surprises in between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pissa.linalg import LowRank, product_singular_values, relative_error, truncated_svd

both = pytest.mark.parametrize("accuracy", ["exact", "fast"])


def with_spectrum(
    rows: int, columns: int, power: float, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Singular values k^power between random orthonormal bases."""
    generator = torch.Generator().manual_seed(0)
    small = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(size, small, generator=generator, dtype=torch.float64)).Q
        for size in (rows, columns)
    )
    values = torch.arange(1, small + 1, dtype=torch.float64) ** power
    return ((left * values) @ right.T).to(dtype)


def product(found: LowRank) -> Tensor:
    return (found.U * found.S) @ found.Vh


def orthonormal(vectors: Tensor, tolerance: float) -> bool:
    eye = torch.eye(vectors.shape[1], dtype=vectors.dtype)
    return torch.allclose(vectors.T @ vectors, eye, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(160, 120), (120, 160), (400, 80), (80, 400)])
@pytest.mark.parametrize(
    ("power", "share"),
    [(-2.0, 0.999), (-0.5, 0.999), (-0.1, 0.99), (0.0, 0.999)],
    ids=["steep", "decaying", "nearly flat", "flat"],
)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_fast_captures_nearly_all_of_the_best_energy(shape, power, share, rank):
    weight = with_spectrum(*shape, power, torch.float32)
    best = torch.linalg.svdvals(weight.double())[:rank].square().sum()
    found = truncated_svd(weight, rank, "fast", name="w")
    captured = (
        weight.double().square().sum() - (weight.double() - product(found).double()).square().sum()
    )
    assert share * best <= captured <= (1 + 1e-6) * best
    assert orthonormal(found.U, 1e-5)
    assert orthonormal(found.Vh.T, 1e-5)
    assert (found.S[:-1] >= found.S[1:]).all()


def test_fast_really_sketches_and_still_finds_the_leading_values():
    weight = with_spectrum(400, 300, -0.5, torch.float32)
    fast, exact = (truncated_svd(weight, 8, accuracy) for accuracy in ("fast", "exact"))
    assert not torch.equal(fast.U, exact.U)
    assert torch.allclose(fast.S, exact.S, rtol=1e-4)
    assert relative_error(product(fast), product(exact)) < 0.02


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
def test_exact_agrees_with_lapack_in_float64(shape):
    weight = with_spectrum(*shape, -0.5)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    found, single = truncated_svd(weight, 7), truncated_svd(weight.float(), 7)
    assert torch.allclose(found.S, S[:7], rtol=1e-13)
    assert relative_error(product(found), (U[:, :7] * S[:7]) @ Vh[:7]) < 1e-13
    assert single.S.dtype == torch.float32
    assert torch.allclose(single.S.double(), S[:7], rtol=1e-6)
    assert relative_error(product(single).double(), (U[:, :7] * S[:7]) @ Vh[:7]) < 2e-6 * 7**0.5


@both
@pytest.mark.parametrize("shape", [(200, 150), (150, 200)])
def test_signs_are_fixed_by_the_largest_entry_on_the_left(accuracy, shape):
    weight = with_spectrum(*shape, -0.5)
    found, negated = truncated_svd(weight, 6, accuracy), truncated_svd(-weight, 6, accuracy)
    for U in (found.U, negated.U):
        assert (U.gather(0, U.abs().argmax(dim=0, keepdim=True)) > 0).all()
    assert torch.allclose(negated.Vh, -found.Vh, atol=1e-8)


@both
@pytest.mark.parametrize("size", [1e30, 1e-30, 1e-40], ids=str)
def test_huge_and_tiny_values_keep_their_singular_values(accuracy, size):
    unit = with_spectrum(120, 100, -0.5)
    weight = (size * unit).float()
    found = truncated_svd(weight, 5, accuracy)
    reference = torch.linalg.svdvals(weight.double())[:5]
    assert torch.allclose(found.S.double() / size, reference / size, rtol=1e-3)
    assert orthonormal(found.U, 1e-5)
    assert orthonormal(found.Vh.T, 1e-5)


@both
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (150, 200)])
def test_zero_matrix_has_zero_values_and_orthonormal_vectors(accuracy, shape):
    found = truncated_svd(torch.zeros(shape), 4, accuracy)
    assert not found.S.any()
    assert orthonormal(found.U, 0.0)
    assert orthonormal(found.Vh.T, 0.0)


@both
def test_rank_deficient_matrix_is_found_whole_with_finite_vectors(accuracy):
    weight = (with_spectrum(200, 3, -0.5) @ with_spectrum(3, 150, -0.5)).float()
    found = truncated_svd(weight, 8, accuracy)
    assert relative_error(product(found), weight) < 1e-5
    assert found.U.isfinite().all()
    assert found.Vh.isfinite().all()
    assert (found.S[3:] < 1e-5 * found.S[0]).all()


@both
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (25, 25), (1, 6), (6, 1)])
def test_full_rank_gives_the_matrix_back(accuracy, shape):
    weight = with_spectrum(*shape, -0.5)
    assert relative_error(product(truncated_svd(weight, min(shape), accuracy)), weight) < 1e-13


def test_balanced_factors_carry_one_over_scale():
    found = truncated_svd(with_spectrum(30, 20, -0.5), 4)
    left, right = found.balanced(scale=2.0)
    assert torch.allclose(2.0 * left @ right, product(found), atol=1e-14)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1))


def test_singular_values_of_a_thin_product_need_no_dense_product():
    left, right = with_spectrum(30, 4, -0.5), with_spectrum(4, 25, -0.5)
    expected = torch.linalg.svdvals(-3.0 * left @ right)[:4]
    assert torch.allclose(product_singular_values(left, right, 3.0), expected, rtol=1e-12)


def test_relative_error_of_zero_against_zero_is_zero():
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert relative_error(torch.full((4,), 3.0), torch.zeros(4)) == 6.0
    # Huge values do not overflow: the norm is taken in float64.
    assert abs(relative_error(torch.full((4,), 2e30), torch.full((4,), 1e30)) - 1.0) < 1e-6
