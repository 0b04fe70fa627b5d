"""SVDQuant: what the split promises, and the layer that computes with it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pissa.errors import InputError
from pissa.linalg import relative_error
from pissa.linalg.int4 import pack, product, quantise, unpack
from pissa.linalg.smoothing import exponents, smoothings
from pissa.methods.svdquant import svdquant
from pissa.registry import get
from pissa.splits import Lora, Split
from pissa.w4a4 import W4A4Linear

OUTLIERS = 6


def layer(
    rows: int = 96, columns: int = 256, outliers: int = OUTLIERS, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A weight and inputs of which a few channels are forty times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    inputs = torch.randn(512, columns, generator=generator)
    inputs[:, torch.randperm(columns, generator=generator)[:outliers]] *= 40
    return weight, inputs


WEIGHT, INPUTS = layer()


def split(
    rank: int, *, smoothing: bool = True, rounds: int = 1, weight=WEIGHT, inputs=INPUTS, scale=1.0
) -> Split:
    how = {"scale": scale, "svd": "exact", "seed": 0, "name": "w", "inputs": inputs}
    return svdquant(weight, rank, **how, smoothing=smoothing, rounds=rounds)


def error(found: Split, inputs: Tensor = INPUTS) -> float:
    """Of the layer's output, relative."""
    return relative_error(W4A4Linear.from_split(found)(inputs), inputs @ found.weight.float().T)


def stored(found: Split) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale of each entry, smooth)."""
    parts = found.quantised.parts
    columns = found.weight.shape[1]
    steps = parts["scales"].float().repeat_interleave(64, dim=1)[:, :columns]
    return unpack(parts["codes"], columns), steps, parts["smooth"].float()


def missed_singular_values(found: Split, rank: int) -> Tensor:
    return torch.linalg.svdvals((found.weight * stored(found)[2]).double())[rank:]


# What the method does


@pytest.mark.parametrize("smooth", range(0, 39, 6))
def test_without_rounding_the_output_is_the_layers_own_for_every_smoothing(smooth):
    factors = list(smoothings(INPUTS, WEIGHT))[smooth].double()
    weight, inputs = WEIGHT.double(), INPUTS.double()
    torch.testing.assert_close(
        (inputs / factors) @ (weight * factors).T, inputs @ weight.T, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("rounds", [1, 5])
def test_the_codes_are_those_of_what_the_stored_branch_leaves_of_the_smoothed_weight(
    rank, scale, rounds
):
    found = split(rank, scale=scale, rounds=rounds)
    for factor in (found.left, found.right):
        assert torch.equal(factor, factor.half().float())
    codes, steps, smooth = stored(found)
    assert len(smooth.unique()) > 1
    rest = (WEIGHT.double() - scale * found.left.double() @ found.right.double()) * smooth
    assert torch.all((codes * steps - rest).abs() <= 0.501 * steps + 1e-6)


def test_no_outliers_no_smoothing_no_branch_is_plain_w4a4():
    weight, inputs = layer(outliers=0)
    plain = split(0, smoothing=False, weight=weight, inputs=inputs)
    assert torch.all(plain.quantised.parts["smooth"] == 1)
    assert torch.equal(plain.quantised.parts["codes"], pack(quantise(weight).codes))
    expected = product(quantise(inputs), quantise(weight))
    assert torch.equal(W4A4Linear.from_split(plain)(inputs), expected)


def test_on_outlying_channels_neither_smoothing_nor_the_branch_suffices_and_both_do():
    naive = error(split(0, smoothing=False))
    smoothed = error(split(0))
    branch = error(split(16, smoothing=False))
    both, iterated = error(split(16)), error(split(16, rounds=10))
    # Of the specification's toy: 0.179, 0.087, 0.146, 0.0216, 0.0193; of this seed 0.192, 0.087,
    # 0.155, 0.0224, 0.0199.
    assert naive == pytest.approx(0.18, abs=0.02) and branch == pytest.approx(0.15, abs=0.01)
    assert smoothed == pytest.approx(0.087, abs=0.005)
    assert both == pytest.approx(0.022, abs=0.002) and iterated == pytest.approx(0.0195, abs=0.001)
    assert iterated < 0.93 * both


def test_the_error_falls_with_the_rank_and_steeply_once_it_reaches_the_number_of_outliers():
    errors = {rank: error(split(rank)) for rank in (0, 4, 8, 16, 32)}
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    assert errors[8] < 0.5 * errors[4]
    assert errors[32] > 0.5 * errors[8]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("outliers", [0, OUTLIERS])
def test_more_rounds_are_never_further_on_the_rows_they_were_judged_by(seed, outliers):
    weight, inputs = layer(48, 64, outliers, seed)
    errors = [
        error(split(2, rounds=rounds, weight=weight, inputs=inputs), inputs)
        for rounds in range(1, 13)
    ]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]


@pytest.mark.parametrize("rank", [1, 8, 32])
def test_the_rest_holds_the_energy_of_the_singular_values_that_the_branch_leaves(rank):
    found = split(rank)
    rest = (WEIGHT - found.left @ found.right) * stored(found)[2]
    expected = missed_singular_values(found, rank).square().sum()
    assert float(rest.double().square().sum()) == pytest.approx(float(expected), rel=1e-3)


def test_at_full_rank_nothing_is_left_for_four_bits():
    weight, inputs = layer(48, 128)
    found = split(48, weight=weight, inputs=inputs)
    # Float16 factors miss 2^-11 or less of the weight, and the codes take up most of that.
    assert relative_error(found.rebuild(), weight) < 1e-4
    assert error(found, inputs) < 1e-4


@pytest.mark.parametrize("smoothing", [True, False])
def test_the_smoothing_is_the_best_of_the_grid_by_output_error_with_the_branch(smoothing):
    weight, inputs = layer(32, 128)
    best = error(split(4, smoothing=smoothing, weight=weight, inputs=inputs), inputs)
    each = []
    for factors in smoothings(inputs, weight):
        smooth = factors.float()
        left = torch.linalg.svd(weight * smooth, full_matrices=False)
        B, A = (left.U * left.S)[:, :4], left.Vh[:4] / smooth
        y = (
            product(quantise(inputs / smooth), quantise((weight - B @ A) * smooth))
            + inputs @ A.T @ B.T
        )
        each.append(relative_error(y, inputs @ weight.T))
    assert best == pytest.approx(min(each) if smoothing else each[0], rel=0.02)
    assert min(each) < 0.5 * each[0]


def test_the_grid_has_39_candidates_of_which_the_first_is_no_smoothing():
    pairs = list(exponents())
    assert len(pairs) == len(set(pairs)) == 39 and pairs[0] == (0.0, 0.0)
    assert {b for a, b in pairs if a == 0.25} == {0.0, 0.75}
    candidates = list(smoothings(INPUTS, WEIGHT))
    assert len(candidates) == 39 and torch.all(candidates[0] == 1)
    ranges = INPUTS.abs().amax(0), WEIGHT.abs().amax(0)
    expected = ranges[0] ** 0.25 / ranges[1] ** 0.75
    got = candidates[pairs.index((0.25, 0.75))].float()
    torch.testing.assert_close(got / got[0], expected / expected[0], rtol=2e-3, atol=0)


def test_dead_channels_and_dead_rows_keep_the_smoothing_away_from_zero_and_infinity():
    weight, inputs = layer(32, 128)
    inputs[:, 5], weight[:, 7] = 0, 0
    for case in (inputs, torch.zeros_like(inputs), 1e-20 * inputs):
        for factors in smoothings(case, weight):
            assert torch.isfinite(factors).all() and factors.min() > 1e-3
    found = split(4, weight=weight, inputs=inputs)
    awake = inputs.clone()
    awake[:, 5] = 1.0
    assert error(found, awake) < 2 * error(found, inputs)


def test_bfloat16_weights_and_short_last_groups_split_too():
    weight, inputs = layer(40, 100)
    found = get("svdquant").split(weight.bfloat16(), 8, observed=inputs)
    assert found.left.dtype == torch.float32 and found.quantised.parts["scales"].shape == (40, 2)
    assert error(found, inputs) < 0.05


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (None, {}, "needs the inputs of `w`"),
        (torch.ones(4, 9), {}, r"are \[4, 9\], expected \[rows, 256\]"),
        (torch.ones(0, 256), {}, "expected .* with a row or more"),
        (torch.full((2, 256), torch.inf), {}, "has non-finite values"),
        (INPUTS, {"rounds": 0}, "rounds is 0, expected 1 or more"),
        (INPUTS, {"smooth": True}, "Did you mean 'smoothing'"),
    ],
)
def test_what_cannot_be_right_is_refused(inputs, options, message):
    with pytest.raises(InputError, match=message):
        get("svdquant").split(WEIGHT, 4, name="w", observed=inputs, options=options)


def test_a_weight_beyond_float16_scales_is_refused_by_name():
    with pytest.raises(InputError, match="`w` leaves float16, in which scales are stored"):
        get("svdquant").split(WEIGHT * 1e8, 4, name="w", observed=INPUTS)


# The layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_layer_is_the_integer_product_of_the_stored_parts_and_the_branch_of_unrounded_inputs(
    dtype,
):
    found, bias = (
        split(8, rounds=3),
        torch.randn(96, generator=torch.Generator().manual_seed(1)).to(dtype),
    )
    x = INPUTS[:12].to(dtype).reshape(3, 4, 256)
    got = W4A4Linear.from_split(found, bias)(x)
    assert got.dtype == dtype and got.shape == (3, 4, 96)
    codes, steps, smooth = stored(found)
    rows = x.reshape(12, 256).float()
    acts = quantise(rows / smooth)
    exact = acts.dense().double() @ (codes * steps).double().T
    exact += rows.double() @ found.right.double().T @ found.left.double().T + bias.double()
    torch.testing.assert_close(
        got.reshape(12, 96).double(), exact, rtol=3 * torch.finfo(dtype).eps, atol=2e-4
    )


def test_a_token_does_not_depend_on_its_neighbours():
    found = W4A4Linear.from_split(split(8))
    torch.testing.assert_close(found(INPUTS[:5])[2], found(INPUTS[2]), rtol=1e-6, atol=1e-6)


def test_the_dense_weight_is_what_the_split_rebuilds():
    found = split(8, rounds=3)
    torch.testing.assert_close(
        W4A4Linear.from_split(found).dense(), found.rebuild(), rtol=1e-5, atol=1e-6
    )


def test_a_lora_beside_the_branch_adds_its_own_output():
    layer_, generator = (
        W4A4Linear.from_split(split(8), torch.ones(96)),
        torch.Generator().manual_seed(1),
    )
    lora = Lora(
        torch.randn(4, 256, generator=generator).half(),
        torch.randn(96, 4, generator=generator).half(),
    )
    both = layer_.with_lora(lora)
    assert both.rank == 12 and layer_.rank == 8
    expected = layer_(INPUTS) + INPUTS @ lora.A.float().T @ lora.B.float().T
    torch.testing.assert_close(both(INPUTS), expected, rtol=1e-4, atol=1e-3)


def test_the_state_dict_is_packed_and_gives_the_same_bits_back():
    first = W4A4Linear.from_split(split(8), torch.ones(96))
    state = first.state_dict()
    kinds = {"codes": torch.uint8, "bias": torch.float32}
    assert {name: part.dtype for name, part in state.items()} == {
        name: kinds.get(name, torch.float16)
        for name in ("codes", "scales", "smooth", "left", "right", "bias")
    }
    bits = 8 * (state["codes"].nbytes + state["scales"].nbytes) / WEIGHT.numel()
    assert bits == 4.25
    second = W4A4Linear(256, 96, 8, torch.zeros(96))
    second.load_state_dict(state)
    assert torch.equal(second(INPUTS), first(INPUTS))


def test_a_layer_whose_scales_were_cast_refuses_to_compute():
    cast = W4A4Linear.from_split(split(8)).to(torch.bfloat16)
    with pytest.raises(InputError, match=r"cast to torch\.bfloat16.*leave its dtype alone"):
        cast(INPUTS)
