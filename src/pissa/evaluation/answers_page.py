"""MODEL/TASK.html: each answer of a model to a benchmark, to be browsed without a script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pissa.evaluation.page import figure, limited_to, title_of, visible
from pissa.evaluation.result import TaskResult
from pissa.evaluation.tracks import file_stem
from pissa.reports.page import plain, render, write_page
from pissa.untyped import Json

MOST = 5000
"""Answers on a page: as many as the largest of our benchmarks has."""


def write_answers(result: TaskResult, samples: list[Json], path: Path) -> Path:
    """Write the page of one model's answers to one benchmark; past the first 5,000 it says that it
    leaves some out.

    Args:
        result: what they came to.
        samples: id, correct (None without a verdict), extracted, reason, authors, prompt, output,
            gold.
        path: of the HTML file, OUT/MODEL/TASK.html.

    Raises:
        OutputError: it cannot be written.
    """
    answers = [_answer(sample) for sample in samples]
    wrong = [answer for answer in answers if answer["verdict"] == "wrong"]
    shown = answers[:MOST]
    html = render(
        "answers.html",
        result=result,
        stem=file_stem(result.task, result.track),
        limited=limited_to(result),
        shown=shown,
        count=len(answers),
        verdicts=Counter(answer["verdict"] for answer in answers),
        filters=_filters(shown),
        reasons=Counter(answer["reason"] or "no reason given" for answer in wrong).most_common(),
        scored_twice=any(answer["authors"] for answer in answers),
        only_ours=sum(answer["disagree"] and answer["verdict"] == "right" for answer in answers),
        only_authors=sum(answer["disagree"] and answer["verdict"] == "wrong" for answer in answers),
        figures={title_of(name): figure(name, score) for name, score in result.scores.items()},
    )
    return write_page(path, visible(html))


def _answer(sample: Mapping[str, Any]) -> Json:
    """One answer as the page shows it."""
    correct, authors = sample["correct"], sample["authors"]
    return {
        "id": sample["id"],
        "verdict": _verdict(correct),
        "disagree": bool(authors) and correct is not None and authors["correct"] != correct,
        "reason": sample["reason"],
        "authors": {**authors, "verdict": _verdict(authors["correct"])} if authors else None,
        "taken": _short(_text(sample["extracted"])),
        "wanted": _short(_text(sample["gold"]).rpartition("####")[2]),
        **{key: _text(sample[key]) for key in ("prompt", "output", "extracted", "gold")},
    }


def _verdict(correct: bool | None) -> str:
    return "no verdict" if correct is None else "right" if correct else "wrong"


def _text(value: object) -> str:
    return "" if value is None else plain(value)


def _short(text: str, most: int = 60) -> str:
    return line if len(line := " ".join(text.split())) <= most else f"{line[:most]}…"


def _filters(answers: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, int]]:
    """By name the label of a filter and how many answers it shows; what none has, needs none."""
    counts = Counter(answer["verdict"] for answer in answers)
    filters = {
        "all": ("all", len(answers)),
        "right": ("right", counts["right"]),
        "wrong": ("wrong", counts["wrong"]),
    }
    if counts["no verdict"]:
        filters["open"] = ("no verdict", counts["no verdict"])
    if any(answer["authors"] for answer in answers):
        filters["disagree"] = ("scorers disagree", sum(answer["disagree"] for answer in answers))
    return filters
