"""Calibration: what some methods need to have seen of the base, on the rows of a run or on others."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pissa.config import TrainSettings, load_settings
from pissa.errors import InputError
from pissa.method import Method
from pissa.observe import Observations, observe
from pissa.observe.processes import process
from pissa.presets import Choice, find
from pissa.training import distributed, language
from pissa.training.arguments import device
from pissa.training.data import Rows, read, renamed
from pissa.training.examples import Examples
from pissa.training.models import load_tokenizer
from pissa.untyped import Tokenizer

SAVED = ".safetensors"
COMPONENTS = 4
"""Principal components kept of a layer for each rank that is asked: EVA may give a layer more than its share."""
logger = logging.getLogger(__name__)


def observations(
    load: Callable[[], Any],
    task: Any,
    examples: Examples,
    tokenizer: Tokenizer,
    settings: TrainSettings,
    choice: Choice | None,
) -> Observations | None:
    """What the method needs, seen by the base; read from a file where `calibration` names one.

    Args:
        load: gives the base, whole; called only where it is observed.
        task: the module of the run's task, for its encoding and its batches.
        examples: the run's own rows, which are read where no others are named.
        tokenizer: the model's.
        settings: of the run.
        choice: its method; None for full.

    Raises:
        InputError, DataError: rows that cannot be read.
    """
    need = choice.method.observes if choice else None
    if need is None:
        return None
    if settings.calibration and settings.calibration.endswith(SAVED):
        return Observations.load(settings.calibration)
    rows, source = examples.train, {"name": settings.data}
    if settings.calibration:
        others, source = read(settings.calibration, settings.data_split)
        rows = task.encode(
            Rows(renamed(others, settings.fields), [], []), tokenizer, settings
        ).train
    return _observed(
        load(), task, rows[: settings.calibration_rows], source, tokenizer, settings, [need]
    )


def for_method(
    model: str, method: str | Method, calibration: str | None, rows: int, **settings: Any
) -> Observations | None:
    """What a method needs to have seen of a language model on disk or on the Hub.

    Args:
        model: a folder with its tokenizer, or a Hub id.
        method: as users name it.
        calibration: data, or a file of observations; None where the method needs none.
        rows: of the data, the first so many.
        settings: further keys of a run: targets, rank, revision.

    Raises:
        InputError: calibration without a need, or a need without calibration.
    """
    chosen = find(method)
    needs = chosen.observes
    if needs is None:
        if calibration:
            raise InputError(
                f"calibration is {calibration}, but {chosen.name} needs the weights alone: leave it out"
            )
        return None
    if calibration is None:
        raise InputError(
            f"{chosen.name} needs the {needs} of each layer: give --calibration DATA, rows as for training"
        )
    if calibration.endswith(SAVED):
        return Observations.load(calibration)
    return calibrate(model, calibration, rows, [needs], **settings)


def calibrate(model: str, data: str, rows: int, needs: list[str], **settings: Any) -> Observations:
    """Load a language model and observe it on rows of data.

    Args:
        model: a folder with its tokenizer, or a Hub id.
        data: rows as for training.
        rows: the first so many.
        needs: of `pissa.registry.OBSERVED`.
        settings: further keys of a run, as `fields`, `template`, `max_length`, `targets`, `rank`.
    """
    chosen = {key: value for key, value in settings.items() if value is not None}
    run = load_settings(
        None, {"output": "unused", "model": model, "data": data, "calibration_rows": rows, **chosen}
    )
    read_rows, source = read(run.data, run.data_split)
    tokenizer = load_tokenizer(run)
    examples = language.encode(Rows(renamed(read_rows[:rows], run.fields), [], []), tokenizer, run)
    base = language.load_model(run, examples, tokenizer)
    return _observed(base, language, examples.train, source, tokenizer, run, needs)


def _observed(
    model: Any,
    task: Any,
    rows: list[dict[str, Any]],
    source: dict[str, Any],
    tokenizer: Tokenizer,
    settings: TrainSettings,
    needs: list[str],
) -> Observations:
    count, index, total = distributed.processes(), process(), len(rows)
    if total < count:
        raise InputError(
            f"got {total} rows to observe the base on, expected at least one for each of {count} processes"
        )
    rows, where = rows[index::count], device(settings)
    logger.warning("reading %d rows for the %s of each layer", len(rows), " and ".join(needs))
    model.to(where)
    collate = task.collator(tokenizer)

    def batches() -> Iterator[dict[str, Any]]:
        for start in range(0, len(rows), settings.micro_batch_size):
            batch = collate(rows[start : start + settings.micro_batch_size])
            yield {
                key: value.to(where)
                for key, value in batch.items()
                if isinstance(value, torch.Tensor)
            }

    most = max(COMPONENTS, math.ceil(float(settings.options.get("rho", 0)))) * settings.rank
    seen = observe(
        model, batches(), needs, targets=settings.targets, components=most, seed=settings.seed
    )
    read_here = {"rows_read": total, "micro_batch_size": settings.micro_batch_size}
    seen.facts["data"] = {**source, **read_here, "processes": count}
    return seen
