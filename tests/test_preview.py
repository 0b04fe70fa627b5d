"""What `pissa preview` shows and counts, against what training does with the same rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pissa.errors import DataError, InputError
from pissa.planning.preview import preview, printable
from pissa.training import language
from pissa.training.data import load_rows
from pissa.training.models import load_tokenizer
from test_cli import run

ODD = [
    {"prompt": "1 + 1 =", "completion": " 2"},
    {"prompt": "1 + 1 =", "completion": " 2"},
    {"prompt": "say nothing:", "completion": " "},
    {"prompt": "a prompt of more than thirty-two letters:", "completion": " lost"},
    {"prompt": "a prompt of some letters:", "completion": " partly kept"},
]
SEEN = [ODD[0], {"prompt": "2 + 2 =", "completion": " 4"}]


@pytest.fixture
def odd(settings: Callable[..., Any], tmp_path: Path) -> Any:
    for name, rows in (("odd", ODD), ("seen", SEEN)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    data = {"data": str(tmp_path / "odd.jsonl"), "eval_data": str(tmp_path / "seen.jsonl")}
    return settings(**data, eval_size=0, max_length=32)


def test_what_is_odd_about_the_data_is_counted(odd: Any) -> None:
    found = preview(odd)
    assert (found.rows, found.evaluation, found.limit) == (5, 2, 32)
    assert (found.cut, found.dropped, found.empty, found.duplicates, found.leaked) == (
        2,
        1,
        1,
        1,
        1,
    )
    # A letter a token, and the end
    lengths = sorted(len(row["prompt"] + row["completion"]) + 1 for row in ODD)
    assert (found.median, found.p95, found.longest) == (lengths[2], lengths[4], lengths[4])


def test_counts_are_those_that_training_records(odd: Any) -> None:
    found, tokenizer = preview(odd), load_tokenizer(odd)
    examples = language.encode(dataclasses.replace(load_rows(odd), evaluation=[]), tokenizer, odd)
    assert (
        found.cut == examples.notes["rows_cut"] and found.dropped == examples.notes["rows_dropped"]
    )
    assert found.tokens == sum(len(row["input_ids"]) for row in examples.train)
    learnt = sum(label != language.MASKED for row in examples.train for label in row["labels"][1:])
    assert found.loss_share == pytest.approx(learnt / found.tokens)


def test_a_row_is_shown_as_it_is_cut_with_the_response_marked(odd: Any) -> None:
    first, *_, last = preview(odd, rows=9).shown
    assert [(part.text, part.loss) for part in first.segments] == [
        ("1 + 1 =", False),
        (" 2</s>", True),
    ]
    assert [(part.text, part.loss) for part in last.segments] == [
        ("a prompt of some letters:", False),
        (" partly", True),
    ]
    assert last.tokens == 32 and last.cut == 6 and last.where.endswith("odd.jsonl, line 5")


def test_classes_and_texts_are_counted(settings: Callable[..., Any], tmp_path: Path) -> None:
    data = tmp_path / "labels.csv"
    data.write_text("text,label\ngood,yes\nbad,no\ngood,yes\nfine,yes\n", encoding="utf-8")
    found = preview(
        settings(task="classification", data=str(data), eval_size=0, eval_steps=0), rows=1
    )
    assert found.labels == {"yes": 3, "no": 1}
    assert (found.duplicates, found.dropped, found.loss_share) == (1, 0, None)
    assert found.shown[0].label == "yes" and "good" in found.shown[0].segments[0].text


def test_no_control_character_reaches_the_terminal(odd: Any, tmp_path: Path, base: Path) -> None:
    evil = "\x1b[2J\x07\r\u202e\u200b\x9b\x00"
    row = {"prompt": f"clear{evil}", "completion": f"[bold]{evil}\ndone"}
    (tmp_path / "evil.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    flags = ["--model", base, "--data", tmp_path / "evil.jsonl", "--output", tmp_path / "out"]
    done = run("preview", *flags)
    assert done.returncode == 0, done.stderr
    assert not [mark for mark in done.stdout if not mark.isprintable() and mark != "\n"]
    assert (
        "clear\\x1b[2J" in done.stdout
        and "⟦[bold]" in done.stdout
        and "↵\ndone</s>⟧" in done.stdout
    )
    assert (
        json.loads(run("preview", *flags, "--json").stdout)["shown"][0]["segments"][0]["text"]
        == f"clear{evil}"
    )
    assert printable("a b\té\ud800") == "a b\\té\\ud800"


def test_wrong_data_and_counts_are_refused(settings: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 or more"):
        preview(settings(), rows=-1)
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "a", "completion": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 1: completion"):
        preview(settings(data=str(tmp_path / "wrong.jsonl"), eval_size=0, eval_steps=0))
