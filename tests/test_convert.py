"""Runs and foreign pairs as plain LoRA: exact at 2r, the best at rank k, and stock peft agrees."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pissa
from conftest import TOKENS, build_pico
from pissa.errors import CheckpointError, InputError, WrongBaseError
from runs import error_of, gap, language_model, logits, make_run, stock_logits, train

METHODS = ("lora", "milora", "olora", "pissa")


def deltas(adapter: Path) -> dict[str, Tensor]:
    """Each weight's change in float64, from a stock adapter folder."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    return {
        name: scale * tensors[name.replace("lora_A", "lora_B")].double() @ right.double()
        for name, right in tensors.items()
        if ".lora_A." in name
    }


def total_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return error_of(
        *(torch.cat([part[name].flatten() for name in expected]) for part in (got, expected))
    )


@pytest.mark.parametrize("method", METHODS)
def test_stock_peft_on_the_original_base_equals_the_trained_model(
    method: str, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico_folder()
    trained = make_run(base, tmp_path / "run", method=method, alpha=6)
    assert gap(trained, logits(language_model(base))) > 0.1
    record = pissa.convert(tmp_path / "run", tmp_path / "lora", base=base)
    assert record.notes["error"] == 0
    assert record.notes["rank"] == (4 if method == "lora" else 8)
    assert gap(stock_logits(base, tmp_path / "lora"), trained) <= 1e-5
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()
    assert gap(logits(auto), trained) <= 1e-5


@pytest.mark.parametrize("source", ["run", "run/state", "run/adapter"])
def test_every_folder_of_a_run_converts_to_the_same_change(
    source: str, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico_folder()
    make_run(base, tmp_path / "run")
    pissa.convert(tmp_path / source, tmp_path / "lora")
    assert total_error(deltas(tmp_path / "lora"), deltas(tmp_path / "run" / "adapter")) < 1e-7


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_smaller_rank_is_the_best_approximation_and_its_error_is_true(
    rank: int, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    make_run(pico_folder(), tmp_path / "run")
    record = pissa.convert(tmp_path / "run", tmp_path / "lora", rank=rank)
    exact, got = deltas(tmp_path / "run" / "adapter"), deltas(tmp_path / "lora")
    assert record.notes["error"] == pytest.approx(total_error(got, exact), rel=1e-4)
    missed = sum(
        float(torch.linalg.svdvals(delta)[rank:].square().sum()) for delta in exact.values()
    )
    total = sum(float(delta.square().sum()) for delta in exact.values())
    # Eckart-Young, dense
    assert record.notes["error"] == pytest.approx((missed / total) ** 0.5, rel=1e-4)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == rank
    assert (
        json.loads((tmp_path / "lora" / "pissa.json").read_text())["notes"]["error"]
        == record.notes["error"]
    )


def test_rank_0_is_an_error_and_no_output(pico_folder: Callable[..., Path], tmp_path: Path) -> None:
    make_run(pico_folder(), tmp_path / "run")
    with pytest.raises(InputError, match="rank 0"):
        pissa.convert(tmp_path / "run", tmp_path / "lora", rank=0)
    assert not (tmp_path / "lora").exists()


def as_bf16(adapter: Path) -> dict[str, Tensor]:
    """The change as an engine sees it that stores adapters in bf16."""
    file = adapter / "adapter_model.safetensors"
    save_file(
        {name: tensor.bfloat16() for name, tensor in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    return deltas(adapter)


def test_stored_in_bf16_the_change_is_within_half_a_percent_where_pefts_own_conversion_is_not(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico_folder()
    ours_trained = train(pissa.attach(language_model(base), rank=8), learning_rate=1e-4)
    pissa.save(ours_trained, tmp_path / "run")
    pissa.convert(tmp_path / "run", tmp_path / "ours")
    ours = total_error(as_bf16(tmp_path / "ours"), deltas(tmp_path / "run" / "adapter"))

    config = peft.LoraConfig(
        r=8, lora_alpha=8, lora_dropout=0.0, init_lora_weights="pissa", target_modules="all-linear"
    )
    model = peft.get_peft_model(language_model(base), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    train(model, learning_rate=1e-4)
    # peft reads the start back from its folder, and says `pissa` of the one it subtracts.
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(
        tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    exact = deltas(tmp_path / "theirs")
    theirs = total_error(as_bf16(tmp_path / "theirs"), exact)
    print(
        f"change stored in bf16: {100 * ours:.2f} % off in the drift form, {100 * theirs:.1f} % in peft's conversion"
    )
    assert ours <= 0.005
    assert theirs > 10 * ours


def train_with_stock_peft(out: Path, adapter: Path) -> Tensor:
    """Ten AdamW steps by stock peft from a decomposed folder, saved by stock peft; the trained logits."""
    residual = language_model(out)
    model = peft.PeftModel.from_pretrained(residual, out, subfolder="pissa_init", is_trainable=True)
    trained = logits(train(model, steps=10))
    model.save_pretrained(adapter)
    return trained


@pytest.mark.parametrize("method", ["pissa", "milora", "olora"])
def test_a_pair_that_stock_peft_trained_becomes_a_plain_lora_on_the_base(
    method: str, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico_folder()
    pissa.decompose(base, tmp_path / "out", method=method, rank=4, alpha=8)
    trained = train_with_stock_peft(tmp_path / "out", tmp_path / "pair")
    assert gap(trained, logits(language_model(base))) > 0.1
    with pytest.raises(WrongBaseError, match="--start"):
        pissa.convert(tmp_path / "pair", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    record = pissa.convert(tmp_path / "pair", tmp_path / "lora", start=tmp_path / "out", base=base)
    assert record.base is not None
    assert record.base.name == str(base)
    assert gap(stock_logits(base, tmp_path / "lora"), trained) <= 1e-4


def make_foreign(out: Path) -> None:
    """What the authors' folders look like: no pissa.json, nothing in config.json."""
    for record in out.rglob("pissa.json"):
        record.unlink()
    config = json.loads((out / "config.json").read_text())
    del config["pissa"]
    (out / "config.json").write_text(json.dumps(config))


def test_a_folder_that_others_made_converts_with_a_warning_and_the_base_named(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico_folder()
    pissa.decompose(base, tmp_path / "out", rank=4)
    make_foreign(tmp_path / "out")
    trained = train_with_stock_peft(tmp_path / "out", tmp_path / "pair")
    start = tmp_path / "out" / "pissa_init"
    with pytest.warns(UserWarning, match="original base is unknown"):
        pissa.convert(tmp_path / "pair", tmp_path / "unknown", start=start)
    with pytest.warns(UserWarning, match="cannot be checked"):
        pissa.convert(tmp_path / "pair", tmp_path / "lora", start=start, base=base)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert gap(stock_logits(base, tmp_path / "lora"), trained) <= 1e-4
    with pytest.warns(UserWarning, match="unknown until you name it"):
        loaded = pissa.load(language_model(tmp_path / "out"), tmp_path / "out")
    assert gap(logits(loaded.eval()), logits(language_model(base))) <= 1e-4


def test_another_start_is_refused(pico_folder: Callable[..., Path], tmp_path: Path) -> None:
    for seed, name in ((0, "out"), (1, "other")):
        pissa.decompose(pico_folder(f"base{seed}", seed=seed), tmp_path / name, rank=4)
    train_with_stock_peft(tmp_path / "out", tmp_path / "pair")
    with pytest.raises(
        WrongBaseError, match=r"not trained from .*other.* of `model\.layers\.0\..*weight`"
    ):
        pissa.convert(tmp_path / "pair", tmp_path / "lora", start=tmp_path / "other")
    shutil.rmtree(tmp_path / "out")  # the residual that the pair names is no longer at hand
    with pytest.raises(
        WrongBaseError, match=r"not trained from .*other.* of `model\.layers\.\d.*weight`"
    ):
        pissa.convert(tmp_path / "pair", tmp_path / "lora", start=tmp_path / "other")
    assert not (tmp_path / "lora").exists()


def classifier(base: Path, seed: int = 7) -> nn.Module:
    """A classification model on an encoder from disk, its head new."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=3
        ).eval()


def bert_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    config = transformers.BertConfig(vocab_size=96, max_position_embeddings=64, **small)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rank", [None, 8])
def test_a_trained_head_survives_in_stock_peft(rank: int | None, tmp_path: Path) -> None:
    base = bert_folder(tmp_path / "base")
    model = train(pissa.attach(classifier(base), rank=4))
    pissa.save(model, tmp_path / "run")
    pissa.convert(tmp_path / "run", tmp_path / "lora", rank=rank, base=base)
    fresh = stock_logits(base, tmp_path / "lora", lambda folder: classifier(folder, seed=8))
    assert gap(logits(model), logits(classifier(base))) > 1e-3
    assert gap(fresh, logits(model)) <= 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"lora_bias": True},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.filterwarnings("ignore:.*has no pissa.json")
def test_what_is_no_plain_lora_is_an_error(
    change: dict[str, object], pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"])
    peft.get_peft_model(build_pico(), config).save_pretrained(tmp_path / "pair")
    file = tmp_path / "pair" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=next(iter(change))):
        pissa.convert(tmp_path / "pair", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_rank_stabilised_lora_keeps_its_scale(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico_folder()
    config = peft.LoraConfig(
        r=4, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "up_proj"]
    )
    model = train(peft.get_peft_model(language_model(base), config))
    model.save_pretrained(tmp_path / "pair")
    with pytest.warns(UserWarning, match="cannot be checked"):
        pissa.convert(tmp_path / "pair", tmp_path / "lora")
    assert gap(stock_logits(base, tmp_path / "lora"), logits(model)) <= 1e-5
    assert model(input_ids=TOKENS).logits.shape[-1] == 96
