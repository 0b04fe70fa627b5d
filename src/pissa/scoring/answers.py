"""Which scorer an answer goes to: the table of tasks, and rows of answers that were generated anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pissa.errors import ConfigError, DataError, InputError, did_you_mean
from pissa.scoring import code, latex, numbers
from pissa.scoring.isolation.run import Isolation
from pissa.scoring.verdict import Item, Verdict

Scorer = Callable[[str, str], Verdict]
"""(what the model wrote, the gold answer) to a verdict."""
Doc = Mapping[str, Any]
"""A question with its answer or tests, as a data set has it, or a row of answers."""
CODE = ("humaneval", "mbpp")
"""Tasks whose answers are programs that must run."""


@dataclass(frozen=True)
class Scorers:
    """Of a task whose answers are compared with a gold answer.

    Attributes:
        ours: the verdict that counts.
        authors: that of the PiSSA authors' script.
        check_gold: raises DataError where there is no gold answer in what the data set has for it.
    """

    ours: Scorer
    authors: Scorer
    check_gold: Callable[[str], object]


TEXT = {
    "gsm8k": Scorers(numbers.ours, numbers.authors, numbers.gold_value),
    "math": Scorers(latex.ours, latex.authors, latex.gold_answer),
}
TASKS = (*TEXT, *CODE)


def check_task(task: str) -> None:
    """Raise InputError for a task without a scorer."""
    if task not in TASKS:
        raise InputError(
            f"task is {task!r}, expected one of {', '.join(TASKS)}.{did_you_mean(task, TASKS)}"
        )


def check_permission(tasks: Sequence[str], allowed: bool) -> None:
    """Raise ConfigError where one of the tasks is scored by running programs and that is not allowed."""
    code = [task for task in tasks if task in CODE]
    if code and not allowed:
        raise _not_permitted(code)


def walls(task: str, isolation: Isolation | None) -> Isolation:
    """What the programs of a task run behind.

    Raises:
        ConfigError: nothing, so they may not run.
    """
    if isolation is None:
        raise _not_permitted([task])
    return isolation


def _not_permitted(tasks: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{', '.join(tasks)}: scored by running programs that a model wrote, in a process without "
        "network, files or rights: permit it with --allow-code-execution, or leave it out"
    )


def score(
    task: str, output: str, doc: Mapping[str, Any], *, isolation: Isolation | None = None
) -> Item:
    """One answer.

    Args:
        task: one of `TASKS`.
        output: what the model wrote after the prompt.
        doc: the question as the data set has it: for gsm8k and math at least `answer`, for code its
            tests.
        isolation: the walls that a program runs behind; needed for code.

    Raises:
        InputError: another task.
        ConfigError: code without isolation.
    """
    check_task(task)
    if task in TEXT:
        scorers, gold = TEXT[task], str(doc["answer"])
        name = str(doc.get("id", doc.get("unique_id", "")))
        return Item(name, scorers.ours(output, gold), scorers.authors(output, gold))
    return code.score(task, output, doc, walls(task, isolation))


def score_rows(
    task: str,
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    questions: Sequence[Mapping[str, Any]] = (),
    *,
    isolation: Isolation | None = None,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> list[Item]:
    """Answers that were generated elsewhere.

    Args:
        task: one of `TASKS`.
        rows: where each stands (file and line), and its fields: `output`, and `answer` (gsm8k,
            math) or the `task_id` of one of the questions.
        questions: the data set; may be empty where every row has its `answer`.
        isolation: for code.
        say: told of rows done.

    Raises:
        DataError: naming the first wrong row, before anything is scored; for code also the second
            of two answers to one question.
        ConfigError: code without isolation.
    """
    check_task(task)
    by_id = {str(question["task_id"]): question for question in questions if "task_id" in question}
    check_permission([task], isolation is not None)
    docs = [_doc(task, number, where, row, by_id) for number, (where, row) in enumerate(rows)]
    if task in CODE:
        _check_once(
            [(where, str(doc["task_id"])) for (where, _), doc in zip(rows, docs, strict=True)]
        )
    items = []
    for done, ((_, row), doc) in enumerate(zip(rows, docs, strict=True), 1):
        items.append(score(task, row["output"], doc, isolation=isolation))
        say(done, len(rows))
    return items


def _check_once(asked: Sequence[tuple[str, str]]) -> None:
    first: dict[str, str] = {}
    for where, name in asked:
        if name in first:
            raise DataError(
                f"{where}: answers {name} as {first[name]} does, expected one answer to each question"
            )
        first[name] = where


def _doc(task: str, number: int, where: str, row: Doc, by_id: Mapping[str, Doc]) -> Doc:
    if not isinstance(row.get("output"), str):
        raise DataError(
            f"{where}: got fields {', '.join(row) or 'none'}, expected a text in `output`"
        )
    if task in TEXT:
        if not isinstance(row.get("answer"), (str, int, float)):
            raise DataError(
                f"{where}: got fields {', '.join(row)}, expected the gold answer in `answer`"
            )
        try:
            TEXT[task].check_gold(str(row["answer"]))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        return {"id": str(row.get("id", number)), **row}
    # The authors keep the task's name in `answer`
    name = str(row.get("task_id", row.get("answer", "")))
    if name not in by_id:
        known = next(iter(by_id), "none")
        raise DataError(
            f"{where}: task_id is {name!r}, expected one of the {len(by_id)} questions, as {known!r}"
        )
    return by_id[name]
