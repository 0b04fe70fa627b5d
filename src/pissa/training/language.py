"""Language models: rows to tokens with a mask that is certain, and TRL's trainer around them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from pissa.config import TrainSettings
from pissa.errors import CheckpointError, ConfigError, DataError, require
from pissa.training import packing
from pissa.training.arguments import common_arguments, one_device
from pissa.training.data import Row, Rows
from pissa.training.examples import Examples
from pissa.training.models import load_base, position_limit
from pissa.training.templates import Script, chosen, scripts, shape_of
from pissa.untyped import Tokenizer

MASKED = -100
logger = logging.getLogger(__name__)


def encode(rows: Rows, tokenizer: Tokenizer, settings: TrainSettings) -> Examples:
    """Tokens and labels of all rows; only responses carry loss.

    Raises:
        DataError: a wrong row, or no response left within max_length.
    """
    limit = position_limit(tokenizer, settings)
    train, train_notes = _encode_rows(rows.train, tokenizer, settings.template, limit)
    evaluation, evaluation_notes = _encode_rows(
        rows.evaluation, tokenizer, settings.template, limit
    )
    old, old_notes = _encode_rows(rows.old, tokenizer, settings.template, limit)
    notes = {key: train_notes[key] + evaluation_notes[key] + old_notes[key] for key in train_notes}
    for name, read, kept in (
        (settings.data, rows.train, train),
        (settings.eval_data or settings.data, rows.evaluation, evaluation),
        (settings.old_data, rows.old, old),
    ):
        if read and not kept:
            raise DataError(
                f"no row of {name} has a response within {limit} tokens: raise max_length, or shorten the prompts"
            )
    if notes["rows_dropped"]:
        logger.warning(
            "rows left out because no response fits within the first %d tokens: %d",
            limit,
            notes["rows_dropped"],
        )
    facts = {
        "max_length": limit,
        "template": chosen(settings.template, shape_of(rows.train[0])),
        **notes,
    }
    return Examples(train, evaluation, facts, old=old)


def load_model(settings: TrainSettings, examples: Examples, tokenizer: Tokenizer) -> Any:
    """The causal language model, whole.

    Raises:
        CheckpointError: not a causal language model, or one with weights missing.
    """
    model, missing = load_base(settings, "AutoModelForCausalLM")
    if missing:
        raise CheckpointError(
            f"{settings.model} has no weights for {missing[0]} ({len(missing)} tensors are missing): "
            "it is not a whole causal language model; for an encoder set task: classification"
        )
    if settings.packing:
        packing.check_rows_stay_apart(model)
    return model


def collator(tokenizer: Tokenizer) -> packing.PackingCollator:
    """Rows to a padded batch."""
    padding = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
    # Our own collator keeps TRL from setting pad tokens in the model's config.
    return packing.PackingCollator(padding or 0)


def build_trainer(
    model: Any,
    tokenizer: Tokenizer,
    examples: Examples,
    settings: TrainSettings,
    folder: str,
    callbacks: list[Any],
) -> Any:
    """TRL's SFTTrainer on data that is tokenised already, so that it changes neither data nor model."""
    trl, datasets = require("trl", "train"), require("datasets", "train")
    if isinstance(model, PeftModel) and isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ConfigError(
            f"targets: got {settings.targets!r}, which matches the output layer; TRL reads its weight directly and "
            "would never train an adapter there: expected targets without it (all-linear leaves it out)"
        )
    arguments = trl.SFTConfig(
        **common_arguments(settings, folder, bool(examples.evaluation)),
        max_length=None,
        packing=False,  # see `packing`: TRL would pack what is evaluated too
        completion_only_loss=False,  # the labels say it already
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    rows = datasets.Dataset.from_list(examples.train)
    return trl.SFTTrainer(
        model,
        one_device(arguments),
        data_collator=collator(tokenizer),
        train_dataset=packing.packed(rows, examples.notes["max_length"])
        if settings.packing
        else rows,
        eval_dataset=datasets.Dataset.from_list(examples.evaluation)
        if examples.evaluation
        else None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def _encode_rows(
    rows: Sequence[Row], tokenizer: Tokenizer, template: str, limit: int
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """Examples and how many rows were cut or dropped."""
    if not rows:
        return [], {"rows_cut": 0, "rows_dropped": 0}
    written = scripts(list(rows), template, tokenizer)
    encoded = [
        (ids[:limit], labels[:limit], len(ids) > limit)
        for ids, labels in tokens(written, tokenizer)
    ]
    kept = [
        {"input_ids": ids, "labels": labels}
        for ids, labels, _ in encoded
        if any(label != MASKED for label in labels[1:])
    ]
    return kept, {
        "rows_cut": sum(cut for _, _, cut in encoded),
        "rows_dropped": len(rows) - len(kept),
    }


def tokens(
    written: Iterable[Script], tokenizer: Tokenizer
) -> Iterable[tuple[list[int], list[int]]]:
    """Token ids and labels of each script.

    Each part is tokenised by itself, as a prompt is at inference, so no token lies across the edge
    of a response. The tokenizer's start token, if it adds one, is masked; the end token after a
    last response carries loss.
    """
    start = _start_tokens(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for chunk in _batched(written, 1000):
        texts = [text for script in chunk for text, _ in script.parts]
        pieces = iter(
            tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        )
        for script in chunk:
            ids = [] if script.ready else list(start)
            labels = [MASKED] * len(ids)
            learn = False
            for _, learn in script.parts:
                piece = list(next(pieces))
                ids += piece
                labels += piece if learn else [MASKED] * len(piece)
            if learn and not script.ready:
                ids, labels = ids + end, labels + end
            yield ids, labels


def _start_tokens(tokenizer: Tokenizer) -> list[int]:
    first = tokenizer("")["input_ids"][:1]
    return list(first) if first and first[0] == tokenizer.bos_token_id else []


def _batched(items: Iterable[Script], size: int) -> Iterable[tuple[Script, ...]]:
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch
