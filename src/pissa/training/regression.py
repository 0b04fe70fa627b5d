"""Regression: a score for a text, or for two, as in STS-B."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pissa.config import TrainSettings
from pissa.errors import require
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
    """Tokens and scores of all rows.

    Raises:
        DataError: a wrong row.
    """
    limit = position_limit(tokenizer, settings)
    columns = text_columns(rows.train[0])
    check_rows([*rows.train, *rows.evaluation], lambda row: problem(row, columns))
    train, evaluation = (
        encode_texts(part, columns, lambda row: float(row.fields["label"]), tokenizer, limit)
        for part in (rows.train, rows.evaluation)
    )
    return Examples(train, evaluation, {"max_length": limit})


def load_model(settings: TrainSettings, examples: Examples, tokenizer: Tokenizer) -> Any:
    """The base model with a head of one number; the loss is the mean squared error."""
    return load_with_head(settings, tokenizer, num_labels=1, problem_type="regression")


def build_trainer(
    model: Any,
    tokenizer: Tokenizer,
    examples: Examples,
    settings: TrainSettings,
    folder: str,
    callbacks: list[Any],
) -> Any:
    """Transformers' Trainer, with both correlations at each evaluation."""
    require("scipy", "train")
    return head_trainer(model, tokenizer, examples, settings, folder, callbacks, measures)


def measures(prediction: Any) -> dict[str, float]:
    """Pearson's and Spearman's correlation, STS-B's scores; 0 where all predictions are equal."""
    stats = require("scipy.stats", "train")
    logits = (
        prediction.predictions[0]
        if isinstance(prediction.predictions, tuple)
        else prediction.predictions
    )
    guess, truth = np.ravel(logits), np.ravel(prediction.label_ids)
    if np.ptp(guess) == 0 or np.ptp(truth) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(stats.pearsonr(guess, truth).statistic),
        "spearman": float(stats.spearmanr(guess, truth).statistic),
    }


def problem(row: Row, columns: tuple[str, ...]) -> str | None:
    """What is wrong with a row, or None."""
    label: Any = row.fields.get("label")  # whatever a file has there
    try:
        finite = not isinstance(label, bool) and math.isfinite(float(label))
    except (TypeError, ValueError):
        finite = False
    if not finite:
        return f"got fields {', '.join(row.fields)}, expected a number in label, got {label!r}"
    return text_problem(row, columns)
