"""Runs beside a quantised residual: what they are right on, the exact ways out, and every wrong pairing refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import pissa
from conftest import PACKABLE, TOKENS
from pissa.checkpoint.reader import Checkpoint
from pissa.errors import InputError, WrongBaseError
from pissa.quant import quantiser
from pissa.surgery.packing import PackedWeights
from runs import error_of, gap, language_model, logits, stock_logits, train

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@dataclasses.dataclass
class Trained:
    """A pico model, its residual in few bits, a run beside it, and the run's own logits."""

    base: Path
    residual: Path
    run: Path
    logits: torch.Tensor


def trained(folder: Path, base: Path, method: str = "qpissa", **settings: object) -> Trained:
    residual, run = folder / f"{method}-residual", folder / f"{method}-run"
    pissa.decompose(base, residual, method, 4, **settings)
    model = train(pissa.load(language_model(residual), residual))
    pissa.save(model, run)
    return Trained(base, residual, run, logits(model))


@pytest.fixture
def pair(pico_folder: Callable[..., Path], tmp_path: Path) -> Trained:
    return trained(tmp_path, pico_folder(**PACKABLE))


@pytest.mark.parametrize("method", ["qpissa", "loftq", "qlora", "milora"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_the_run_its_adapter_and_the_merged_model_are_one_model(
    method: str, quant: str, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pair = trained(tmp_path, pico_folder(**PACKABLE), method, quant=quant)
    start = logits(pissa.load(language_model(pair.residual), pair.residual))
    assert gap(pair.logits, start) > 0.1, "training moved it"
    assert torch.equal(stock_logits(pair.residual, pair.run / "adapter"), pair.logits)
    assert torch.equal(logits(pissa.load(language_model(pair.residual), pair.run)), pair.logits)
    for run in (pair.run, pair.run / "adapter"):
        record = pissa.merge(pair.residual, run, tmp_path / "merged", force=True)
        merged = language_model(tmp_path / "merged")
        # int8's own product rounds its inputs to 8 bits, a plain layer's does not.
        assert gap(logits(merged), pair.logits) < (1e-5 if quant == "nf4" else 0.1)
        assert not hasattr(merged.config, "quantization_config")
        assert not hasattr(merged.config, "pissa")
        assert record.notes["errors"]["written"] < 1e-6
        assert 0.03 < record.notes["errors"]["nf4"] < 0.2


def test_merging_rounds_once_into_16_bits_and_says_so(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pair = trained(tmp_path, pico_folder(dtype=torch.bfloat16, **PACKABLE))
    record = pissa.merge(pair.residual, pair.run, tmp_path / "merged")
    state = load_file(pair.run / "state" / "state.safetensors")
    module = WEIGHT.removesuffix(".weight")
    dense = PackedWeights(Checkpoint.open(pair.residual)).dense(WEIGHT)
    whole = dense.float() + state[f"{module}.left"] @ state[f"{module}.right"]
    assert torch.equal(
        load_file(tmp_path / "merged" / "model.safetensors")[WEIGHT], whole.bfloat16()
    )
    assert 1e-4 < record.notes["errors"]["written"] < 2**-8


def test_merging_back_into_few_bits_is_only_done_when_asked(pair: Trained, tmp_path: Path) -> None:
    record = pissa.merge(pair.residual, pair.run, tmp_path / "packed", quant="nf4")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert "pissa" not in config
    pissa.merge(pair.residual, pair.run, tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")[WEIGHT]
    packed = PackedWeights(Checkpoint.open(tmp_path / "packed")).dense(WEIGHT)
    assert torch.equal(packed, quantiser("nf4").quantise(whole, torch.float32).dense)
    assert record.notes["errors"]["written"] == pytest.approx(error_of(packed, whole), rel=0.5)
    assert gap(logits(language_model(tmp_path / "packed")), pair.logits) > 1e-2
    pissa.convert(pair.run, tmp_path / "lora", 8)
    with pytest.raises(
        WrongBaseError, match="is quantised, and a change merged into it would be rounded away"
    ):
        pissa.merge(tmp_path / "packed", tmp_path / "lora", tmp_path / "again")


def test_there_is_no_exact_lora_and_the_ways_out_are_named(pair: Trained, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no LoRA on it is exact") as caught:
        pissa.convert(pair.run, tmp_path / "lora")
    assert f"serving the residual {pair.residual} with the run's adapter/" in str(caught.value)
    assert f"pissa merge {pair.residual} {pair.run} OUT" in str(caught.value)
    assert "--rank" in str(caught.value)
    assert not (tmp_path / "lora").exists()


def test_the_best_lora_of_a_rank_has_the_error_it_says(pair: Trained, tmp_path: Path) -> None:
    pissa.merge(pair.residual, pair.run, tmp_path / "merged")
    merged, base = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", pair.base)
    )
    missed = total = 0.0
    for name, weight in merged.items():
        if name.endswith("_proj.weight"):
            squares = torch.linalg.svdvals((weight - base[name]).double()).square()
            missed, total = missed + float(squares[8:].sum()), total + float(squares.sum())
    record = pissa.convert(pair.run, tmp_path / "lora", 8)
    assert record.notes["error"] == pytest.approx((missed / total) ** 0.5, rel=1e-3)
    assert record.notes["rank"] == 8
    assert pissa.inspect(tmp_path / "lora", pair.base).base_check == "same"
    record = pissa.convert(pair.run, tmp_path / "full", 64)
    assert record.notes["error"] < 1e-5
    assert gap(stock_logits(pair.base, tmp_path / "full"), pair.logits) < 1e-4


def test_an_adapter_that_stock_peft_trained_is_merged_and_converted_like_ours(
    pair: Trained, tmp_path: Path
) -> None:
    model = peft.PeftModel.from_pretrained(
        language_model(pair.residual), pair.residual, subfolder="pissa_init", is_trainable=True
    )
    train(model).save_pretrained(tmp_path / "stock")
    with pytest.warns(UserWarning, match="no pissa.json"):
        pissa.merge(pair.residual, tmp_path / "stock", tmp_path / "merged")
    assert gap(logits(language_model(tmp_path / "merged")), logits(model)) < 1e-5
    start = pair.residual / "pissa_init"
    with pytest.raises(InputError, match="no LoRA on it is exact"):
        pissa.convert(tmp_path / "stock", tmp_path / "lora", start=start)
    ours = pissa.convert(pair.run, tmp_path / "ours", 8)
    theirs = pissa.convert(tmp_path / "stock", tmp_path / "lora", 8, start=start)
    assert theirs.notes["error"] == pytest.approx(ours.notes["error"], rel=1e-3)


def test_no_other_model_is_taken_for_the_residual(
    pair: Trained, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pissa.decompose(pico_folder("other", seed=1, **PACKABLE), tmp_path / "foreign", "qpissa", 4)
    pissa.decompose(pair.base, tmp_path / "plain", rank=4)
    for name in (pair.run, pair.run / "state", pair.run / "adapter"):
        with pytest.raises(WrongBaseError, match="belongs on the residual in nf4"):
            pissa.load(language_model(pair.base), name)
        for residual in (tmp_path / "foreign", tmp_path / "plain"):
            with pytest.raises(WrongBaseError):
                pissa.load(language_model(residual), name)
            with pytest.raises(WrongBaseError):
                pissa.merge(residual, name, tmp_path / "merged")
        with pytest.raises(WrongBaseError, match="its factors mean nothing on"):
            pissa.merge(pair.base, name, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_lora_for_the_original_base_is_refused_by_its_residual(
    pair: Trained, tmp_path: Path
) -> None:
    pissa.convert(pair.run, tmp_path / "lora", 8)
    with pytest.raises(WrongBaseError, match="is for the original model"):
        pissa.merge(pair.residual, tmp_path / "lora", tmp_path / "merged")
    with pytest.raises(WrongBaseError):
        pissa.load(language_model(pair.residual), tmp_path / "lora")


def test_what_does_not_hold_the_whole_start_is_not_merged_with_the_residual(
    pair: Trained, tmp_path: Path
) -> None:
    for name, base in (("part", pair.residual), ("stranger", pair.base)):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"] if name == "part" else "all-linear")
        peft.get_peft_model(language_model(base), config).save_pretrained(tmp_path / name)
    with (
        pytest.raises(
            WrongBaseError,
            match=r"holds nothing for `model\.layers\.0\.mlp\.down_proj\.weight` \(12 such",
        ),
        pytest.warns(UserWarning, match="no pissa.json"),
    ):
        pissa.merge(pair.residual, tmp_path / "part", tmp_path / "merged")
    with (
        pytest.raises(WrongBaseError, match="has no pissa.json and names .*base as its base"),
        pytest.warns(UserWarning, match="no pissa.json"),
    ):
        pissa.merge(pair.residual, tmp_path / "stranger", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_run_that_moved_with_its_residual_is_converted(pair: Trained, tmp_path: Path) -> None:
    pair.residual.rename(pair.run / "residual")
    assert pissa.convert(pair.run, tmp_path / "lora", 4).notes["rank"] == 4
    (pair.run / "residual").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="which is gone: put it back"):
        pissa.convert(pair.run, tmp_path / "again", 4)


def test_one_changed_code_is_noticed(pair: Trained, tmp_path: Path) -> None:
    file = pair.residual / "model.safetensors"
    tensors = load_file(file)
    tensors[WEIGHT][7] ^= 16
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WrongBaseError, match="mlp.up_proj.weight"):
        pissa.load(language_model(pair.residual), pair.run)
    with pytest.raises(WrongBaseError, match="mlp.up_proj.weight"):
        pissa.merge(pair.residual, pair.run, tmp_path / "merged")
    with pytest.raises(WrongBaseError, match="mlp.up_proj.weight"):
        pissa.convert(pair.run, tmp_path / "lora", 8)


def test_switched_off_it_gives_the_start_back_and_nothing_is_merged_into_few_bits(
    pair: Trained,
) -> None:
    start = logits(pissa.load(language_model(pair.residual), pair.residual))
    model = pissa.load(language_model(pair.residual), pair.run)
    with model.disable_adapter():
        assert gap(logits(model), start) < 1e-5
    assert torch.equal(logits(model), pair.logits)
    for leave in (
        model.merge_adapter,
        model.merge_and_unload,
        model.unload,
        lambda: model.delete_adapter("default"),
    ):
        with pytest.raises(InputError, match="pissa merge FOLDER RUN OUT"):
            leave()


@pytest.mark.parametrize("method", ["qpissa", "qlora"])
def test_an_evaluation_never_repacks_what_goes_on_training(
    method: str, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pair = trained(tmp_path, pico_folder(**PACKABLE), method)
    model = language_model(pair.residual)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True  # as on processors that have it
    loaded = pissa.load(model, pair.run)
    assert torch.equal(logits(loaded), pair.logits)
    assert not any(
        getattr(p.quant_state, "packing_format_for_cpu", False)
        for p in loaded.parameters()
        if hasattr(p, "quant_state")
    )
    loaded(input_ids=TOKENS, labels=TOKENS).loss.backward()
    first = loaded.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert first.lora_A["default"].weight.grad.abs().max() > 0


def test_transposed_layers_are_merged_and_converted_the_right_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    base = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                parameter.mul_(5)
    base.save_pretrained(tmp_path / "base")
    pair = trained(tmp_path, tmp_path / "base")
    pissa.merge(pair.residual, pair.run, tmp_path / "merged")
    assert gap(logits(language_model(tmp_path / "merged")), pair.logits) < 1e-5
    record = pissa.convert(pair.run, tmp_path / "lora", 64)
    assert record.notes["error"] < 1e-5
    assert gap(stock_logits(pair.base, tmp_path / "lora"), pair.logits) < 1e-4


@pytest.mark.parametrize("method", ["qpissa", "loftq", "qlora"])
def test_a_live_model_is_not_quantised_and_the_way_is_named(
    method: str, pico: torch.nn.Module
) -> None:
    with pytest.raises(InputError, match="is done on files: pissa.decompose"):
        pissa.attach(pico, method)
