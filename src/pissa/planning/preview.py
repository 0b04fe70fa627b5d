"""Rows as the model will see them, and what is odd about a data set, before anything is trained."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from pissa.config import TrainSettings
from pissa.errors import InputError
from pissa.training import classification, regression
from pissa.training.data import Row, Rows, check_rows, load_rows
from pissa.training.heads import text_columns
from pissa.training.language import MASKED, tokens
from pissa.training.models import load_tokenizer, position_limit
from pissa.training.templates import SHAPES, scripts, shape_of
from pissa.untyped import Tokenizer


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens that all carry loss, or all do not."""

    text: str
    tokens: int
    loss: bool


@dataclass(frozen=True)
class Shown:
    """One row as the model sees it.

    Attributes:
        where: file and line.
        tokens: how many the model sees.
        cut: tokens behind max_length, which it does not see.
        segments: the text in pieces.
        label: of a classification.
    """

    where: str
    tokens: int
    cut: int
    segments: list[Segment]
    label: str | None = None


@dataclass(frozen=True)
class Survey:
    """Counts over a data set.

    Attributes:
        rows: to train on.
        evaluation: rows to evaluate on.
        limit: tokens at which rows are cut.
        tokens: that the model sees in a pass over the rows.
        median, p95, longest: tokens of a row before it is cut.
        cut: rows longer than the limit.
        dropped: rows left out because no response is left within the limit.
        empty: rows whose response is blank.
        duplicates: rows that are exactly an earlier one to the model.
        leaked: evaluation rows that are training rows too.
        loss_share: of the tokens that carry loss.
        labels: rows of each class.
        shown: the first rows.
    """

    rows: int
    evaluation: int
    limit: int
    tokens: int
    median: int
    p95: int
    longest: int
    cut: int
    dropped: int
    empty: int
    duplicates: int
    leaked: int
    loss_share: float | None
    labels: dict[str, int] = field(default_factory=dict)
    shown: list[Shown] = field(default_factory=list)


@dataclass(frozen=True)
class _Seen:
    """A row in tokens, whole; labels are those of language."""

    ids: list[int]
    labels: list[int]
    empty: bool
    key: Hashable


def preview(settings: TrainSettings, rows: int = 3) -> Survey:
    """Look at the data of a run through its tokenizer; the model's weights are not needed.

    Args:
        settings: of the run.
        rows: how many to show, 0 or more.

    Raises:
        InputError: less than no rows.
        DataError: a wrong row, naming file and line.
        CheckpointError: no tokenizer.
    """
    if rows < 0:
        raise InputError(f"rows is {rows}, expected 0 or more")
    data = load_rows(settings)
    tokenizer = load_tokenizer(settings)
    return survey(data, tokenizer, settings, position_limit(tokenizer, settings), rows)


def survey(
    rows: Rows, tokenizer: Tokenizer, settings: TrainSettings, limit: int, show: int = 0
) -> Survey:
    """Counts over rows, and the first `show` of them.

    Args:
        rows: read from the data.
        tokenizer: of the model.
        settings: task and template are read.
        limit: tokens at which rows are cut.
        show: how many rows to show.

    Raises:
        DataError: a wrong row, naming file and line.
    """
    look = _spoken if settings.task == "language" else _classified
    train, evaluation = (
        look(rows.train, tokenizer, settings),
        look(rows.evaluation, tokenizer, settings),
    )
    kept = [seen for seen in train if _learns(seen, limit)]
    lengths = sorted(len(seen.ids) for seen in train)
    read = sum(min(len(seen.ids), limit) for seen in kept)
    learnt = sum(label != MASKED for seen in kept for label in seen.labels[1:limit])
    known = {seen.key for seen in train}
    spoken = settings.task == "language"
    names = [] if spoken else [str(row.fields["label"]) for row in rows.train]
    return Survey(
        rows=len(train),
        evaluation=len(evaluation),
        limit=limit,
        tokens=read,
        median=round(statistics.median(lengths)),
        p95=lengths[math.ceil(0.95 * len(lengths)) - 1],
        longest=lengths[-1],
        cut=sum(length > limit for length in lengths),
        dropped=len(train) - len(kept),
        empty=sum(seen.empty for seen in train),
        duplicates=len(train) - len(known),
        leaked=sum(seen.key in known for seen in evaluation),
        loss_share=learnt / max(read, 1) if spoken else None,
        labels=dict(Counter(names).most_common()),
        shown=[
            _shown(row, seen, tokenizer, limit, None if spoken else str(row.fields["label"]))
            for row, seen in list(zip(rows.train, train, strict=True))[:show]
        ],
    )


def printable(text: str) -> str:
    """The text with line ends marked, and everything else that a terminal would obey or hide as an escape."""
    return "".join(
        "↵\n"
        if mark == "\n"
        else mark
        if mark.isprintable()
        else mark.encode("unicode_escape").decode()
        for mark in text
    )


def _spoken(rows: Sequence[Row], tokenizer: Tokenizer, settings: TrainSettings) -> list[_Seen]:
    """Rows of a language model, tokenised as training does."""
    if not rows:
        return []
    columns = SHAPES[shape_of(rows[0])]
    encoded = tokens(scripts(list(rows), settings.template, tokenizer), tokenizer)
    return [
        _Seen(ids, labels, not _response(row, columns).strip(), tuple(ids))
        for row, (ids, labels) in zip(rows, encoded, strict=True)
    ]


def _classified(rows: Sequence[Row], tokenizer: Tokenizer, settings: TrainSettings) -> list[_Seen]:
    """Rows of a classification; no token carries loss, the class does."""
    if not rows:
        return []
    task = classification if settings.task == "classification" else regression
    columns = text_columns(rows[0])
    check_rows(list(rows), lambda row: task.problem(row, columns))
    texts = [[row.fields[column] for row in rows] for column in columns]
    encoded = tokenizer(*texts, verbose=False)["input_ids"]
    return [
        _Seen(ids, [], not any(part.strip() for part in parts), (*parts, str(row.fields["label"])))
        for row, ids, parts in zip(rows, encoded, zip(*texts, strict=True), strict=True)
    ]


def _response(row: Row, columns: tuple[str, ...]) -> str:
    """What the model is to learn, as the row has it."""
    if columns == ("messages",):
        return "".join(
            message["content"]
            for message in row.fields["messages"]
            if message["role"] == "assistant"
        )
    response: str = row.fields[columns[-1]]
    return response


def _learns(seen: _Seen, limit: int) -> bool:
    """Whether training keeps the row."""
    return not seen.labels or any(label != MASKED for label in seen.labels[1:limit])


def _shown(row: Row, seen: _Seen, tokenizer: Tokenizer, limit: int, label: str | None) -> Shown:
    ids = seen.ids[:limit]
    losses = [number != MASKED for number in seen.labels[:limit]] or [False] * len(ids)
    if losses:
        losses[0] = False  # nothing comes before it that could predict it
    segments = list(_segments(ids, losses, tokenizer))
    return Shown(row.where, len(ids), len(seen.ids) - len(ids), segments, label)


def _segments(ids: list[int], losses: list[bool], tokenizer: Tokenizer) -> Iterator[Segment]:
    """Text in pieces; each from the row's beginning, since tokenizers drop the space before a first word."""

    def text(count: int) -> str:
        exact = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        decoded: str = tokenizer.decode(ids[:count], **exact)
        return decoded

    end = 0
    for loss, group in groupby(losses):
        begin, end = end, end + len(list(group))
        yield Segment(text(end)[len(text(begin)) :], end - begin, loss)
