"""The paper's form on a live model: W becomes the residual, and the kept original comes back whole."""

from __future__ import annotations

import peft
import pytest
import torch

import pissa
from conftest import TOKENS, build_pico
from pissa.errors import InputError
from runs import gap, logits, train
from test_adapters_peft import BASE, same, weights
from test_laws import every_pair_of_the_weight, every_started_pair_of_the_weight

# One rounding of each weight to the dtype, seen at the logits (of size 1): about ten times its
# spacing.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


def residual(method: str = "pissa", **settings: object) -> peft.PeftModel:
    return pissa.attach(build_pico(), method, **{"rank": 4, "base": "residual", **settings})


@every_pair_of_the_weight
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("alpha", [None, 9.0])
def test_starts_within_one_rounding_of_the_base(method, dtype, alpha):
    model = build_pico().to(dtype)
    base = logits(model)
    attached = pissa.attach(model, method, rank=4, alpha=alpha, base="residual")
    assert gap(logits(attached), base) < ROUNDING[dtype]


@every_started_pair_of_the_weight
def test_the_weights_really_are_the_residual_of_the_stored_factors(method):
    model = residual(method, alpha=8)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    original = build_pico().model.layers[0].mlp.up_proj.weight
    split = pissa.split(
        original.data, method, 4, alpha=8, svd="fast", name="model.layers.0.mlp.up_proj.weight"
    )
    assert gap(layer.base_layer.weight, split.frozen) < 1e-6
    assert gap(layer.base_layer.weight, original) > 0.01


@every_pair_of_the_weight
def test_switched_off_it_gives_the_bases_output(method):
    model = train(residual(method))
    assert gap(logits(model), BASE) > 0.1
    with model.disable_adapter():
        assert gap(logits(model), BASE) < ROUNDING[torch.float32]
    assert gap(logits(model), BASE) > 0.1


@every_pair_of_the_weight
@pytest.mark.parametrize("leave", ["unload", "delete_adapter"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_original_weights_come_back_bit_for_bit(method, leave, dtype):
    original = build_pico().to(dtype)
    model = train(pissa.attach(build_pico().to(dtype), method, rank=4, base="residual"))
    if leave == "unload":
        base = model.unload()
        assert same(weights(base), weights(original))
        assert torch.equal(logits(base), logits(original))
    else:
        model.delete_adapter("default")
        assert torch.equal(logits(model.base_model.model), logits(original))


def test_after_deletion_another_adapter_may_come():
    model = train(residual())
    model.delete_adapter("default")
    model.add_adapter("plain", peft.LoraConfig(r=2, target_modules="all-linear"))
    model.set_adapter("plain")
    assert torch.equal(logits(model), BASE)
    assert gap(logits(train(model)), BASE) > 0.01


@every_started_pair_of_the_weight
def test_a_second_adapter_is_refused(method):
    model = residual(method)
    with pytest.raises(InputError, match="exactly one adapter: attach with base='keep'"):
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear"))


@every_started_pair_of_the_weight
def test_a_second_split_is_refused_before_it_splits_the_residual(method):
    model = residual(method)
    before = weights(model)
    with pytest.raises(pissa.PissaError, match="residual"):
        pissa.attach(model, method, rank=4, adapter_name="second")
    assert same(weights(model), before)


@every_started_pair_of_the_weight
def test_a_residual_under_another_adapter_is_refused(method):
    model = train(pissa.attach(build_pico(), method, rank=4))
    expected = logits(model)
    with pytest.raises(InputError, match="base='keep'"):
        pissa.attach(model, method, rank=4, base="residual", adapter_name="second")
    assert torch.equal(logits(model), expected)


@every_started_pair_of_the_weight
def test_rows_of_one_batch_cannot_choose(method):
    with pytest.raises(InputError, match=r"adapter_names .* nor on a residual"):
        residual(method).eval()(TOKENS, adapter_names=["default", "__base__"])


@every_pair_of_the_weight
@pytest.mark.parametrize("alpha", [None, 10.0])
def test_what_is_saved_is_a_plain_lora_for_the_original_base(method, alpha, tmp_path):
    model = train(residual(method, alpha=alpha))
    expected = logits(model)
    model.save_pretrained(tmp_path / "stock")
    pissa.save(model, tmp_path / "run")
    for folder in (tmp_path / "stock", tmp_path / "run" / "adapter"):
        stock = peft.PeftModel.from_pretrained(build_pico(), folder).eval()
        assert gap(logits(stock), expected) < 2e-5
    # And loaded by pissa on the original base it trains on in its own form.
    again = pissa.load(build_pico(), tmp_path / "run").eval()
    assert gap(logits(again), expected) < 1e-6
    again.delete_adapter("default")
    assert torch.equal(logits(again.base_model.model), BASE)


@every_pair_of_the_weight
@pytest.mark.parametrize("safe", [False, True])
def test_merged_weights_give_the_adapters_output(method, safe):
    model = train(residual(method, alpha=6))
    expected = logits(model)
    model.merge_adapter(safe_merge=safe)
    assert gap(logits(model), expected) < 1e-5
    model.unmerge_adapter()
    assert gap(logits(model), expected) < 1e-5
    assert gap(logits(model.merge_and_unload(safe_merge=safe)), expected) < 1e-5
