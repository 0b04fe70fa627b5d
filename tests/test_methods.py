"""Each method against its own definition: golden numbers of a 4 x 4 with a known SVD, and what its paper promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pissa
from pissa.linalg import relative_error
from test_laws import SHAPES, every_method, matrix, split_of

H = (
    torch.tensor(
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64
    )
    / 2
)
GOLDEN = H.T @ torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)) @ H
"""Singular values 4, 3, 2, 1 with the rows of H as vectors on both sides (docs/methods, golden numbers)."""

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_scale = pytest.mark.parametrize("alpha", [4.0, 16.0, 1.0], ids=["s=1", "s=4", "s=0.25"])


def near(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return torch.allclose(got, expected.to(got), rtol=0, atol=tolerance)


def test_golden_matrix_is_the_one_in_the_documents():
    assert near(
        GOLDEN,
        torch.tensor([[2.5, 0.5, 1, 0], [0.5, 2.5, 0, 1], [1, 0, 2.5, 0.5], [0, 1, 0.5, 2.5]]),
    )
    assert near(GOLDEN.square().sum(), torch.tensor(30.0))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_pissa_of_the_golden_matrix_is_all_ones(alpha):
    split = pissa.split(GOLDEN, "pissa", 1, alpha=alpha)
    assert near(split.product(), torch.ones(4, 4))
    assert near(split.frozen, GOLDEN - 1)
    assert near(split.frozen.square().sum(), torch.tensor(14.0))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_milora_of_the_golden_matrix_is_the_last_pattern(alpha):
    split = pissa.split(GOLDEN, "milora", 1, alpha=alpha)
    pattern = torch.tensor([[1, -1, -1, 1], [-1, 1, 1, -1], [-1, 1, 1, -1], [1, -1, -1, 1]])
    assert near(split.product(), 0.25 * pattern)
    assert near(split.product().norm(), torch.tensor(1.0))


def test_olora_of_the_golden_matrix_is_its_first_column_times_a_row():
    split = pissa.split(GOLDEN, "olora", 1)
    expected = GOLDEN[:, :1] * torch.tensor([[1, 1 / 3, 2 / 3, 2 / 15]], dtype=torch.float64)
    assert near(split.product(), expected)


@every_shape
@every_scale
def test_pissa_takes_the_best_rank_r_part(shape, alpha):
    weight = matrix(*shape)
    split = pissa.split(weight, "pissa", 4, alpha=alpha)
    S = torch.linalg.svdvals(weight)
    assert near(split.frozen.square().sum(), S[4:].square().sum())
    assert near(split.left.T @ split.frozen, torch.zeros(4, shape[1]))
    assert near(split.frozen @ split.right.T, torch.zeros(shape[0], 4))


@pytest.mark.parametrize("method", ["pissa", "milora"])
@every_shape
@every_scale
def test_svd_methods_balance_their_factors(method, shape, alpha):
    weight = matrix(*shape)
    split = pissa.split(weight, method, 4, alpha=alpha)
    S = torch.linalg.svdvals(weight)
    expected = torch.diag(S[:4] if method == "pissa" else S[-4:]) * 4 / alpha
    assert near(split.left.T @ split.left, expected)
    assert near(split.right @ split.right.T, expected)


def test_pissa_matches_the_svd_by_hand():
    weight = matrix(12, 40)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    split = pissa.split(weight, "pissa", 3, alpha=6)
    assert near(2 * split.left @ split.right, (U[:, :3] * S[:3]) @ Vh[:3])


@every_shape
@every_scale
def test_milora_takes_the_least_energy(shape, alpha):
    weight = matrix(*shape)
    split = pissa.split(weight, "milora", 4, alpha=alpha)
    U, S, _ = torch.linalg.svd(weight, full_matrices=False)
    assert near(split.product().square().sum(), S[-4:].square().sum())
    assert near(split.left.T @ U[:, :-4], torch.zeros(4, len(S) - 4))
    assert near(torch.linalg.svdvals(split.frozen)[: len(S) - 4], S[:-4])


@every_shape
@every_scale
def test_olora_is_an_unpivoted_qr(shape, alpha):
    weight = matrix(*shape)
    split = pissa.split(weight, "olora", 4, alpha=alpha)
    assert near(split.left.T @ split.left, torch.eye(4))
    assert near(split.right[:, :4].tril(-1), torch.zeros(4, 4))
    assert (split.right.diagonal() > 0).all()
    projector = weight[:, :4] @ torch.linalg.pinv(weight[:, :4])
    assert near(split.left @ split.right, projector @ weight)


@every_shape
def test_olora_at_scale_one_moves_the_first_columns_whole(shape):
    split = pissa.split(matrix(*shape), "olora", 4)
    assert near(split.frozen[:, :4], torch.zeros(shape[0], 4))
    assert split.frozen[:, 4:].norm() > 0.1


def test_lora_starts_at_zero_with_kaiming_bounds():
    weight = matrix(12, 40)
    split = pissa.split(weight, "lora", 8)
    assert torch.equal(split.frozen, weight)
    assert not split.left.any()
    bound = 1 / 40**0.5
    assert 0.95 * bound < split.right.abs().max() <= bound
    assert abs(float(split.right.std()) - bound / 3**0.5) < 0.05 * bound


def test_lora_first_gradient_is_s_G_At_on_the_left_and_zero_on_the_right():
    split = pissa.split(matrix(12, 40), "lora", 4, alpha=8)
    left, right = split.left.clone().requires_grad_(), split.right.clone().requires_grad_()
    G = matrix(12, 40, seed=5)
    (G * (split.frozen + 2 * left @ right)).sum().backward()
    assert near(left.grad, 2 * G @ split.right.T)
    assert not right.grad.any()


def gradients(split: pissa.Split) -> tuple[Tensor, Tensor]:
    """Of the factors under a random linear loss; of a core in place of both, where there is one."""
    left, right = split.left.clone().requires_grad_(), split.right.clone().requires_grad_()
    core = None if split.core is None else split.core.clone().requires_grad_()
    product = left @ right if core is None else split.left @ core @ split.right
    (
        matrix(*split.frozen.shape, seed=6).to(split.frozen)
        * (split.frozen + split.scale * product)
    ).sum().backward()
    return (left.grad, right.grad) if core is None else (core.grad, core.grad.T)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("svd", ["exact", "fast"])
def test_zero_weight_is_split_into_finite_and_living_factors(method, dtype, svd):
    for shape in ((9, 14), (14, 9), (100, 120)):
        split = split_of(torch.zeros(shape, dtype=dtype), method, 3, svd=svd)
        # Exact where the factors are of the weight; LoRA-GA's are of a gradient, and their product
        # is rounded twice.
        assert split.rebuild().abs().max() <= (1e-6 if method == "lora_ga" else 0)
        left, right = gradients(split)
        assert left.isfinite().all()
        assert right.isfinite().all()
        # Every column of the adapter can learn: no pair has two zero gradients.
        assert ((left.norm(dim=0) + right.norm(dim=1)) > 1e-3).all()


@every_method
def test_rank_deficient_weight_is_split_into_finite_and_living_factors(method):
    weight = (matrix(20, 3) @ matrix(3, 16)).float()
    split = split_of(weight, method, 6)
    assert relative_error(split.rebuild(), weight) < 1e-5
    left, right = gradients(split)
    assert ((left.norm(dim=0) + right.norm(dim=1)) > 1e-3).all()


def test_milora_of_a_rank_deficient_weight_leaves_it_whole_and_can_learn():
    weight = (matrix(20, 3) @ matrix(3, 16)).float()
    split = pissa.split(weight, "milora", 4)
    assert torch.equal(split.frozen, weight)
    assert not split.left.any()
    assert near(split.right @ split.right.T, torch.eye(4), 1e-5)
    assert (gradients(split)[0].norm(dim=0) > 1e-3).all()
