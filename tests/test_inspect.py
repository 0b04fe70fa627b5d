"""What `inspect` says of every kind of folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import pissa
from pissa.errors import CheckpointError, WrongBaseError
from runs import language_model, make_run

KINDS = {
    "base": ("model", "yes"),
    "run": ("run", "adapter/"),
    "run/state": ("state", "no"),
    "run/adapter": ("lora", "yes, on the original base"),
    "lora": ("lora", "yes, on the original base"),
    "out": ("decomposed", "only both together"),
    "out/pissa_init": ("init", "no"),
    "merged": ("merged", "yes"),
    "stock": ("foreign-adapter", "only if it was trained on"),
    "stock_pissa": ("raw-adapter", "no"),
    "pair": ("raw-adapter", "no"),
    "foreign": ("foreign-decomposed", "only both together"),
}


@pytest.fixture
def folders(pico_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """One folder of every kind."""
    base = pico_folder()
    pico_folder("other", seed=1)
    make_run(base, tmp_path / "run")
    pissa.convert(tmp_path / "run", tmp_path / "lora")
    pissa.merge(base, tmp_path / "run", tmp_path / "merged")
    for name in ("out", "foreign"):
        pissa.decompose(base, tmp_path / name, rank=4)
    for record in (tmp_path / "foreign").rglob("pissa.json"):
        record.unlink()
    for name, start in (("stock", True), ("stock_pissa", "pissa")):
        config = peft.LoraConfig(
            r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=start
        )
        peft.get_peft_model(language_model(base), config).save_pretrained(tmp_path / name)
    residual = language_model(tmp_path / "out")
    pair = peft.PeftModel.from_pretrained(
        residual, tmp_path / "out", subfolder="pissa_init", is_trainable=True
    )
    pair.save_pretrained(tmp_path / "pair")
    return tmp_path


def test_every_folder_is_named_and_served_or_not(folders: Path) -> None:
    for name, (kind, safe) in KINDS.items():
        report = inspect(folders / name)
        assert report.kind == kind, name
        assert report.safe_to_serve.startswith(safe) or safe in report.safe_to_serve, name
        assert report.path == str(folders / name)
        assert report.base_check == "not checked"
        again = json.loads(json.dumps(report.to_json(), allow_nan=False))
        assert again["kind"] == kind


def test_the_base_is_named_and_compared(folders: Path) -> None:
    for name in ("run", "run/state", "run/adapter", "lora", "out", "out/pissa_init", "merged"):
        same, other = (
            pissa.inspect(folders / name, base=folders / base) for base in ("base", "other")
        )
        assert same.base_check == "same", name
        assert same.base["name"] == str(folders / "base"), name
        assert "tensors" not in same.base
        assert same.base["fingerprint"]
        assert "made for another base: `" in other.base_check, name
        assert str(folders / "base") in other.base_check, name
    assert inspect(folders / "stock").base["name"] == str(folders / "base")
    assert inspect(folders / "pair").base["name"] == str(folders / "out")


@pytest.mark.parametrize("name", ["run", "out", "lora"])
def test_energies_and_spectra_are_those_of_the_weights(name: str, folders: Path) -> None:
    layers = pissa.inspect(folders / name).layers
    assert len(layers) == 14
    weights = load_file(folders / "base" / "model.safetensors")
    for layer in layers:
        values = torch.linalg.svdvals(weights[layer["name"]].double())
        assert layer["shape"] == list(weights[layer["name"]].shape)
        assert layer["singular_values"] == sorted(layer["singular_values"], reverse=True)
        assert layer["singular_values"] == pytest.approx(values[:4].tolist(), rel=1e-4)
        assert layer["energy"] == pytest.approx(
            float(values[:4].square().sum() / values.square().sum()), rel=1e-4
        )
        assert 0 < layer["energy"] < 1
        assert 0 <= layer["error"] < 1e-6


def test_a_foreign_adapters_spectrum_is_that_of_its_change(folders: Path) -> None:
    for name in ("stock_pissa", "foreign"):
        adapter = folders / name if name == "stock_pissa" else folders / name / "pissa_init"
        pairs = load_file(adapter / "adapter_model.safetensors")
        for layer in inspect(folders / name).layers:
            key = f"base_model.model.{layer['name'].removesuffix('.weight')}.lora_"
            change = pairs[f"{key}B.weight"].double() @ pairs[f"{key}A.weight"].double()
            values = torch.linalg.svdvals(change)[:4].tolist()
            assert layer["singular_values"] == pytest.approx(values, rel=1e-6)
            assert layer["energy"] is None


def test_the_recipe_is_told(folders: Path) -> None:
    recipe = pissa.inspect(folders / "out").recipe
    assert recipe == {
        "method": "pissa",
        "rank": 4,
        "alpha": 4.0,
        "svd": "fast",
        "seed": 0,
        "base_form": "residual",
    }


def test_what_is_no_folder_of_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model, run or adapter"):
        pissa.inspect(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        pissa.inspect(tmp_path / "absent")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is not JSON"):
        pissa.inspect(tmp_path)


def inspect(path: Path) -> pissa.surgery.inspection.Report:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no pissa.json")
        return pissa.inspect(path)


def test_a_principal_adapter_that_calls_itself_plain_is_found_out_beside_its_base(
    pico_folder, tmp_path
):
    """Stock peft's own PiSSA, its flag set to true by hand as peft's README says: a plain LoRA by every other sign."""
    base = pico_folder()
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        r=4, lora_alpha=4, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa"
    )
    started = peft.get_peft_model(model, config)
    started.peft_config["default"].init_lora_weights = True
    started.save_pretrained(tmp_path / "raw")
    assert pissa.inspect(tmp_path / "raw").kind == "foreign-adapter"
    report = pissa.inspect(tmp_path / "raw", base)
    assert report.kind == "raw-adapter"
    assert report.safe_to_serve.startswith("no")
    with (
        pytest.raises(WrongBaseError, match="holds a part of the weights"),
        pytest.warns(UserWarning, match="no pissa.json"),
    ):
        pissa.merge(base, tmp_path / "raw", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
