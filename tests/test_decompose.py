"""Decomposing folders: the laws of what is written, for every method, layout and kind of layer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import pissa
from pissa.checkpoint.reader import Checkpoint
from runs import error_of

METHODS = ("lora", "milora", "olora", "pissa")


def read(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder, need_config=False)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def rebuilt(out: Path) -> dict[str, Tensor]:
    """Residual plus start of every target, in float64, as stock tools would add them up."""
    residual, start = read(out), read(out / "pissa_init")
    config = json.loads((out / "pissa_init" / "adapter_config.json").read_text())
    for name, right in start.items():
        if ".lora_A." in name or name.endswith("lora_embedding_A"):
            left = start[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            weight = name.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight"
            stored = weight if weight in residual else weight.removeprefix("transformer.")
            product = config["lora_alpha"] / config["r"] * (left.double() @ right.double())
            turned = config["fan_in_fan_out"] or "embedding" in name
            residual[stored] = residual[stored].double() + (product.T if turned else product)
    return residual


def assert_rebuilds(base: Path, out: Path, targets: int) -> None:
    """Targets to the rounding of the residual's dtype, the rest bit for bit."""
    original, residual, sums = read(base), read(out), rebuilt(out)
    assert list(residual) == list(original)
    changed = 0
    for name, weight in original.items():
        if sums[name].dtype != torch.float64:
            assert residual[name].dtype == weight.dtype
            assert torch.equal(residual[name], weight), name
            continue
        changed += 1
        limits = torch.finfo(residual[name].dtype)
        rounding = limits.eps / 2 * residual[name].double().abs().clamp(min=limits.smallest_normal)
        rounding = rounding + 2e-7 * weight.double().abs().max()  # of the float32 algebra
        assert ((sums[name] - weight.double()).abs() <= rounding).all(), name
    assert changed == targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_residual_plus_start_is_the_base(
    method: str, dtype: torch.dtype, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico_folder(dtype=dtype)
    record = pissa.decompose(base, tmp_path / "out", method=method, rank=4, alpha=6)
    assert_rebuilds(base, tmp_path / "out", targets=14)
    assert record.recipe is not None
    assert record.recipe.scale == 1.5
    assert {layer.rank for layer in record.layers} == {4}
    moved = any(
        not torch.equal(read(base)[name], read(tmp_path / "out")[name]) for name in read(base)
    )
    assert moved == (method != "lora")


def test_a_residual_may_be_wider_than_its_base(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico_folder(dtype=torch.bfloat16)
    pissa.decompose(base, tmp_path / "out", rank=4, dtype="float32")
    assert {tensor.dtype for tensor in read(tmp_path / "out").values()} == {torch.float32}
    original, sums = read(base), rebuilt(tmp_path / "out")
    assert max(error_of(sums[name], original[name]) for name in original) < 1e-7
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_fast_svd_keeps_the_energy_of_the_exact_one(
    tmp_path: Path, pico_folder: Callable[..., Path]
) -> None:
    base = pico_folder(hidden_size=96, intermediate_size=128)
    exact, fast = (
        pissa.decompose(base, tmp_path / svd, rank=4, svd=svd, targets=["gate_proj"])
        for svd in ("exact", "fast")
    )
    assert_rebuilds(base, tmp_path / "fast", targets=2)
    for one, other in zip(exact.layers, fast.layers, strict=True):
        assert one.name == other.name
        assert one.energy >= other.energy - 1e-5  # nothing beats the exact one
        assert other.energy == pytest.approx(one.energy, rel=1e-5)
        weight = read(base)[one.name]
        best = torch.linalg.svdvals(weight.double())
        assert one.energy == pytest.approx(
            float(best[:4].square().sum() / best.square().sum()), rel=1e-5
        )
        assert one.singular_values == pytest.approx(best[:4].tolist(), rel=1e-5)


def test_two_runs_are_equal_bit_for_bit_whatever_the_shards(
    tmp_path: Path, pico_folder: Callable[..., Path]
) -> None:
    base = pico_folder(hidden_size=96, intermediate_size=128)
    transformers.AutoModelForCausalLM.from_pretrained(base).save_pretrained(
        tmp_path / "shards", max_shard_size="60KB"
    )
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    pissa.decompose(base, tmp_path / "one", rank=4)
    pissa.decompose(base, tmp_path / "two", rank=4)
    pissa.decompose(tmp_path / "shards", tmp_path / "three", rank=4, max_shard_bytes="70KB")
    for part in ("model.safetensors", "pissa_init/adapter_model.safetensors"):
        assert (tmp_path / "one" / part).read_bytes() == (tmp_path / "two" / part).read_bytes()
    for part in (".", "pissa_init"):
        one, three = read(tmp_path / "one" / part), read(tmp_path / "three" / part)
        assert one.keys() == three.keys()
        assert all(torch.equal(one[name], three[name]) for name in one)
    pissa.decompose(base, tmp_path / "other", rank=4, seed=1)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() != (
        tmp_path / "other" / "model.safetensors"
    ).read_bytes()


def test_shards_keep_to_their_size_and_the_index_to_the_shards(
    tmp_path: Path, pico_folder: Callable[..., Path]
) -> None:
    base = pico_folder()
    pissa.decompose(base, tmp_path / "out", rank=4, max_shard_bytes=20_000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == [shard.name for shard in shards]
    assert all(sum(t.nbytes for t in read_file(shard).values()) <= 20_000 for shard in shards)
    assert_rebuilds(base, tmp_path / "out", targets=14)


def read_file(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_gpt2_and_an_untied_embedding_are_split_in_their_own_orientation(
    tmp_path: Path, pico_folder: Callable[..., Path]
) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=1,
        n_head=4,
        vocab_size=96,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    pissa.decompose(tmp_path / "gpt2", tmp_path / "gpt2_out", rank=4)
    assert_rebuilds(tmp_path / "gpt2", tmp_path / "gpt2_out", targets=4)
    base = pico_folder(tie_word_embeddings=False)
    pissa.decompose(base, tmp_path / "out", rank=4, targets=["embed_tokens", "q_proj"])
    assert_rebuilds(base, tmp_path / "out", targets=3)


def test_the_folder_is_a_model_folder_with_its_tokenizer_and_no_stale_index(
    tmp_path: Path, pico_folder: Callable[..., Path]
) -> None:
    base = pico_folder()
    for name in ("tokenizer.json", "chat_template.jinja", "modeling_own.py", "pissa.json"):
        (base / name).write_text("{}")
    pissa.decompose(base, tmp_path / "out", rank=4)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
        "pissa_init",
    } <= names
    assert "modeling_own.py" not in names
    assert json.loads((tmp_path / "out" / "pissa.json").read_text())["kind"] == "residual"
    start = json.loads((tmp_path / "out" / "pissa_init" / "adapter_config.json").read_text())
    assert start["init_lora_weights"] is True
    assert start["base_model_name_or_path"] == str(tmp_path / "out")


def test_progress_ends_at_the_total(tmp_path: Path, pico_folder: Callable[..., Path]) -> None:
    told: list[tuple[str, int, int]] = []
    base = pico_folder()
    pissa.decompose(base, tmp_path / "out", rank=4, progress=lambda *step: told.append(step))
    total = sum(tensor.nbytes for tensor in read(base).values())
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1:] == (total, total)
    assert [name for name, _, _ in told] == list(read(base))


def test_force_replaces_the_output_and_never_the_input(
    tmp_path: Path, pico_folder: Callable[..., Path]
) -> None:
    base = pico_folder()
    pissa.decompose(base, tmp_path / "out", rank=4)
    pissa.decompose(base, tmp_path / "out", rank=2, force=True)
    assert json.loads((tmp_path / "out" / "pissa.json").read_text())["recipe"]["rank"] == 2
    with pytest.raises(pissa.PissaError, match="is the input"):
        pissa.decompose(base, base, rank=2, force=True)


KILLED = """
import os, signal, sys, pissa
def stop(name, done, total):
    if 2 * done > total:
        os.kill(os.getpid(), signal.SIGKILL)
pissa.decompose(sys.argv[1], sys.argv[2], rank=4, max_shard_bytes=20_000, progress=stop)
"""


def test_a_kill_in_the_middle_leaves_no_output_and_the_next_run_clears_up(
    tmp_path: Path, pico_folder: Callable[..., Path]
) -> None:
    base, out = pico_folder(), tmp_path / "results" / "out"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, base, out],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert [path.name.startswith(".out.partial-") for path in out.parent.iterdir()] == [True]
    pissa.decompose(base, out, rank=4)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
