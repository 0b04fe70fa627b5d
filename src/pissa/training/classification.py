"""Classification: one of several names for a text, or for two."""

from __future__ import annotations

from typing import Any

import numpy as np

from pissa.config import TrainSettings
from pissa.errors import DataError
from pissa.training.data import Row, Rows, check_rows
from pissa.training.examples import Examples
from pissa.training.heads import collator as collator
from pissa.training.heads import (
    encode_texts,
    head_trainer,
    load_with_head,
    text_columns,
    text_problem,
)
from pissa.training.models import position_limit
from pissa.untyped import Tokenizer


def encode(rows: Rows, tokenizer: Tokenizer, settings: TrainSettings) -> Examples:
    """Tokens and class indices of all rows; the classes are those of the training rows.

    Raises:
        DataError: a wrong row, a single class, or a class that only the evaluation rows have.
    """
    limit = position_limit(tokenizer, settings)
    columns = text_columns(rows.train[0])
    check_rows([*rows.train, *rows.evaluation], lambda row: problem(row, columns))
    names = _sorted_names({_name(row) for row in rows.train})
    if len(names) < 2:
        raise DataError(
            f"{rows.sources[0]['name']}: got the single class {names[0]!r}, expected two or more"
        )
    check_rows(
        rows.evaluation,
        lambda row: (
            None
            if _name(row) in names
            else f"label: got {_name(row)!r}, expected one of {', '.join(names)}"
        ),
    )
    index = {name: number for number, name in enumerate(names)}
    train, evaluation = (
        encode_texts(part, columns, lambda row: index[_name(row)], tokenizer, limit)
        for part in (rows.train, rows.evaluation)
    )
    return Examples(train, evaluation, {"max_length": limit}, names)


def load_model(settings: TrainSettings, examples: Examples, tokenizer: Tokenizer) -> Any:
    """The base model with a head for these classes, see `pissa.training.heads.load_with_head`."""
    return load_with_head(
        settings,
        tokenizer,
        num_labels=len(examples.names),
        id2label=dict(enumerate(examples.names)),
        label2id={name: index for index, name in enumerate(examples.names)},
    )


def build_trainer(
    model: Any,
    tokenizer: Tokenizer,
    examples: Examples,
    settings: TrainSettings,
    folder: str,
    callbacks: list[Any],
) -> Any:
    """Transformers' Trainer, with accuracy (and F1 and Matthews' correlation for two classes) at each evaluation."""
    return head_trainer(model, tokenizer, examples, settings, folder, callbacks, measures)


def measures(prediction: Any) -> dict[str, float]:
    """Accuracy, and for two classes F1 of the second."""
    logits = (
        prediction.predictions[0]
        if isinstance(prediction.predictions, tuple)
        else prediction.predictions
    )
    guess, truth = np.argmax(logits, axis=-1), prediction.label_ids
    found = {"accuracy": float(np.mean(guess == truth))}
    if logits.shape[-1] == 2:
        hits, wrong = int(np.sum((guess == 1) & (truth == 1))), int(np.sum(guess != truth))
        found["f1"] = 2 * hits / (2 * hits + wrong) if hits else 0.0
        found["matthews"] = _matthews(guess, truth)
    return found


def _matthews(guess: np.ndarray, truth: np.ndarray) -> float:
    """Matthews' correlation of two classes, CoLA's score; 0 where one class is missing."""
    spread = np.std(guess) * np.std(truth)
    return (
        float(np.mean((guess - guess.mean()) * (truth - truth.mean())) / spread) if spread else 0.0
    )


def problem(row: Row, columns: tuple[str, ...]) -> str | None:
    """What is wrong with a row, or None."""
    label = row.fields.get("label")
    if not isinstance(label, (str, int)) or label == "":
        return f"got fields {', '.join(row.fields)}, expected a name or a whole number in label, got {label!r}"
    return text_problem(row, columns)


def _name(row: Row) -> str:
    label = row.fields["label"]
    return str(int(label)) if isinstance(label, bool) else str(label)


def _sorted_names(names: set[str]) -> list[str]:
    """Numbers in their order, else the alphabet's."""
    if all(name.lstrip("-").isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)
