"""The exact SVD's certificate: what is certified holds, checked against LAPACK in float64."""

from __future__ import annotations

import pytest
import torch

from pissa.errors import InputError
from pissa.linalg import svd, truncated_svd
from pissa.linalg.krylov import KrylovSpace
from spectra import drawn, missed, spectrum, with_values

CASES = 500


@pytest.mark.parametrize("part", range(10))
def test_what_is_certified_holds_for_any_shape_rank_spectrum_and_dtype(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that most of these small cases are not left to LAPACK
    monkeypatch.setattr(svd, "SMALL", 128)
    wrong, engines = [], set()
    for seed in range(part, CASES, 10):
        name, weight, rank = drawn(seed)
        found = truncated_svd(weight, rank, "exact", seed=seed)
        sigma, gap = missed(weight, found, torch.linalg.svdvals(weight.double()))
        certificate = found.certificate
        assert certificate is not None
        engines.add(certificate.engine)
        if not (sigma <= certificate.sigma <= 1e-5 and gap <= certificate.gap <= 1e-5):
            wrong.append(
                f"seed {seed}: {name}, rank {rank}: sigma {sigma:.1e}, gap {gap:.1e}, {certificate}"
            )
    assert wrong == []
    assert engines == {"lanczos", "lapack"}


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("kind", ["language", "flat", "steep"])
def test_a_looser_tolerance_is_certified_too_and_holds(kind: str, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = with_values(spectrum(kind, 600, generator), 700, 600, generator).float()
    found = truncated_svd(weight, 20, tolerance)
    sigma, gap = missed(weight, found, torch.linalg.svdvals(weight.double()))
    assert found.certificate is not None
    assert sigma <= found.certificate.sigma <= tolerance
    assert gap <= found.certificate.gap <= tolerance


@pytest.mark.parametrize("stretch", [2e-5, 1e-3])
def test_an_eigensolver_that_is_not_exact_enough_gets_no_certificate(
    stretch: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As CUDA's Jacobi in float32 does it: vectors that are longer than one, and singular values
    # with them.
    generator = torch.Generator().manual_seed(0)
    weight = with_values(spectrum("language", 600, generator), 700, 600, generator).float()
    ritz = KrylovSpace.ritz
    monkeypatch.setattr(
        KrylovSpace, "ritz", lambda space: (ritz(space)[0], ritz(space)[1] * (1 + stretch))
    )
    found = truncated_svd(weight, 16, "exact")
    sigma, _ = missed(weight, found, torch.linalg.svdvals(weight.double()))
    assert found.certificate is not None
    assert sigma <= found.certificate.sigma <= 1e-5
    assert found.certificate.engine == "lapack"


COPIES = [
    (copies, rank, low, seed)
    for copies, rank, low in ((46, 45, 0.7), (55, 35, 0.5), (90, 64, 0.05))
    for seed in range(6)
]


@pytest.mark.parametrize(("copies", "rank", "low", "seed"), COPIES)
def test_more_copies_of_a_value_than_a_block_has_columns_are_all_found(
    copies, rank, low, seed
) -> None:
    # A block sees at most as many copies of a singular value as it has columns; the probe from a
    # fresh block tells.
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(1, 401, dtype=torch.float64)
    values = torch.where(index <= copies, 1.0, low * (index - copies).clamp_min(1) ** -0.1)
    weight = with_values(values, 420, 400, generator)
    for dtype in (torch.float32, torch.float64):
        found = truncated_svd(weight.to(dtype), rank, "exact", seed=seed)
        assert (found.S - 1).abs().max() < 1e-5


def test_an_orthogonal_matrix_is_certified_without_lapack() -> None:
    torch.manual_seed(0)
    found = truncated_svd(torch.linalg.qr(torch.randn(700, 600)).Q, 16, "exact")
    assert found.certificate is not None
    assert found.certificate.engine == "lanczos"
    assert (found.S - 1).abs().max() < 1e-5


def test_a_space_is_enough_where_the_spectrum_falls_and_lapack_decides_where_the_rank_is_high() -> (
    None
):
    generator = torch.Generator().manual_seed(0)
    weight = with_values(torch.arange(1.0, 701).double() ** -0.8, 900, 700, generator).float()
    engines = [truncated_svd(weight, rank, "exact").certificate for rank in (16, 600)]
    assert [certificate and certificate.engine for certificate in engines] == ["lanczos", "lapack"]


def test_small_singular_values_beside_large_ones_are_right_to_their_own_size() -> None:
    # In float32 products a value of 1e-4 of the largest is lost; the engine goes to float64 by
    # itself.
    generator = torch.Generator().manual_seed(0)
    values = 10.0 ** (-5 * torch.arange(400, dtype=torch.float64) / 60).clamp_max(7)
    weight = with_values(values, 450, 400, generator)
    found = truncated_svd(weight.float(), 48, "exact")
    true = torch.linalg.svdvals(weight.float().double())[:48]
    assert float(true[-1] / true[0]) < 2e-4
    assert float(((found.S.double() - true) / true).abs().max()) < 1e-6


def test_fewer_directions_than_columns_are_found_whole() -> None:
    torch.manual_seed(0)
    weight = torch.randn(900, 12) @ torch.randn(12, 700)
    for accuracy in ("exact", "fast"):
        found = truncated_svd(weight, 16, accuracy)
        product = (found.U * found.S) @ found.Vh
        assert (product - weight).norm() < 1e-5 * weight.norm()


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_huge_and_tiny_values_are_certified_too(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = with_values(torch.arange(1.0, 701).double() ** -0.8, 900, 700, generator).float()
    plain, scaled = truncated_svd(weight, 8, "exact"), truncated_svd(weight * size, 8, "exact")
    assert torch.allclose(scaled.S / size, plain.S, rtol=1e-5)


@pytest.mark.parametrize("tolerance", [0.0, 1e-6, 1.5, -1e-3])
def test_a_tolerance_that_cannot_be_met_is_refused(tolerance: float) -> None:
    with pytest.raises(InputError, match="a tolerance from 5e-06 to 1"):
        truncated_svd(torch.eye(4), 2, tolerance)
