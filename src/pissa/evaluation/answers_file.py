"""Answers that were generated elsewhere: scored without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pissa.errors import DataError
from pissa.evaluation.questions import questions
from pissa.records import versions
from pissa.scoring.answers import CODE, check_permission, check_task, score_rows
from pissa.scoring.isolation.probe import find_isolation
from pissa.scoring.verdict import summary
from pissa.training.data import read
from pissa.untyped import Json


def score_file(
    task: str,
    answers: str | Path,
    *,
    data: str | None = None,
    allow_code_execution: bool = False,
    isolation: bool = True,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> Json:
    """Score a file of answers.

    Args:
        task: gsm8k, math, humaneval or mbpp.
        answers: a file of rows with `output`, and `answer` (gsm8k, math) or `task_id` (code).
        data: a folder with the questions, for code; None for the Hub.
        allow_code_execution: run the programs.
        isolation: False accepts a mere process with limits where the machine has no walls.
        say: told of rows done, and in all.

    Returns:
        task, answers (name and digest), how many of the questions they cover, summary by scorer,
        items, versions.

    Raises:
        InputError: no such task.
        ConfigError: code without permission.
        DataError: no such file, or a wrong row.
    """
    check_task(task)
    if not Path(answers).is_file():
        raise DataError(
            f"{answers} is not a file: give JSON lines with `output` and the right answer"
        )
    check_permission([task], allow_code_execution)
    rows, source = read(str(answers), "answers")
    asked = questions(task, data, whole=True) if task in CODE else None
    walls = find_isolation(allow_none=not isolation) if task in CODE else None
    items = score_rows(
        task,
        [(row.where, row.fields) for row in rows],
        asked.rows if asked else (),
        isolation=walls,
        say=say,
    )
    return {
        "task": task,
        "answers": source | {"rows": len(rows)},
        "data": asked.source if asked else None,
        "coverage": {"answered": len(items), "questions": len(asked.rows)} if asked else None,
        "summary": summary(items),
        "items": [item.to_json() for item in items],
        "versions": versions("math_verify"),
    }
