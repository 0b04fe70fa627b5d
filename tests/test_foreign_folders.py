"""Decomposed folders that other tools made: a residual, `pissa_init/`, and nothing that says of what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import pissa
from conftest import TOKENS
from pissa.errors import WrongBaseError


@pytest.fixture
def foreign(pico_folder, tmp_path: Path) -> Path:
    """A folder of ours without pissa.json and without the note in config.json."""
    out = tmp_path / "foreign"
    pissa.decompose(pico_folder(), out, rank=4)
    for record in out.rglob("pissa.json"):
        record.unlink()
    config = json.loads((out / "config.json").read_text())
    del config["pissa"]
    (out / "config.json").write_text(json.dumps(config))
    return out


def residual(folder: Path) -> transformers.LlamaForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_it_loads_as_its_base_with_a_warning(foreign: Path, pico_folder) -> None:
    with pytest.warns(UserWarning, match="unknown until you name it"):
        model = pissa.load(residual(foreign), foreign)
    base = transformers.AutoModelForCausalLM.from_pretrained(pico_folder())
    assert torch.allclose(model(TOKENS).logits, base(TOKENS).logits, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*unknown until you name it")
def test_a_run_on_it_goes_on_from_the_same_residual_and_from_no_other(
    foreign: Path, tmp_path: Path
) -> None:
    model = pissa.load(residual(foreign), foreign)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    pissa.save(model, tmp_path / "run")
    again = pissa.load(residual(foreign), tmp_path / "run")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    other = residual(foreign)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 0.1
    with pytest.raises(WrongBaseError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        pissa.load(other, tmp_path / "run")
