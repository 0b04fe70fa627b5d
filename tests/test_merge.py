"""Base plus run as one ordinary model folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pissa
from conftest import TOKENS
from pissa.checkpoint.reader import Checkpoint
from pissa.errors import CheckpointError, InputError, WrongBaseError
from runs import gap, language_model, logits, make_run, train


def read(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("source", ["run", "run/state", "run/adapter"])
@pytest.mark.parametrize("method", ["lora", "milora", "olora", "pissa"])
def test_a_merged_model_is_the_trained_model(
    method: str, source: str, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico_folder()
    trained = make_run(base, tmp_path / "run", method=method, alpha=6)
    record = pissa.merge(base, tmp_path / source, tmp_path / "merged")
    assert record.kind == "merged"
    assert gap(logits(language_model(tmp_path / "merged")), trained) <= 1e-5
    original, merged = read(base), read(tmp_path / "merged")
    changed = {name for name in original if not torch.equal(original[name], merged[name])}
    assert len(changed) == 14
    assert all("_proj" in name for name in changed)


def test_a_converted_lora_merges_like_its_run(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico_folder()
    trained = make_run(base, tmp_path / "run")
    pissa.convert(tmp_path / "run", tmp_path / "lora")
    pissa.merge(base, tmp_path / "lora", tmp_path / "merged")
    assert gap(logits(language_model(tmp_path / "merged")), trained) <= 1e-5


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_a_16_bit_base_is_rounded_once(
    dtype: str | None, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico_folder(dtype=torch.bfloat16)
    make_run(base, tmp_path / "run", dtype=torch.bfloat16)
    pissa.merge(base, tmp_path / "run", tmp_path / "merged", dtype=dtype)
    stored = getattr(torch, dtype or "bfloat16")
    pairs = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    original = read(base)
    for name, merged in read(tmp_path / "merged").items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        expected = original[name].float()
        if f"{key}A.weight" in pairs:
            expected = expected + pairs[f"{key}B.weight"].float() @ pairs[f"{key}A.weight"].float()
        assert merged.dtype == stored
        assert torch.equal(merged, expected.to(stored)), name
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == str(
        stored
    ).removeprefix("torch.")


def test_shards_stream_in_and_out(pico_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = pico_folder()
    language_model(base).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    trained = make_run(base, tmp_path / "run")
    pissa.merge(tmp_path / "shards", tmp_path / "run", tmp_path / "merged", max_shard_bytes=30_000)
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 2
    assert gap(logits(language_model(tmp_path / "merged")), trained) <= 1e-5


def classifier(folder: Path) -> nn.Module:
    torch.manual_seed(7)
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3
    ).eval()


@pytest.mark.parametrize("source", ["run", "lora"])
def test_a_trained_head_lands_in_the_merged_model(source: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    config = transformers.BertConfig(vocab_size=96, max_position_embeddings=64, **small)
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    model = train(pissa.attach(classifier(tmp_path / "base"), rank=4))
    pissa.save(model, tmp_path / "run")
    pissa.convert(tmp_path / "run", tmp_path / "lora")
    pissa.merge(tmp_path / "base", tmp_path / source, tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged"
    ).eval()
    assert merged.config.num_labels == 3
    assert gap(logits(merged), logits(model)) <= 1e-5


def test_a_stock_lora_merges_with_a_warning(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico_folder()
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    model = train(peft.get_peft_model(language_model(base), config))
    model.save_pretrained(tmp_path / "lora")
    with pytest.warns(UserWarning, match="cannot be checked"):
        pissa.merge(base, tmp_path / "lora", tmp_path / "merged")
    assert gap(logits(language_model(tmp_path / "merged")), logits(model)) <= 1e-5


def test_a_stock_lora_over_transposed_and_plain_square_layers_merges_right(tmp_path: Path) -> None:
    """GPT-2's own layers are transposed, its head is not, and the adapter's file has one flag for both."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=48,
        n_layer=1,
        n_head=4,
        vocab_size=48,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.tie_word_embeddings = False
    base = tmp_path / "base"
    transformers.GPT2LMHeadModel(config).save_pretrained(base)
    lora = peft.LoraConfig(
        r=4, target_modules=["attn.c_proj", "lm_head"], task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = train(peft.get_peft_model(language_model(base), lora))
    model.save_pretrained(tmp_path / "lora")
    with pytest.warns(UserWarning, match="cannot be checked"):
        pissa.merge(base, tmp_path / "lora", tmp_path / "merged")
    assert gap(logits(language_model(tmp_path / "merged")), logits(model)) <= 1e-5


def test_a_stock_lora_of_other_shapes_is_refused_by_name(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model = language_model(pico_folder())
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "lora"
    )
    wide = pico_folder("wide", hidden_size=64)
    with (
        pytest.warns(UserWarning, match="cannot be checked"),
        pytest.raises(WrongBaseError, match=r"q_proj\.weight.*\[32, 32\].*\[64, 64\]"),
    ):
        pissa.merge(wide, tmp_path / "lora", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_stands_for_no_change_is_refused(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico_folder()
    pissa.decompose(base, tmp_path / "out", rank=4)
    for folder, kind, message in (
        (base, CheckpointError, "is a model folder"),
        (tmp_path / "out", CheckpointError, "is a decomposed folder"),
        (tmp_path / "out" / "pissa_init", WrongBaseError, "only right beside the residual"),
        (tmp_path, CheckpointError, "no model, run or adapter"),
    ):
        with pytest.raises(kind, match=message):
            pissa.merge(base, folder, tmp_path / "merged")
    make_run(base, tmp_path / "run")
    with pytest.raises(InputError, match="dtype is 'half'"):
        pissa.merge(base, tmp_path / "run", tmp_path / "merged", dtype="half")
    assert not (tmp_path / "merged").exists()


def test_a_run_on_a_residual_merges_into_the_original_base(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico_folder()
    pissa.decompose(base, tmp_path / "out", rank=4)
    model = train(pissa.load(language_model(tmp_path / "out"), tmp_path / "out"))
    pissa.save(model, tmp_path / "run")
    pissa.merge(base, tmp_path / "run", tmp_path / "merged")
    assert gap(logits(language_model(tmp_path / "merged")), logits(model)) <= 1e-4
    assert model(input_ids=TOKENS).logits.isfinite().all()


def test_a_state_without_one_of_its_tensors_is_an_error(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico_folder()
    make_run(base, tmp_path / "run")
    file = tmp_path / "run" / "state" / "state.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith("drift_left"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file)
    with pytest.raises(CheckpointError, match=lost):
        pissa.merge(base, tmp_path / "run", tmp_path / "merged")


def test_a_truncated_state_is_an_error(pico_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = pico_folder()
    make_run(base, tmp_path / "run")
    file = tmp_path / "run" / "state" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        pissa.merge(base, tmp_path / "run", tmp_path / "merged")
