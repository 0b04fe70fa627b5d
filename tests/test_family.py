"""One life for the whole family: attached, trained, saved, loaded, exported and merged alike."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor

import pissa
from conftest import PACKABLE, TOKENS, build_pico
from pissa.adapters.attach import adaptation_of
from pissa.checkpoint.output import read_json
from pissa.errors import InputError, WrongBaseError
from pissa.jobs import DecomposeSettings
from pissa.method import OBSERVED
from pissa.observe import Observations, observe
from pissa.records import Record
from pissa.registry import get, methods
from pissa.surgery.decompose import prepare
from pissa.training.lora_pro import LoraPro

TRAINABLE = sorted(
    name for name, method in methods().items() if method.parts and method.needs != "quantiser"
)
CORED = [name for name in TRAINABLE if "core" in get(name).parts]
NEW = [name for name in TRAINABLE if name not in ("lora", "pissa", "milora", "olora")]
RANK, ALPHA, NEAR = 4, 8.0, 1e-5
every_method = pytest.mark.parametrize("method", TRAINABLE)
every_core = pytest.mark.parametrize("method", CORED)


def build() -> transformers.LlamaForCausalLM:
    return build_pico(**PACKABLE)


@pytest.fixture(scope="module")
def observations() -> Observations:
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    return observe(build(), [batch], ("covariance", "components", "gradient"))


def seen(method: str, observations: Observations) -> Observations | None:
    return observations if get(method).needs in OBSERVED else None


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def away(one: torch.nn.Module, other: Tensor) -> float:
    return float((logits(one) - other).abs().max())


def trained(model: PeftModel, steps: int = 3) -> PeftModel:
    """Moved by a few steps on the tokens themselves, of AdamW or of the method's own optimiser."""
    if adaptation_of(model, model.active_adapter).method.optimizer:
        optimizer = LoraPro(model, lr=1e-2)
    else:
        optimizer = torch.optim.AdamW(
            [part for part in model.parameters() if part.requires_grad], lr=1e-2
        )
    for _ in range(steps):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@every_method
@pytest.mark.parametrize("base", ["keep", "residual"])
def test_every_way_out_of_a_model_gives_what_was_trained(method, base, observations, tmp_path):
    before = logits(build())
    model = pissa.attach(
        build(), method, RANK, alpha=ALPHA, base=base, observations=seen(method, observations)
    )
    assert away(model, before) <= (0.0 if base == "keep" else NEAR)
    after = logits(trained(model))
    assert (after - before).abs().max() > 0.05
    pissa.save(model, tmp_path / "run")
    model.save_pretrained(tmp_path / "stock")
    again = pissa.restart(build(), tmp_path / "run" / "state")
    peft.set_peft_model_state_dict(again, peft.get_peft_model_state_dict(model))
    assert torch.equal(logits(pissa.load(build(), tmp_path / "run")), after)
    assert away(PeftModel.from_pretrained(build(), tmp_path / "run" / "adapter"), after) < NEAR
    assert away(PeftModel.from_pretrained(build(), tmp_path / "stock"), after) < NEAR
    assert away(again, after) < NEAR
    assert away(copy.deepcopy(model).merge_and_unload(), after) < NEAR
    with model.disable_adapter():
        assert away(model, before) < NEAR


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("method", NEW)
def test_every_method_decomposes_a_folder_that_stock_tools_load(
    method, quant, observations, tmp_path
):
    build().save_pretrained(tmp_path / "base")
    options = {"alpha": ALPHA, "observations": seen(method, observations), "quant": quant}
    if quant and get(method).full_rank:
        with pytest.raises(InputError, match="larger in 32 bits than the weight"):
            pissa.decompose(tmp_path / "base", tmp_path / "out", method, RANK, **options)
        return
    pissa.decompose(tmp_path / "base", tmp_path / "out", method, RANK, **options)
    start = pissa.load(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tmp_path / "out"
    )
    begun = logits(start)
    assert (begun - logits(build())).abs().max() < (0.2 if quant else NEAR)
    residual = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert away(PeftModel.from_pretrained(residual, tmp_path / "out" / "pissa_init"), begun) < NEAR
    after = logits(trained(start))
    pissa.save(start, tmp_path / "run")
    served_on = tmp_path / ("out" if quant else "base")
    served = transformers.AutoModelForCausalLM.from_pretrained(served_on)
    assert away(PeftModel.from_pretrained(served, tmp_path / "run" / "adapter"), after) < NEAR
    pissa.merge(served_on, tmp_path / "run", tmp_path / "merged", dtype="float32")
    assert (
        away(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), after) < NEAR
    )


@every_method
def test_convert_writes_the_smallest_exact_rank(method, observations, tmp_path):
    model = trained(pissa.attach(build(), method, RANK, observations=seen(method, observations)))
    pissa.save(model, tmp_path / "run")
    chosen = get(method)
    if chosen.full_rank:
        with pytest.raises(InputError, match="full rank"):
            pissa.convert(tmp_path / "run", tmp_path / "lora")
        record = pissa.convert(tmp_path / "run", tmp_path / "lora", rank=6)
        # The values of its diagonal core are the singular values of the change: what six of them
        # miss is known.
        missed = whole = 0.0
        for name, part in model.named_parameters():
            if part.requires_grad and "lora_A" in name:
                squares = part.detach().double().square().flatten().sort(descending=True).values
                missed, whole = missed + float(squares[6:].sum()), whole + float(squares.sum())
        assert record.notes["error"] == pytest.approx((missed / whole) ** 0.5, rel=1e-4)
        return
    record = pissa.convert(tmp_path / "run", tmp_path / "lora")
    own = max(record.recipe.ranks.values(), default=RANK)
    assert record.notes["rank"] == (own if chosen.zero_start or "core" in chosen.parts else 2 * own)
    loaded = PeftModel.from_pretrained(build(), tmp_path / "lora")
    assert away(loaded, logits(model)) < NEAR


@every_core
def test_only_what_the_method_says_trains(method):
    model = pissa.attach(build(), method, RANK)
    before = {
        name: part.clone() for name, part in (*model.named_buffers(), *model.named_parameters())
    }
    trained(model)
    moved = {
        name
        for name, part in (*model.named_buffers(), *model.named_parameters())
        if not part.equal(before[name])
    }
    assert moved == {name for name, part in model.named_parameters() if part.requires_grad}
    per_layer = {"lora_xs": lambda shape: RANK**2, "svft": min}.get(
        method, lambda shape: RANK**2 + RANK * shape[0]
    )
    layers = [
        module.weight.shape
        for module in build().model.layers.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    assert sum(part.numel() for part in model.parameters() if part.requires_grad) == sum(
        map(per_layer, layers)
    )


@every_core
def test_a_core_of_another_start_is_refused(method):
    """The same rank and shapes, but another base: its factors are other ones."""
    other = peft.get_peft_model_state_dict(
        trained(pissa.attach(build_pico(1, **PACKABLE), method, RANK))
    )
    model = pissa.attach(build(), method, RANK)
    with pytest.raises(WrongBaseError, match="another start"):
        peft.set_peft_model_state_dict(model, other)


@every_core
def test_two_adapters_of_different_kinds_live_on_one_base(method, tmp_path):
    model = trained(pissa.attach(build(), method, RANK))
    after = logits(model)
    pissa.attach(model, "pissa", RANK, adapter_name="second")
    model.set_adapter("second")
    second = logits(trained(model))
    model.set_adapter("default")
    assert torch.equal(logits(model), after)
    pissa.save(model, tmp_path / "one", adapter_name="default")
    pissa.save(model, tmp_path / "two", adapter_name="second")
    assert away(PeftModel.from_pretrained(build(), tmp_path / "one" / "adapter"), after) < NEAR
    assert away(PeftModel.from_pretrained(build(), tmp_path / "two" / "adapter"), second) < NEAR
    model.delete_adapter("default")
    assert away(model, second) < NEAR


def test_ranks_of_eva_are_its_own_and_are_recorded(observations, tmp_path):
    model = pissa.attach(build(), "eva", RANK, alpha=ALPHA, observations=observations)
    pissa.save(model, tmp_path / "run")
    record = Record.from_json(read_json(tmp_path / "run/state/pissa.json"), "")
    ranks = record.recipe.ranks
    assert len(set(ranks.values())) > 1 and sum(ranks.values()) == RANK * 14
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert {layer.scaling["default"] for layer in layers} == {ALPHA / RANK}
    assert sorted(layer.r["default"] for layer in layers) == sorted(ranks.values())


@pytest.mark.parametrize("method", [name for name in TRAINABLE if get(name).needs in OBSERVED])
def test_an_unprepared_method_is_an_error(method, observations, tmp_path):
    with pytest.raises(InputError, match=f"needs the {get(method).needs} of `layers.0"):
        pissa.attach(build(), method, RANK)
    build_pico(1, **PACKABLE).save_pretrained(tmp_path / "other")
    with pytest.raises(WrongBaseError):
        pissa.attach(build_pico(1, **PACKABLE), method, RANK, observations=observations)
    with pytest.raises(WrongBaseError):
        pissa.decompose(
            tmp_path / "other", tmp_path / "out", method, RANK, observations=observations
        )
    assert not (tmp_path / "out").exists()


def test_lora_pro_trained_by_another_optimiser_is_not_saved_under_its_name(tmp_path):
    model = pissa.attach(build(), "lora_pro", RANK)
    pissa.save(model, tmp_path / "start")
    with torch.no_grad():
        next(part for name, part in model.named_parameters() if "lora_B" in name).add_(1)
    with pytest.raises(
        InputError,
        match="trained by another optimizer: train it with pissa.training.lora_pro.LoraPro",
    ):
        pissa.save(model, tmp_path / "run")


@pytest.mark.parametrize("method", ["lora_pro", "lora_pro-control"])
def test_what_lora_pros_own_optimizer_trained_is_saved_under_its_name(method, tmp_path):
    model = pissa.attach(build(), method, RANK)
    optimizer = LoraPro(model, lr=1e-2)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    after = logits(model)
    pissa.save(model, tmp_path / "run")
    again = pissa.load(build(), tmp_path / "run")
    assert torch.equal(logits(again), after)
    pissa.save(again, tmp_path / "again")


def test_options_are_checked_and_recorded(tmp_path):
    with pytest.raises(
        InputError, match="svft: pattern is 'band', expected one of plain, banded, random, top_k"
    ):
        pissa.attach(build(), "svft", RANK, options={"pattern": "band"})
    with pytest.raises(InputError, match="no option 'widht'. Did you mean 'width'"):
        pissa.attach(build(), "svft", RANK, options={"widht": 3})
    model = pissa.attach(build(), "svft", RANK, options={"pattern": "banded", "width": "2"})
    assert adaptation_of(model).recipe.options == {"pattern": "banded", "width": 2}
    after = logits(trained(model))
    pissa.save(model, tmp_path / "run")
    assert torch.equal(logits(pissa.load(build(), tmp_path / "run")), after)


@pytest.mark.parametrize("pattern", ["plain", "banded", "random"])
def test_svft_trains_as_many_entries_as_it_says(pattern):
    model = pissa.attach(build(), "svft", RANK, options={"pattern": pattern, "width": 2})
    layers = [
        module.weight.shape
        for module in build().model.layers.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    width = 0 if pattern == "plain" else 2
    expected = sum(min(shape) * (2 * width + 1) - width * (width + 1) for shape in layers)
    assert sum(part.numel() for part in model.parameters() if part.requires_grad) == expected


def test_cores_do_not_fit_into_embeddings():
    model = build_pico(tie_word_embeddings=False)
    with pytest.raises(InputError, match="`model.embed_tokens` is of kind embedding"):
        pissa.attach(model, "lora_xs", RANK, targets=["embed_tokens"])


def test_a_method_that_trains_nothing_is_not_attached():
    with pytest.raises(InputError, match="svdquant trains nothing"):
        pissa.attach(build(), "svdquant", RANK)


@pytest.mark.parametrize("method", ["lora_xs", "svft", "lamda", "lamda++", "eva", "corda"])
def test_what_stock_peft_trained_from_a_start_comes_back_to_the_base(
    method, observations, tmp_path
):
    build().save_pretrained(tmp_path / "base")
    pissa.decompose(
        tmp_path / "base", tmp_path / "out", method, RANK, observations=seen(method, observations)
    )
    residual = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = PeftModel.from_pretrained(residual, tmp_path / "out" / "pissa_init", is_trainable=True)
    optimizer = torch.optim.AdamW(
        [part for part in model.parameters() if part.requires_grad], lr=1e-2
    )
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = logits(model)
    model.save_pretrained(tmp_path / "stock")
    rank = 64 if get(method).full_rank else None  # all that there is
    pissa.convert(
        tmp_path / "stock", tmp_path / "lora", rank, start=tmp_path / "out" / "pissa_init"
    )
    assert away(PeftModel.from_pretrained(build(), tmp_path / "lora"), after) < NEAR


def test_layers_without_a_rank_stay_as_they_are_in_four_bits(tmp_path):
    """A layer of whose input no direction explains much gets no adapter."""
    build().save_pretrained(tmp_path / "base")
    flat = observe(build(), [{"input_ids": TOKENS}], "components")
    flat.seen["components"]["layers.0.mlp.down_proj.weight"].values.mul_(1e-3)
    pissa.decompose(
        tmp_path / "base",
        tmp_path / "out",
        "eva",
        1,
        observations=flat,
        quant="nf4",
        options={"rho": 4},
    )
    record = Record.from_json(read_json(tmp_path / "out" / "pissa.json"), "")
    assert (
        "model.layers.0.mlp.down_proj" not in record.recipe.targets
        and len(record.recipe.targets) > 3
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert away(pissa.load(model, tmp_path / "out"), logits(build())) < 0.2


def test_a_float64_model_is_decomposed_around_a_core(tmp_path):
    build().double().save_pretrained(tmp_path / "base")
    pissa.decompose(tmp_path / "base", tmp_path / "out", "lamda", RANK)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert away(pissa.load(model, tmp_path / "out"), logits(build().double())) < NEAR


def test_a_killed_decomposition_goes_on_only_with_the_same_observations(observations, tmp_path):
    build().save_pretrained(tmp_path / "base")
    other = observe(
        build(),
        [{"input_ids": TOKENS + 1, "labels": TOKENS + 1}],
        ("covariance", "components", "gradient"),
    )
    jobs = [
        prepare(tmp_path / "base", DecomposeSettings("corda", RANK, observations=given))
        for given in (observations, observations, other)
    ]
    assert jobs[0].key == jobs[1].key != jobs[2].key
    observations.save(tmp_path / "seen.safetensors")
    again = Observations.load(tmp_path / "seen.safetensors")
    assert again.digest() == observations.digest() != other.digest()
