"""Every kind of layer, from the start through training and files to stock peft, and a classification head beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import pissa
from conftest import TOKENS, build_pico
from pissa.errors import WrongBaseError
from runs import gap
from test_laws import every_pair_of_the_weight


class Picture(nn.Module):
    """Convolutions of several shapes and a linear layer, not a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, (3, 2), stride=2, padding=(1, 0), bias=False)
        self.third = nn.Conv2d(6, 10, 1)
        self.last = nn.Linear(10, 7)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.third(torch.relu(self.second(torch.relu(self.first(pixels)))))
        return self.last(x.mean(dim=(2, 3)))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64, initializer_range=0.2, bos_token_id=0,
        eos_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        initializer_range=0.2, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    # A fine-tuning's head is new: here it has its own seed, as it would after loading an encoder.
    model.classifier.reset_parameters()
    return model.eval()


def picture() -> nn.Module:
    torch.manual_seed(0)
    return Picture().eval()


def language(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


def pixels(model: nn.Module) -> Tensor:
    picture = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return model(picture.to(next(model.parameters()).dtype))


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    output: Callable[[nn.Module], Tensor]
    targets: str | list[str]
    rank: int = 4


CASES = {
    "linear": Case(build_pico, language, "all-linear"),
    "conv1d": Case(gpt2, language, "all-linear"),
    "embedding": Case(lambda: build_pico(tie_word_embeddings=False), language, ["embed_tokens"]),
    "embedding and head": Case(
        lambda: build_pico(tie_word_embeddings=False), language, ["embed_tokens", "lm_head"]
    ),
    "conv2d": Case(picture, pixels, ["first", "second", "third", "last"]),
    "classifier": Case(bert, language, "all-linear"),
}
every_kind = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
both_forms = pytest.mark.parametrize("base", ["keep", "residual"])


@torch.no_grad()
def output(case: Case, model: nn.Module) -> Tensor:
    return case.output(model.eval())


def fit(case: Case, model: nn.Module, steps: int = 5) -> nn.Module:
    """Towards one fixed class everywhere."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    for _ in range(steps):
        optimizer.zero_grad()
        case.output(model.train()).log_softmax(-1)[..., 2].mean().neg().backward()
        optimizer.step()
    return model.eval()


@every_kind
@every_pair_of_the_weight
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_first_step_equals_the_base_bit_for_bit(case, method, dtype):
    model = case.build().to(dtype)
    base = output(case, model)
    attached = pissa.attach(model, method, case.rank, targets=case.targets, alpha=6)
    assert torch.equal(output(case, attached), base)
    assert gap(output(case, fit(case, attached, steps=1)), base) > 1e-3


@every_kind
@every_pair_of_the_weight
@both_forms
def test_trained_saved_and_loaded_by_stock_peft_and_by_pissa(case, method, base, tmp_path):
    untouched = output(case, case.build())
    model = fit(
        case,
        pissa.attach(case.build(), method, case.rank, targets=case.targets, base=base, alpha=6),
    )
    expected = output(case, model)
    moved = gap(expected, untouched)
    assert moved > 0.05
    pissa.save(model, tmp_path / "run")
    model.save_pretrained(tmp_path / "stock")
    tolerance = 1e-5 * max(1.0, moved, float(expected.abs().max()))
    for folder in (tmp_path / "run" / "adapter", tmp_path / "stock"):
        stock = peft.PeftModel.from_pretrained(case.build(), folder)
        assert gap(output(case, stock), expected) < tolerance
    again = pissa.load(case.build(), tmp_path / "run")
    assert gap(output(case, again), expected) < (0.1 * tolerance if base == "keep" else tolerance)
    if base == "keep":
        assert torch.equal(output(case, again), expected)
        assert torch.equal(output(case, fit(case, again)), output(case, fit(case, model)))


@every_kind
@every_pair_of_the_weight
@both_forms
def test_disabled_it_is_the_base_and_merged_it_is_the_adapter(case, method, base):
    untouched = output(case, case.build())
    model = fit(
        case,
        pissa.attach(case.build(), method, case.rank, targets=case.targets, base=base, alpha=6),
    )
    expected = output(case, model)
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    if "classifier" not in dict(case.build().named_children()):
        with model.disable_adapter():
            assert gap(output(case, model), untouched) < (
                tolerance if base == "residual" else 1e-30
            )
    model.merge_adapter()
    assert gap(output(case, model), expected) < tolerance
    model.unmerge_adapter()
    assert gap(output(case, model), expected) < tolerance
    assert gap(output(case, model.merge_and_unload()), expected) < tolerance


@every_kind
@every_pair_of_the_weight
@both_forms
def test_unloading_gives_the_weights_back_bit_for_bit(case, method, base):
    model = fit(
        case, pissa.attach(case.build(), method, case.rank, targets=case.targets, base=base)
    )
    back, original = model.unload().state_dict(), case.build().state_dict()
    assert back.keys() == original.keys()
    assert all(
        torch.equal(back[name], original[name])
        for name in original
        if not name.startswith("classifier.")
    )


def test_a_trained_head_survives_in_the_adapter_folder(tmp_path):
    case = CASES["classifier"]
    model = fit(case, pissa.attach(bert(), rank=4))
    pissa.save(model, tmp_path / "run")
    head = model.get_base_model().classifier.modules_to_save["default"].weight
    assert gap(head, bert().classifier.weight) > 0.01
    other_head = bert()
    other_head.classifier.reset_parameters()
    for again in (
        pissa.load(other_head, tmp_path / "run"),
        peft.PeftModel.from_pretrained(bert(), tmp_path / "run" / "adapter"),
    ):
        assert torch.equal(
            again.get_base_model().classifier.modules_to_save["default"].weight, head
        )
        assert gap(output(case, again), output(case, model)) < 1e-5


def test_a_run_on_an_encoder_with_a_head_refuses_another_encoder(tmp_path: Path):
    pissa.save(pissa.attach(bert(), rank=4), tmp_path / "run")
    other = bert()
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight[5, 5] += 1
    with pytest.raises(WrongBaseError, match=r"`embeddings\.word_embeddings\.weight`"):
        pissa.load(other, tmp_path / "run")


def test_a_head_that_does_not_train_belongs_to_the_base(tmp_path: Path):
    pissa.save(pissa.attach(bert(), rank=4, modules_to_save=[]), tmp_path / "run")
    again = pissa.load(bert(), tmp_path / "run")
    assert torch.equal(output(CASES["classifier"], again), output(CASES["classifier"], bert()))


@every_pair_of_the_weight
@both_forms
def test_a_stock_checkpoint_of_an_embedding_continues_with_the_same_bits(method, base, tmp_path):
    case = CASES["embedding and head"]
    settings = {"method": method, "rank": 4, "targets": case.targets, "base": base}
    model = fit(case, pissa.attach(case.build(), **settings))
    model.save_pretrained(tmp_path)
    again = pissa.attach(case.build(), **settings)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(output(case, again), output(case, model))
    assert gap(output(case, again), output(case, case.build())) > 0.05
    if base == "residual" and method != "lora":
        other = case.build()
        with torch.no_grad():
            other.lm_head.weight[0, 0] += 1
        with pytest.raises(WrongBaseError):
            pissa.attach(other, **settings).load_adapter(tmp_path, "default")


def test_modules_can_be_chosen_to_train_whole(tmp_path):
    case = CASES["linear"]
    model = pissa.attach(build_pico(tie_word_embeddings=False), rank=4, modules_to_save=["lm_head"])
    expected = output(case, fit(case, model))
    pissa.save(model, tmp_path / "run")
    base = build_pico(tie_word_embeddings=False)
    assert torch.equal(output(case, pissa.load(base, tmp_path / "run")), expected)
