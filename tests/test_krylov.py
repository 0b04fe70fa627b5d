"""The Krylov space under the fast and the exact SVD."""

from __future__ import annotations

import pytest
import torch

from pissa.linalg import lanczos, truncated_svd
from pissa.linalg.krylov import KrylovSpace
from spectra import missed, spectrum, with_values


def matrix(
    kind: str = "language", rows: int = 500, columns: int = 400, dtype: torch.dtype = torch.float32
):
    generator = torch.Generator().manual_seed(0)
    return with_values(spectrum(kind, min(rows, columns), generator), rows, columns, generator).to(
        dtype
    )


def orthonormality(space: KrylovSpace) -> float:
    basis = space.basis[: space.size].double()
    return float((basis @ basis.T - torch.eye(space.size)).abs().max())


@pytest.mark.parametrize("kind", ["language", "flat", "steep", "exponential", "equal", "deficient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_basis_stays_orthonormal_whatever_the_spectrum(kind: str, dtype: torch.dtype) -> None:
    space = KrylovSpace(matrix(kind, dtype=dtype), dtype, block=16, capacity=320, seed=0)
    space.grow(320)
    assert orthonormality(space) < 20 * torch.finfo(dtype).eps


def test_images_and_projection_are_those_of_the_matrix() -> None:
    weight = matrix(dtype=torch.float64)
    space = KrylovSpace(weight, weight.dtype, block=8, capacity=64, seed=0)
    space.grow(64)
    basis = space.basis.T
    assert torch.allclose(space.images.T, weight @ basis, atol=1e-12)
    assert torch.allclose(space.projected, basis.T @ weight.T @ weight @ basis, atol=1e-12)


def test_what_leaves_the_space_is_the_next_block_times_the_coupling() -> None:
    weight = matrix(dtype=torch.float64)
    space = KrylovSpace(weight, weight.dtype, block=8, capacity=64, seed=0)
    space.grow(40)
    basis, last = space.basis[:40].T, space.basis[32:40].T
    image = weight.T @ (weight @ last)
    outside = image - basis @ (basis.T @ image)
    assert torch.allclose(space.outside() @ space.coupling, outside, atol=1e-12)
    assert outside.norm() > 1e-6


def test_following_a_fresh_block_keeps_what_is_there_and_the_basis_orthonormal() -> None:
    space = KrylovSpace(matrix(), torch.float32, block=16, capacity=96, seed=0)
    space.grow(64)
    before = space.basis[:64].clone()
    space.follow(None, 16)
    space.grow(96)
    assert torch.equal(space.basis[:64], before)
    assert orthonormality(space) < 1e-5


def test_the_turn_from_images_finds_values_that_squaring_loses() -> None:
    weight = matrix("exponential")
    space = KrylovSpace(weight, weight.dtype, block=16, capacity=304, seed=0)
    space.grow(304)
    true = torch.linalg.svdvals(weight.double())[:250]
    _, image = space.turned(space.turn_from_images()[:, :250])
    found = torch.linalg.vector_norm(image.double(), dim=0)
    assert true[-1] < 3e-4 * true[0]
    assert float(((found - true) / true).abs().max()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(500, 400), (400, 500)])
def test_products_in_bf16_cost_the_fast_form_little(
    dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = matrix("language", *shape, dtype=dtype)
    true = torch.linalg.svdvals(weight.double())
    gaps = {}
    for first in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(
            lanczos, "_product_dtypes", lambda weight, first=first: [first, torch.float32]
        )
        found = truncated_svd(weight, 16, "fast")
        gaps[first] = missed(weight, found, true)[1]
        eye = torch.eye(16, dtype=torch.float64)
        assert float((found.U.double().T @ found.U.double() - eye).abs().max()) < 1e-5
        assert float((found.Vh.double() @ found.Vh.double().T - eye).abs().max()) < 1e-5
    assert gaps[torch.bfloat16] < gaps[torch.float32] + 1e-3
    assert gaps[torch.bfloat16] != gaps[torch.float32]


def test_values_that_drown_in_bf16_are_found_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanczos, "_product_dtypes", lambda weight: [torch.bfloat16, torch.float32])
    weight = matrix("steep")
    rough = truncated_svd(weight, 32, "fast")
    monkeypatch.setattr(lanczos, "_product_dtypes", lambda weight: [torch.float32])
    assert torch.equal(truncated_svd(weight, 32, "fast").S, rough.S)


def test_same_bits_at_every_call_and_another_start_for_another_name() -> None:
    weight = matrix()
    first, second = (truncated_svd(weight, 16, "fast", seed=3, name="w") for _ in range(2))
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.Vh, second.Vh)
    assert not torch.equal(first.U, truncated_svd(weight, 16, "fast", seed=3, name="v").U)
