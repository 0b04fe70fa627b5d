"""What a cell came to, read from its run's folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pissa.checkpoint.output import read_json
from pissa.comparison.grid import CELLS, Cell
from pissa.training.callbacks import SCORES
from pissa.training.folder import METRICS, RECORD, read_metrics
from pissa.untyped import Json

Curve = list[tuple[int, float]]
"""Pairs of optimiser step and value."""


@dataclass(frozen=True)
class Outcome:
    """One run of a comparison.

    Attributes:
        cell: which.
        finished: False for a run whose loss was not a number any more.
        trainable: parameters.
        seconds: of wall time, training and evaluating.
        peak_memory_bytes: of the device, or of the process on a CPU.
        train: loss at each logged step.
        evaluation: loss on the evaluation rows, the first one before the first step.
        old: loss on the old data at the same steps; empty without.
        scores: accuracy and the like at the end; empty for language.
        tokens: digest of the tokenised rows, the same for all cells of a seed.
        versions: of the packages that made it.
    """

    cell: Cell
    finished: bool
    trainable: int = 0
    seconds: float = math.nan
    peak_memory_bytes: int | None = None
    train: Curve = field(default_factory=list)
    evaluation: Curve = field(default_factory=list)
    old: Curve = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    tokens: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Evaluation loss at the end of training (not the best on the way); infinite for a run that diverged."""
        return self.evaluation[-1][1] if self.finished else math.inf

    def value(self, measure: str) -> float:
        """`loss`, `old`, or one of `scores`; not a number where the run has none."""
        if measure == "loss":
            return self.loss
        if measure == "old":
            return self.old[-1][1] if self.old and self.finished else math.nan
        return self.scores.get(measure, math.nan) if self.finished else math.nan

    def to_json(self) -> Json:
        """Everything, for compare.json."""
        return {
            "method": self.cell.method,
            "learning_rate": self.cell.learning_rate,
            "seed": self.cell.seed,
            "status": "finished" if self.finished else "diverged",
            "trainable_parameters": self.trainable,
            "seconds": self.seconds if self.finished else None,
            "peak_memory_bytes": self.peak_memory_bytes,
            "eval_loss": self.loss if self.finished else None,
            "scores": self.scores,
            "curves": {"loss": self.train, "eval_loss": self.evaluation, "old_loss": self.old},
        }


def outcome(cell: Cell, out: Path) -> Outcome | None:
    """The outcome of a cell, or None while it has none."""
    folder = cell.folder(out)
    if not (folder / RECORD).is_file():
        return None
    record = read_json(folder / RECORD)
    if record.get("status") == "diverged":
        return Outcome(cell, finished=False, tokens=record["data"]["tokens_sha256"])
    if record.get("status") != "finished":
        return None
    lines = read_metrics(folder / METRICS)

    def curve(key: str) -> Curve:
        return [(line["step"], line[key]) for line in lines if line.get(key) is not None]

    scores = {key.removeprefix("eval_"): record[key] for key in SCORES if key in record}
    return Outcome(
        cell,
        True,
        record["trainable_parameters"],
        record["seconds"],
        record.get("peak_memory_bytes"),
        curve("loss"),
        curve("eval_loss"),
        curve("old_loss"),
        scores,
        record["data"]["tokens_sha256"],
        record["versions"],
    )


def outcomes(out: Path) -> list[Outcome]:
    """Of all cells that a comparison's folder holds, in the order of methods, rates and seeds."""
    found = []
    for record in sorted((out / CELLS).glob(f"*/lr-*/seed-*/{RECORD}")):
        seed, rate, method = (folder.name for folder in record.parents[:3])
        cell = Cell(method, float(rate.removeprefix("lr-")), int(seed.removeprefix("seed-")))
        if (result := outcome(cell, out)) is not None:
            found.append(result)
    return sorted(found, key=lambda result: result.cell)


def mean_curve(results: list[Outcome], of: Callable[[Outcome], Curve]) -> Curve:
    """The mean over runs at every step that all of them have."""
    curves = [dict(of(result)) for result in results]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return [(step, sum(curve[step] for curve in curves) / len(curves)) for step in steps]
