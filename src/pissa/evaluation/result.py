"""What one model came to on one benchmark, with all that is needed to come to it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from pissa.errors import CheckpointError
from pissa.untyped import Json

FORMAT = 1
SHARES = (
    "ours",
    "authors",
    "pass@1",
    "acc",
    "acc_norm",
    "acc_mutual_info",
    "em",
    "exact_match",
    "math_verify",
)
"""Scores that are means of right and wrong, so that percent fits; others keep the scorer's own unit."""


@dataclass(frozen=True)
class Score:
    """One figure.

    Attributes:
        value: 0 to 1 for a share, else in the scorer's own unit.
        stderr: of the mean; None where it is not known.
        interval: 95 %; None where it is not known.
        count: of answers.
    """

    value: float
    stderr: float | None
    interval: tuple[float, float] | None
    count: int


@dataclass(frozen=True)
class Perplexity:
    """Of right answers, prompt given: exp of the mean loss of a token.

    Attributes:
        value: of all tokens together.
        tokens: of all answers.
        answers: how many.
        cut: how many of them, with their prompts, were longer than the model's positions and lost a
            part.
    """

    value: float
    tokens: int
    answers: int
    cut: int


@dataclass(frozen=True)
class TaskResult:
    """One model on one benchmark.

    Attributes:
        model: its name in the table.
        identity: path, kind, base, digests: which weights answered.
        task, track, protocol: what was asked, and how, in a sentence.
        headline: key of the score that a table shows; empty where there is none (no judge).
        scores: by scorer: `ours` and `authors`, or the harness's metrics, or `judge`.
        gold: perplexity of the right answers; None where the questions have none.
        data: name, sha256, rows.
        notes: what a reader must know: prompts cut, answers shortened, another template in
            training.
        settings: batch size, limit, tokens, seeds, backend.
        versions: of the packages that matter.
        seconds: of generating and scoring, all sittings together as far as they ended.
    """

    model: str
    identity: Json
    task: str
    track: str
    protocol: str
    headline: str
    scores: dict[str, Score]
    gold: Perplexity | None
    data: Json
    notes: list[str] = field(default_factory=list)
    settings: Json = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> Json:
        """Everything."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Json, where: str) -> TaskResult:
        """The same back.

        Raises:
            CheckpointError: another shape.
        """
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}, expected {FORMAT}")
            scores = {
                name: Score(
                    **{**score, "interval": tuple(score["interval"]) if score["interval"] else None}
                )
                for name, score in data["scores"].items()
            }
            gold = Perplexity(**data["gold"]) if data["gold"] else None
            rest = {
                key: value for key, value in data.items() if key not in ("format", "scores", "gold")
            }
            return cls(scores=scores, gold=gold, **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{where} is no result of pissa eval ({error}): delete it, and run again"
            ) from error
