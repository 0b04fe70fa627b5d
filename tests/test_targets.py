"""Which weights are split: what names mean, how each kind reads as a matrix, and what is refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import build_pico
from pissa.checkpoint.targets import Target, find_targets, head_modules, plain_modules, short_names
from pissa.errors import InputError

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def endings(targets: list[Target]) -> list[str]:
    return [target.module.rpartition(".")[2] for target in targets]


def test_all_linear_is_every_linear_but_the_output_head():
    for tied in (True, False):
        model = build_pico(tie_word_embeddings=tied)
        assert endings(find_targets(model)) == LINEARS * 2


def test_all_linear_leaves_a_classification_head_out():
    config = transformers.BertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=30,
    )
    model = transformers.BertForSequenceClassification(config)
    assert head_modules(model) == ["classifier"]
    found = [target.module for target in find_targets(model)]
    assert found == [
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.0.attention.self.key",
        "bert.encoder.layer.0.attention.self.value",
        "bert.encoder.layer.0.attention.output.dense",
        "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder.layer.0.output.dense",
        "bert.pooler.dense",
    ]
    assert head_modules(transformers.BertModel(config)) == []


def test_a_deep_classification_head_is_left_out_whole():
    config = transformers.RobertaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=30,
    )
    model = transformers.RobertaForSequenceClassification(config)
    assert not any("classifier" in target.module for target in find_targets(model))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", ["q_proj"] * 2),
        (["up_proj", "q_proj"], ["q_proj", "up_proj"] * 2),
        (["layers.1.mlp.up_proj"], ["up_proj"]),
        (["model.layers.0.self_attn.k_proj"], ["k_proj"]),
        (r".*\.1\.self_attn\.(q|v)_proj", ["q_proj", "v_proj"]),
        ([r".*layers\.0.*_proj", "lm_head"], [*LINEARS, "lm_head"]),
        ("embed_tokens", ["embed_tokens"]),
    ],
    ids=str,
)
def test_names_endings_and_expressions_find_what_they_say_in_model_order(targets, expected):
    assert endings(find_targets(build_pico(tie_word_embeddings=False), targets)) == expected


def test_an_ending_matches_whole_names_only():
    with pytest.raises(InputError, match="no module matches 'proj'"):
        find_targets(build_pico(), "proj")
    with pytest.raises(InputError, match=r"no module matches '.\*q_pro'"):
        find_targets(build_pico(), ".*q_pro")


@pytest.mark.parametrize("targets", ["q_porj", ["v_proj", "q_porj"]])
def test_a_name_that_matches_nothing_names_the_nearest_and_the_known(targets):
    with pytest.raises(
        InputError, match=r"no module matches 'q_porj'\. Did you mean 'q_proj'\?"
    ) as caught:
        find_targets(build_pico(), targets)
    assert "This model's layers are: down_proj, embed_tokens, gate_proj" in str(caught.value)


def test_a_model_without_linear_layers_says_so():
    with pytest.raises(InputError, match="none that can be split"):
        find_targets(nn.Sequential(nn.LayerNorm(4), nn.ReLU()))


@pytest.mark.parametrize(
    ("target", "other"),
    [("embed_tokens", "lm_head.weight"), ("lm_head", "model.embed_tokens.weight")],
)
def test_a_tied_weight_is_refused_with_both_names(target, other):
    with pytest.raises(InputError, match=f"{target}.weight` is tied to `{other}`"):
        find_targets(build_pico(tie_word_embeddings=True), target)


def test_linear_reads_as_it_is():
    layer = nn.Sequential(nn.Linear(5, 3))
    (target,) = find_targets(layer)
    assert (target.kind, target.weight, target.matrix_shape) == ("linear", "0.weight", (3, 5))
    assert torch.equal(target.to_matrix(layer[0].weight), layer[0].weight)
    assert torch.equal(target.from_matrix(layer[0].weight), layer[0].weight)


def test_gpt2_conv1d_reads_transposed_and_maps_vectors_as_the_layer_does():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20)
    )
    targets = {target.module: target for target in find_targets(model)}
    assert list(targets) == [
        f"transformer.h.0.{end}" for end in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    target = targets["transformer.h.0.attn.c_attn"]
    layer = model.get_submodule(target.module)
    assert (target.kind, target.shape, target.matrix_shape) == ("conv1d", (8, 24), (24, 8))
    x = torch.randn(2, 8)
    assert torch.allclose(layer(x) - layer.bias, x @ target.to_matrix(layer.weight).T, atol=1e-6)
    assert torch.equal(target.from_matrix(target.to_matrix(layer.weight)), layer.weight)


def test_embedding_reads_as_a_map_from_one_hot_tokens():
    model = nn.Sequential(nn.Embedding(7, 4))
    (target,) = find_targets(model, "0")
    assert (target.kind, target.matrix_shape) == ("embedding", (4, 7))
    one_hot = torch.eye(7)[3]
    assert torch.allclose(target.to_matrix(model[0].weight) @ one_hot, model[0](torch.tensor(3)))
    assert torch.equal(target.from_matrix(target.to_matrix(model[0].weight)), model[0].weight)


def test_conv2d_reads_as_a_map_from_patches():
    model = nn.Sequential(nn.Conv2d(3, 5, (2, 3), bias=False))
    (target,) = find_targets(model, "0")
    assert (target.kind, target.matrix_shape) == ("conv2d", (5, 18))
    patch = torch.randn(1, 3, 2, 3)
    matrix = target.to_matrix(model[0].weight)
    assert torch.allclose(matrix @ patch.flatten(), model[0](patch).flatten(), atol=1e-6)
    assert torch.equal(target.from_matrix(matrix), model[0].weight)


@pytest.mark.parametrize(
    "change", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}], ids=str
)
def test_a_convolution_that_adapters_get_wrong_is_refused(change):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, **change))
    with pytest.raises(
        InputError, match=f"`0` is a convolution with .*{next(iter(change))}=.*leave it out"
    ):
        find_targets(model, "0")


def tiny_mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=2, vocab_size=30,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def test_fused_experts_are_refused_by_name_with_what_to_name_instead():
    model = tiny_mixtral()
    for targets in ("all-linear", "experts"):
        with pytest.raises(
            InputError,
            match=r"`model\.layers\.0\.mlp\.experts\.\w+` holds the fused .* q_proj,k_proj",
        ):
            find_targets(model, targets)
    assert endings(find_targets(model, ["q_proj", "k_proj"])) == ["q_proj", "k_proj"]


def test_a_quantised_layer_is_refused_by_name():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")
    model = nn.Sequential(nn.Linear(8, 8), bitsandbytes.nn.Linear4bit(64, 64))
    with pytest.raises(InputError, match="`1` is quantised"):
        find_targets(model)


def test_integer_weights_are_refused_as_quantised():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="`0` is quantised"):
        find_targets(model)


def test_torch_attention_is_left_out_of_all_linear_and_refused_by_name():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert endings(find_targets(layer)) == ["linear1", "linear2"]
    for target, message in (
        ("out_proj", "bypasses adapters"),
        ("self_attn", "is a MultiheadAttention"),
    ):
        with pytest.raises(InputError, match=f"target `self_attn.*{message}"):
            find_targets(layer, target)


def test_what_is_no_matrix_is_refused_with_its_type():
    with pytest.raises(InputError, match=r"target `model\.norm` is a LlamaRMSNorm"):
        find_targets(build_pico(), ["model.norm"])


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj"], ["layers.1.mlp.up_proj", "layers.0.mlp.up_proj"]]
)
def test_short_names_shorten_to_endings_where_those_say_the_same(targets):
    model = build_pico()
    found = find_targets(model, targets)
    names = short_names(found, model)
    assert names == sorted(set(endings(found)))
    assert find_targets(model, names) == found


def test_short_names_stay_full_where_an_ending_would_say_more():
    model = build_pico()
    found = find_targets(model, ["layers.1.mlp.up_proj"])
    assert short_names(found, model) == ["model.layers.1.mlp.up_proj"]
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=short_names(found, model)))
    assert peft_model.targeted_module_names == ["model.layers.1.mlp.up_proj"]


def test_an_attached_model_shows_its_plain_modules():
    model = build_pico(tie_word_embeddings=False)
    plain = {name: type(module) for name, module in plain_modules(model).items()}
    found = find_targets(model)
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"])
    get_peft_model(model, config)
    assert {name: type(module) for name, module in plain_modules(model).items()} == plain
    assert find_targets(model) == found


def test_targets_are_known_without_any_weights():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(build_pico().config)
    model.tie_weights()
    assert find_targets(model) == find_targets(build_pico())
