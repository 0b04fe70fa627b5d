"""What one answer is worth, and what many are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pissa.untyped import Json

Z = 1.959963984540054
"""Of a 95 % interval."""


@dataclass(frozen=True)
class Verdict:
    """One scorer on one answer.

    Attributes:
        correct: whether it counts.
        extracted: what was taken for the answer; None where nothing was found.
        reason: why it does not count, in a few words; empty where it does.
    """

    correct: bool
    extracted: str | None
    reason: str = ""


@dataclass(frozen=True)
class Item:
    """One answer, by our scorer and by the PiSSA authors' own, faults and all.

    Attributes:
        id: of the question: task_id, or its number.
        ours: the verdict that counts.
        authors: theirs; None where they have none.
    """

    id: str
    ours: Verdict
    authors: Verdict | None = None

    def to_json(self) -> Json:
        """Flat: id, correct, extracted, reason, authors."""
        return {
            "id": self.id,
            **asdict(self.ours),
            "authors": asdict(self.authors) if self.authors else None,
        }


@dataclass(frozen=True)
class Share:
    """How many of how many, with what chance leaves open.

    Attributes:
        correct: how many.
        count: of how many, 1 or more.
    """

    correct: int
    count: int

    @property
    def value(self) -> float:
        """The share, 0 to 1."""
        return self.correct / self.count

    @property
    def error(self) -> float:
        """Standard error of the mean, as lm-evaluation-harness has it; 0 for a single answer."""
        return (
            math.sqrt(self.value * (1 - self.value) / (self.count - 1)) if self.count > 1 else 0.0
        )

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (JASA 22, 1927): right for shares near 0 and 1 too, where the error says 0."""
        n, p = self.count, self.value
        middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        # At 0 and 1 the limit is exact, and rounding would leave 4e-19 of it.
        return 0.0 if p == 0 else middle - half, 1.0 if p == 1 else middle + half

    def to_json(self) -> Json:
        """With error and interval."""
        return {
            "correct": self.correct,
            "count": self.count,
            "value": self.value,
            "stderr": self.error,
            "interval": list(self.interval),
        }


def summary(items: Sequence[Item]) -> Json:
    """The share by our scorer, and by the authors' where all items have it.

    Args:
        items: one or more.
    """
    said = {"ours": Share(sum(item.ours.correct for item in items), len(items)).to_json()}
    if all(item.authors for item in items):
        correct = sum(item.authors.correct for item in items if item.authors)
        said["authors"] = Share(correct, len(items)).to_json()
    return said
