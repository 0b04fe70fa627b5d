"""The exact SVD's certificate: bounds from computed residuals, checked against LAPACK in float64."""

from __future__ import annotations

import pytest
import torch

from pissa.linalg import truncated_svd


def constructed(rows: int, columns: int, power: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(rows + columns)
    small = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(size, small, dtype=torch.float64)).Q for size in (rows, columns))
    return ((left * torch.arange(1.0, small + 1, dtype=torch.float64) ** power) @ right.T).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(900, 700), (700, 900), (640, 640)])
@pytest.mark.parametrize(("power", "rank"), [(-0.5, 8), (-0.5, 64), (-1.5, 8), (-1.5, 64), (-3.0, 32)])
def test_what_is_certified_holds(dtype: torch.dtype, shape: tuple[int, int], power: float, rank: int) -> None:
    weight = constructed(*shape, power, dtype)
    found = truncated_svd(weight, rank, "exact")
    true = torch.linalg.svdvals(weight.double())
    certificate = found.certificate
    assert certificate is not None
    assert certificate.sigma <= 1e-5
    assert certificate.gap <= 1e-5
    rounding = 2e-6 * float(true[0] / true[rank - 1])
    error = ((found.S.double() - true[:rank]).abs() / true[:rank]).max()
    assert error <= certificate.sigma + rounding
    product = (found.U.double() * found.S.double()) @ found.Vh.double()
    left_over = (weight.double() - product).square().sum()
    best = true[rank:].square().sum()
    assert (left_over - best) / best <= certificate.gap + rounding


def test_a_subspace_is_enough_where_the_spectrum_falls() -> None:
    certificate = truncated_svd(constructed(900, 700, -0.8), 16, "exact").certificate
    assert certificate is not None
    assert certificate.engine == "subspace"


def test_a_flat_spectrum_goes_to_lapack() -> None:
    torch.manual_seed(0)
    weight = torch.linalg.qr(torch.randn(700, 600)).Q
    certificate = truncated_svd(weight, 16, "exact").certificate
    assert certificate is not None
    assert certificate.engine == "lapack"


def test_fewer_directions_than_columns_are_found_whole() -> None:
    torch.manual_seed(0)
    weight = torch.randn(900, 12) @ torch.randn(12, 700)
    for accuracy in ("exact", "fast"):
        found = truncated_svd(weight, 16, accuracy)
        product = (found.U * found.S) @ found.Vh
        assert (product - weight).norm() < 1e-5 * weight.norm()


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_huge_and_tiny_values_are_certified_too(size: float) -> None:
    weight = constructed(900, 700, -0.8)
    plain, scaled = truncated_svd(weight, 8, "exact"), truncated_svd(weight * size, 8, "exact")
    assert torch.allclose(scaled.S / size, plain.S, rtol=1e-5)


def test_same_bits_at_every_call_and_another_start_for_another_name() -> None:
    weight = constructed(900, 700, -0.5)
    first, second = (truncated_svd(weight, 16, "fast", seed=3, name="w") for _ in range(2))
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.Vh, second.Vh)
    assert not torch.equal(first.U, truncated_svd(weight, 16, "fast", seed=3, name="v").U)
