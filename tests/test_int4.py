"""4-bit integers: what is stored is what is computed with, and the product is that of integers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from pissa.errors import InputError
from pissa.linalg.int4 import GROUP, Int4, pack, product, quantise, unpack

COLUMNS = pytest.mark.parametrize("columns", [1, 7, 64, 128, 200])


def noise(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 3, rows)[:, None]
    return sizes * torch.randn(rows, columns, generator=generator)


def groups(columns: int) -> list[slice]:
    return [slice(start, min(start + GROUP, columns)) for start in range(0, columns, GROUP)]


@COLUMNS
def test_codes_are_the_nearest_in_the_stored_scale_and_use_minus_7_to_7(columns):
    matrix = noise(12, columns)
    found = quantise(matrix)
    assert found.codes.dtype == torch.int8 and found.codes.abs().max() == 7
    for index, group in enumerate(groups(columns)):
        steps = (matrix[:, group].abs().amax(1) / 7).half()
        assert torch.equal(found.scales[:, index], steps)
        exact = matrix[:, group].double() / steps.double()[:, None]
        assert torch.all((found.codes[:, group] - exact.clamp(-7, 7)).abs() <= 0.5 + 1e-6)
    assert found.scales.shape == (12, len(groups(columns)))


def test_a_scale_that_float16_rounds_down_clips_the_largest_value_by_less_than_its_rounding():
    # 7.0027 / 7 = 1.00038..., float16's neighbours are 1 and 1.00098.
    matrix = torch.tensor([[7.0027, -7.0027, 3.4]])
    found = quantise(matrix)
    assert found.scales.item() == 1.0 and found.codes.tolist() == [[7, -7, 3]]
    assert (found.dense()[0, 0] - 7.0027).abs() / 7.0027 < 2**-11


def test_a_scale_of_one_bit_clips_what_is_larger_to_7():
    smallest = 2.0**-24
    found = quantise(torch.tensor([[9.8 * smallest, -9.8 * smallest, 2 * smallest]]))
    assert found.scales.item() == smallest and found.codes.tolist() == [[7, -7, 2]]


def test_zero_groups_are_zero_and_tiny_ones_no_nan():
    matrix = torch.zeros(2, 130)
    matrix[0, 64] = 1.0
    matrix[1, 129] = 1e-12
    found = quantise(matrix)
    assert found.scales[0].tolist() == [0.0, torch.tensor(1 / 7).half().item(), 0.0]
    assert torch.equal(found.codes.nonzero(), torch.tensor([[0, 64]]))
    assert torch.isfinite(found.dense()).all() and torch.isfinite(product(found, found)).all()


def test_values_beyond_float16_show_as_infinite_scales_and_are_never_clipped_in_silence():
    assert torch.isinf(quantise(torch.tensor([[1e6, 1.0]])).scales).all()
    assert torch.isnan(quantise(torch.tensor([[float("nan"), 1.0]])).dense()).any()


@COLUMNS
def test_packing_is_half_a_byte_a_code_and_loses_nothing(columns):
    codes = quantise(noise(6, columns)).codes
    packed = pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (6, -(-columns // 2))
    assert torch.equal(unpack(packed, columns), codes)


def test_every_pair_of_codes_has_its_own_byte_with_the_even_column_low():
    pairs = torch.cartesian_prod(torch.arange(-7, 8), torch.arange(-7, 8)).to(torch.int8)
    packed = pack(pairs)
    assert len(packed.unique()) == 225 and torch.equal(unpack(packed, 2), pairs)
    assert pack(torch.tensor([[1, -1]], dtype=torch.int8)).item() == 0xF1


@COLUMNS
def test_the_product_is_the_integers_product_up_to_the_sum_over_groups(columns):
    left, right = quantise(noise(5, columns)), quantise(noise(9, columns, seed=1))
    codes = [matrix.codes.numpy().astype(np.int64) for matrix in (left, right)]
    got, exact, size = product(left, right), np.zeros((5, 9)), np.zeros((5, 9))
    for index, group in enumerate(groups(columns)):
        dots = codes[0][:, group] @ codes[1][:, group].T
        scales = np.outer(
            left.scales[:, index].double().numpy(), right.scales[:, index].double().numpy()
        )
        exact += dots * scales
        size += np.abs(dots * scales)
    assert np.all(np.abs(got.double().numpy() - exact) <= 2**-23 * len(groups(columns)) * size)


def test_the_product_of_one_group_is_the_exact_number_rounded_once():
    left, right = quantise(noise(4, 64)), quantise(noise(4, 64, seed=1))
    for row in range(4):
        for column in range(4):
            dot = int((left.codes[row].long() * right.codes[column].long()).sum())
            exact = (
                Fraction(dot)
                * Fraction(left.scales[row].item())
                * Fraction(right.scales[column].item())
            )
            assert product(left, right)[row, column].item() == np.float32(exact)


def test_the_product_is_near_that_of_what_the_codes_stand_for():
    left, right = quantise(noise(5, 200)), quantise(noise(9, 200, seed=1))
    dense = left.dense().double() @ right.dense().double().T
    torch.testing.assert_close(product(left, right).double(), dense, rtol=1e-5, atol=1e-5)


def test_rows_are_quantised_each_on_its_own():
    matrix = noise(6, 200)
    assert torch.equal(quantise(matrix[2:3]).codes[0], quantise(matrix).codes[2])


def test_other_groups_do_not_multiply():
    with pytest.raises(InputError, match="groups of 64 meet rows of 8 in groups of 4"):
        product(quantise(noise(2, 8)), quantise(noise(2, 8), group=4))


def test_normal_noise_loses_the_known_share():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(256, 1024, generator=generator)
    found: Int4 = quantise(matrix)
    error = float((found.dense() - matrix).norm() / matrix.norm())
    assert error == pytest.approx(0.1075, abs=0.001)
