"""Several rows in one sequence: only for models that keep them apart, which is tried on the model
itself.

Rows are packed whole, the longest first, each where it leaves the least room (TRL's
`pack_dataset`). Where a row begins is told by position ids that begin anew; transformers makes a
block-diagonal mask of them, flash attention takes the lengths. A model that knows neither would
read one row as the beginning of the next, and no loss would show it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pissa.errors import ConfigError, require

_FIRST, _SECOND = 8, 12
"""Tokens of the two rows that are tried."""


class PackingCollator:
    """Packed rows as one flat batch with positions; rows that are not packed, to evaluate on, padded as ever."""

    def __init__(self, pad_token_id: int):
        sft = require("trl.trainer.sft_trainer", "train")
        self.padded = sft.DataCollatorForLanguageModeling(pad_token_id=pad_token_id)
        self.packed = sft.DataCollatorForLanguageModeling(
            pad_token_id=pad_token_id, padding_free=True
        )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch for the model."""
        collate = self.packed if "seq_lengths" in rows[0] else self.padded
        batch: dict[str, Any] = collate(rows)
        return batch


def packed(rows: Any, length: int) -> Any:
    """A data set of whole rows in sequences of up to `length` tokens, with the rows' lengths in `seq_lengths`."""
    trl, datasets = require("trl", "train"), require("datasets", "train")
    quiet_already = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return trl.pack_dataset(rows, length)
    finally:
        if not quiet_already:
            datasets.enable_progress_bars()


def check_rows_stay_apart(model: Any) -> None:
    """Try whether a row changes by what is packed before it.

    A row is read alone, packed behind each of two others, and joined to one of them. Packed it must
    be as it is alone up to rounding, that is, differ far less than joined.

    Raises:
        ConfigError: they do not stay apart.
    """
    attention = model.config._attn_implementation
    if attention.startswith("flash") and model.device.type == "cpu":
        return  # runs on a GPU only, and takes the lengths themselves
    ids = [
        number % model.config.get_text_config().vocab_size for number in range(2 * _FIRST + _SECOND)
    ]
    one, other, row = ids[:_FIRST], ids[_FIRST : 2 * _FIRST], ids[2 * _FIRST :]
    was_training = model.training
    try:
        alone = _logits(model.eval(), row)
        apart = [_logits(model, before, row) for before in (one, other)]
        joined = _logits(model, one + row)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise _refusal(attention, f"it takes no packed rows ({error})") from error
    finally:
        model.train(was_training)
    if max(_distance(logits, alone) for logits in apart) > 0.1 * _distance(joined, alone):
        raise _refusal(attention, "a row packed behind another one reads it")


def _logits(model: Any, *rows: list[int]) -> Tensor:
    """Of the last tokens, of rows in one batch as it is when training."""
    ids = [number for row in rows for number in row]
    batch = PackingCollator(0)(
        [{"input_ids": ids, "labels": ids, "seq_lengths": [len(row) for row in rows]}]
    )
    del batch["labels"]
    on_device = {
        key: value.to(model.device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
    with torch.no_grad():
        logits: Tensor = model(**on_device, use_cache=False).logits
    return logits[0, -_SECOND:].float()


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _refusal(attention: str, reason: str) -> ConfigError:
    return ConfigError(
        f"packing: got true, expected false with this model and {attention} attention: {reason}, so packed rows would "
        "train on one another"
    )
