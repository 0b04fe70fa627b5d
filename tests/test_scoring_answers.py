"""Rows of answers: what is wrong with them is said before any is scored."""

from __future__ import annotations

from typing import Any

import pytest

from pissa.errors import ConfigError, DataError
from pissa.scoring import answers
from pissa.scoring.answers import check_permission, score_rows
from pissa.scoring.isolation.run import Isolation

GOOD = {"output": "The answer is: 18", "answer": "#### 18"}
QUESTION = {
    "task_id": "Tiny/0",
    "prompt": "def f():\n",
    "entry_point": "f",
    "test": "def check(f): pass",
}


@pytest.mark.parametrize(
    ("task", "wrong", "message"),
    [
        (
            "gsm8k",
            {"output": "", "answer": "#### none"},
            "a.jsonl:2: gold answer is '#### none', expected a number",
        ),
        ("gsm8k", {"output": "", "answer": float("nan")}, "a.jsonl:2: gold answer is 'nan'"),
        ("gsm8k", {"output": ""}, "a.jsonl:2: got fields output, expected the gold answer"),
        (
            "gsm8k",
            {"output": 5, "answer": "5"},
            "a.jsonl:2: got fields output, answer, expected a text in `output`",
        ),
        ("math", {"output": "", "answer": " "}, "a.jsonl:2: gold answer is empty"),
    ],
)
def test_the_first_wrong_row_is_named_before_anything_is_scored(
    task: str, wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []
    monkeypatch.setattr(answers, "score", lambda *arguments, **others: scored.append(arguments[0]))
    with pytest.raises(DataError) as error:
        score_rows(task, [("a.jsonl:1", GOOD), ("a.jsonl:2", wrong), ("a.jsonl:3", {})])
    assert str(error.value).startswith(message)
    assert scored == []


def test_two_answers_to_one_question_of_code_are_refused() -> None:
    rows = [(f"a.jsonl:{line}", {"output": "", "task_id": "Tiny/0"}) for line in (1, 4)]
    with pytest.raises(
        DataError, match=r"a.jsonl:4: answers Tiny/0 as a.jsonl:1 does, expected one answer"
    ):
        score_rows("humaneval", rows, [QUESTION], isolation=Isolation("none"))


def test_two_questions_with_the_same_gold_answer_both_count() -> None:
    assert len(score_rows("gsm8k", [("a.jsonl:1", GOOD), ("a.jsonl:2", GOOD)])) == 2


def test_programs_need_a_permission_that_texts_do_not() -> None:
    check_permission(["gsm8k", "math"], False)
    check_permission(["gsm8k", "mbpp"], True)
    with pytest.raises(ConfigError, match=r"^mbpp, humaneval: .*--allow-code-execution"):
        check_permission(["gsm8k", "mbpp", "humaneval"], False)
    with pytest.raises(ConfigError, match="--allow-code-execution"):
        answers.score("humaneval", "", QUESTION)
    with pytest.raises(ConfigError, match="--allow-code-execution"):
        score_rows("humaneval", [])
