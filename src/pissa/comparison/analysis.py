"""A comparison read as a whole: each method at its best learning rate, all at equal ones, against LoRA and controls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from pissa.comparison.outcome import Curve, Outcome, mean_curve
from pissa.comparison.statistics import Difference, Mean, holm, mean, paired
from pissa.registry import CONTROL
from pissa.untyped import Json

BASELINE = "lora"


def studied(method: str) -> str:
    """The method that a control is the control of; a method itself."""
    return method.removesuffix(CONTROL)


@dataclass(frozen=True)
class Comparison:
    """The outcomes of all cells that are done."""

    outcomes: list[Outcome]

    @cached_property
    def methods(self) -> list[str]:
        """Full and LoRA first, each control behind its method."""
        first = {"full": 0, BASELINE: 1}
        names = {result.cell.method for result in self.outcomes}
        return sorted(names, key=lambda name: (first.get(studied(name), 2), studied(name), name))

    @cached_property
    def rates(self) -> list[float]:
        """All learning rates, rising."""
        return sorted({result.cell.learning_rate for result in self.outcomes})

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds that all means are over: those with which the most runs can be compared."""
        groups = [frozenset(found) for found in self._table.values()]

        def compared(seeds: frozenset[int]) -> tuple[int, list[int]]:
            return len(seeds) * sum(seeds <= group for group in groups), sorted(seeds)

        most: frozenset[int] = max(groups, key=compared)
        return sorted(most)

    @property
    def left_out(self) -> list[Outcome]:
        """Outcomes that no mean counts: of a further seed, or of a method and rate that lacks one."""
        used = {id(run) for method, rate in self._table for run in self.runs(method, rate)}
        return [result for result in self.outcomes if id(result) not in used]

    @property
    def reference(self) -> str:
        """What the others are compared with: LoRA, or the first method where it is not there."""
        return BASELINE if BASELINE in self.methods else self.methods[0]

    @cached_property
    def _table(self) -> dict[tuple[str, float], dict[int, Outcome]]:
        table: dict[tuple[str, float], dict[int, Outcome]] = {}
        for result in self.outcomes:
            table.setdefault((result.cell.method, result.cell.learning_rate), {})[
                result.cell.seed
            ] = result
        return table

    def runs(self, method: str, rate: float) -> list[Outcome]:
        """One per seed; empty while any seed is missing, so that no mean is over fewer seeds than another."""
        found = self._table.get((method, rate), {})
        return [found[seed] for seed in self.seeds] if found.keys() >= set(self.seeds) else []

    def mean(self, method: str, rate: float, measure: str = "loss") -> Mean | None:
        """Over seeds, of `loss`, `old` or a score; None while a seed is missing."""
        runs = self.runs(method, rate)
        return mean([run.value(measure) for run in runs]) if runs else None

    @cached_property
    def best(self) -> dict[str, float]:
        """Each method's learning rate with the lowest mean loss; absent where every rate diverged or is unfinished."""
        found = {}
        for method in self.methods:
            means = {rate: self.mean(method, rate) for rate in self.rates}
            finite = {
                rate: value.mean
                for rate, value in means.items()
                if value and math.isfinite(value.mean)
            }
            if finite:
                found[method] = min(finite, key=lambda rate: finite[rate])
        return found

    def grid_of(self, method: str) -> list[float]:
        """The rates at which a method was run with every seed."""
        return [rate for rate in self.rates if self.runs(method, rate)]

    def at_edge(self, method: str) -> bool:
        """Whether the best rate is the lowest or highest tried, so that a better one may lie beyond."""
        grid = self.grid_of(method)
        return method in self.best and self.best[method] in (grid[0], grid[-1])

    def _against(
        self, method: str, rate: float, other: str, other_rate: float, family: int = 1
    ) -> Difference:
        first, second = self.runs(method, rate), self.runs(other, other_rate)
        return paired([run.loss for run in first], [run.loss for run in second], family)

    @cached_property
    def at_best(self) -> dict[str, Difference]:
        """Each method against the reference, each at its own best rate; Holm over the methods."""
        others = [method for method in self.best if method != self.reference]
        if self.reference not in self.best:
            return {}
        return holm(
            {
                method: self._against(
                    method,
                    self.best[method],
                    self.reference,
                    self.best[self.reference],
                    len(others),
                )
                for method in others
            }
        )

    @cached_property
    def at_equal(self) -> dict[tuple[str, float], Difference]:
        """Each method against the reference at each rate that neither diverged at; Holm over the methods of a rate."""
        found: dict[tuple[str, float], Difference] = {}
        for rate in self.rates:
            whole = [
                m
                for m in self.methods
                if (runs := self.runs(m, rate)) and all(run.finished for run in runs)
            ]
            others = [
                method for method in whole if method != self.reference and self.reference in whole
            ]
            tests = {
                (m, rate): self._against(m, rate, self.reference, rate, len(others)) for m in others
            }
            found |= holm(tests)
        return found

    @cached_property
    def against_control(self) -> dict[str, Difference]:
        """Each method against its own random control, each at its best rate; Holm over the methods."""
        able = [m for m in self.best if m + CONTROL in self.best]
        return holm(
            {m: self._against(m, self.best[m], m + CONTROL, self.best[m + CONTROL]) for m in able}
        )

    def explained(self, method: str, rate: float) -> float | None:
        """Share of a method's lead over the reference that its random control has too, at one rate.

        None where there is no lead that a test sees; 0 where it sees none of the control.
        """
        lead = self.at_equal.get((method, rate))
        control = self.at_equal.get((method + CONTROL, rate))
        if lead is None or control is None or not lead.seen or lead.difference >= 0:
            return None
        return (
            control.difference / lead.difference if control.seen and control.difference < 0 else 0.0
        )

    def curve(self, method: str, rate: float, of: str = "evaluation") -> Curve:
        """Mean over seeds of `train`, `evaluation` or `old`; empty where a run diverged."""
        runs = self.runs(method, rate)
        whole = bool(runs) and all(run.finished for run in runs)
        return mean_curve(runs, lambda run: getattr(run, of)) if whole else []

    def steps_to_reference(self, method: str, rate: float, reference_rate: float) -> int | None:
        """The first evaluated step at which the mean loss is no higher than the reference's at its end; None: never."""
        goal = self.mean(self.reference, reference_rate)
        if goal is None or not math.isfinite(goal.mean):
            return None
        return next((step for step, loss in self.curve(method, rate) if loss <= goal.mean), None)

    def old_at_reference(self, method: str, rate: float, reference_rate: float) -> float | None:
        """Loss on the old data where `steps_to_reference` says that both know the new data equally well."""
        step = self.steps_to_reference(method, rate, reference_rate)
        return dict(self.curve(method, rate, "old")).get(step) if step is not None else None

    @cached_property
    def same_start(self) -> bool:
        """Whether all runs of a seed began at the same loss, as those from one unquantised base do."""
        starts = {(run.cell.seed, run.evaluation[0][1]) for run in self.outcomes if run.evaluation}
        return len(starts) == len({seed for seed, _ in starts})

    @property
    def scores(self) -> list[str]:
        """Names of what is measured beside the loss."""
        return sorted({name for result in self.outcomes for name in result.scores})

    @property
    def has_old(self) -> bool:
        """Whether the loss on old data was taken."""
        return any(result.old for result in self.outcomes)

    def to_json(self) -> Json:
        """Everything that the page says, in numbers."""
        reference_rate = self.best.get(self.reference)
        measures = ["loss", *(["old"] if self.has_old else []), *self.scores]
        best = {}
        for method, rate in self.best.items():
            known = {measure: self.mean(method, rate, measure) for measure in measures}
            best[method] = {
                "learning_rate": rate,
                "at_edge_of_grid": self.at_edge(method),
                **{name: value.to_json() for name, value in known.items() if value},
                "against_reference": self.at_best[method].to_json()
                if method in self.at_best
                else None,
                "steps_to_reference": self.steps_to_reference(method, rate, reference_rate)
                if reference_rate
                else None,
                "old_at_reference": self.old_at_reference(method, rate, reference_rate)
                if reference_rate
                else None,
            }
        equal = [
            {
                "learning_rate": rate,
                "method": method,
                **{
                    name: value.to_json()
                    for name in measures
                    if (value := self.mean(method, rate, name))
                },
                "against_reference": self.at_equal[method, rate].to_json()
                if (method, rate) in self.at_equal
                else None,
                "steps_to_reference": self.steps_to_reference(method, rate, rate),
                "explained_by_control": self.explained(method, rate),
            }
            for rate in self.rates
            for method in self.methods
            if self.runs(method, rate)
        ]
        return {
            "methods": self.methods,
            "learning_rates": self.rates,
            "seeds": self.seeds,
            "reference": self.reference,
            "best_of_grid": best,
            "equal_settings": equal,
            "against_control": {
                method: test.to_json() for method, test in self.against_control.items()
            },
            "cells": [result.to_json() for result in self.outcomes],
        }
