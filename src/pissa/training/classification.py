"""Classification: an encoder (or decoder) with a new head that trains whole, in transformers' own trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers

from pissa.checkpoint.targets import head_modules
from pissa.config import TrainSettings
from pissa.errors import CheckpointError, DataError, require
from pissa.training.arguments import common_arguments
from pissa.training.data import Row, Rows, check_rows
from pissa.training.examples import Examples
from pissa.training.models import load_base, position_limit

TEXTS = (("sentence1", "sentence2"), ("text", "text_pair"), ("sentence",), ("text",))
"""Columns of the one or two texts; the first pair that is there is taken."""


def encode(rows: Rows, tokenizer: Any, settings: TrainSettings) -> Examples:
    """Tokens and class indices of all rows; the classes are those of the training rows.

    Raises:
        DataError: a wrong row, a single class, or a class that only the evaluation rows have.
    """
    limit = position_limit(tokenizer, settings)
    columns = _text_columns(rows.train[0])
    check_rows([*rows.train, *rows.evaluation], lambda row: _problem(row, columns))
    names = _sorted_names({_name(row) for row in rows.train})
    if len(names) < 2:
        raise DataError(f"{rows.sources[0]['name']}: got the single class {names[0]!r}, expected two or more")
    check_rows(
        rows.evaluation,
        lambda row: None if _name(row) in names else f"label: got {_name(row)!r}, expected one of {', '.join(names)}",
    )
    train, evaluation = (_encode_rows(part, columns, names, tokenizer, limit) for part in (rows.train, rows.evaluation))
    return Examples(train, evaluation, {"max_length": limit}, names)


def load_model(settings: TrainSettings, examples: Examples, tokenizer: Any) -> Any:
    """The base model with a head for these classes; a head that the checkpoint lacks is drawn from the seed.

    Raises:
        CheckpointError: weights other than the head's are missing.
    """
    model, missing = load_base(
        settings,
        "AutoModelForSequenceClassification",
        num_labels=len(examples.names),
        id2label=dict(enumerate(examples.names)),
        label2id={name: index for index, name in enumerate(examples.names)},
    )
    heads = tuple(f"{name}." for name in head_modules(model))
    lost = [name for name in missing if not name.startswith(heads)]
    if lost:
        raise CheckpointError(
            f"{settings.model} has no weights for `{lost[0]}` ({len(lost)} tensors besides the head are missing), and "
            "an adapter would leave them random: use a checkpoint that has them"
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def build_trainer(
    model: Any, tokenizer: Any, examples: Examples, settings: TrainSettings, folder: str, callbacks: list[Any]
) -> Any:
    """Transformers' Trainer, with accuracy (and F1 for two classes) at each evaluation."""
    datasets = require("datasets", "train")
    if settings.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # else nothing below the first adapter is differentiated
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**common_arguments(settings, folder, bool(examples.evaluation))),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        train_dataset=datasets.Dataset.from_list(examples.train),
        eval_dataset=datasets.Dataset.from_list(examples.evaluation) if examples.evaluation else None,
        processing_class=tokenizer,
        compute_metrics=measures,
        callbacks=callbacks,
    )


def measures(prediction: Any) -> dict[str, float]:
    """Accuracy, and for two classes F1 of the second."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
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
    return float(np.mean((guess - guess.mean()) * (truth - truth.mean())) / spread) if spread else 0.0


def _text_columns(row: Row) -> tuple[str, ...]:
    for columns in TEXTS:
        if all(column in row.fields for column in columns):
            return columns
    raise DataError(
        f"{row.where}: got fields {', '.join(row.fields) or 'none'}, expected label and "
        f"{'; or '.join(' + '.join(columns) for columns in TEXTS)}. "
        "Name yours with `fields`, as in {text: your_column}"
    )


def _problem(row: Row, columns: tuple[str, ...]) -> str | None:
    for column in columns:
        if not isinstance(row.fields.get(column), str):
            return f"got fields {', '.join(row.fields)}, expected a text in {column}, got {row.fields.get(column)!r}"
    label = row.fields.get("label")
    if not isinstance(label, (str, int)) or label == "":
        return f"got fields {', '.join(row.fields)}, expected a name or a whole number in label, got {label!r}"
    return None


def _name(row: Row) -> str:
    label = row.fields["label"]
    return str(int(label)) if isinstance(label, bool) else str(label)


def _sorted_names(names: set[str]) -> list[str]:
    """Numbers in their order, else the alphabet's."""
    if all(name.lstrip("-").isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def _encode_rows(
    rows: list[Row], columns: tuple[str, ...], names: list[str], tokenizer: Any, limit: int
) -> list[dict[str, Any]]:
    if not rows:
        return []
    texts = [[row.fields[column] for row in rows] for column in columns]
    encoded = tokenizer(*texts, truncation=True, max_length=limit)
    index = {name: number for number, name in enumerate(names)}
    keys = list(encoded.keys())
    return [
        {**{key: encoded[key][number] for key in keys}, "labels": index[_name(row)]} for number, row in enumerate(rows)
    ]
