"""Two models on the same questions, answer by answer."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pissa.evaluation.result import TaskResult
from pissa.evaluation.tracks import file_stem
from pissa.untyped import Json


@dataclass(frozen=True)
class Paired:
    """Two models on the same questions.

    Attributes:
        won: right by the first one only.
        lost: right by the second one only.
        count: questions that both were asked and that have a verdict.
    """

    won: int
    lost: int
    count: int

    @property
    def difference(self) -> float:
        """Of the shares, first minus second."""
        return (self.won - self.lost) / self.count

    @property
    def p(self) -> float:
        """McNemar's test (Psychometrika 12, 1947) in its exact form, two-sided."""
        unequal, fewer = self.won + self.lost, min(self.won, self.lost)
        tail = sum(math.comb(unequal, n) for n in range(fewer + 1))
        return float(min(1.0, 2 * tail / 2**unequal))


def paired(first: Iterable[Json], second: Iterable[Json]) -> Paired | None:
    """Compare two models over the questions that both were asked in the same words.

    Args:
        first: samples of one model.
        second: samples of the other.

    Returns:
        None where they have no question with a verdict in common.
    """
    verdicts = [
        {
            (one["id"], one["prompt"]): one["correct"]
            for one in samples
            if one["correct"] is not None
        }
        for samples in (first, second)
    ]
    common = [
        (verdicts[0][key], verdicts[1][key]) for key in verdicts[0].keys() & verdicts[1].keys()
    ]
    counted = Counter(common)
    return Paired(counted[True, False], counted[False, True], len(common)) if common else None


def bases(found: Sequence[TaskResult]) -> list[str]:
    """The models that results name as their base, in the order of the results."""
    named = {os.path.realpath(base) for one in found if (base := one.identity.get("base"))}
    return list(
        dict.fromkeys(one.model for one in found if os.path.realpath(one.identity["path"]) in named)
    )


def bases_first(found: Sequence[TaskResult]) -> list[TaskResult]:
    """The results of `bases`, then the others, both in their order."""
    above = bases(found)
    return sorted(found, key=lambda one: one.model not in above)


def against_base(one: TaskResult, found: Sequence[TaskResult], out: Path) -> Paired | None:
    """With the base that a result names, asked the same on the same track.

    Args:
        one: the result.
        found: all results.
        out: the folder of the evaluation, with OUT/MODEL/TASK.samples.jsonl.

    Returns:
        None where no base is named, or it was not asked, or more than once in this dtype.
    """
    named = one.identity.get("base")
    asked = [other for other in found if (other.task, other.track) == (one.task, one.track)]
    origins = [
        other
        for other in asked
        if named and os.path.realpath(other.identity["path"]) == os.path.realpath(named)
    ]
    if len(origins) > 1:  # in several dtypes
        origins = [
            other for other in origins if other.settings.get("dtype") == one.settings.get("dtype")
        ]
    if len(origins) != 1:
        return None
    files = [
        out / who.model / f"{file_stem(who.task, who.track)}.samples.jsonl"
        for who in (one, *origins)
    ]
    return paired(*map(_samples, files)) if all(file.is_file() for file in files) else None


def _samples(file: Path) -> Iterable[Json]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
