"""One task of `pissa glue` by GLUE's measures: each method at the rate its dev score chose."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from pissa.checkpoint.output import read_json
from pissa.comparison.analysis import Comparison
from pissa.comparison.compare import RESULT as COMPARISON
from pissa.comparison.outcome import Outcome, outcomes
from pissa.evaluation.glue_rows import FACTS
from pissa.evaluation.glue_tasks import MISMATCHED, SHORT, Task
from pissa.training import classification
from pissa.training.data import read
from pissa.untyped import Json

DATA = "data"
"""Beside the tasks' comparisons: their rows."""
FURTHER = "mismatched.json"
"""In the folder of a run on MNLI: its scores on the mismatched dev set."""


@dataclass(frozen=True)
class Spread:
    """One measure over seeds.

    Attributes:
        median: of all runs.
        low: the smallest.
        high: the largest.
        deviation: sample standard deviation; None for one seed.
        seeds: how many.
    """

    median: float
    low: float
    high: float
    deviation: float | None
    seeds: int


def spread(values: Sequence[float]) -> Spread:
    """Median, range and deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.median(values), min(values), max(values), deviation, len(values))


@dataclass(frozen=True)
class TaskComparison:
    """One task: its comparison by GLUE's measures.

    Attributes:
        task: which.
        folder: of its comparison.
        comparison: all runs that are done.
        data: where the rows came from, see `glue_rows.Loaded.facts`.
        facts: settings, base and versions, from compare.json.
    """

    task: Task
    folder: Path
    comparison: Comparison
    data: Json
    facts: Json

    @classmethod
    def read(cls, out: Path, task: Task) -> TaskComparison:
        """From the folder of `pissa glue`."""
        folder = out / task.name
        data = read_json(out / DATA / task.name / FACTS)
        return cls(task, folder, Comparison(outcomes(folder)), data, read_json(folder / COMPARISON))

    def values(self, method: str, rate: float, measure: str) -> list[float]:
        """One per seed; empty while a seed is missing or, on the mismatched set, unmeasured."""
        found = [self._value(run, measure) for run in self.comparison.runs(method, rate)]
        return [] if None in found else [value for value in found if value is not None]

    def _value(self, run: Outcome, measure: str) -> float | None:
        if not run.finished:
            return 0.0
        if measure != MISMATCHED:
            return run.value(measure)
        file = run.cell.folder(self.folder) / FURTHER
        return float(read_json(file)["eval_accuracy"]) if file.is_file() else None

    @cached_property
    def best(self) -> dict[str, float]:
        """Each method's rate with the highest median of the first measure, the lower one of equals."""
        best = {}
        for method in self.comparison.methods:
            grid = self.comparison.grid_of(method)
            if grid:
                first = self.task.measures[0]
                best[method] = max(
                    grid, key=lambda rate: spread(self.values(method, rate, first)).median
                )
        return best

    def at_edge(self, method: str) -> bool:
        """Whether the best rate is the lowest or highest tried, so that a better one may lie beyond."""
        grid = self.comparison.grid_of(method)
        return self.best.get(method) in (*grid[:1], *grid[-1:])

    def diverged(self, method: str) -> int:
        """How many of a method's runs at its best rate diverged."""
        return sum(not run.finished for run in self.comparison.runs(method, self.best[method]))

    def spreads(self, method: str) -> dict[str, Spread | None]:
        """Each measure at the method's best rate; None for what was not run."""
        found = {
            m: self.values(method, self.best[method], m)
            for m in self.task.measures
            if method in self.best
        }
        return {measure: spread(values) if values else None for measure, values in found.items()}

    def score(self, method: str) -> float | None:
        """The mean of the task's measures (of their medians); None where one was not run."""
        medians = [found.median if found else None for found in self.spreads(method).values()]
        return (
            None
            if not medians or None in medians
            else statistics.fmean(m for m in medians if m is not None)
        )

    @cached_property
    def floor(self) -> dict[str, float]:
        """What always saying the training rows' majority class scores, or one number for all (a correlation of 0)."""
        if not self.task.classes:
            return dict.fromkeys(self.task.measures, 0.0)
        return {
            measure: self._constant(part)[measure.removesuffix("_mismatched")]
            for measure, part in zip(self.task.measures, self.task.parts * 2, strict=False)
            if part in self.data["rows"]
        }

    def _constant(self, part: str) -> dict[str, float]:
        file = self.folder.parent / DATA / self.task.name / f"{part}.jsonl"
        rows = read(str(file), part)[0][: self.facts["settings"]["eval_limit"] or None]
        names = sorted(self.task.classes)  # the order of a run's classes, on which F1 depends
        truth = np.array([names.index(row.fields["label"]) for row in rows])
        said = np.eye(len(names))[[names.index(self.data["majority"])] * len(rows)]
        return classification.measures(SimpleNamespace(predictions=said, label_ids=truth))

    def notes(self) -> list[str]:
        """What a reader must know of this task's numbers."""
        title, settings = self.task.title, self.facts["settings"]
        said = [f"{title}: {self.data['split']}."] if self.data["split"] else []
        for part, source in self.data["sources"].items():
            name = Path(source["name"]).stem
            if (
                part == "train"
                and not name.startswith("train-")
                and name != "train"
                and "split" not in source
            ):
                said.append(
                    f"{title}: trained on {name}, {source['rows']:,} rows, which may not be all."
                )
            if source["left_out"]:
                said.append(
                    f"{title}, {part}: {source['left_out']} lines with a wrong number of columns left out."
                )
        limits = (("data_limit", "train"), ("eval_limit", self.task.parts[0]))
        cut = [
            (settings[key], self.data["rows"][part], part) for key, part in limits if settings[key]
        ]
        if rows := [
            f"{limit:,} of {count:,} rows of {part}" for limit, count, part in cut if limit < count
        ]:
            said.append(f"{title}: only the first {' and '.join(rows)}.")
        for part in self.task.parts[1:]:
            if part not in self.data["rows"]:
                said.append(f"{title}, {part}: not run, since there is no such file.")
        first = self.task.measures[0]
        for method in self.best:
            found = self.spreads(method)[first]
            if lost := self.diverged(method):
                said.append(
                    f"{title}: {lost} of {len(self.comparison.seeds)} runs of {method} diverged."
                )
            elif found and found.median <= self.floor[first]:
                said.append(
                    f"{title}: {method} is no better than the majority class ({SHORT[first]})."
                )
        if left := len(self.comparison.left_out):
            runs, seeds = len(self.comparison.outcomes), ", ".join(map(str, self.comparison.seeds))
            said.append(
                f"{title}: {left} of {runs} runs count nowhere: numbers are over seeds {seeds}, all of them."
            )
        if edges := ", ".join(
            f"{method} ({rate:g})" for method, rate in self.best.items() if self.at_edge(method)
        ):
            said.append(f"{title}: the best rate is at the edge of the grid for {edges}.")
        return said

    def to_json(self) -> Json:
        """Scores are shares, not percent."""
        return {
            "title": self.task.title,
            "measures": list(self.task.measures),
            "seeds": self.comparison.seeds,
            "floor": self.floor,
            "methods": {
                method: {
                    "learning_rate": rate,
                    "at_edge_of_grid": self.at_edge(method),
                    "learning_rates": self.comparison.grid_of(method),
                    "diverged": self.diverged(method),
                    "scores": {
                        name: asdict(found) if found else None
                        for name, found in self.spreads(method).items()
                    },
                    "score": self.score(method),
                }
                for method, rate in self.best.items()
            },
            "notes": self.notes(),
            "data": self.data,
            **{key: self.facts[key] for key in ("settings", "base", "versions")},
            "cells": [
                {key: value for key, value in run.to_json().items() if key != "curves"}
                | {"scores": {name: self._value(run, name) for name in self.task.measures}}
                for run in self.comparison.outcomes
            ],
        }
