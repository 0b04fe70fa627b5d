"""Training on few bits: from a 16-bit base or a decomposed folder, in float32, resumed to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import pissa
from conftest import PACKABLE
from pissa.config import load_settings
from pissa.errors import ConfigError, InputError
from pissa.training import train
from pissa.training.folder import read_metrics
from runs import gap, language_model, logits, stock_logits
from training_runs import assert_same_run, kill_training, save_tokenizer, weights_of

Settings = Callable[..., Any]


@pytest.fixture
def base(pico_folder: Callable[..., Path]) -> Path:
    folder = pico_folder(vocab_size=260, **PACKABLE)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("method", ["qpissa", "loftq", "qlora"])
def test_a_16_bit_base_and_its_decomposed_folder_train_to_the_same_bits(
    method: str, settings: Settings, base: Path, tmp_path: Path
) -> None:
    train(settings("one", method=method))
    pissa.decompose(base, tmp_path / "residual", method, 4)
    train(settings("two", method=method, model=str(tmp_path / "residual")))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    out = tmp_path / "one"
    assert torch.equal(
        stock_logits(out / "residual", out / "adapter"),
        logits(pissa.load(language_model(out / "residual"), out)),
    )
    pissa.merge(out / "residual", out, tmp_path / "merged")
    assert (
        gap(
            logits(language_model(tmp_path / "merged")),
            stock_logits(out / "residual", out / "adapter"),
        )
        < 1e-5
    )


def test_the_first_loss_is_the_starts_and_it_falls(
    settings: Settings, base: Path, tmp_path: Path
) -> None:
    for method in ("lora", "qlora", "qpissa"):
        train(settings(method, method=method))
    losses = {m: [line["eval_loss"] for line in read_metrics(tmp_path / m / "metrics.jsonl") if "eval_loss" in line]
              for m in ("lora", "qlora", "qpissa")}  # fmt: skip
    start = losses["lora"][0]
    assert 0 < abs(losses["qpissa"][0] - start) < abs(losses["qlora"][0] - start) < 0.5
    assert all(loss[-1] < loss[0] for loss in losses.values())


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_train_in_float32_on_few_bits(
    recompute: bool, settings: Settings, tmp_path: Path
) -> None:
    train(
        settings(
            method="qpissa", dtype="bfloat16", gradient_checkpointing=recompute, learning_rate=1e-4
        )
    )
    trained = weights_of(tmp_path / "out")
    start = load_file(tmp_path / "out" / "residual" / "pissa_init" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    # Not float32 by name alone: neither the start nor what was added to it lies on bf16's grid.
    moved = [trained[name] - start[name] for name in trained]
    assert all(0 < float(change.abs().max()) < 6e-4 for change in moved)
    assert all(
        (trained[name].bfloat16().float() != trained[name]).float().mean() > 0.9 for name in trained
    )


@pytest.mark.parametrize("method", ["qpissa", "qlora"])
def test_sigkill_and_resume_give_the_same_bits(
    method: str, settings: Settings, tmp_path: Path
) -> None:
    train(settings("whole", method=method))
    killed = settings("killed", method=method)
    kill_training(killed, once=tmp_path / "killed" / "checkpoints" / "checkpoint-2" / "whole")
    train(killed, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_run_killed_while_it_quantises_resumes_to_the_same_bits(
    settings: Settings, tmp_path: Path
) -> None:
    train(settings("whole", method="qpissa"))
    killed = settings("killed", method="qpissa")
    kill_training(killed, once=tmp_path / "killed" / "residual" / "pissa.json")
    train(killed, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_classifier_trains_on_a_decomposed_encoder_and_keeps_its_head(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=260, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    rows = "".join(f'{{"text": "{n} is {n % 2}", "label": "{n % 2}"}}\n' for n in range(24))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    values = {
        "model": str(tmp_path / "base"), "task": "classification", "data": str(tmp_path / "rows.jsonl"), "rank": 4,
        "method": "qpissa", "output": str(tmp_path / "out"), "max_steps": 3, "batch_size": 4, "learning_rate": 1e-2,
        "device": "cpu",
    }  # fmt: skip
    train(load_settings(None, values))

    def load(folder: Path) -> torch.nn.Module:
        return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()

    residual = tmp_path / "out" / "residual"
    run = logits(pissa.load(load(residual), tmp_path / "out").eval())
    assert torch.equal(stock_logits(residual, tmp_path / "out" / "adapter", load), run)
    pissa.merge(residual, tmp_path / "out", tmp_path / "merged")
    assert gap(logits(load(tmp_path / "merged")), run) < 1e-5
    record = pissa.convert(tmp_path / "out", tmp_path / "lora", 64)
    assert record.notes["error"] < 1e-5
    assert gap(stock_logits(tmp_path / "base", tmp_path / "lora", load), run) < 1e-4


def test_a_refused_run_leaves_the_one_before_as_it_was(settings: Settings, tmp_path: Path) -> None:
    train(settings(method="qpissa"))
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="rank 4096 is larger"):
        train(settings(method="qpissa", rank=4096, force=True))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_another_run_in_the_folder_takes_nothing_of_the_old_residual(
    settings: Settings, base: Path, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    train(settings(method="qpissa", max_steps=1))
    train(settings(method="pissa", max_steps=1, force=True))
    assert not (tmp_path / "out" / "residual").exists()
    # Killed once its residual was whole: another rank or model does not go on with it.
    killed = settings("killed", method="qpissa")
    kill_training(killed, once=tmp_path / "killed" / "residual" / "pissa.json")
    other = pico_folder("other", seed=1, vocab_size=260, **PACKABLE)
    save_tokenizer(other)
    train(settings("killed", method="qpissa", model=str(other)), resume=True)
    train(settings("whole", method="qpissa", model=str(other)))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_further_modules_train_whole_beside_few_bits(
    settings: Settings, base: Path, tmp_path: Path
) -> None:
    train(settings(method="qpissa", modules_to_save=["norm"]))
    trained = weights_of(tmp_path / "out")["base_model.model.model.norm.weight"]
    assert not torch.equal(trained, load_file(base / "model.safetensors")["model.norm.weight"])


def test_full_training_is_not_for_a_residual_nor_for_few_bits(
    settings: Settings, base: Path, tmp_path: Path
) -> None:
    pissa.decompose(base, tmp_path / "residual", "pissa", 4)
    with pytest.raises(ConfigError, match="a residual, expected a whole model with full") as caught:
        train(settings(method="full", model=str(tmp_path / "residual"), iterations=3, dropout=0.1))
    assert "iterations: got 3, expected null with full" in str(caught.value)
    assert "dropout: got 0.1, expected 0 with full" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2}, "rank: got 2, expected 4, as"),
        ({"targets": ["q_proj"]}, r"targets: got \['q_proj'\], expected those of"),
        ({"double_quant": True, "quant": "nf4"}, "double_quant: got True, expected False, as"),
        ({"svd": "exact"}, "svd: got 'exact', expected 'fast', as"),
        ({"method": "loftq"}, "method: got 'loftq', expected 'pissa', as"),
        ({"quant": "int8"}, "quant: got 'int8', expected 'nf4', as"),
        ({"iterations": 3}, "iterations: got 3, expected 5, as"),
    ],
)
def test_settings_that_contradict_the_decomposed_folder_are_refused(
    changes: dict[str, Any], message: str, settings: Settings, base: Path, tmp_path: Path
) -> None:
    pissa.decompose(base, tmp_path / "residual", "qpissa", 4)
    with pytest.raises(ConfigError, match=message):
        train(settings(**{"method": "qpissa", "model": str(tmp_path / "residual"), **changes}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full", "quant": "nf4"}, "quant: got nf4, expected null with full"),
        ({"method": "lora", "quant": "nf4", "iterations": 3}, "iterations is 3 with lora"),
        ({"method": "loftq", "quant": None, "iterations": 0}, "iterations: got 0"),
        ({"quant": "nf5"}, "quant: unknown quantiser 'nf5'. Did you mean 'nf4'"),
        ({"quant": "int8", "load_in_4bit": True}, "load_in_4bit: got it beside quant 'int8'"),
        ({"load_in_4bit": "maybe"}, "load_in_4bit: got 'maybe', expected true or false"),
        ({"quant": "int8", "double_quant": True}, "which int8 has not"),
        ({"iterations": 3}, "iterations is 3, which has a meaning only with a quantiser"),
    ],
)
def test_a_quantiser_without_a_meaning_is_a_mistake_in_one_line(
    changes: dict[str, Any], message: str, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(settings(**changes))
    assert not (tmp_path / "out").exists()


def test_the_names_that_other_tools_use_are_understood(settings: Settings) -> None:
    for names, expected in (
        ({"load_in_4bit": True}, ("nf4", False)),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
            ("fp4", True),
        ),
        ({"load_in_8bit": True}, ("int8", False)),
        ({"load_in_4bit": "True"}, ("nf4", False)),
        ({"load_in_4bit": False}, (None, False)),
    ):
        read = settings(**names)
        assert (read.quant, read.double_quant) == expected, names
