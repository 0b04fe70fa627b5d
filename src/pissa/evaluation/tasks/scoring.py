"""The functions that the task files name: documents and answers in the harness's form to
`pissa.scoring`.

Programs run behind the walls of `pissa.scoring.isolation`; where there are none, a task that runs
code is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from pissa.scoring.answers import score
from pissa.scoring.code import verbatim
from pissa.scoring.isolation.probe import find_isolation
from pissa.scoring.isolation.run import Isolation
from pissa.untyped import Json

Metrics = dict[str, float]
EXAMPLES = (2, 3, 4)
"""Numbers of the three MBPP questions that the harness shows."""
isolation = cache(find_isolation)


def _paper(
    task: str, needs: Callable[[], Isolation | None]
) -> Callable[[Json, list[str]], Metrics]:
    def process_results(doc: Json, results: list[str]) -> Metrics:
        item = score(task, results[0], doc, isolation=needs())
        authors = item.authors.correct if item.authors else False
        return {"accuracy": float(item.ours.correct), "accuracy_authors": float(authors)}

    return process_results


def _standard(task: str) -> Callable[[Json, list[str]], Metrics]:
    def process_results(doc: Json, results: list[str]) -> Metrics:
        return {"pass@1": float(verbatim(task, results[0], doc, isolation()).ours.correct)}

    return process_results


gsm8k = _paper("gsm8k", lambda: None)
math = _paper("math", lambda: None)
humaneval = _paper("humaneval", isolation)
mbpp = _paper("mbpp", isolation)
standard_humaneval = _standard("humaneval")
standard_mbpp = _standard("mbpp")


def mbpp_examples(docs: Any) -> list[Json]:
    """The questions that the harness shows, in its order."""
    return [doc for number in EXAMPLES for doc in docs if int(doc["task_id"]) == number]
