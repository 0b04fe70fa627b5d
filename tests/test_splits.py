"""A change as a plain LoRA: cut to a smaller rank or padded to a larger one; what cannot be split is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import pissa
from pissa.adapters.storing import store
from pissa.checks import check_rank, scale_of, tolerance_of
from pissa.errors import InputError
from pissa.registry import method, methods
from pissa.splits import Lora, Split
from test_laws import as_lora

METHODS = sorted(name for name, method in methods().items() if method.needs == "weight")


def pair(
    rows: int = 20, rank: int = 6, columns: int = 14, dtype: torch.dtype = torch.float64
) -> Lora:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    B = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return Lora(A.to(dtype), B.to(dtype))


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize(
    "shape", [(20, 14), (14, 20), (20, 4)], ids=["tall", "wide", "narrower than its rank"]
)
def test_truncated_is_the_svd_of_the_dense_change(rank, shape):
    lora = pair(rows=shape[0], columns=shape[1])
    U, S, Vh = torch.linalg.svd(lora.delta(), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    cut, error = lora.truncated(rank)
    assert cut.rank == min(rank, shape[1])
    assert torch.allclose(cut.delta(), best, rtol=0, atol=1e-12 * float(S[0]))
    assert math.isclose(error, float(S[rank:].norm() / S.norm()), abs_tol=1e-12)
    assert error > 0.05 or rank >= min(shape)


def test_truncated_shares_the_size_between_its_factors_and_keeps_the_dtype():
    cut, _ = pair(dtype=torch.bfloat16).truncated(2)
    assert (cut.A.dtype, cut.B.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.allclose(cut.A.float().norm(dim=1), cut.B.float().norm(dim=0), rtol=0.02)


def test_truncated_to_its_own_rank_or_more_loses_nothing():
    lora = pair()
    for rank in (6, 9):
        cut, error = lora.truncated(rank)
        assert torch.allclose(cut.delta(), lora.delta(), atol=1e-12)
        assert error < 1e-12


def test_truncated_zero_change_is_zero_with_error_zero():
    cut, error = Lora(torch.zeros(4, 7), torch.ones(5, 4)).truncated(2)
    assert error == 0.0
    assert not cut.delta().any()


def test_padded_keeps_every_bit_of_the_change():
    lora = pair(dtype=torch.float32)
    padded = lora.padded(9)
    assert (padded.rank, padded.A.shape, padded.B.shape) == (9, (9, 14), (20, 9))
    # Zero columns and rows add exact zeros; only the order of the sums may differ.
    assert torch.allclose(padded.delta(), lora.delta(), rtol=1e-6, atol=1e-6)
    assert torch.equal(padded.A[:6], lora.A)
    assert not padded.A[6:].any()
    assert not padded.B[:, 6:].any()


def test_a_rank_below_the_possible_is_refused():
    with pytest.raises(InputError, match="rank 0 is below 1: choose a rank from 1 to 6"):
        pair().truncated(0)
    with pytest.raises(InputError, match="cannot pad a rank-6 LoRA to rank 5: choose at least 6"):
        pair().padded(5)


def test_core_stands_between_the_factors():
    left, core, right = (
        torch.eye(3)[:, :2],
        torch.tensor([[0.0, 2.0], [3.0, 0.0]]),
        torch.eye(4)[:2],
    )
    split = Split(torch.ones(3, 4), left, right, core, scale=0.5)
    # By hand: left core right puts 2 at (0, 1) and 3 at (1, 0); scale halves them.
    expected = torch.zeros(3, 4)
    expected[0, 1], expected[1, 0] = 1.0, 1.5
    assert torch.equal(split.product(), expected)
    assert torch.equal(split.frozen, 1 - expected)
    assert torch.equal(split.rounded(torch.bfloat16).product(), expected)
    stored = store("w", split, torch.bfloat16, torch.bfloat16)
    assert torch.equal(stored.frozen.float(), 1 - expected)
    assert stored.layer.error == 0
    assert not as_lora(split).delta().any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weight_is_refused_by_name(method, bad):
    weight = torch.ones(6, 5)
    weight[2, 3] = bad
    with pytest.raises(InputError, match=r"`layers\.3\.up\.weight` has 1 non-finite value"):
        pissa.split(weight, method, 2, name="layers.3.up.weight")


@pytest.mark.parametrize("method", METHODS)
def test_values_that_overflow_are_refused_by_name_never_split_into_nan(method):
    weight = torch.full((6, 5), 3e38)
    try:
        split = pissa.split(weight, method, 2, name="huge")
    except InputError as error:
        assert "`huge` overflows float32" in str(error)  # noqa: PT017 (a method may also get it right)
    else:
        assert split.rebuild().isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank 0 is below 1 for `w`"),
        (-3, "rank -3 is below 1 for `w`"),
        (6, r"rank 6 is larger than min\(out, in\) = 5 of `w` \[7, 5\]: use --rank 5"),
    ],
)
def test_impossible_rank_is_refused_by_name(method, rank, message):
    if methods()[method].full_rank and rank > 0:
        return  # it works at full rank, whatever is asked
    with pytest.raises(InputError, match=message):
        pissa.split(torch.ones(7, 5), method, rank, name="w")


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan, math.inf])
def test_impossible_alpha_is_refused(alpha):
    with pytest.raises(InputError, match=r"alpha is .*, expected a number above 0"):
        pissa.split(torch.eye(4), "pissa", 2, alpha=alpha)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(4, 4, dtype=torch.int8), "`w` has dtype torch.int8, expected .* quantised"),
        (torch.ones(4, 4, device="meta"), "`w` is on the meta device"),
        (torch.ones(2, 4, 4), r"`w` has shape \[2, 4, 4\], expected a matrix"),
        (torch.ones(4), r"`w` has shape \[4\], expected a matrix"),
        (torch.ones(()), r"`w` has shape \[\], expected a matrix"),
        (torch.ones(0, 4), r"larger than min\(out, in\) = 0 of `w`"),
    ],
    ids=["int8", "meta", "3-D", "1-D", "0-D", "empty"],
)
def test_what_is_no_float_matrix_is_refused_by_name(weight: Tensor, message: str):
    with pytest.raises(InputError, match=message):
        pissa.split(weight, "pissa", 1, name="w")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("pisa", "pissa"), ("PiSSA", "pissa"), ("mi-lora", "milora"), ("olara", "olora")],
)
def test_unknown_method_names_the_nearest(wrong, meant):
    with pytest.raises(
        InputError, match=f"unknown method '{wrong}'. Did you mean '{meant}'?"
    ) as caught:
        pissa.split(torch.eye(4), wrong, 2)
    known = str(caught.value).partition("Known: ")[2].split(", ")
    assert known == sorted({*methods(), "qlora", "qpissa"})


def test_unknown_svd_is_refused():
    with pytest.raises(
        InputError, match="svd is 'quick', expected 'fast', 'exact' or a tolerance from 5e-06 to 1"
    ):
        pissa.split(torch.eye(4), "pissa", 2, svd="quick")


@pytest.mark.parametrize("svd", [0.0, 1e-7, 2.0, math.nan, "1e-9", None])
def test_a_tolerance_out_of_range_is_refused(svd):
    with pytest.raises(InputError, match="a tolerance from 5e-06 to 1"):
        pissa.split(torch.eye(4), "pissa", 2, svd=svd)


def test_a_tolerance_may_be_written_as_text():
    assert tolerance_of("1e-3") == tolerance_of(0.001) == 1e-3
    assert (tolerance_of("fast"), tolerance_of("exact")) == (None, 1e-5)


def test_scale_is_alpha_over_rank():
    assert (scale_of(None, 16), scale_of(8, 16), scale_of(32, 16)) == (1.0, 0.5, 2.0)
    assert pissa.split(torch.eye(4), "pissa", 2, alpha=1).scale == 0.5


def test_rank_may_be_the_whole_smaller_side():
    check_rank(5, (7, 5), "w")


def test_a_decorated_function_is_found_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pissa.registry._METHODS", dict(methods()))

    @method(
        "half",
        title="Half",
        paper="none",
        trains="half of the first column",
        verdict="for this test",
    )
    def half(weight: Tensor, rank: int, *, scale: float, svd: str, seed: int, name: str) -> Split:
        left, right = weight[:, :rank] / 2, torch.eye(rank, weight.shape[1])
        return Split(weight, left, right, scale=scale)

    assert "half" in methods()
    assert torch.equal(
        pissa.split(2 * torch.eye(3), "half", 1).left[:, 0], torch.tensor([1.0, 0.0, 0.0])
    )
