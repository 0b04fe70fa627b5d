"""Decomposed folders in the hands of stock transformers and peft: the base's output, or an error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import pissa
from conftest import TOKENS
from runs import gap, language_model, logits

MODELS = ("stories260K", "tinytalk-3m-neo", "mixed-8m", "MiniLM")
RANKS = (4, 8, 16)
STORED_BF16 = "mixed-8m"

STOCK = """
import json, sys, torch, transformers, peft

TOKENS = torch.arange(3, 43).reshape(2, 20)
jobs = json.loads(sys.argv[1])
gaps = {}
bases = {}

@torch.no_grad()
def output(model):
    found = model.eval()(input_ids=TOKENS)
    return found.logits if "logits" in found else found.last_hidden_state

for name, kind, base, folder in jobs:
    auto = getattr(transformers, kind)
    if base not in bases:
        bases[base] = output(auto.from_pretrained(base, dtype=torch.float32))
    residual = auto.from_pretrained(folder, dtype=torch.float32)
    alone = output(residual)
    both = output(peft.PeftModel.from_pretrained(residual, folder, subfolder="pissa_init"))
    gaps[name] = [float((got - bases[base]).abs().max()) for got in (both, alone)]
assert "pissa" not in sys.modules
print(json.dumps(gaps))
"""


@pytest.fixture(scope="module")
def gaps(
    shared: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[float]]:
    """Largest output difference from the base, [residual + start, residual alone], without pissa in the process."""
    out = tmp_path_factory.mktemp("decomposed")
    jobs = []
    for model in MODELS:
        base = minilm if model == "MiniLM" else shared / "models" / model
        kind = "AutoModel" if model == "MiniLM" else "AutoModelForCausalLM"
        for rank in RANKS:
            folder = out / f"{model}-{rank}"
            pissa.decompose(
                base, folder, rank=rank, dtype="float32" if model == STORED_BF16 else None
            )
            jobs.append((folder.name, kind, str(base), str(folder)))
            if model == STORED_BF16:
                pissa.decompose(base, out / f"{model}-bf16-{rank}", rank=rank)
                jobs.append(
                    (f"{model}-bf16-{rank}", kind, str(base), str(out / f"{model}-bf16-{rank}"))
                )
    done = subprocess.run(
        [sys.executable, "-c", STOCK, json.dumps(jobs)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shutil.rmtree(out)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("model", MODELS)
def test_stock_tools_get_the_bases_output_from_a_decomposed_folder(
    model: str, rank: int, gaps: dict[str, list[float]]
) -> None:
    both, alone = gaps[f"{model}-{rank}"]
    print(f"{model} rank {rank}: {both:.1e} from the base (residual alone {alone:.1e})")
    assert both <= 1e-4
    assert alone > 0.1  # the residual alone is another model, so the start did count


@pytest.mark.parametrize("rank", RANKS)
def test_a_residual_stored_in_bf16_is_off_by_its_own_rounding_only(
    rank: int, gaps: dict[str, list[float]]
) -> None:
    both, alone = gaps[f"{STORED_BF16}-bf16-{rank}"]
    print(
        f"{STORED_BF16} stored in bf16, rank {rank}: {both:.1e} from the base (residual alone {alone:.1e})"
    )
    assert 1e-4 < both < 0.1 * alone


def test_auto_peft_model_loads_the_right_model(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    base = pico_folder()
    pissa.decompose(base, tmp_path / "out", rank=4)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "pissa_init")
    assert gap(logits(loaded.eval()), logits(language_model(base))) <= 1e-4


def test_auto_peft_model_fails_on_a_moved_folder_rather_than_take_another_base(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    pissa.decompose(pico_folder(), tmp_path / "out", rank=4)
    (tmp_path / "out").rename(tmp_path / "moved")
    with pytest.raises((OSError, ValueError), match="out"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "moved" / "pissa_init")
    residual = language_model(tmp_path / "moved")  # both together are still right
    assert pissa.load(residual, tmp_path / "moved") is not None


def test_the_residual_says_what_it_is_after_stock_load_and_save(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pissa.decompose(pico_folder(), tmp_path / "out", rank=4)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["pissa"]
    assert written["kind"] == "residual"
    assert written["base"] == str(tmp_path / "base")
    language_model(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["pissa"] == written
    with pytest.raises(pissa.PissaError, match="residual"):
        pissa.attach(language_model(tmp_path / "again"), rank=4)


def test_gpt2_is_right_through_stock_tools(tmp_path: Path) -> None:
    from peft import PeftModel

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    base = transformers.GPT2LMHeadModel(config).eval()
    base.save_pretrained(tmp_path / "base")
    pissa.decompose(tmp_path / "base", tmp_path / "out", rank=4)
    residual = language_model(tmp_path / "out")
    expected = base(input_ids=TOKENS).logits
    assert gap(logits(residual), expected) > 1e-3
    loaded = PeftModel.from_pretrained(residual, tmp_path / "out", subfolder="pissa_init").eval()
    assert gap(logits(loaded), expected) <= 1e-5
