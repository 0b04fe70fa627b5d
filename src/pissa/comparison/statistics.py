"""Means with their standard errors, and the paired test over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pissa.errors import require
from pissa.untyped import Json

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Mean:
    """Of one value per seed.

    Attributes:
        mean: infinite where a run diverged.
        error: standard error of the mean; None for a single seed.
        count: seeds.
    """

    mean: float
    error: float | None
    count: int

    def to_json(self) -> Json:
        """Infinity, which JSON does not know, is null."""
        return {
            "mean": self.mean if math.isfinite(self.mean) else None,
            "stderr": self.error,
            "seeds": self.count,
        }


def mean(values: Sequence[float]) -> Mean:
    """Mean and standard error."""
    count = len(values)
    middle = sum(values) / count
    if count < 2 or not math.isfinite(middle):
        return Mean(middle, None, count)
    variance = sum((value - middle) ** 2 for value in values) / (count - 1)
    return Mean(middle, math.sqrt(variance / count), count)


@dataclass(frozen=True)
class Difference:
    """One method minus another over the same seeds.

    Attributes:
        difference: mean, below 0 where the first one ends lower.
        error: its standard error; None for fewer than two seeds.
        p: of the two-sided paired t-test; None where it cannot be taken: one seed, or seeds that
            change nothing.
        adjusted: p after Holm's correction for all tests of one family.
        detectable: the smallest difference that would have been significant, given this spread.
    """

    difference: float
    error: float | None
    p: float | None
    adjusted: float | None = None
    detectable: float | None = None

    @property
    def seen(self) -> bool:
        """Whether a difference is seen at all."""
        return self.adjusted is not None and self.adjusted < SIGNIFICANT

    def to_json(self) -> Json:
        """As it is, with the verdict."""
        verdict = (
            ("lower" if self.difference < 0 else "higher") if self.seen else "no difference seen"
        )
        return {
            "difference": self.difference if math.isfinite(self.difference) else None,
            "stderr": self.error,
            "p": self.p,
            "p_holm": self.adjusted,
            "detectable": self.detectable,
            "verdict": verdict if self.p is not None else "not tested",
        }


def paired(first: Sequence[float], second: Sequence[float], family: int = 1) -> Difference:
    """Compare two methods seed by seed: the data's order, which both share, cancels out.

    Args:
        first: one value per seed.
        second: the same seeds in the same order.
        family: how many tests are corrected together; `detectable` is for the strictest of them.
    """
    stats = require("scipy.stats", "train")
    differences = mean([a - b for a, b in zip(first, second, strict=True)])
    if differences.error is None:
        return Difference(differences.mean, None, None)
    critical = float(stats.t.ppf(1 - SIGNIFICANT / 2 / family, differences.count - 1))
    if differences.error == 0:
        # Without spread nothing can be tested; seeds that change nothing are one run, not several.
        return Difference(
            differences.mean,
            0.0,
            None if differences.mean else 1.0,
            None if differences.mean else 1.0,
        )
    p = float(stats.ttest_rel(first, second).pvalue)
    return Difference(differences.mean, differences.error, p, p, critical * differences.error)


def holm(tests: dict[Any, Difference]) -> dict[Any, Difference]:
    """Holm's step-down correction over one family of tests (Scandinavian Journal of Statistics 6, 1979)."""
    ordered = sorted(
        (key for key in tests if tests[key].p is not None), key=lambda key: tests[key].p or 0.0
    )
    corrected, floor = dict(tests), 0.0
    for rank, key in enumerate(ordered):
        test = tests[key]
        floor = max(floor, min(1.0, (len(ordered) - rank) * (test.p or 0.0)))
        corrected[key] = Difference(test.difference, test.error, test.p, floor, test.detectable)
    return corrected
