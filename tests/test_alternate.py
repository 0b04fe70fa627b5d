"""Alternation between the low-rank part and the quantised rest: what QPiSSA and LoftQ promise of their errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import pissa
from pissa.errors import InputError
from pissa.linalg import relative_error
from pissa.method import Quantisation
from pissa.quant import NAMES, quantiser
from pissa.registry import get
from pissa.splits import Quantised, Split
from spectra import with_values
from test_laws import matrix, same_bits
from test_methods import gradients

every_preset = pytest.mark.parametrize("preset", ["qpissa", "loftq", "qlora"])
every_alternating = pytest.mark.parametrize("method", ["pissa", "loftq"])
every_quantiser = pytest.mark.parametrize("quant", NAMES)
every_decay = pytest.mark.parametrize("decay", [0.5, 0.7, 1.0])


def power_law(
    decay: float = 0.7, rows: int = 128, columns: int = 192, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Singular values k^-decay, as of trained weights; on Gaussian ones PiSSA does not win."""
    values = torch.arange(1.0, min(rows, columns) + 1, dtype=torch.float64) ** -decay
    return with_values(values, rows, columns, torch.Generator().manual_seed(0)).to(dtype)


def nf4(matrix: Tensor) -> Quantised:
    return quantiser("nf4").quantise(matrix, torch.float32)


def by_the_authors(weight: Tensor, rank: int, rounds: int) -> Split:
    """QPiSSA as the authors' script has it: each round ends with quantizing, also the last one."""
    rest = weight
    for _ in range(rounds):
        part = pissa.split(rest, "pissa", rank)
        quantized = nf4(weight - part.product())
        rest = weight - quantized.dense
    return Split(weight, part.left, part.right, quantised=quantized)


def missing(split: Split) -> Tensor:
    """What the split lost of the weight, float64."""
    return (
        split.weight.double()
        - split.frozen.double()
        - split.scale * split.left.double() @ split.right.double()
    )


def error(split: Split, norm: str = "fro") -> float:
    return float(torch.linalg.matrix_norm(missing(split), norm))


@every_decay
@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("rounds", [1, 5])
def test_qpissa_is_closer_than_loftq_is_closer_than_qlora(decay, rank, rounds):
    weight = power_law(decay)
    ours, loftq = (
        pissa.split(weight, preset, rank, iterations=rounds) for preset in ("qpissa", "loftq")
    )
    qlora = pissa.split(weight, "qlora", rank)
    authors = by_the_authors(weight, rank, rounds)
    for norm in ("fro", "nuc"):
        assert error(ours, norm) < 0.9 * error(loftq, norm) < 0.9 * 0.95 * error(qlora, norm)
        assert error(ours, norm) < error(authors, norm) < 0.9 * error(loftq, norm)


@every_alternating
@every_quantiser
def test_more_rounds_never_raise_the_error_and_the_first_ones_lower_it(method, quant):
    splits = [
        pissa.split(power_law(), method, 8, quant=quant, iterations=rounds)
        for rounds in range(1, 8)
    ]
    errors = [error(split) for split in splits]
    assert errors == sorted(errors, reverse=True)
    assert errors[4] < 0.97 * errors[0]


@every_decay
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_closing_with_the_low_rank_part_never_raises_the_error(decay, rounds):
    closed = get("pissa").split(power_law(decay), 8, quantisation=Quantisation(nf4, rounds))
    assert error(closed) < error(by_the_authors(power_law(decay), 8, rounds))


def test_one_round_of_the_authors_loses_what_quantising_the_residual_loses():
    weight = power_law(dtype=torch.float64)
    plain = pissa.split(weight, "pissa", 8)
    split = by_the_authors(weight, 8, 1)
    assert torch.equal(split.left, plain.left) and torch.equal(split.right, plain.right)
    assert relative_error(missing(split), plain.frozen - nf4(plain.frozen).dense) < 1e-12


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_rounds_follow_the_loop_of_the_authors_and_that_of_the_loftq_paper(rounds):
    weight = power_law(dtype=torch.float64)

    def best(rest: Tensor) -> Tensor:
        U, S, Vh = torch.linalg.svd(rest, full_matrices=False)
        return (U[:, :8] * S[:8]) @ Vh[:8]

    rest, product = weight, torch.zeros_like(weight)
    for _ in range(rounds):
        part = best(rest)
        rest = weight - nf4(weight - part).dense
    for _ in range(rounds):
        frozen = nf4(weight - product).dense
        product = best(weight - frozen)
    authors = by_the_authors(weight, 8, rounds)
    closed = get("pissa").split(weight, 8, quantisation=Quantisation(nf4, rounds))
    loftq = get("loftq").split(weight, 8, quantisation=Quantisation(nf4, rounds))
    q_pissa = weight - rest
    for split, *parts in (
        (authors, q_pissa, part),
        (closed, q_pissa, best(rest)),
        (loftq, frozen, product),
    ):
        assert relative_error(split.frozen, parts[0]) < 1e-12
        assert relative_error(split.product(), parts[1]) < 1e-12


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_with_nothing_quantised_qpissa_is_pissa(rounds):
    weight = power_law(dtype=torch.float64)
    plain = pissa.split(weight, "pissa", 8)
    exact = Quantisation(lambda rest: Quantised({}, rest), rounds)
    split = get("pissa").split(weight, 8, quantisation=exact)
    assert relative_error(split.product(), plain.product()) < 1e-12
    assert relative_error(split.frozen, plain.frozen) < 1e-12
    assert error(split) < 1e-12


def test_one_round_of_loftq_keeps_the_quantised_part_of_qlora():
    loftq, qlora = (
        pissa.split(power_law(), "loftq", 8, iterations=1),
        pissa.split(power_law(), "qlora", 8),
    )
    assert torch.equal(loftq.frozen, qlora.frozen)
    assert all(
        torch.equal(part, loftq.quantised.parts[key]) for key, part in qlora.quantised.parts.items()
    )


@every_alternating
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_full_rank_part_leaves_no_error(method, shape, rounds):
    split = pissa.split(matrix(*shape, torch.float32), method, 24, quant="nf4", iterations=rounds)
    assert error(split) < 1e-5 * split.weight.norm()


@every_alternating
@pytest.mark.parametrize("svd", ["exact", "fast"])
def test_any_alpha_starts_from_the_same_product_with_balanced_factors(method, svd):
    weight = power_law()
    one, three = (
        pissa.split(weight, method, 8, alpha=alpha, quant="nf4", svd=svd) for alpha in (8, 24)
    )
    assert torch.equal(one.frozen, three.frozen)
    assert three.scale == 3.0
    assert relative_error(three.product(), one.product()) < 1e-6
    for split in (one, three):
        S = torch.linalg.svdvals(split.product())[:8] / split.scale
        for gram in (split.left.T @ split.left, split.right @ split.right.T):
            assert torch.allclose(gram, torch.diag(S), rtol=0, atol=1e-5 * float(S[0]))
        assert error(split) < 0.9 * error(pissa.split(weight, "qlora", 8))


@every_alternating
def test_the_low_rank_part_is_the_best_for_the_rest_it_was_left(method):
    split = pissa.split(power_law(), method, 8, alpha=24, quant="nf4", iterations=3)
    values = torch.linalg.svdvals(split.weight.double() - split.frozen.double())
    assert error(split) == pytest.approx(float(values[8:].norm()), rel=1e-6)


@every_alternating
def test_the_fast_svd_loses_next_to_nothing(method):
    weight = power_law(rows=300, columns=400)
    exact, fast = (
        pissa.split(weight, method, 8, svd=svd, quant="nf4") for svd in ("exact", "fast")
    )
    assert not torch.equal(exact.left, fast.left)
    assert error(fast) < 1.002 * error(exact)


def worsening(results: list[Quantised], rest: Tensor) -> Quantised:
    """NF4 with noise that grows from call to call."""
    results.append(Quantised({}, nf4(rest).dense + 0.1 * len(results) * power_law(decay=0.0)))
    return results[-1]


@every_alternating
def test_the_best_round_is_kept_and_the_first_worse_one_is_the_last(method):
    results: list[Quantised] = []
    split = get(method).split(
        power_law(), 8, quantisation=Quantisation(partial(worsening, results), 5)
    )
    alone = get(method).split(power_law(), 8, quantisation=Quantisation(nf4, 1))
    assert len(results) == 2
    assert split.quantised is results[0]
    assert same_bits(split, alone)


@every_alternating
def test_a_round_that_gains_next_to_nothing_is_the_last(method):
    weight, noise, calls = power_law(), power_law(decay=0.0), []

    def creeping(rest: Tensor) -> Quantised:
        calls.append(rest)
        return Quantised({}, weight + noise * (1 - 1e-5 * len(calls)))

    get(method).split(weight, 8, quantisation=Quantisation(creeping, 50))
    assert len(calls) == 2


@every_preset
@pytest.mark.parametrize("svd", ["exact", "fast"])
def test_same_seed_and_name_give_the_same_bits_and_leave_the_weight_alone(preset, svd):
    weight = power_law(rows=400, columns=500)
    before, state = weight.clone(), torch.get_rng_state()
    one, other = (pissa.split(weight, preset, 8, svd=svd, seed=3, name="a") for _ in range(2))
    assert same_bits(one, other)
    assert torch.equal(weight, before) and torch.equal(torch.get_rng_state(), state)


@every_preset
@every_quantiser
def test_a_zero_weight_has_no_error_and_factors_that_can_learn(preset, quant):
    for dtype in (torch.float32, torch.bfloat16):
        split = pissa.split(torch.zeros(20, 30, dtype=dtype), preset, 3, quant=quant)
        assert error(split) == 0.0 and not split.frozen.any()
        left, right = gradients(split)
        assert left.isfinite().all() and right.isfinite().all()
        assert ((left.norm(dim=0) + right.norm(dim=1)) > 1e-3).all()


@pytest.mark.parametrize("method", ["lora", "milora", "olora"])
@every_quantiser
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_methods_that_do_not_alternate_quantise_the_frozen_part_of_their_own_split(
    method, quant, dtype
):
    weight, double = power_law(dtype=dtype), quant != "int8"
    plain = pissa.split(weight, method, 8, alpha=24)
    split = pissa.split(weight, method, 8, alpha=24, quant=quant, double_quant=double)
    expected = quantiser(quant, double=double).quantise(plain.frozen, dtype)
    assert split.quantised.dense.dtype == dtype
    assert torch.equal(split.quantised.dense, expected.dense)
    assert all(
        torch.equal(split.quantised.parts[key], part) for key, part in expected.parts.items()
    )
    assert torch.equal(split.left, plain.left) and torch.equal(split.right, plain.right)


@pytest.mark.parametrize(
    ("method", "asked", "message"),
    [
        ("pissa", {"quant": "nf4", "iterations": 0}, "iterations is 0, expected 1 or more"),
        ("pissa", {"iterations": 3}, "only with a quantiser: add --quant nf4"),
        ("lora", {"quant": "nf4", "iterations": 3}, "leave it out, or use one of loftq, pissa"),
        ("qlora", {"iterations": 3}, "leave it out, or use one of loftq, pissa"),
        (
            "pissa",
            {"quant": "nf5"},
            "unknown quantiser 'nf5'. Did you mean 'nf4'[?] Known: fp4, int8, nf4",
        ),
        ("qpisa", {}, "unknown method 'qpisa'. Did you mean 'qpissa'[?]"),
    ],
)
def test_what_has_no_meaning_is_refused_with_advice(method, asked, message):
    with pytest.raises(InputError, match=message):
        pissa.split(torch.eye(8), method, 2, **asked)


def test_loftq_without_a_quantiser_is_refused_and_its_name_alone_brings_one():
    with pytest.raises(
        InputError,
        match="loftq starts from the error of a quantised weight: name the quantiser, --quant",
    ):
        get("loftq").split(torch.eye(8), 2)
    assert set(pissa.split(torch.eye(8), "loftq", 2).quantised.parts) > {"weight", "weight.absmax"}
