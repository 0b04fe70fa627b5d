"""Bad input to `decompose`: one error that names the tensor or the key, and nothing written."""

from __future__ import annotations

import json
import shutil
import struct
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import pissa
from conftest import pico_config
from pissa.errors import CheckpointError, InputError, OutputError, PissaError, WrongBaseError

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def edit_config(base: Path, **changes: object) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))


def put(base: Path, name: str, value: float) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def shard(base: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="20KB")
    return base / "model.safetensors.index.json"


def truncate(base: Path) -> None:
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[: len(data) // 2])


def lie(base: Path) -> None:
    """A header that says a tensor is larger than its bytes."""
    data = (base / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[Q_PROJ]["shape"] = [64, 64]
    text = json.dumps(header).encode()
    (base / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + data[8 + length :]
    )


def drop_shard(base: Path) -> None:
    shard(base)
    sorted(base.glob("model-*.safetensors"))[1].unlink()


def point_outside(base: Path) -> None:
    index = shard(base)
    content = json.loads(index.read_text())
    content["weight_map"][Q_PROJ] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))


def pickle_only(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def lose_target(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.qkv.weight"] = tensors.pop(Q_PROJ)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def as_residual(base: Path) -> None:
    pissa.decompose(base, base.parent / "residual", rank=2)
    shutil.rmtree(base)
    (base.parent / "residual").rename(base)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], type[PissaError], str]] = {
    "nan": (
        lambda base: put(base, Q_PROJ, float("nan")),
        InputError,
        f"`{Q_PROJ}` has 1 non-finite",
    ),
    "inf": (
        lambda base: put(base, Q_PROJ, float("inf")),
        InputError,
        f"`{Q_PROJ}` has 1 non-finite",
    ),
    "truncated": (truncate, CheckpointError, r"model\.safetensors is damaged"),
    "lying header": (lie, CheckpointError, Q_PROJ),
    "absent shard": (drop_shard, CheckpointError, "names the shard model-00002-of-.* absent"),
    "index points outside": (point_outside, CheckpointError, f"{Q_PROJ}.*elsewhere"),
    "pickle": (pickle_only, CheckpointError, r"pytorch_model\.bin.*save_pretrained"),
    "remote code": (
        lambda base: edit_config(base, auto_map={"AutoModelForCausalLM": "modeling_own.Own"}),
        CheckpointError,
        r"modeling_own\.Own.*--trust-remote-code",
    ),
    "unknown architecture": (
        lambda base: edit_config(base, model_type="nonesuch", architectures=["Nonesuch"]),
        CheckpointError,
        r"config\.json.*nonesuch",
    ),
    "mistyped config": (
        lambda base: edit_config(base, hidden_size="wide"),
        CheckpointError,
        "hidden_size",
    ),
    "config of another size": (
        lambda base: edit_config(base, hidden_size=64),
        CheckpointError,
        r"\[.*32.*\].*64",
    ),
    "no config": (
        lambda base: (base / "config.json").unlink(),
        CheckpointError,
        r"no config\.json",
    ),
    "quantised": (
        lambda base: edit_config(base, quantization_config={"quant_method": "gptq"}),
        InputError,
        "quantised.*gptq",
    ),
    "residual": (as_residual, WrongBaseError, "itself a residual"),
    "fused on disk": (lose_target, CheckpointError, Q_PROJ),
    "not a folder": (shutil.rmtree, CheckpointError, "is not a folder"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_one_error_and_no_output(
    case: str, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    spoil, kind, message = BAD_FOLDERS[case]
    base = pico_folder()
    spoil(base)
    refuse(kind, message, base, tmp_path / "out")


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"rank": 0}, "rank 0 is below 1"),
    "rank too large": ({"rank": 17}, r"rank 17 is larger than.*k_proj\.weight.*--rank 16"),
    "alpha 0": ({"alpha": 0}, "alpha is 0"),
    "alpha negative": ({"alpha": -1.0}, r"alpha is -1\.0"),
    "alpha nan": ({"alpha": float("nan")}, "alpha is nan"),
    "no target": ({"targets": ["q_porj"]}, "'q_porj'.*Did you mean 'q_proj'"),
    "norm as target": ({"targets": ["input_layernorm"]}, "input_layernorm.*expected Linear"),
    "tied target": (
        {"targets": ["embed_tokens"]},
        r"embed_tokens\.weight` is tied to `lm_head\.weight",
    ),
    "method": ({"method": "pisa"}, "'pisa'.*Did you mean 'pissa'"),
    "dtype": ({"dtype": "fp16"}, "dtype is 'fp16', expected one of float32"),
    "workers": ({"workers": 0}, "workers is 0, expected 1 or more"),
    "device": ({"device": "abacus"}, "device is 'abacus', expected cpu, cuda or cuda:1"),
    "far device": ({"device": "cuda:64"}, "device is 'cuda:64', "),
    "svd": ({"svd": "quick"}, "svd is 'quick', expected 'fast', 'exact' or a tolerance"),
    "shard size": ({"max_shard_bytes": "5 apples"}, "'5 apples' is not a size"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_bad_setting_is_one_error_and_no_output(
    case: str, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    settings, message = BAD_SETTINGS[case]
    refuse(InputError, message, pico_folder(), tmp_path / "out", **settings)


def test_fused_experts_are_refused_by_name(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        num_local_experts=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    refuse(
        InputError,
        r"model\.layers\.0\.mlp\.experts\.\w+.*several experts",
        tmp_path / "base",
        tmp_path / "out",
    )
    pissa.decompose(tmp_path / "base", tmp_path / "out", rank=2, targets=["q_proj", "v_proj"])


def test_a_folder_with_files_in_it_is_not_replaced(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear to someone")
    with pytest.raises(OutputError, match="--force"):
        pissa.decompose(pico_folder(), tmp_path / "out", rank=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_told_before_writing(
    pico_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No small disk can be mounted without root, so the answer to "how much is free" is made up."""
    base = pico_folder()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    refuse(OutputError, "needs .* bytes.*1000 bytes.*free some space", base, tmp_path / "out")


def test_a_wrong_model_class_is_refused(tmp_path: Path) -> None:
    """An encoder's weights under a decoder's config hold none of its layers."""
    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    transformers.BertModel(transformers.BertConfig(vocab_size=96, **small)).save_pretrained(
        tmp_path / "base"
    )
    pico_config(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "base")
    refuse(CheckpointError, "q_proj.weight", tmp_path / "base", tmp_path / "out")


def refuse(kind: type[PissaError], message: str, base: Path, out: Path, **settings: Any) -> None:
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(kind, match=message):
        pissa.decompose(base, out, **{"rank": 4, **settings})
    assert sorted(path.name for path in out.parent.iterdir()) == before
