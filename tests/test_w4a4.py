"""Models in 4 bits: live, on disk and as ordinary ones; and that no stock tool takes one for another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from pissa.checkpoint.output import read_json, write_json
from pissa.checkpoint.reader import Checkpoint
from pissa.errors import CheckpointError, InputError, OutputError, WrongBaseError
from pissa.linalg import relative_error
from pissa.observe import Observations, observe
from pissa.w4a4 import W4A4Linear, export_dense, load_w4a4, quantise_model, svdquant

FAST = {"smoothing": False, "rounds": 1}
TOKENS = torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(0))


def gpt2() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def seen(model: nn.Module) -> Observations:
    return observe(model, [{"input_ids": TOKENS}], "inputs", inputs=64)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


@pytest.fixture(params=["llama", "gpt2"])
def source(request, tmp_path, pico) -> Path:
    """A model on disk, of each kind of linear layer, with a tokenizer's file."""
    model = pico if request.param == "llama" else gpt2()
    model.save_pretrained(tmp_path / "source")
    write_json(tmp_path / "source" / "tokenizer_config.json", {"some": "words"})
    return tmp_path / "source"


def original(source: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(source).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_models_targets_are_replaced_and_its_outputs_stay_near(kind, pico):
    model = pico if kind == "llama" else gpt2()
    before = logits(model)
    layers = quantise_model(model, seen(model), rank=16)
    assert len(layers) == {"llama": 14, "gpt2": 8}[kind]
    assert all(model.get_submodule(name) is new for name, new in layers.items())
    assert 1e-4 < relative_error(logits(model), before) < 0.1
    with pytest.raises(InputError, match="random weights in their place"):
        model.save_pretrained("nowhere")


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [("embed_tokens", 4, "tied"), ("all-linear", 17, "rank 17 is larger than min")],
)
def test_a_model_is_left_as_it_was_where_a_target_cannot_be(targets, rank, message, pico):
    observations = seen(pico)
    before = {name: type(module) for name, module in pico.named_modules()}
    with pytest.raises(InputError, match=message):
        quantise_model(pico, observations, rank, targets=targets)
    assert {name: type(module) for name, module in pico.named_modules()} == before


def test_an_embedding_does_not_compute_in_4_bits(pico_folder):
    model = original(pico_folder(tie_word_embeddings=False))
    with pytest.raises(
        InputError, match=r"embed_tokens.weight` is of kind embedding, expected linear or conv1d"
    ):
        quantise_model(model, seen(model), 4, targets="embed_tokens")


def test_observations_of_another_model_are_refused_by_name(pico, pico_folder, tmp_path):
    other = pico_folder(seed=1)
    with pytest.raises(
        WrongBaseError, match=r"another base: `layers\.0\..*Observe the model at hand"
    ):
        svdquant(other, tmp_path / "out", seen(pico), rank=4)
    assert not (tmp_path / "out").exists()
    with pytest.raises(WrongBaseError, match="Observe the model at hand"):
        quantise_model(original(other), seen(pico), rank=4)


def test_a_folder_loads_to_the_very_model_that_was_quantised_in_memory(source, tmp_path):
    live = original(source)
    observations = seen(live)
    record = svdquant(source, tmp_path / "out", observations, rank=8, workers=1)
    layers = quantise_model(live, observations, rank=8)
    loaded = load_w4a4(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(live))
    assert {name for name, m in loaded.named_modules() if isinstance(m, W4A4Linear)} == set(layers)
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head.weight is embedding.weight
    errors = record.notes["output_errors"]
    assert len(errors) == len(record.layers) == len(layers) and 0 < max(errors.values()) < 0.2
    assert read_json(tmp_path / "out" / "tokenizer_config.json") == {"some": "words"}


def test_the_workers_and_shards_change_no_bit(source, tmp_path):
    observations = seen(original(source))
    for name, options in {
        "one": {"workers": 1},
        "two": {"workers": 2, "max_shard_bytes": 4096},
    }.items():
        svdquant(source, tmp_path / name, observations, rank=4, options={"rounds": 1}, **options)
    one, two = (
        Checkpoint.open(tmp_path / name / "weights", need_config=False) for name in ("one", "two")
    )
    assert len(list((tmp_path / "two" / "weights").glob("*.safetensors"))) > 2
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.tensors)
    assert torch.equal(logits(load_w4a4(tmp_path / "one")), logits(load_w4a4(tmp_path / "two")))


def test_the_weights_take_half_a_byte_an_entry_and_a_scale_a_group(pico_folder, tmp_path):
    source = pico_folder(hidden_size=128, intermediate_size=256)
    svdquant(source, tmp_path / "out", seen(original(source)), rank=4, options=FAST)
    with safe_open(tmp_path / "out" / "weights" / "model.safetensors", "pt") as file:
        codes, scales, left = (
            file.get_slice(f"model.layers.0.mlp.up_proj.{part}")
            for part in ("codes", "scales", "left")
        )
        assert (codes.get_shape(), codes.get_dtype()) == ([256, 64], "U8")
        assert (scales.get_shape(), scales.get_dtype()) == ([256, 2], "F16")
        assert (left.get_shape(), left.get_dtype()) == ([256, 4], "F16")
        assert "model.layers.0.mlp.up_proj.weight" not in file.keys()  # noqa: SIM118


def test_stock_transformers_refuses_the_folder_and_its_weights(source, tmp_path):
    svdquant(source, tmp_path / "out", seen(original(source)), rank=4, options=FAST)
    for folder in (tmp_path / "out", tmp_path / "out" / "weights"):
        with pytest.raises(
            (OSError, ValueError), match=r"no file named model.safetensors|model_type"
        ):
            transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(InputError, match="random weights in their place"):
        load_w4a4(tmp_path / "out").save_pretrained(tmp_path / "again")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        svdquant(tmp_path / "out", tmp_path / "twice", seen(original(source)), rank=4)


def test_the_dense_export_is_an_ordinary_model_of_what_the_layers_stand_for(source, tmp_path):
    model = original(source)
    svdquant(source, tmp_path / "out", seen(model), rank=8)
    record = export_dense(tmp_path / "out", tmp_path / "dense")
    dense, loaded = original(tmp_path / "dense"), load_w4a4(tmp_path / "out")
    for name, layer in loaded.named_modules():
        if isinstance(layer, W4A4Linear):
            module = dense.get_submodule(name)
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
            assert torch.equal(weight, layer.dense())
            assert layer.bias is None or torch.equal(layer.bias, module.bias)
    assert "pissa" not in read_json(tmp_path / "dense" / "config.json")
    assert record.kind == "merged" and record.base.tensors
    assert (
        0
        < relative_error(logits(dense), logits(model))
        < relative_error(logits(loaded), logits(model))
    )


def test_the_dense_export_is_written_in_the_dtype_asked_for(pico_folder, tmp_path):
    source = pico_folder(dtype=torch.bfloat16)
    svdquant(source, tmp_path / "out", seen(original(source)), rank=4, options=FAST)
    assert {p.dtype for p in load_w4a4(tmp_path / "out").parameters()} == {torch.bfloat16}
    for dtype in ("bfloat16", "float32"):
        export_dense(tmp_path / "out", tmp_path / dtype, dtype=dtype)
        infos = Checkpoint.open(tmp_path / dtype).tensors.values()
        assert {info.dtype for info in infos} == {getattr(torch, dtype)}
        assert original(tmp_path / dtype).dtype == getattr(torch, dtype)


def test_what_is_no_4_bit_folder_is_refused(pico_folder, tmp_path):
    source = pico_folder()
    for reader in (load_w4a4, lambda folder: export_dense(folder, tmp_path / "dense")):
        with pytest.raises(CheckpointError, match="is no 4-bit model of svdquant"):
            reader(source)
    svdquant(source, tmp_path / "out", seen(original(source)), rank=4, options=FAST)
    config = read_json(tmp_path / "out" / "config.json")
    write_json(
        tmp_path / "out" / "config.json", config | {"pissa": config["pissa"] | {"group": 32}}
    )
    with pytest.raises(CheckpointError, match="groups of 32, expected 64"):
        load_w4a4(tmp_path / "out")


def test_a_folder_that_lacks_a_tensor_is_refused_by_its_name(pico_folder, tmp_path):
    source = pico_folder()
    svdquant(source, tmp_path / "out", seen(original(source)), rank=4, options=FAST)
    config = read_json(tmp_path / "out" / "config.json")
    write_json(tmp_path / "out" / "config.json", config | {"num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match=r"lacks `model\.layers\.2\."):
        load_w4a4(tmp_path / "out")


def test_an_output_is_replaced_only_when_asked_and_a_quantised_source_refused(
    pico_folder, tmp_path
):
    source = pico_folder()
    observations = seen(original(source))
    svdquant(source, tmp_path / "out", observations, rank=4, options=FAST)
    with pytest.raises(OutputError, match="--force"):
        svdquant(source, tmp_path / "out", observations, rank=4, options=FAST)
    svdquant(source, tmp_path / "out", observations, rank=4, options=FAST, force=True)
    config = read_json(source / "config.json")
    write_json(
        source / "config.json", config | {"quantization_config": {"quant_method": "bitsandbytes"}}
    )
    with pytest.raises(InputError, match="start from the original model in 16 bits"):
        svdquant(source, tmp_path / "other", observations, rank=4)
