"""How an adapter lives on a layer is chosen once: exactly one form for each method, base and quantizer."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import pissa
import runs
from conftest import build_pico
from pissa import registry
from pissa.adapters.attach import adaptation_of
from pissa.adapters.forms import form_of, forms, on_layer
from pissa.adapters.sharding import load_trained_state, trained_state
from pissa.errors import InputError
from pissa.registry import get, methods
from pissa.training import train
from pissa.training.closing import CloseLeft

TRAINABLE = sorted(name for name, method in methods().items() if method.parts)
PLACES = [*product(["keep", "residual"], [False, True])]
# Pair: no start is kept. Drift, Core: W stays. OnResidual: the weight changes. BesideQuantized: W
# is gone.
EXPECTED = {
    "lora": ["Pair", "Pair", "Pair", "Pair"],
    "pissa": ["Drift", "PairBesideQuantized", "DriftOnResidual", "PairBesideQuantized"],
    "lora_xs": ["ZeroCore", "ZeroCoreBesideQuantized", "ZeroCore", "ZeroCoreBesideQuantized"],
    "lamda": ["Core", "CoreBesideQuantized", "CoreOnResidual", "CoreBesideQuantized"],
}
"""By method, for `PLACES` in their order."""


@pytest.mark.parametrize("name", TRAINABLE)
@pytest.mark.parametrize(("base", "quantized"), PLACES)
def test_every_method_has_exactly_one_form(name: str, base: str, quantized: bool) -> None:
    chosen = form_of(get(name), base, quantized)
    assert chosen.parts == get(name).parts
    assert [kind for kind in forms() if kind.fits(get(name), base, quantized)] == [type(chosen)]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_form_is_that_of_what_trains_and_of_what_the_layer_keeps(name: str) -> None:
    assert [type(form_of(get(name), *place)).__name__ for place in PLACES] == EXPECTED[name]


def test_each_form_is_a_file_of_its_own() -> None:
    folder = Path(sys.modules["pissa.adapters.forms"].__file__).parent
    shared = {"__init__", "form", "variant", "on_residual"}
    assert {kind.__module__.rpartition(".")[2] for kind in forms()} | shared == {
        file.stem for file in folder.glob("*.py")
    }


def test_a_method_that_trains_nothing_has_no_form() -> None:
    with pytest.raises(InputError, match="svdquant trains nothing .* forms for that are none"):
        form_of(get("svdquant"), "keep", False)


@pytest.mark.parametrize("method", ["lora", "pissa", "lora_xs", "lamda"])
def test_the_form_lies_on_every_layer_and_goes_with_the_adapter(method: str) -> None:
    model = pissa.attach(build_pico(), method, 4)
    form = adaptation_of(model).form
    layers = [layer for layer in model.modules() if on_layer(layer)]
    assert len(layers) == 14 and all(on_layer(layer) == {"default": form} for layer in layers)
    pissa.attach(model, "milora", 4, adapter_name="second")
    model.delete_adapter("default")
    assert all(set(on_layer(layer)) == {"second"} for layer in layers)


@pytest.mark.parametrize("method", ["lora", "pissa", "lora_xs", "svft", "lamda"])
def test_what_trains_beside_a_twin_comes_back_from_its_state(method: str) -> None:
    model = pissa.attach(build_pico(), method, 4)
    model.add_adapter("ref", model.peft_config["default"])
    runs.train(model, steps=2)
    trained, kept = runs.logits(model), trained_state(model)
    runs.train(model, steps=2)
    assert runs.gap(runs.logits(model), trained) > 1e-3
    load_trained_state(model, kept)
    assert runs.gap(runs.logits(model), trained) < 1e-5


def test_columns_are_closed_in_the_adapters_that_are_there_each_at_its_own_pace() -> None:
    model = pissa.attach(build_pico(), "lamda", 4, options={"eta": 0.3})
    pissa.attach(model, "lamda", 4, adapter_name="slow", options={"eta": 0.9})
    pissa.attach(model, "pissa", 4, adapter_name="other")
    assert {eta for *_, eta in CloseLeft(model).layers} == {0.3, 0.9}
    model.delete_adapter("default")
    left = CloseLeft(model).layers
    assert len(left) == 14 and {(adapter, eta) for _, adapter, _, eta in left} == {("slow", 0.9)}
    assert {eta for *_, eta in CloseLeft(model, eta=0.5).layers} == {0.5}


def test_settings_of_a_command_are_told_by_name_and_mistakes_name_the_function(
    tmp_path: Path,
) -> None:
    for function, keys in (
        (pissa.decompose, ("method", "svd", "progress", "observations")),
        (pissa.merge, ("quant", "progress")),
        (pissa.convert, ("rank", "start")),
    ):
        text, parameters = function.__doc__ or "", inspect.signature(function).parameters
        assert all(f"        {key}: " in text and key in parameters for key in keys)
        assert "settings" not in parameters
    with pytest.raises(TypeError, match=r"decompose\(\): missing a required argument: 'out'"):
        pissa.decompose(tmp_path)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"merge\(\): got an unexpected keyword argument 'rank'"):
        pissa.merge(tmp_path, tmp_path, tmp_path, rank=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("method", ["lora", "pissa", "lamda", "lora_pro", "corda", "qpissa"])
def test_a_training_looks_its_method_up_once(
    settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    looked_up: list[str] = []
    look_up = registry.get

    def counted(name: str) -> Any:
        looked_up.append(name)
        return look_up(name)

    for module in [*sys.modules.values()]:
        if module.__name__.startswith("pissa") and getattr(module, "get", None) is look_up:
            monkeypatch.setattr(module, "get", counted)
    given = {"quant": "nf4", "method": "pissa"} if method == "qpissa" else {"method": method}
    packable = build_pico(vocab_size=260, hidden_size=64, intermediate_size=128)
    asked = settings(**given, max_steps=2)
    packable.save_pretrained(asked.model)
    train(asked)
    assert len(looked_up) == 1
