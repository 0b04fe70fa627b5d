"""How many rows, steps and tokens: from the data where they are here, tokenised no further than needed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers

from pissa.config import TrainSettings
from pissa.planning.preview import survey
from pissa.planning.source import Source
from pissa.training.data import Rows, load_rows
from pissa.untyped import Tokenizer

SAMPLE = 1000
"""Rows that are tokenised to know how long rows are."""


@dataclass(frozen=True)
class Counts:
    """What there is to do.

    Attributes:
        rows: to train on; None where the data are not here.
        steps: optimiser steps; None where they follow from data that are not here.
        tokens: that training reads in all, padding left out.
        row_tokens: of a row, on average.
        classes: of a classification.
        note: why something is not known, or how it was found.
    """

    rows: int | None = None
    steps: int | None = None
    tokens: int | None = None
    row_tokens: float | None = None
    classes: int = 2
    note: str = ""


def count(settings: TrainSettings, source: Source) -> Counts:
    """Rows, steps and tokens of a run.

    Steps are ``ceil(epochs * ceil(ceil(rows / micro_batch_size) / accumulation))``, as the trainer
    has them.

    Raises:
        DataError: data that are here and broken.
    """
    if not Path(settings.data).exists():
        return Counts(
            steps=settings.max_steps or None,
            classes=len(source.config.get("id2label") or ()) or 2,
            note=f"data not here ({settings.data}): {'rows' if settings.max_steps else 'steps'} unknown",
        )
    rows = load_rows(settings)
    names = (
        {str(row.fields.get("label")) for row in rows.train}
        if settings.task == "classification"
        else set()
    )
    found = Counts(len(rows.train), _steps(settings, len(rows.train)), classes=max(len(names), 2))
    tokenizer = _tokenizer(source, settings)
    if tokenizer is None:
        return replace(
            found,
            note="no tokenizer here: tokens unknown" + (", and steps" if settings.packing else ""),
        )
    sampled = rows.train
    if len(sampled) > SAMPLE and not settings.packing:
        sampled = random.Random(settings.seed).sample(sampled, SAMPLE)
    seen = survey(
        Rows(sampled, [], rows.sources), tokenizer, settings, limit(settings, source, tokenizer)
    )
    kept = round(len(rows.train) * (1 - seen.dropped / len(sampled)))
    sequences = math.ceil(seen.tokens / seen.limit) if settings.packing else kept
    steps = _steps(settings, sequences)
    mean = seen.tokens / max(len(sampled) - seen.dropped, 1)
    share = (
        steps * settings.batch_size / max(sequences, 1) if settings.max_steps else settings.epochs
    )
    notes = [f"tokens from a sample of {SAMPLE} rows"] if len(sampled) < len(rows.train) else []
    notes += ["steps with packing are a lower bound"] if settings.packing else []
    return Counts(kept, steps, round(mean * kept * share), mean, found.classes, "; ".join(notes))


def limit(settings: TrainSettings, source: Source, tokenizer: Tokenizer = None) -> int:
    """Tokens of the longest row: max_length, or less where the model or its tokenizer has fewer positions."""
    positions = source.config.get("max_position_embeddings") or source.config.get("n_positions")
    most = [settings.max_length, positions, getattr(tokenizer, "model_max_length", None)]
    return int(min(number for number in most if number))


def _steps(settings: TrainSettings, rows: int) -> int:
    batches = math.ceil(rows / settings.micro_batch_size)
    updates = max(math.ceil(batches * settings.micro_batch_size / settings.batch_size), 1)
    return settings.max_steps or math.ceil(settings.epochs * updates)


def _tokenizer(source: Source, settings: TrainSettings) -> Any:
    """The model's tokenizer if its files are here."""
    if not any(
        (source.folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
    ):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=settings.trust_remote_code, local_files_only=True
        )
    # A tokenizer that is not whole: a plan can do without
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
    ):
        return None
