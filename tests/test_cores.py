"""Methods with a core against their own definitions, in float64 NumPy written here, and what their papers promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import pissa
from pissa.errors import InputError
from pissa.linalg import relative_error
from pissa.registry import get
from pissa.splits import Split
from test_laws import SHAPES, as_lora, matrix
from test_methods import GOLDEN, near

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
RANK, ALPHA = 4, 8.0
SCALE = ALPHA / RANK


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def svd(weight: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin, by NumPy; the sign of each pair makes the largest entry of the left vector positive."""
    U, S, Vh = np.linalg.svd(weight.numpy(), full_matrices=False)
    signs = np.sign(U[np.abs(U).argmax(axis=0), np.arange(len(S))])
    return U * signs, S, Vh * signs[:, None]


def forward(split: Split, x: Tensor, core: Tensor) -> Tensor:
    return x @ (split.frozen + split.scale * split.left @ core @ split.right).T


@every_shape
def test_lora_xs_is_its_equation(shape):
    W, R = matrix(*shape), noise(RANK, RANK)
    U, S, Vh = svd(W)
    expected = SCALE * (U[:, :RANK] @ R.numpy() @ (S[:RANK, None] * Vh[:RANK]))
    lora = as_lora(pissa.split(W, "lora_xs", RANK, alpha=ALPHA), core=R)
    # A flip of a pair of vectors flips a row and a column of what the core means: canonical signs
    # on both sides.
    split = pissa.split(W, "lora_xs", RANK, alpha=ALPHA)
    signs = torch.sign(split.left[split.left.abs().argmax(0), torch.arange(RANK)])
    flipped = as_lora(split, core=signs[:, None] * R * signs).delta()
    assert near(flipped, torch.from_numpy(expected), 1e-5)
    assert lora.rank == RANK


@every_shape
def test_a_core_of_one_in_lora_xs_is_the_best_approximation(shape):
    W = matrix(*shape)
    split = pissa.split(W, "lora_xs", RANK)
    U, S, Vh = svd(W)
    best = torch.from_numpy((U[:, :RANK] * S[:RANK]) @ Vh[:RANK])
    assert near(as_lora(split, core=torch.eye(RANK, dtype=W.dtype)).delta(), best, 1e-10)


def test_lora_xs_of_the_golden_matrix():
    change = as_lora(pissa.split(GOLDEN, "lora_xs", 1), core=GOLDEN.new_full((1, 1), 0.1)).delta()
    assert near(change, GOLDEN.new_full((4, 4), 0.1))


@pytest.mark.parametrize("method", ["lora_xs", "svft"])
@every_shape
def test_the_first_step_of_a_core_is_the_projected_gradient(method, shape):
    """Through autograd on y = W_eff x, against the closed form."""
    W, x, rate = matrix(*shape), noise(9, shape[1], seed=5), 0.1
    split = pissa.split(W, method, RANK, alpha=ALPHA)
    core = split.core.clone().requires_grad_()
    target = noise(9, shape[0], seed=6)
    (forward(split, x, core) * target).sum().backward()
    G = target.T @ x
    assert near(core.grad, SCALE * split.left.T @ G @ split.right.T, 1e-10)
    if method == "lora_xs":
        change = as_lora(split, core=-rate * core.grad).delta()
        L, R = split.left, split.right
        assert near(change, -rate * SCALE**2 * L @ L.T @ G @ R.T @ R, 1e-10)
        assert near(change - L @ (L.T @ change), torch.zeros(shape), 1e-10)
    else:
        values = (-rate * core.grad).diagonal()
        U, _, Vh = svd(W)
        by_hand = [-rate * SCALE * U[:, i] @ G.numpy() @ Vh[i] for i in range(min(shape))]
        assert near(values, torch.tensor(by_hand), 1e-8)


@every_shape
def test_svft_is_its_equation_and_keeps_the_singular_values_of_its_core(shape):
    W, k = matrix(*shape), min(shape)
    m = noise(k, seed=4)
    split = pissa.split(W, "svft", 1, alpha=2.0)
    U, _, Vh = svd(W)
    change = as_lora(split, core=m).delta()
    assert near(change, torch.from_numpy(2.0 * (U * m.numpy()) @ Vh), 1e-5)
    assert near(torch.linalg.svdvals(change)[:k], 2.0 * m.abs().sort(descending=True).values, 1e-10)
    best, error = as_lora(split, core=m).truncated(3)
    left_out = m.abs().sort(descending=True).values[3:]
    assert error == pytest.approx(float(left_out.norm() / m.norm()), abs=1e-10)
    assert best.rank == 3


def test_svft_can_take_the_whole_weight_away():
    W = matrix(12, 40)
    split = pissa.split(W, "svft")
    assert relative_error(as_lora(split, core=-torch.linalg.svdvals(W)).delta(), -W) < 1e-10
    golden = as_lora(
        pissa.split(GOLDEN, "svft"), core=torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    )
    assert near(golden.delta(), 0.25 * torch.ones(4, 4))


@pytest.mark.parametrize("pattern", ["plain", "banded", "random", "top_k"])
@pytest.mark.parametrize("width", [0, 2, 23, 99])
def test_svft_trains_distinct_entries_and_as_many_as_it_says(pattern, width):
    split = pissa.split(matrix(24, 24), "svft", options={"pattern": pattern, "width": width})
    band = 0 if pattern == "plain" else min(width, 23)
    rows, columns = split.pattern
    assert len(rows) == 24 * (2 * band + 1) - band * (band + 1)
    assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == len(rows)
    assert {(i, i) for i in range(24)} <= {*zip(rows.tolist(), columns.tolist(), strict=True)}
    if pattern == "banded":
        assert int((rows - columns).abs().max()) == band


def test_svft_top_k_takes_the_best_aligned_directions():
    W = matrix(24, 24)
    split = pissa.split(W, "svft", options={"pattern": "top_k", "width": 2})
    U, _, Vh = svd(W)
    aligned = np.abs(U.T @ Vh.T)
    np.fill_diagonal(aligned, np.inf)
    expected = {
        divmod(int(index), 24)
        for index in np.argsort(-aligned, axis=None)[: split.pattern.shape[1]]
    }
    assert expected == {*zip(*split.pattern.tolist(), strict=True)}
    with pytest.raises(InputError, match=r"`weight` \[12, 40\] has of different lengths"):
        pissa.split(matrix(12, 40), "svft", options={"pattern": "top_k"})


def test_svft_draws_by_seed_and_name():
    W = matrix(24, 24)
    draws = [
        pissa.split(
            W, "svft", name=name, seed=seed, options={"pattern": "random", "width": 2}
        ).pattern
        for name, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1))
    ]
    assert torch.equal(draws[0], draws[1])
    assert not any(torch.equal(draws[0], other) for other in draws[2:])


def test_an_off_diagonal_entry_connects_the_right_directions():
    """Entry (i, j) carries what comes in along v_j out along u_i, and nothing else."""
    W = matrix(24, 24)
    split = pissa.split(W, "svft", options={"pattern": "banded", "width": 1})
    values = torch.zeros(split.pattern.shape[1], dtype=W.dtype)
    index = [*zip(*split.pattern.tolist(), strict=True)].index((3, 4))
    values[index] = 1.0
    assert near(as_lora(split, core=values).delta(), torch.outer(split.left[:, 3], split.right[4]))


@every_shape
def test_lamda_is_its_equation(shape):
    W = matrix(*shape)
    dL, dC = 0.1 * noise(shape[0], RANK, seed=7), 0.1 * noise(RANK, RANK, seed=8)
    split = pissa.split(W, "lamda", RANK, alpha=ALPHA)
    U, S, Vh = svd(W)
    signs = torch.sign(split.left[split.left.abs().argmax(0), torch.arange(RANK)]).numpy()
    B0, S0, A = U[:, :RANK] * signs, np.diag(S[:RANK]) / SCALE, Vh[:RANK] * signs[:, None]
    frozen = W.numpy() - SCALE * B0 @ S0 @ A
    trained = frozen + SCALE * (B0 + dL.numpy()) @ (S0 + dC.numpy()) @ A
    lora = as_lora(split, left=dL, core=dC)
    assert near(split.frozen, torch.from_numpy(frozen), 1e-5)
    assert near(W + lora.delta(), torch.from_numpy(trained), 1e-5)
    assert lora.rank == RANK


def spectrum(decay: float, rows: int = 24) -> Tensor:
    U, _, Vh = torch.linalg.svd(noise(rows, 24))
    return ((U[:, :24] * torch.arange(1.0, 25.0, dtype=torch.float64) ** -decay) @ Vh).float()


def ranks(weights: dict[str, Tensor], rank: int) -> dict[str, int]:
    allotment = get("lamda++").allotment
    scores = {
        name: allotment.score(weight, None, rank, eta=0.3) for name, weight in weights.items()
    }
    return allotment.allot(scores, rank, eta=0.3)


def test_lamda_plus_gives_flat_spectra_more_of_the_same_budget():
    given = ranks({"steep": spectrum(2.0), "middle": spectrum(0.7), "flat": spectrum(0.1)}, 6)
    assert sum(given.values()) == 18
    assert 3 <= given["steep"] < given["middle"] < given["flat"] <= 12
    assert set(ranks({"one": spectrum(0.7), "two": spectrum(0.7)}, 6).values()) == {6}


def test_lamda_plus_never_asks_for_more_than_a_weight_has():
    narrow = spectrum(0.1)[:7]
    given = ranks({"narrow": narrow, "steep": spectrum(2.0)}, 6)
    assert given["narrow"] <= 7 and sum(given.values()) == 12
