"""CorDA, LoRA-GA and EVA against their equations and golden numbers; peft's own are in test_starts_by_peft.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pissa import Split
from pissa.errors import InputError
from pissa.linalg import Components, relative_error
from pissa.registry import get
from test_laws import SHAPES, matrix
from test_methods import GOLDEN, gradients, near

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_mode = pytest.mark.parametrize("mode", ["ipm", "kpm"])
every_weighting = pytest.mark.parametrize("weighting", ["covariance", "root"])


def start(
    method: str, weight: Tensor, rank: int, seen: Any = None, scale: float = 1.0, **options: Any
) -> Split:
    return get(method).split(
        weight, rank, scale=scale, name="layer", observed=seen, options=options
    )


def rows_of(
    count: int, width: int, seed: int = 3, decay: float = 0.7, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Inputs of a layer: strongly correlated, with a mean, the entry of largest magnitude positive."""
    noise = torch.randn(
        count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    mixing = matrix(width, width, seed=seed + 1)
    rows = noise * torch.arange(1.0, width + 1) ** -decay @ mixing + 0.1 * mixing[0]
    return (rows if rows.max() == rows.abs().max() else -rows).to(dtype)


def covariance_of(*samples: Tensor) -> Tensor:
    return torch.stack([(X / X.abs().max()).T @ (X / X.abs().max()) for X in samples]).mean(0)


def same_up_to_signs(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Of each row."""
    signs = (one * other).sum(dim=1, keepdim=True).sign()
    return relative_error(signs * one, other) < tolerance


def cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))


def first_step(left: Tensor, right: Tensor, G: Tensor) -> Tensor:
    """Direction of the first change of the weight by SGD on both factors."""
    return -(left @ (left.T @ G) + G @ right.T @ right)


# CorDA


def test_corda_of_the_golden_matrix():
    C = torch.diag(torch.tensor([4.0, 1.0, 1.0, 1.0]))
    first, last = (start("corda", GOLDEN, 1, C, mode=mode).product()[0] for mode in ("ipm", "kpm"))
    assert near(first, torch.tensor([2.456170, 0.873161, 1.697098, 0.411637]), 1e-6)
    assert near(last, torch.tensor([0.010719, -0.209343, -0.186368, 0.215337]), 1e-6)
    values = start("corda", GOLDEN, 4, C, normalised=False).left.square().sum(0)
    assert near(values, torch.tensor([11.212612, 3.477056, 2.288754, 1.138289]), 1e-6)


def by_the_equations(W: Tensor, C: Tensor, rank: int, mode: str, weighting: str) -> np.ndarray:
    """What the adapter holds, with the inverse and the symmetric root that `corda` does without."""
    weight, hat = W.numpy(), C.numpy() + 0.01 * C.diagonal().mean().item() * np.eye(len(C))
    if weighting == "root":
        values, vectors = np.linalg.eigh(hat)
        hat = vectors * np.sqrt(values) @ vectors.T
    U, S, Vh = np.linalg.svd(weight @ hat, full_matrices=False)
    chosen = slice(rank) if mode == "ipm" else slice(len(S) - rank, None)
    return (U[:, chosen] * S[chosen]) @ (Vh[chosen] @ np.linalg.inv(hat))


@every_shape
@every_mode
@every_weighting
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_corda_is_its_equations(shape, mode, weighting, scale):
    W, C = matrix(*shape), covariance_of(rows_of(100, shape[1]))
    split = start("corda", W, 4, C, scale, mode=mode, weighting=weighting)
    assert (
        relative_error(
            split.product(), torch.from_numpy(by_the_equations(W, C, 4, mode, weighting))
        )
        < 1e-9
    )
    assert relative_error(split.rebuild(), W) < 1e-14


@every_shape
def test_corda_with_an_isotropic_covariance_is_pissa_or_milora(shape):
    W, C = matrix(*shape), 7 * torch.eye(shape[1])
    for mode, method in (("ipm", "pissa"), ("kpm", "milora")):
        split, plain = start("corda", W, 3, C, 0.5, mode=mode), start(method, W, 3, scale=0.5)
        assert relative_error(split.product(), plain.product()) < 1e-11
        # Also in how the product is shared, up to the damping of one hundredth.
        assert relative_error(split.left, 1.01**0.5 * plain.left) < 1e-11


@every_shape
@every_weighting
def test_corda_with_all_components_takes_the_whole_weight(shape, weighting):
    split = start(
        "corda",
        matrix(*shape),
        min(shape),
        covariance_of(rows_of(9, shape[1])),
        weighting=weighting,
    )
    assert relative_error(split.product(), split.weight) < 1e-12


@every_mode
def test_the_unit_of_the_covariance_moves_no_factor_and_in_the_authors_form_only_the_share_of_each(
    mode,
):
    W, C = matrix(12, 40), covariance_of(rows_of(100, 40))
    one, ten = (start("corda", W, 4, factor * C, mode=mode) for factor in (1.0, 10.0))
    assert relative_error(ten.left, one.left) < 1e-12
    assert relative_error(ten.right, one.right) < 1e-12
    raw, raw_ten = (
        start("corda", W, 4, factor * C, mode=mode, normalised=False) for factor in (1.0, 10.0)
    )
    assert relative_error(raw_ten.product(), one.product()) < 1e-12
    assert relative_error(raw_ten.left, 10**0.5 * raw.left) < 1e-12
    assert relative_error(raw.left, one.left) > 0.1


@every_mode
@every_weighting
def test_one_input_direction_is_covariance_enough(mode, weighting):
    x = rows_of(1, 40, dtype=torch.float32)
    split = start(
        "corda", matrix(30, 40, torch.float32), 5, x.T @ x, mode=mode, weighting=weighting
    )
    assert relative_error(split.rebuild(), split.weight) < 1e-6
    assert split.product().norm() > 1e-3


def test_kpm_of_a_rank_deficient_weight_leaves_it_whole_and_can_learn():
    weight = (matrix(20, 3) @ matrix(3, 16)).float()
    split = start("corda", weight, 4, covariance_of(rows_of(50, 16)).float(), mode="kpm")
    assert torch.equal(split.frozen, weight)
    assert near(split.right.norm(dim=1), torch.ones(4), 1e-6)
    assert (gradients(split)[0].norm(dim=0) > 1e-3).all()


def test_kpm_does_not_take_what_is_small_next_to_a_large_covariance_for_nothing():
    # The least S are below float32's rounding of the largest; what W itself does along them is not.
    U, _, Vh = torch.linalg.svd(matrix(256, 256))
    values, spread = torch.logspace(2, -8, 256).double(), torch.logspace(0, -3, 256).double()
    W, C = (U * spread) @ Vh, (Vh.T * values) @ Vh
    split = start("corda", W.float(), 8, C, mode="kpm")
    expected = spread * (values / values.mean() + 0.01)
    assert expected[-1] < 1e-6 * expected[0]
    assert torch.allclose(split.left.square().sum(0).double(), expected[-8:], rtol=1e-3)
    assert torch.allclose(split.product().norm().double(), spread[-8:].norm(), rtol=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_kpm_keeps_the_outputs_on_the_calibration_data_better_than_milora_and_ipm_takes_more_than_pissa(
    seed,
):
    # Directions of the inputs fall off as 1 / i; docs: 0.015 to 0.039 against 0.086 to 0.122.
    W, X = matrix(48, 48, seed=seed), rows_of(400, 48, seed=10 * seed, decay=1.5)
    C = covariance_of(X)

    def change(method: str, **options: Any) -> float:
        taken = start(method, W, 8, C if options else None, **options).product()
        return float((X @ taken.T).norm() / (X @ W.T).norm())

    assert change("corda", mode="kpm") < 0.5 * change("milora")
    assert change("corda", mode="ipm") > 1.1 * change("pissa")


@every_shape
def test_the_root_variant_has_the_least_error_on_the_outputs(shape):
    W, X = matrix(*shape), rows_of(400, shape[1])
    C = covariance_of(X)

    def error(method: str, **options: Any) -> float:
        return float((X @ start(method, W, 4, C if options else None, **options).frozen.T).norm())

    outputs = X @ W.T
    least = float(torch.linalg.svdvals(outputs)[4:].square().sum().sqrt())
    root, covariance, plain = (
        error("corda", weighting="root"),
        error("corda", mode="ipm"),
        error("pissa"),
    )
    assert least <= root * (1 + 1e-9)
    assert root < 1.01 * least  # the damping
    assert root < covariance < plain


def test_corda_refuses_a_covariance_that_does_not_fit_or_saw_nothing():
    with pytest.raises(
        InputError, match=r"covariance of `layer` is \[12, 12\], expected \[40, 40\]"
    ):
        start("corda", matrix(12, 40), 2, torch.eye(12))
    with pytest.raises(InputError, match="covariance of `layer` is zero"):
        start("corda", matrix(12, 40), 2, torch.zeros(40, 40))


# LoRA-GA


def test_lora_ga_of_the_golden_matrix():
    split = start("lora_ga", GOLDEN, 1, GOLDEN, 16.0)
    assert near(split.product().norm(), torch.tensor(2.0))
    step = 256 * -first_step(split.left, split.right, GOLDEN)
    assert near(step, torch.tensor([[56.0, 8, 56, 8], [8, 56, 8, 56]] * 2), 1e-11)
    assert cosine(step, GOLDEN) == pytest.approx(5 / 30**0.5, abs=1e-12)


@every_shape
@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("gamma", [16.0, 64.0])
def test_lora_ga_steps_along_the_best_rank_2r_part_of_the_gradient(shape, scale, gamma):
    W, G = matrix(*shape), matrix(*shape, seed=7)
    split = start("lora_ga", W, 5, G, scale, gamma=gamma)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    square = shape[0] ** 0.5 / gamma
    assert near(split.left.T @ split.left, square * torch.eye(5, dtype=torch.float64))
    assert near(split.right @ split.right.T, square * torch.eye(5, dtype=torch.float64))
    assert near(split.left.T @ G @ split.right.T, torch.zeros(5, 5))
    step = -first_step(split.left, split.right, G)
    assert relative_error(step, square * (U[:, :10] * S[:10]) @ Vh[:10]) < 1e-12
    assert relative_error(split.rebuild(), W) < 1e-12


def test_lora_ga_refuses_what_has_no_first_step():
    W = matrix(12, 40)
    with pytest.raises(
        InputError, match=r"2 x 7 directions of the gradient of `layer` \[12, 40\].*ranks up to 6"
    ):
        start("lora_ga", W, 7, W)
    with pytest.raises(InputError, match=r"gradient of `layer` is \[40, 12\], expected \[12, 40\]"):
        start("lora_ga", W, 3, W.T)
    with pytest.raises(InputError, match="gradient of `layer` is zero"):
        start("lora_ga", W, 3, torch.zeros_like(W))
    with pytest.raises(InputError, match="gamma is 0.0, expected a number above 0"):
        start("lora_ga", W, 3, W, gamma=0)


# EVA


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_eva_reads_along_the_principal_components_and_writes_nothing(dtype):
    X = rows_of(120, 40)
    split = start("eva", matrix(12, 40, dtype), 6, Components.of(X, 12))
    compute = torch.promote_types(dtype, torch.float32)
    assert split.left.dtype == split.right.dtype == compute
    assert not split.left.any()
    assert torch.equal(split.frozen, split.weight.to(compute))
    assert near(split.right @ split.right.T, torch.eye(6), 1e-5)
    principal = np.linalg.svd((X - X.mean(0)).numpy())[2][:6]
    assert same_up_to_signs(split.right.double(), torch.from_numpy(principal), 1e-5)


def test_eva_captures_the_most_variance_of_any_orthonormal_rows():
    X = rows_of(120, 40)
    centred = X - X.mean(0)
    split = start("eva", matrix(12, 40), 6, Components.of(X, 12))
    captured = float((centred @ split.right.T).square().sum())
    assert captured == pytest.approx(
        float(torch.linalg.svdvals(centred)[:6].square().sum()), rel=1e-6
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        rows = torch.linalg.qr(torch.randn(40, 6, generator=generator, dtype=torch.float64))[0]
        assert float((centred @ rows).square().sum()) < captured


def shares_and_ranks(rho: float, rank: int = 4) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Of eight layers whose inputs are simple at first and more and more even."""
    allotment = get("eva").allotment
    assert allotment is not None
    shares = {
        f"layer.{i}": allotment.score(
            matrix(24, 24),
            Components.of(rows_of(200, 24, seed=i, decay=2 - i / 4), 12),
            rank,
            rho=rho,
        )
        for i in range(8)
    }
    return shares, allotment.allot(shares, rank, rho=rho)


@pytest.mark.parametrize(("rho", "most"), [(1.0, 4), (1.4, 6), (2.0, 8), (3.0, 12)])
def test_eva_spends_the_budget_under_its_cap_on_what_explains_most(rho, most):
    shares, ranks = shares_and_ranks(rho)
    assert sum(ranks.values()) == 32
    assert all(0 <= rank <= most for rank in ranks.values())
    assert list(ranks) == list(shares)
    taken = [float(share) for name, rank in ranks.items() for share in shares[name][:rank]]
    left = [float(share) for name, rank in ranks.items() for share in shares[name][rank:]]
    assert not left or min(taken) >= max(left)
    even = sum(float(layer[:4].sum()) for layer in shares.values())
    assert sum(taken) > even if rho > 1 else set(ranks.values()) == {4}


def test_eva_can_leave_a_layer_without_a_rank_and_gives_none_more_than_it_has():
    allotment = get("eva").allotment
    assert allotment is not None
    ranks = allotment.allot(
        {"a": torch.tensor([0.9, 0.05]), "b": torch.tensor([0.01, 0.005])}, 1, rho=2.0
    )
    assert ranks == {"a": 2, "b": 0}
    assert len(allotment.score(matrix(5, 24), Components.of(rows_of(50, 24), 24), 4, rho=4.0)) == 5


def test_eva_refuses_too_few_or_foreign_components_and_a_rho_below_one():
    W = matrix(12, 40)
    with pytest.raises(
        InputError, match="3 rows of inputs of `layer` gave 3 components, rank 6 needs as many"
    ):
        start("eva", W, 6, Components.of(rows_of(3, 40), 12))
    with pytest.raises(InputError, match="inputs of `layer` are 24 wide, expected 40"):
        start("eva", W, 6, Components.of(rows_of(30, 24), 12))
    with pytest.raises(InputError, match="rho is 0.5, expected at least 1"):
        shares_and_ranks(0.5)
