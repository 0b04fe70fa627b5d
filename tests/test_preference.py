"""TRL's preference trainers on attached models: what they compare with is the model as it was given to them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import trl
from trl.trainer.utils import use_adapter

import pissa
from conftest import PACKABLE, build_pico
from pissa.errors import InputError
from runs import gap, language_model, logits, train
from training_runs import save_tokenizer

PAIRS = [
    {"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n + 2}!"} for n in range(8)
]
JUDGED = [
    {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
    for pair in PAIRS
    for kind in ("chosen", "rejected")
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def trainer_of(tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """A short training of a model: `trainer_of(model)`, `trainer_of(model, "KTO", JUDGED)`."""

    def make(model: Any, kind: str = "DPO", rows: list[dict[str, Any]] = PAIRS, **more: Any) -> Any:
        rewards = {"reward_funcs": more.pop("reward")} if "reward" in more else {}
        values = {
            "output_dir": str(tmp_path / "trainer"), "per_device_train_batch_size": 4, "max_steps": 3,
            "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
            "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
        }  # fmt: skip
        return getattr(trl, f"{kind}Trainer")(
            model,
            args=getattr(trl, f"{kind}Config")(**{**values, **more}),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            **rewards,
        )

    return make


def pico(**changes: Any) -> Any:
    return build_pico(vocab_size=260, **changes)


def reference(trainer: Any) -> torch.Tensor:
    """The logits of what the trainer compares with, asked for as the trainer itself does."""
    model = trainer.model.eval()
    with use_adapter(model, "ref" if "ref" in model.peft_config else None):
        return logits(model)


def logged(trainer: Any, key: str = "loss") -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def assert_learns_from_ln_2(trainer: Any) -> None:
    """The first loss is that of two equal models, the last one less, and the reference does not move."""
    before = reference(trainer)
    trainer.train()
    assert abs(logged(trainer)[0] - math.log(2)) < 1e-6
    assert logged(trainer)[-1] < math.log(2) - 1e-3
    assert torch.equal(reference(trainer), before)
    assert gap(logits(trainer.model.eval()), before) > 0.01


@pytest.mark.parametrize("base", ["keep", "residual"])
@pytest.mark.parametrize("method", ["lora", "pissa", "milora", "olora"])
def test_dpo_starts_at_ln_2_and_its_reference_stays_the_base(
    method: str, base: str, trainer_of: Callable[..., Any]
) -> None:
    model = pico()
    before = logits(model)
    trainer = trainer_of(pissa.attach(model, method, 4, alpha=6, base=base))
    assert gap(reference(trainer), before) <= (0 if base == "keep" else 1e-6)
    assert_learns_from_ln_2(trainer)


def test_on_a_bfloat16_base_the_reference_is_the_base_bit_for_bit(
    trainer_of: Callable[..., Any],
) -> None:
    model = pico().bfloat16()
    before = logits(model)
    trainer = trainer_of(pissa.attach(model, "pissa", 4))
    assert torch.equal(reference(trainer), before)
    assert_learns_from_ln_2(trainer)


@pytest.mark.parametrize("method", ["qpissa", "qlora"])
def test_on_a_residual_in_four_bits_the_reference_is_residual_and_start(
    method: str, trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    pico(**PACKABLE).save_pretrained(tmp_path / "base")
    pissa.decompose(tmp_path / "base", tmp_path / "residual", method, 4)
    model = pissa.load(language_model(tmp_path / "residual"), tmp_path / "residual")
    before = logits(model)
    trainer = trainer_of(model)
    assert torch.equal(reference(trainer), before)
    assert_learns_from_ln_2(trainer)
    assert {part.dtype for part in model.parameters() if part.requires_grad} == {torch.float32}
    pissa.save(trainer.model, tmp_path / "run")
    again = pissa.load(language_model(tmp_path / "residual"), tmp_path / "run")
    assert torch.equal(logits(again), logits(trainer.model))


def test_the_reference_of_a_trained_run_is_what_it_had_learnt_and_the_base_on_request(
    trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    model = train(pissa.attach(pico(), "pissa", 4))
    learnt = logits(model)
    pissa.save(model, tmp_path / "run")
    trainer = trainer_of(pissa.load(pico(), tmp_path / "run"))
    assert torch.equal(reference(trainer), learnt)
    assert_learns_from_ln_2(trainer)
    trainer.model.delete_adapter("ref")
    assert torch.equal(reference(trainer), logits(pico()))


def test_kto_keeps_the_base_as_reference(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(pissa.attach(pico(), "pissa", 4), "KTO", JUDGED)
    trainer.train()
    assert logged(trainer)[0] == 0.5, "of two equal models"
    assert logged(trainer)[-1] < 0.5
    assert torch.equal(reference(trainer), logits(pico()))


def test_grpo_keeps_the_base_as_reference(trainer_of: Callable[..., Any]) -> None:
    def variety(completions: list[str], **others: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    trainer = trainer_of(
        pissa.attach(pico(), "pissa", 4), "GRPO", PAIRS, reward=variety, beta=0.1, max_completion_length=8,
        num_generations=4,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "kl")[0] == 0 < logged(trainer, "kl")[-1], "it moves away from the base"
    assert torch.equal(reference(trainer), logits(pico()))


@pytest.mark.parametrize("base", ["keep", "residual"])
def test_a_dpo_checkpoint_goes_on_with_the_same_bits(
    base: str, trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    def trainer() -> Any:
        model = pissa.attach(pico(), "pissa", 4, base=base)
        return trainer_of(model, save_strategy="steps", save_steps=2, max_steps=4)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-2"))
    assert logged(resumed) == logged(whole)
    assert torch.equal(logits(resumed.model), logits(whole.model))
    assert gap(reference(resumed), logits(pico())) <= (0 if base == "keep" else 1e-6)


def test_twins_on_a_residual_come_and_go_without_touching_the_model() -> None:
    model = pissa.attach(pico(), "pissa", 4, base="residual")
    model.add_adapter("ref", model.peft_config["default"])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.start_left["ref"].data_ptr() == layer.start_left["default"].data_ptr(), (
        "the start is shared"
    )
    learnt = logits(train(model))
    model.set_adapter("ref")
    assert gap(logits(model), logits(pico())) < 1e-6
    model.base_model.set_adapter(["default", "ref"])
    assert gap(logits(model), learnt) < 1e-6, "what was taken out is given back once, not twice"
    with pytest.raises(InputError, match="base='keep'"):
        model.add_adapter("stock", pissa.attach(pico(), "pissa", 4).peft_config["default"])
    model.set_adapter("default")
    model.delete_adapter("ref")
    assert torch.equal(logits(model), learnt)
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), logits(pico()))


def test_the_documented_example_runs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "preference.md").read_text(encoding="utf-8")
    example, request = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example.replace("HuggingFaceTB/SmolLM2-135M", str(base)), names)
    assert abs(logged(names["trainer"])[0] - math.log(2)) < 1e-6
    assert (
        gap(
            logits(pissa.load(language_model(base), tmp_path / "dpo/run")),
            logits(language_model(base)),
        )
        > 0
    )
    exec(request, names)
    assert torch.equal(reference(names["trainer"]), logits(language_model(base)))


def test_a_model_with_a_peft_config_beside_it_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = pissa.attach(pico(), "pissa", 4)
    with pytest.raises(ValueError, match="together with a `peft_config`"):
        trl.DPOTrainer(
            model,
            args=trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=datasets.Dataset.from_list(PAIRS),
            processing_class=tokenizer,
            peft_config=model.peft_config["default"],
        )
