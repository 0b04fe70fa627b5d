"""Quantisers: golden numbers, the bits of bitsandbytes, bounds of the error, bytes on disk, refusals."""

from __future__ import annotations

import sys

import bitsandbytes.functional as F
import bitsandbytes.nn as nn
import pytest
import torch
import transformers
from torch import Tensor

import pissa
from pissa.checkpoint.fingerprint import model_tensors
from pissa.errors import CheckpointError, InputError, MissingExtraError
from pissa.linalg import relative_error
from pissa.quant import NAMES, Quantiser, quantiser
from pissa.quant.codebook import Codebook
from pissa.splits import Quantised
from test_laws import matrix

FOUR_BIT = {
    "nf4": ("nf4", False),
    "nf4-double": ("nf4", True),
    "fp4": ("fp4", False),
    "fp4-double": ("fp4", True),
}
ALL = {**FOUR_BIT, "int8": ("int8", False)}
WIDEST_HALF_GAP = {"nf4": 0.1519, "fp4": 1 / 6 + 1e-6}
# The first is one byte, the second a block and a value; none fills its last block.
SHAPES = [(2, 1), (5, 13), (130, 70), (250, 100)]

every_four_bit = pytest.mark.parametrize(("name", "double"), FOUR_BIT.values(), ids=FOUR_BIT)
every_quantiser = pytest.mark.parametrize(("name", "double"), ALL.values(), ids=ALL)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


def codes(parts: dict[str, Tensor]) -> list[int]:
    """One per value: the even one is in the high half of its byte."""
    return [half for byte in parts["weight"].flatten().tolist() for half in (byte >> 4, byte & 15)]


def same_parts(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    dtypes = [{key: part.dtype for key, part in parts.items()} for parts in (got, expected)]
    return dtypes[0] == dtypes[1] and all(torch.equal(got[key], expected[key]) for key in expected)


def whole(weight: Tensor, name: str, double: bool) -> Quantised:
    """What bitsandbytes makes of a matrix itself, all of it at once."""
    packed, state = F.quantize_4bit(
        weight, blocksize=64, quant_type=name, compress_statistics=double
    )
    parts = {
        "weight": packed,
        **{f"weight.{key}": part for key, part in state.as_dict(packed=True).items()},
    }
    # It takes a matrix of one byte for a transposed one.
    return Quantised(parts, F.dequantize_4bit(packed, state).reshape(weight.shape))


def linear(weight: Tensor, name: str, double: bool = False) -> torch.nn.Module:
    """The layer that transformers puts in place of a linear one, quantised by bitsandbytes itself."""
    rows, columns = weight.shape
    if name == "int8":
        layer = nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=6.0)
    else:
        layer = nn.Linear4bit(
            columns, rows, bias=False, quant_type=name, compress_statistics=double
        )
    layer.to(weight.dtype).load_state_dict({"weight": weight})
    return layer.to("cpu")


def quantised(how: Quantiser, weight: Tensor) -> Quantised:
    return how.quantise(weight.float(), weight.dtype)


def test_golden_codes_of_a_block_with_largest_value_one():
    values = [-1, -0.7, -0.3, -0.05, 0, 0.05, 0.1, 0.3, 0.5, 0.9, 1]
    made = quantised(quantiser("nf4"), torch.tensor([values + [0.0] * 53]))
    assert codes(made.parts) == [0, 1, 4, 6, 7, 8, 8, 11, 12, 15, 15] + [7] * 53
    assert made.parts["weight.absmax"].tolist() == [1.0]


def test_codes_change_at_the_midpoints_and_a_tie_goes_to_the_lower():
    golden = [
        -0.8480964, -0.61063293, -0.45999527, -0.33967943, -0.23460741, -0.13791173, -0.04552502, 0.03979015,
        0.12025525, 0.20352125, 0.29201377, 0.38931254, 0.50166342, 0.64278692, 0.86147842,
    ]  # fmt: skip
    book = F.get_4bit_type("nf4", device="cpu")
    ties = (book[:-1] + book[1:]) / 2
    assert torch.allclose(ties, torch.tensor(golden), rtol=0, atol=1e-7)
    for midpoints, above in ((ties - 1e-6, 0), (ties, 0), (ties + 1e-6, 1)):
        block = torch.cat([midpoints, torch.ones(49)])[None]
        assert codes(quantised(quantiser("nf4"), block).parts)[:15] == [
            code + above for code in range(15)
        ]


def test_golden_histogram_and_error_of_an_even_block():
    block = 0.5 * torch.linspace(-1, 1, 64)[None]
    made = quantised(quantiser("nf4"), block)
    assert torch.tensor(codes(made.parts)).bincount().tolist() == [
        5,
        8,
        5,
        3,
        4,
        3,
        3,
        2,
        3,
        2,
        3,
        3,
        4,
        4,
        7,
        5,
    ]
    assert float((made.dense - block).square().mean()) == pytest.approx(7.1736751e-4, rel=1e-6)


def test_every_byte_stands_for_its_two_codes_and_comes_back():
    how, bytes_ = quantiser("nf4"), torch.arange(256, dtype=torch.uint8)[:, None]
    parts = quantised(how, torch.ones(8, 64)).parts | {"weight": bytes_}
    dense = how.dense(parts)
    assert torch.equal(dense.flatten(), parts["weight.quant_map"][codes(parts)])
    assert torch.equal(quantised(how, dense).parts["weight"], bytes_)


@every_four_bit
@every_dtype
@every_shape
@pytest.mark.parametrize("piece", [2**20, 64], ids=["one piece", "many pieces"])
def test_parts_and_dense_are_what_bitsandbytes_makes_of_the_whole(
    name, double, dtype, shape, piece, monkeypatch
):
    monkeypatch.setattr("pissa.quant.nf4.PIECE", piece)
    weight = matrix(*reversed(shape), dtype).T
    how, expected = quantiser(name, double=double), whole(weight, name, double)
    made = quantised(how, weight)
    assert same_parts(made.parts, expected.parts)
    for dense in (made.dense, how.dense(made.parts)):
        assert dense.dtype == dtype and torch.equal(dense, expected.dense)


@every_quantiser
@every_dtype
def test_parts_are_the_state_dict_of_a_layer_of_bitsandbytes_before_and_after_training(
    name, double, dtype
):
    weight = matrix(300, 128, dtype)
    made, layer = quantised(quantiser(name, double=double), weight), linear(weight, name, double)
    assert same_parts(made.parts, dict(layer.state_dict()))
    layer(torch.ones(3, 128, dtype=dtype))
    assert same_parts(made.parts, dict(layer.state_dict()))


@every_quantiser
@every_dtype
def test_unpacking_gives_what_packing_promised_and_leaves_the_parts_alone(name, double, dtype):
    how = quantiser(name, double=double)
    made, again = (quantised(how, matrix(300, 70, dtype)) for _ in range(2))
    assert torch.equal(how.dense(made.parts).to(dtype), made.dense)
    assert same_parts(made.parts, again.parts)


@every_quantiser
@every_shape
def test_plan_is_what_is_made_and_a_bound_where_that_is_late(name, double, shape):
    how = quantiser(name, double=double)
    for dtype, size in ((torch.float32, 1.0), (torch.bfloat16, 1e-6)):
        made = how.quantise(size * matrix(*shape, torch.float32), dtype).parts
        plan = how.plan(shape, dtype)
        assert {key: part.dtype for key, part in made.items()} == {
            key: planned[0] for key, planned in plan.items()
        }
        for key, part in made.items():
            assert (
                part.numel() <= plan[key][1][0] if key in how.late else part.shape == plan[key][1]
            )


@pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4.127)])
def test_bits_per_weight_from_the_bytes_of_all_parts(double, bits):
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    parts = quantised(quantiser("nf4", double=double), weight).parts
    assert 8 * sum(part.nbytes for part in parts.values()) / weight.numel() == pytest.approx(
        bits, abs=1e-3
    )


@pytest.mark.parametrize("name", WIDEST_HALF_GAP)
def test_a_value_is_off_by_half_the_widest_gap_at_most_and_the_largest_by_nothing(name):
    weight = torch.rand(200, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = quantised(quantiser(name), weight)
    largest = weight.abs().amax(dim=1, keepdim=True)
    errors = (made.dense - weight).abs() / largest
    assert 0.95 * WIDEST_HALF_GAP[name] < errors.max() <= WIDEST_HALF_GAP[name]
    assert not errors[weight.abs() == largest].any()


@pytest.mark.parametrize("name", WIDEST_HALF_GAP)
def test_quantising_again_changes_no_bit(name):
    first = quantised(quantiser(name), matrix(130, 70, torch.float32))
    second = quantised(quantiser(name), first.dense)
    assert torch.equal(second.dense, first.dense)
    # FP4 has two zeros.
    assert name == "fp4" or same_parts(second.parts, first.parts)


@pytest.mark.parametrize("name", WIDEST_HALF_GAP)
def test_quantised_scales_are_off_by_less_than_a_percent(name):
    weight = torch.randn(300, 128, generator=torch.Generator().manual_seed(0))
    dense = [quantised(quantiser(name, double=double), weight).dense for double in (True, False)]
    assert 1e-4 < relative_error(*dense) < 0.008


@every_quantiser
def test_zero_blocks_and_rows_give_zeros(name, double):
    how, partly = (
        quantiser(name, double=double),
        matrix(300, 64, torch.float32).index_fill(0, torch.tensor([7]), 0),
    )
    for weight in (torch.zeros(5, 64), torch.zeros(3, 30)):
        assert not quantised(how, weight).dense.any()
    made = quantised(how, partly).dense
    assert made.isfinite().all() and not made[7].any()


@every_four_bit
def test_a_layer_of_the_parts_computes_with_the_dense_matrix(name, double):
    made = quantised(quantiser(name, double=double), matrix(96, 128, torch.float32))
    layer = nn.Linear4bit(128, 96, bias=False)
    rest = {key: part for key, part in made.parts.items() if key != "weight"}
    layer.weight = nn.Params4bit.from_prequantized(
        made.parts["weight"], rest, device="cpu", module=layer
    )
    assert relative_error(layer(torch.eye(128)).T, made.dense) < 1e-6


@pytest.mark.parametrize("double", [True, False])
def test_a_layer_that_repacked_its_codes_for_the_processor_is_refused(double):
    how, weight = quantiser("nf4", double=double), matrix(96, 128, torch.float32)
    layer = linear(weight, "nf4", double).eval()
    layer.support_avx512bf16_for_cpu = True  # as on processors that have it
    parts = {key: part.clone() for key, part in layer.state_dict().items()}
    assert set(model_tensors(torch.nn.Sequential(layer))) == {f"0.{key}" for key in parts}
    layer(torch.ones(1, 128))
    with pytest.raises(InputError, match="`0` has been run, and bitsandbytes has repacked it"):
        model_tensors(torch.nn.Sequential(layer))
    undone = dict(layer.state_dict())
    assert torch.equal(undone["weight"], parts["weight"])
    assert not torch.equal(undone["weight.absmax"], parts["weight.absmax"]), (
        "its scales went through bfloat16"
    )
    if not double:
        with pytest.raises(
            CheckpointError, match="scales in the order that bitsandbytes gives them"
        ):
            how.dense(undone)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_table_finds_the_nearest_code_of_every_number(name):
    values = F.get_4bit_type(name, "cpu")
    order = values.argsort()
    midpoints = (values[order[:-1]] + values[order[1:]]) / 2
    beside = [torch.nextafter(midpoints, torch.tensor(side)) for side in (-2.0, 2.0)]
    numbers = torch.cat(
        [midpoints, *beside, torch.linspace(-1, 1, 2**18 + 1), values, torch.tensor([0.0, -0.0])]
    )
    found = Codebook(values).codes(numbers)
    assert torch.equal(found, order.to(torch.uint8)[torch.bucketize(numbers, midpoints)])
    assert found.unique().numel() == len(midpoints.unique()) + 1


def test_only_whole_blocks_are_packed():
    for name in ("nf4", "fp4"):
        packs = quantiser(name).packs
        assert packs((32, 64))
        assert packs((4096, 11008))
        assert not packs((64, 172))
        assert not packs((33, 64))
    assert quantiser("int8").packs((33, 7))


def test_float64_is_unpacked_in_float32_and_what_overflows_float16_is_refused_by_name():
    weight = matrix(64, 64, torch.float64)
    assert quantised(quantiser("nf4"), weight).dense.dtype == torch.float32
    assert pissa.split(weight, "qpissa", 4).frozen.dtype == torch.float64
    huge = (
        60000 * torch.sign(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    ).half()
    with pytest.raises(InputError, match="`huge`: the quantised weight is beyond float16's 65504"):
        pissa.split(huge, "qpissa", 4, name="huge")


def test_int8_values_are_off_by_half_a_step_of_their_row():
    weight = matrix(300, 40, torch.float32)
    made = quantised(quantiser("int8"), weight)
    half, scale = weight.half().float(), made.parts["SCB"][:, None]
    assert torch.equal(scale, half.abs().amax(dim=1, keepdim=True))
    assert ((made.dense - half).abs() <= scale / 127 / 2 * (1 + 1e-5)).all()
    own = F.int8_vectorwise_dequant(made.parts["weight"], made.parts["SCB"])
    assert relative_error(made.dense, own) < 1e-6


def test_int8_refuses_what_float16_cannot_hold_and_double_quantisation():
    with pytest.raises(
        InputError, match="above float16's 65504, in which int8 rows are rounded: use nf4"
    ):
        pissa.split(matrix(300, 40, torch.float32) * 1e7, "lora", 4, quant="int8")
    with pytest.raises(InputError, match="which int8 has not: leave --double-quant out"):
        pissa.split(torch.eye(4), "pissa", 2, quant="int8", double_quant=True)


@every_quantiser
def test_the_config_is_one_that_transformers_reads(name, double):
    read = transformers.BitsAndBytesConfig.from_dict(
        quantiser(name, double=double).config(torch.bfloat16, ["lm_head"])
    )
    assert read.quantization_method().removeprefix("llm_") == name
    assert (read.bnb_4bit_use_double_quant, read.llm_int8_skip_modules) == (double, ["lm_head"])
    assert name == "int8" or read.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize(("wrong", "meant"), [("nf5", "nf4"), ("fp-4", "fp4"), ("int4", "int8")])
def test_unknown_name_names_the_nearest(wrong, meant):
    with pytest.raises(
        InputError,
        match=f"unknown quantiser '{wrong}'. Did you mean '{meant}'[?] Known: fp4, int8, nf4",
    ):
        quantiser(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_without_bitsandbytes_the_message_is_the_pip_line(name, monkeypatch):
    for module in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pissa\[quant\]'"):
        pissa.split(torch.eye(4), "pissa", 2, quant=name)
