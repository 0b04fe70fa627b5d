"""An attached model under peft's own commands: switch, disable, delete, merge, save; right or refused, never wrong."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import pissa
from conftest import TOKENS, build_pico
from pissa.errors import InputError, WrongBaseError
from runs import gap, logits, train
from test_laws import every_pair_of_the_weight, every_started_pair_of_the_weight

BASE = logits(build_pico())
"""The base's own output."""


def trained(method: str = "pissa", **settings: object) -> peft.PeftModel:
    """A pico model, visibly trained."""
    model = train(pissa.attach(build_pico(), method, **{"rank": 4, **settings}))
    assert gap(logits(model), BASE) > 0.1
    return model


def weights(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@every_pair_of_the_weight
@pytest.mark.parametrize("leave", ["disable_adapter", "unload", "delete_adapter"])
def test_the_base_comes_back_bit_for_bit(method, leave):
    model = trained(method)
    if leave == "disable_adapter":
        with model.disable_adapter():
            assert torch.equal(logits(model), BASE)
        assert gap(logits(model), BASE) > 0.1
    elif leave == "unload":
        base = model.unload()
        assert same(weights(base), weights(build_pico()))
        assert torch.equal(logits(base), BASE)
    else:
        model.delete_adapter("default")
        assert torch.equal(logits(model.base_model.model), BASE)


@every_pair_of_the_weight
@pytest.mark.parametrize("safe", [False, True])
def test_merged_weights_give_the_adapters_output(method, safe):
    model = trained(method, alpha=6)
    expected = logits(model)
    model.merge_adapter(safe_merge=safe)
    assert gap(logits(model), expected) < 1e-5
    model.unmerge_adapter()
    assert gap(logits(model), expected) < 1e-5
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged) is type(build_pico())
    assert gap(logits(merged), expected) < 1e-5


@pytest.mark.parametrize("other", ["pissa", "milora", "lora"])
def test_two_adapters_live_side_by_side_and_switch_exactly(other):
    model = trained()
    first = logits(model)
    model = pissa.attach(model, other, rank=3, seed=5, adapter_name="second")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), BASE)
    second = logits(train(model))
    assert gap(second, BASE) > 0.1
    for name, expected in (("default", first), ("second", second), ("default", first)):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model), second)


def test_a_name_that_is_taken_is_refused():
    model = trained()
    expected = logits(model)
    with pytest.raises(pissa.PissaError, match="adapter 'default' exists"):
        pissa.attach(model, "milora", rank=3)
    assert torch.equal(logits(model), expected)


def test_both_adapters_at_once_add_up():
    model = pissa.attach(trained(), "olora", rank=3, adapter_name="second")
    model.set_adapter("second")
    train(model)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    x = torch.randn(3, 32)
    outputs = {}
    for active in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(active)
        outputs[str(active)] = layer(x) - layer.base_layer(x)
    both = outputs.pop("['default', 'second']")
    assert torch.allclose(both, sum(outputs.values()), atol=1e-5)


def test_a_stock_lora_lives_beside():
    model = trained()
    first = logits(model)
    model.add_adapter(
        "plain", peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.set_adapter("plain")
    assert torch.equal(logits(model), BASE)
    assert gap(logits(train(model)), BASE) > 0.01
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@every_pair_of_the_weight
@pytest.mark.parametrize("alpha", [None, 10.0])
def test_what_stock_peft_saves_is_right_in_stock_peft_on_the_original_base(method, alpha, tmp_path):
    model = trained(method, alpha=alpha)
    model.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).init_lora_weights is True
    stock = peft.PeftModel.from_pretrained(build_pico(), tmp_path).eval()
    assert gap(logits(stock), logits(model)) < 1e-5


@every_pair_of_the_weight
def test_a_stock_checkpoint_continues_on_its_own_start_with_the_same_bits(method, tmp_path):
    model = pissa.attach(build_pico(), method, rank=4)
    pissa.save(model, tmp_path / "run")
    train(model).save_pretrained(tmp_path / "checkpoint")
    again = pissa.restart(build_pico(), tmp_path / "run" / "state")
    assert torch.equal(logits(again), BASE)
    again.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)
    assert same(weights(again), weights(model))
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(train(again)), logits(train(model)))


@pytest.mark.parametrize("other", [{"method": "milora"}, {"rank": 3}], ids=str)
def test_a_checkpoint_of_another_start_is_refused(other, tmp_path):
    trained(**other).save_pretrained(tmp_path)
    with pytest.raises(
        WrongBaseError, match="does not carry the start of the attached adapter 'default'"
    ):
        pissa.attach(build_pico(), **{"method": "pissa", "rank": 4}).load_adapter(
            tmp_path, "default"
        )


def test_a_stock_lora_checkpoint_is_refused_on_a_started_adapter(tmp_path):
    peft.get_peft_model(
        build_pico(), peft.LoraConfig(r=8, target_modules="all-linear")
    ).save_pretrained(tmp_path)
    with pytest.raises(WrongBaseError, match="does not carry the start"):
        pissa.attach(build_pico(), rank=4).load_adapter(tmp_path, "default")


@every_started_pair_of_the_weight
@pytest.mark.parametrize("base", ["keep", "residual"])
def test_peft_commands_that_would_read_a_plain_pair_are_refused(method, base, tmp_path):
    model = trained(method, base=base)
    with pytest.raises(
        InputError, match="add_weighted_adapter reads lora_A and lora_B as a plain pair"
    ):
        model.add_weighted_adapter(["default"], [1.0], "mixed")
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(model, rank=4)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.save_as_lora(tmp_path, model, rank=4)


def test_rows_of_one_batch_take_their_own_adapter():
    model = pissa.attach(trained(), "milora", rank=3, adapter_name="second")
    model.set_adapter("second")
    second = logits(train(model))
    model.set_adapter("default")
    first = logits(model)
    with torch.no_grad():
        mixed = model(
            torch.cat([TOKENS, TOKENS]), adapter_names=["default", "second", "__base__", "default"]
        ).logits
    assert gap(mixed[0], first[0]) < 1e-5
    assert gap(mixed[1], second[1]) < 1e-5
    assert gap(mixed[2], BASE[0]) < 1e-5
    assert gap(mixed[3], first[1]) < 1e-5


def test_rows_of_one_batch_are_refused_on_an_embedding():
    model = pissa.attach(
        build_pico(tie_word_embeddings=False), rank=4, targets=["embed_tokens"]
    ).eval()
    with pytest.raises(InputError, match=r"adapter_names .* works neither on a split embedding"):
        model(TOKENS, adapter_names=["default", "__base__"])


@every_pair_of_the_weight
def test_autocast_trains_in_bf16(method):
    model = trained(method)
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=TOKENS, labels=TOKENS)
    assert 0 < gap(output.logits, expected) < 0.1
    output.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    assert any(g.any() for g in gradients)


def gradients(model: nn.Module) -> list[Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(reentrant):
    model = trained()
    expected = gradients(model)
    model.enable_input_require_grads()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert all(
        torch.allclose(*pair, atol=1e-7) for pair in zip(gradients(model), expected, strict=True)
    )


@pytest.mark.parametrize("base", ["keep", "residual"])
def test_a_deep_copy_lives_its_own_life(base, tmp_path: Path):
    model = trained(base=base)
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    assert gap(logits(train(twin)), expected) > 0.01
    pissa.save(twin, tmp_path / "run")
    assert gap(logits(pissa.load(build_pico(), tmp_path / "run").eval()), logits(twin)) < 1e-4
    with twin.disable_adapter():
        assert gap(logits(twin), BASE) < 1e-4
    assert same(weights(twin.unload()), weights(build_pico()))
    # The original noticed nothing.
    assert torch.equal(logits(model), expected)
    assert same(weights(model.unload()), weights(build_pico()))


@every_pair_of_the_weight
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_a_trained_model_can_be_cast(method, dtype, tolerance):
    model = trained(method)
    expected = logits(model)
    cast = model.to(dtype)
    assert logits(cast).dtype == dtype
    assert gap(logits(cast), expected) < tolerance
    cast(input_ids=TOKENS, labels=TOKENS).loss.backward()
    with cast.disable_adapter():
        assert torch.equal(logits(cast), logits(build_pico().to(dtype)))
