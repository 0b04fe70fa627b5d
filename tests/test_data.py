"""Claims about data: every shape, errors with file and line, a mask that covers the response and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from pissa.config import load_settings
from pissa.errors import DataError
from pissa.training import classification, language
from pissa.training.data import Row, hold_out, load_rows, read
from pissa.training.templates import ALPACA, scripts

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes, with a start and an end token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {
        letter: index + 2 for index, letter in enumerate(alphabet)
    }
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def row(**fields: Any) -> Row:
    return Row(fields, "rows.jsonl, line 1")


def masked_and_learned(rows: list[Row], tokenizer: Any, template: str = "auto") -> tuple[str, str]:
    (ids, labels), *_ = language.tokens(scripts(rows, template, tokenizer), tokenizer)
    assert all(label in (language.MASKED, token) for token, label in zip(ids, labels, strict=True))
    hidden = [token for token, label in zip(ids, labels, strict=True) if label == language.MASKED]
    learned = [label for label in labels if label != language.MASKED]
    return tokenizer.decode(hidden), tokenizer.decode(learned)


@pytest.mark.parametrize(
    ("fields", "prompt", "response"),
    [
        (
            {"instruction": "Add.", "output": "3"},
            "<s>" + ALPACA.format(instruction="Add."),
            "3</s>",
        ),
        (
            {"instruction": "Add.", "input": "", "output": "3"},
            "<s>" + ALPACA.format(instruction="Add."),
            "3</s>",
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "<s>" + ALPACA.format(instruction="Add.\n1 2"),
            "3</s>",
        ),
        ({"question": "1+2?", "answer": "3"}, "<s>" + ALPACA.format(instruction="1+2?"), "3</s>"),
        ({"prompt": "1+2=", "completion": "3"}, "<s>1+2=", "3</s>"),
        ({"text": "Once upon a time"}, "<s>", "Once upon a time</s>"),
        ({"text": "ünï ✓"}, "<s>", "ünï ✓</s>"),
    ],
)
def test_loss_lies_on_exactly_the_response(
    fields: dict[str, str], prompt: str, response: str, tokenizer: Any
) -> None:
    assert masked_and_learned([row(**fields)], tokenizer) == (prompt, response)


def test_prompt_is_the_papers() -> None:
    # utils/... train.py of github.com/MuLabPKU/PiSSA, PROMPT
    assert ALPACA.startswith(
        "Below is an instruction that describes a task. Write a response that appropriately"
    )
    assert ALPACA.endswith("### Instruction:\n{instruction}\n\n### Response:")


MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]


def test_every_assistant_message_carries_loss_with_its_end_mark(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    try:
        hidden, learned = masked_and_learned([row(messages=MESSAGES)], tokenizer)
    finally:
        tokenizer.chat_template = None
    assert hidden == "<|user|>Hi<end><|assistant|><|user|>Bye<end><|assistant|>"
    assert learned == "Hello<end>Ciao<end>"


def test_messages_without_a_chat_template_say_what_to_use(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="template: plain"):
        scripts([row(messages=MESSAGES)], "auto", tokenizer)
    hidden, learned = masked_and_learned([row(messages=MESSAGES[:2])], tokenizer, "plain")
    assert (hidden, learned) == ("<s>User:\nHi\n\nAssistant:\n", "Hello</s>")


def test_a_chat_template_that_rewrites_history_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    try:
        with pytest.raises(DataError, match="rewrites earlier messages"):
            scripts([row(messages=MESSAGES)], "auto", tokenizer)
    finally:
        tokenizer.chat_template = None


def test_instruction_without_template_is_the_words_alone(tokenizer: Any) -> None:
    rows = [row(question="1+2?", answer="3")]
    assert masked_and_learned(rows, tokenizer, "none") == ("<s>1+2?\n", "3</s>")


def test_a_template_on_rows_that_take_none_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="used as they are"):
        scripts([row(text="a")], "alpaca", tokenizer)


def save(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


JSONL = '{"text": "a"}\n\n{"text": "b"}\n'
ARRAY = '[\n  {"text": "a"},\n  {"text":\n "b"}\n]\n'


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.jsonl", JSONL, [1, 3]),
        ("a.json", JSONL, [1, 3]),
        ("b.json", ARRAY, [2, 3]),
        ("c.json", '\ufeff[{"text": "a"}, {"text": "b"}]', [1, 1]),
        ("a.csv", 'text,n\na,"x\ny"\nb,2\n', [2, 4]),
        ("a.tsv", 'text\tn\na\t"x\nb\t2\n', [2, 3]),
    ],
)
def test_every_format_gives_rows_with_their_lines(
    tmp_path: Path, name: str, text: str, lines: list[int]
) -> None:
    rows, source = read(str(save(tmp_path / name, text)), "train")
    assert [r.fields["text"] for r in rows] == ["a", "b"]
    assert [int(r.where.rpartition(" ")[2]) for r in rows] == lines
    assert len(source["sha256"]) == 64


def test_parquet_rows_are_numbered(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    rows, _ = read(str(tmp_path / "a.parquet"), "train")
    assert [r.where.rpartition(", ")[2] for r in rows] == ["row 1", "row 2"]


def test_a_folder_gives_the_file_of_the_split(tmp_path: Path) -> None:
    save(tmp_path / "train.jsonl", JSONL)
    save(tmp_path / "test.jsonl", '{"text": "c"}\n')
    assert len(read(str(tmp_path), "train")[0]) == 2
    assert len(read(str(tmp_path), "test")[0]) == 1
    with pytest.raises(DataError, match="expected one file validation"):
        read(str(tmp_path), "validation")


@pytest.mark.parametrize(
    ("name", "text", "line", "claim"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', 2, "not JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', 2, "got list, expected an object"),
        ("a.json", '[{"text": "a"},\n{"text" "b"}]', 2, "not JSON"),
        ("a.json", '[{"text": "a"}\n{"text": "b"}]', 2, "not JSON"),
        ("a.json", '[{"text": "a"}\n', 2, "not JSON"),
        ("a.csv", "text,n\na,1\nb\n", 3, "got 1 fields, expected 2"),
        ("a.tsv", "text\tn\na\t1\nb\t1\t2\n", 3, "got 3 fields, expected 2"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(
    tmp_path: Path, name: str, text: str, line: int, claim: str
) -> None:
    path = save(tmp_path / name, text)
    with pytest.raises(DataError) as caught:
        read(str(path), "train")
    assert f"{path}, line {line}: " in str(caught.value)
    assert claim in str(caught.value)


@pytest.mark.parametrize(
    ("second", "claim"),
    [
        ({"instruction": "b"}, "got fields instruction, expected output"),
        ({"instruction": "b", "output": None}, "expected output with a value"),
        ({"instruction": "b", "output": 3}, "output: got int, expected a text"),
        ({"instruction": "b", "output": "c", "input": 3}, "input: got int, expected a text"),
    ],
)
def test_a_row_without_its_field_is_named(
    tmp_path: Path, second: dict[str, Any], claim: str, tokenizer: Any
) -> None:
    good = {"instruction": "a", "output": "b"}
    path = save(
        tmp_path / "a.jsonl", "".join(json.dumps(r) + "\n" for r in (good, second, good, second))
    )
    with pytest.raises(DataError) as caught:
        scripts(read(str(path), "train")[0], "auto", tokenizer)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert claim in str(caught.value)
    assert "1 more rows" in str(caught.value)


def test_unknown_columns_say_what_is_known(tokenizer: Any) -> None:
    with pytest.raises(
        DataError, match=r"line 1: got fields foo, expected one of: messages; prompt \+ completion"
    ):
        scripts([row(foo="a")], "auto", tokenizer)


def test_absent_and_unknown_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl does not exist"):
        read(str(tmp_path / "rows.jsonl"), "train")
    with pytest.raises(DataError, match=r"ends in '\.txt'"):
        read(str(save(tmp_path / "a.txt", "x")), "train")
    with pytest.raises(DataError, match="holds no rows"):
        read(str(save(tmp_path / "a.jsonl", "\n")), "train")


def test_held_out_rows_are_drawn_by_the_seed_and_leave_training() -> None:
    rows = [row(text=str(i)) for i in range(100)]
    train, held = hold_out(rows, 0.1, seed=1)
    assert (len(train), len(held)) == (90, 10)
    assert {r.fields["text"] for r in train}.isdisjoint(r.fields["text"] for r in held)
    assert hold_out(rows, 0.1, seed=1) == (train, held)
    assert hold_out(rows, 10, seed=2)[1] != held
    assert hold_out(rows, 0, seed=1) == (rows, [])
    with pytest.raises(DataError, match="eval_size 100 takes 100 of 100 rows"):
        hold_out(rows, 100, seed=1)


def settings_for(tmp_path: Path, **more: Any) -> Any:
    return load_settings(
        None, {"model": "m", "data": str(tmp_path / "a.jsonl"), "output": "o", **more}
    )


@pytest.fixture
def eight_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for task in (language, classification):
        monkeypatch.setattr(task, "position_limit", lambda *_: 8)


@pytest.mark.usefixtures("eight_tokens")
def test_rows_lose_their_end_and_rows_without_response_are_left_out(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "ab", "completion": "cdefghij"},
        {"prompt": "abcdefghij", "completion": "k"},
    ]
    save(tmp_path / "a.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    settings = settings_for(tmp_path)
    examples = language.encode(load_rows(settings), tokenizer, settings)
    assert [tokenizer.decode(e["input_ids"]) for e in examples.train] == [
        "<s>abcd</s>",
        "<s>abcdefg",
    ]
    assert (examples.notes["rows_cut"], examples.notes["rows_dropped"]) == (2, 1)
    assert "first 8 tokens: 1" in caplog.text


@pytest.mark.usefixtures("eight_tokens")
def test_no_response_at_all_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    save(tmp_path / "a.jsonl", json.dumps({"prompt": "abcdefghij", "completion": "k"}) + "\n")
    settings = settings_for(tmp_path)
    with pytest.raises(DataError, match="raise max_length"):
        language.encode(load_rows(settings), tokenizer, settings)


@pytest.mark.usefixtures("eight_tokens")
def test_columns_are_renamed_by_fields(tmp_path: Path, tokenizer: Any) -> None:
    save(tmp_path / "a.jsonl", '{"q": "a", "a": "b", "text": "no"}\n')
    settings = settings_for(tmp_path, fields={"prompt": "q", "completion": "a"})
    assert load_rows(settings).train[0].fields == {"text": "no", "prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match=r"line 1: got fields q, a, text, expected 'absent'"):
        load_rows(settings_for(tmp_path, fields={"prompt": "absent"}))


@pytest.mark.usefixtures("eight_tokens")
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, 10], ["9", "10"]),
        (["no", "yes", "no"], ["no", "yes"]),
        (["1", "0", "1"], ["0", "1"]),
    ],
)
def test_classes_come_from_the_data(
    tmp_path: Path, tokenizer: Any, labels: list[Any], names: list[str]
) -> None:
    save(
        tmp_path / "a.jsonl",
        "".join(json.dumps({"sentence": "x", "label": label}) + "\n" for label in labels),
    )
    settings = settings_for(tmp_path, task="classification")
    examples = classification.encode(load_rows(settings), tokenizer, settings)
    assert examples.names == names
    assert [e["labels"] for e in examples.train] == [names.index(str(label)) for label in labels]


@pytest.mark.usefixtures("eight_tokens")
def test_labels_that_are_no_classes_are_named(tmp_path: Path, tokenizer: Any) -> None:
    save(tmp_path / "a.jsonl", '{"text": "x", "label": 0}\n{"text": "x", "label": 0.5}\n')
    settings = settings_for(tmp_path, task="classification")
    with pytest.raises(DataError, match=r"line 2: .* in label, got 0\.5"):
        classification.encode(load_rows(settings), tokenizer, settings)


def test_mrpc_is_read_whole(shared: Path) -> None:
    rows, _ = read(str(shared / "data/glue/MRPC/train.tsv"), "train")
    assert len(rows) == 3667  # its README
    assert list(rows[0].fields) == ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    assert rows[0].where.endswith("train.tsv, line 2")


def test_gsm8k_is_read_whole(shared: Path) -> None:
    rows, _ = read(str(shared / "data/gsm8k/train.jsonl"), "train")
    assert len(rows) == 7473  # its README
    assert set(rows[0].fields) == {"question", "answer"}
