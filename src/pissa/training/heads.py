"""What classification and regression share: texts in columns, a model with a new head, transformers' own trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from pissa.checkpoint.targets import head_modules
from pissa.config import TrainSettings
from pissa.errors import CheckpointError, DataError, require
from pissa.training.arguments import common_arguments, one_device
from pissa.training.data import Row
from pissa.training.examples import Examples
from pissa.training.models import load_base
from pissa.untyped import Tokenizer

TEXTS = (("sentence1", "sentence2"), ("text", "text_pair"), ("sentence",), ("text",))
"""Columns of the one or two texts; the first pair that is there is taken."""


def text_columns(row: Row) -> tuple[str, ...]:
    """The columns of a data set's texts, from its first row."""
    for columns in TEXTS:
        if all(column in row.fields for column in columns):
            return columns
    raise DataError(
        f"{row.where}: got fields {', '.join(row.fields) or 'none'}, expected label and "
        f"{'; or '.join(' + '.join(columns) for columns in TEXTS)}. "
        "Name yours with `fields`, as in {text: your_column}"
    )


def text_problem(row: Row, columns: tuple[str, ...]) -> str | None:
    """What is wrong with a row's texts, or None."""
    for column in columns:
        if not isinstance(row.fields.get(column), str):
            return f"got fields {', '.join(row.fields)}, expected a text in {column}, got {row.fields.get(column)!r}"
    return None


def encode_texts(
    rows: list[Row],
    columns: tuple[str, ...],
    label: Callable[[Row], int | float],
    tokenizer: Tokenizer,
    limit: int,
) -> list[dict[str, Any]]:
    """Tokens and label of each row."""
    if not rows:
        return []
    encoded = tokenizer(
        *([row.fields[column] for row in rows] for column in columns),
        truncation=True,
        max_length=limit,
    )
    keys = list(encoded.keys())
    return [
        {**{key: encoded[key][number] for key in keys}, "labels": label(row)}
        for number, row in enumerate(rows)
    ]


def load_with_head(settings: TrainSettings, tokenizer: Tokenizer, **head: Any) -> Any:
    """The base model with a head; one that the checkpoint lacks is drawn from the seed.

    Args:
        settings: of the run.
        tokenizer: its pad token is the model's where the model names none.
        head: for the model's config.

    Raises:
        CheckpointError: weights other than the head's are missing.
    """
    model, missing = load_base(settings, "AutoModelForSequenceClassification", **head)
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


def collator(tokenizer: Tokenizer) -> Any:
    """Rows to a padded batch."""
    return transformers.DataCollatorWithPadding(tokenizer)


def head_trainer(
    model: Any,
    tokenizer: Tokenizer,
    examples: Examples,
    settings: TrainSettings,
    folder: str,
    callbacks: list[Any],
    measures: Callable[[Any], dict[str, float]],
) -> Any:
    """Transformers' Trainer, with these measures at each evaluation."""
    datasets = require("datasets", "train")
    if settings.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # else nothing below the first adapter is differentiated
    return transformers.Trainer(
        model,
        one_device(
            transformers.TrainingArguments(
                **common_arguments(settings, folder, bool(examples.evaluation))
            )
        ),
        data_collator=collator(tokenizer),
        train_dataset=datasets.Dataset.from_list(examples.train),
        eval_dataset=datasets.Dataset.from_list(examples.evaluation)
        if examples.evaluation
        else None,
        processing_class=tokenizer,
        compute_metrics=measures,
        callbacks=callbacks,
    )
