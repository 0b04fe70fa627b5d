"""Claims about talking to a run: the prompt is the one of the training, the base is checked, talks end well."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

from conftest import build_pico
from pissa.cli.main import app
from pissa.config import load_settings
from pissa.errors import CheckpointError, InputError, WrongBaseError
from pissa.training import train
from pissa.training.chat import Chat, open_chat
from pissa.training.data import Row
from pissa.training.language import MASKED, tokens
from pissa.training.templates import scripts
from training_runs import save_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(*words: object, say: str | None = None) -> Result:
    return CliRunner().invoke(app, ["chat", *map(str, words)], input=say)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a run that learnt one answer by heart, and a run of each way that stores it otherwise."""
    place = tmp_path_factory.mktemp("place")
    model = build_pico(vocab_size=260, max_position_embeddings=128)
    model.get_input_embeddings().weight.data.normal_()  # logits wide enough to be sure of a word
    model.save_pretrained(place / "base")
    save_tokenizer(place / "base")
    rows = [{"instruction": "Say it.", "output": "yes yes"}] * 8
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "model": str(place / "base"), "data": str(place / "rows.jsonl"), "template": "plain", "rank": 8,
        "batch_size": 2, "max_length": 64, "learning_rate": 1e-2, "device": "cpu", "save_steps": 0,
    }  # fmt: skip
    for name, more in {
        "pissa": {"max_steps": 60},
        "full": {"max_steps": 60, "method": "full"},
        "int8": {"max_steps": 1, "quant": "int8"},
    }.items():
        train(load_settings(None, {**common, "output": str(place / name), **more}))
    return place


@pytest.fixture
def tokenizer(place: Path) -> transformers.PreTrainedTokenizerFast:
    """One token a byte, and ChatML's marks."""
    loaded = transformers.AutoTokenizer.from_pretrained(place / "base")
    loaded.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    loaded.chat_template = CHATML
    return loaded


@pytest.mark.parametrize("template", ["alpaca", "chat", "plain", "none", "raw"])
def test_the_prompt_is_token_for_token_that_of_the_training(
    tokenizer: transformers.PreTrainedTokenizerFast, template: str
) -> None:
    columns = ("prompt", "completion") if template == "raw" else ("instruction", "output")
    row = Row(dict(zip(columns, ("How much?", " 42"), strict=True)), "row 1")
    trained_template = "none" if template == "raw" else template
    ids, labels = next(iter(tokens(scripts([row], trained_template, tokenizer), tokenizer)))
    start = next(index for index, label in enumerate(labels) if label != MASKED)
    assert Chat(None, tokenizer, template).encode(["How much?"]) == ids[:start]


def test_a_conversation_remembers_only_where_the_template_can(
    tokenizer: transformers.PreTrainedTokenizerFast,
) -> None:
    said = ["first words", "and then"], ["an answer"]
    for template, remembers in {
        "chat": True,
        "plain": True,
        "none": True,
        "alpaca": False,
        "raw": False,
    }.items():
        text = tokenizer.decode(Chat(None, tokenizer, template).encode(*said))
        assert "and then" in text and ("first words" in text) == ("an answer" in text) == remembers


def test_an_answer_ends_at_the_mark_of_the_chat_template(
    place: Path, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(Chat(model, tokenizer, "chat").end_tokens()) == {0, mark}
    assert Chat(model, tokenizer, "plain").end_tokens() == [0]


@pytest.mark.parametrize("run", ["pissa", "full"])
def test_a_run_says_on_stdout_what_it_learnt(place: Path, run: str) -> None:
    result = chat(place / run, "--prompt", "Say it.", "--max-new-tokens", 20)
    assert (result.exit_code, result.stdout) == (0, "yes yes\n")
    assert "template: plain" in result.stderr
    untrained = json.loads(
        chat(place / "base", "--prompt", "Say it.", "--json", "--template", "plain").stdout
    )
    assert untrained["answer"] != "yes yes"


def test_an_answer_is_that_of_stock_peft_with_the_same_prompt(place: Path) -> None:
    talk = open_chat(place / "pissa")
    got = talk.answer(["Something else"], most=12, temperature=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    stock = peft.PeftModel.from_pretrained(model, place / "pissa" / "adapter")
    text = "User:\nSomething else\n\nAssistant:\n"
    inputs = talk.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    ids = stock.generate(
        input_ids=inputs["input_ids"], max_new_tokens=12, do_sample=False, pad_token_id=0
    )[0]
    assert got == talk.tokenizer.decode(
        ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


def test_temperature_draws_and_zero_does_not(place: Path) -> None:
    talk = open_chat(place / "base", template="raw")
    torch.manual_seed(0)
    assert len({talk.answer(["a"], most=8, temperature=0) for _ in range(3)}) == 1
    assert len({talk.answer(["a"], most=8, temperature=20) for _ in range(5)}) > 1


def test_a_conversation_ends_kindly_with_its_input(place: Path) -> None:
    result = chat(
        place / "pissa", "--max-new-tokens", 40, say="Say it.\n\n" + "Say it again.\n" * 4
    )
    assert result.exit_code == 0 and result.stdout.startswith("yes yes\n")
    assert result.stdout.count("\n") >= 5, (
        "an answer to each of more words than the model has positions"
    )


def test_another_base_is_refused(place: Path, tmp_path: Path) -> None:
    build_pico(seed=1, vocab_size=260, max_position_embeddings=128).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(WrongBaseError, match="was made"):
        open_chat(place / "pissa", base=str(tmp_path / "other"))
    with pytest.raises(WrongBaseError, match="residual in int8"):
        open_chat(place / "int8", base=str(place / "base"))


def test_a_moved_run_in_few_bits_finds_the_residual_beside_it(place: Path) -> None:
    moved = (place / "int8").rename(place / "moved")
    try:
        assert open_chat(moved).answer(["Hello"], most=2, temperature=0) is not None
    finally:
        moved.rename(place / "int8")


def test_what_cannot_talk_is_refused_with_what_to_do(place: Path, tmp_path: Path) -> None:
    record = json.loads((place / "pissa" / "run.json").read_text())

    def folder(**changes: object) -> Path:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "run.json").write_text(json.dumps({**record, **changes}))
        return tmp_path / "run"

    with pytest.raises(InputError, match=r"learnt classification.*nothing to talk to"):
        open_chat(
            folder(settings={**record["settings"], "task": "classification"}, labels=["no", "yes"])
        )
    with pytest.raises(CheckpointError, match=r"not finished: go on with pissa train .* --resume"):
        open_chat(folder(status="running"))
    with pytest.raises(InputError, match=r"--template is 'alpacca', expected one of alpaca, chat"):
        open_chat(place / "pissa", template="alpacca")
    with pytest.raises(InputError, match="needs none: leave it out"):
        open_chat(place / "base", base=str(place / "base"))
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_chat(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"takes 200 tokens and the model 128"):
        open_chat(place / "base", template="raw").answer(["x" * 200], most=8, temperature=0)
    with pytest.raises(InputError, match="give --prompt"):
        CliRunner().invoke(app, ["chat", str(place / "pissa"), "--json"], catch_exceptions=False)
