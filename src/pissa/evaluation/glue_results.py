"""What a folder of `pissa glue` came to: all its tasks in one table, told honestly."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pissa.comparison.analysis import Comparison
from pissa.comparison.compare import RESULT as COMPARISON
from pissa.errors import OutputError
from pissa.evaluation.glue_comparison import Spread, TaskComparison
from pissa.evaluation.glue_tasks import SHORT, TASKS
from pissa.untyped import Json

RESULT, PAGE = "glue.json", "glue.html"
FLOOR = "majority class"
PROTOCOL = (
    "Scores are those of the model at the end of training (not of the best epoch) on GLUE's dev sets.",
    "Each method has on each task the learning rate with the highest median, over seeds, of the task's first measure. "
    "The rate is chosen on the dev set that is reported, as is the custom with GLUE, so all scores are optimistic, and "
    "more so the more rates a method was tried at.",
    "A run whose loss was not a number any more counts as 0 in every measure.",
    "The average is the mean over the tasks of this table of the mean of a task's measures; a method that lacks a task "
    "has none.",
    "Differences between methods are not tested here: below the spread over seeds they are none. The page of a task's "
    "comparison has paired tests, of the loss and at rates chosen by the loss.",
)


@dataclass(frozen=True)
class Results:
    """All tasks that a folder holds, in GLUE's order."""

    tasks: list[TaskComparison]

    @classmethod
    def read(cls, out: Path) -> Results:
        """Those whose comparison has a run that is done.

        Raises:
            OutputError: none.
        """
        found = [
            TaskComparison.read(out, task)
            for task in TASKS.values()
            if (out / task.name / COMPARISON).is_file()
        ]
        if not found:
            raise OutputError(f"{out} holds no finished run of a GLUE task: run pissa glue first")
        return cls(found)

    @cached_property
    def methods(self) -> list[str]:
        """Of all tasks, full and LoRA first."""
        return Comparison([run for task in self.tasks for run in task.comparison.outcomes]).methods

    @property
    def best_run(self) -> Path:
        """The first seed of the best method on the first task."""
        task = self.tasks[0]
        method = max(task.best, key=lambda method: task.score(method) or 0.0)
        return task.comparison.runs(method, task.best[method])[0].cell.folder(task.folder)

    def average(self, method: str) -> float | None:
        """The mean over tasks of `TaskComparison.score`; None where one is missing."""
        scores = [task.score(method) for task in self.tasks]
        return (
            None
            if None in scores
            else statistics.fmean(score for score in scores if score is not None)
        )

    @property
    def floor(self) -> float | None:
        """The average of always saying the majority class; None where a part is missing."""
        if any(task.floor.keys() != set(task.task.measures) for task in self.tasks):
            return None
        return statistics.fmean(statistics.fmean(task.floor.values()) for task in self.tasks)

    def notes(self) -> list[str]:
        """Those of all tasks."""
        return [line for task in self.tasks for line in task.notes()]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows in percent: median and, in brackets, standard deviation over seeds; a line a measure."""
        columns = [
            "\n".join([t.task.title, *(SHORT[m] for m in t.task.measures)]) for t in self.tasks
        ]
        rows = [
            [m, *(_cell(t, m) for t in self.tasks), _percent(self.average(m))] for m in self.methods
        ]
        floors = ["\n".join(_percent(t.floor.get(m)) for m in t.task.measures) for t in self.tasks]
        return ["method", *columns, "average"], [*rows, [FLOOR, *floors, _percent(self.floor)]]

    def to_json(self) -> Json:
        """The content of glue.json."""
        return {
            "format": 1,
            "protocol": list(PROTOCOL),
            "notes": self.notes(),
            "average": {"tasks": [task.task.name for task in self.tasks], FLOOR: self.floor}
            | {"methods": {method: self.average(method) for method in self.methods}},
            "tasks": {task.task.name: task.to_json() for task in self.tasks},
        }


def _cell(result: TaskComparison, method: str) -> str:
    if method not in result.best:
        return "-"
    lost = result.diverged(method)
    if lost == len(result.comparison.seeds):
        return "diverged"
    lines = [_median(found) for found in result.spreads(method).values()]
    return "\n".join([*lines, f"{lost} diverged"] if lost else lines)


def _median(found: Spread | None) -> str:
    if found is None:
        return "not run"
    return _percent(found.median) + (
        "" if found.deviation is None else f" ({_percent(found.deviation)})"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
