"""A text as windows of tokens, two models' logits on one of them, and means over all."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pissa.errors import DataError, InputError
from pissa.training.data import READERS, read
from pissa.untyped import Json, Tokenizer

PIECE = 2**24
"""Logits that are compared at a time."""


@dataclass(frozen=True)
class Compared:
    """Sums over the predicted tokens of a window, in float64.

    Attributes:
        tokens: how many were predicted.
        base_loss, loss: natural, of the base and of the model.
        kl: KL(base || model).
        agreed: tokens at which both find the same one likeliest.
        largest: absolute difference of a logit; NaN where logits of either are not finite.
    """

    tokens: int
    base_loss: float
    loss: float
    kl: float
    agreed: int
    largest: float


@dataclass(frozen=True)
class Row:
    """One model beside the base. Each standard error is that of a mean over windows.

    Figures are NaN or infinite, in JSON null, where logits were not finite or too large.

    Attributes:
        model: as it was named.
        kind: of the folder; "base"; of a run also "run, converted": its plain LoRA.
        dtype: it computed in.
        identity: path, kind, digest.
        loss: natural, mean of a token.
        perplexity: exp of it.
        difference: of the loss from the base's, window by window.
        ratio: of the perplexity to the base's, exp of the difference.
        kl: KL(base || model) of a token, in nats.
        agreement: share of tokens at which both find the same next token likeliest.
        largest: the largest absolute difference of a logit.
    """

    model: str
    kind: str
    dtype: str
    identity: Json
    loss: float
    loss_stderr: float | None
    perplexity: float
    difference: float
    difference_stderr: float | None
    ratio: float
    ratio_stderr: float | None
    kl: float
    kl_stderr: float | None
    agreement: float
    agreement_stderr: float | None
    largest: float


def read_text(path: Path) -> tuple[str, Json]:
    """A text, and its name and digest.

    Args:
        path: a UTF-8 file, or rows with a field `text`, between which a blank line is put.

    Raises:
        DataError: no such file, or a row without text.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file: give a UTF-8 text, or rows with a field `text`")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix.lower() in READERS:
        rows, _ = read(str(path), "text")
        for row in rows:
            if not isinstance(row.fields.get("text"), str):
                raise DataError(
                    f"{row.where}: got fields {', '.join(row.fields)}, expected a text in `text`"
                )
        content = "\n\n".join(row.fields["text"] for row in rows)
    else:
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 ({error}): convert it") from error
    return content, {"name": str(path), "sha256": digest}


def encode(tokenizer: Tokenizer, content: str) -> list[int]:
    """Token ids without marks around them."""
    return list(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])


def windows(
    model: Any, tokenizer: Tokenizer, ids: list[int], max_length: int, batch_size: int
) -> list[Tensor]:
    """Batches of token ids [windows, tokens], equally long; the last window may be shorter and is a
    batch of its own.

    Args:
        model: its positions bound a window.
        tokenizer: a window begins with BOS where it writes one.
        ids: of the text.
        max_length: tokens in a window, 2 or more.
        batch_size: windows in a batch.

    Raises:
        DataError: too little text.
    """
    with_marks, bare = (
        tokenizer("x")["input_ids"],
        tokenizer("x", add_special_tokens=False)["input_ids"],
    )
    begin = (
        with_marks[:1]
        if with_marks[0] == tokenizer.bos_token_id and with_marks[:1] != bare[:1]
        else []
    )
    length = min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)
    step = length - len(begin)
    parts = [begin + ids[at : at + step] for at in range(0, len(ids), step)]
    whole = [part for part in parts if len(part) == length]
    rest = [part for part in parts if 1 < len(part) < length]
    batches = [torch.tensor(whole[at : at + batch_size]) for at in range(0, len(whole), batch_size)]
    batches += [torch.tensor([part]) for part in rest]
    if not batches:
        raise DataError(f"the text has {len(ids)} tokens, expected 2 or more: give a longer text")
    return batches


def check_tokenizer(
    other: Any, tokenizer: Tokenizer, content: str, ids: list[int], path: str
) -> None:
    """Refuse a tokenizer that would make other tokens of the text.

    Args:
        other: of the model at `path`.
        tokenizer: of the base.
        content: the text.
        ids: the base's tokens of it, or the first of them.
        path: for the message.

    Raises:
        InputError: another vocabulary, or another split of the text.
    """
    theirs, ours = other.get_vocab(), tokenizer.get_vocab()
    odd = sorted({*theirs.items()} ^ {*ours.items()})
    if odd:
        raise InputError(
            f"{path} has another tokenizer than the base: {json.dumps(odd[0][0])} is {theirs.get(odd[0][0])} there and "
            f"{ours.get(odd[0][0])} in the base. Compare models with one vocabulary"
        )
    if encode(other, content)[: len(ids)] != ids:
        raise InputError(
            f"{path} has the base's vocabulary and splits the text otherwise: copy the base's tokenizer"
        )


@torch.no_grad()
def compare(base: Any, model: Any, batch: Tensor, name: str) -> list[Compared]:
    """Compare what two models say of each window of a batch.

    Args:
        base: a causal language model.
        model: another, maybe on another device; or the base itself.
        batch: token ids [windows, tokens].
        name: of the model, for the message.

    Raises:
        InputError: another number of logits.
    """
    ours = base(input_ids=batch.to(device_of(base))).logits[:, :-1]
    theirs = ours if model is base else model(input_ids=batch.to(device_of(model))).logits[:, :-1]
    if theirs.shape != ours.shape:
        raise InputError(
            f"{name} gives {theirs.shape[-1]} logits and the base {ours.shape[-1]}: one was padded or resized, and "
            "their distributions are over different tokens"
        )
    return [
        _compare(*window)
        for window in zip(ours, theirs.to(ours.device), batch[:, 1:].to(ours.device), strict=True)
    ]


def device_of(model: Any) -> torch.device:
    """Where its inputs belong."""
    return torch.device(next(model.parameters()).device)


def _compare(base: Tensor, model: Tensor, labels: Tensor) -> Compared:
    """Two models' logits [tokens, vocabulary] on what comes next [tokens]."""
    base_loss = loss = kl = 0.0
    agreed, differences = 0, []
    rows = max(1, PIECE // base.shape[-1])
    pieces = (torch.split(tensor, rows) for tensor in (base, model, labels))
    for ours, theirs, right in zip(*pieces, strict=True):
        ours, theirs, right = ours.float(), theirs.float(), right[:, None]
        differences.append(float((ours - theirs).abs().max()))
        agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
        base_loss -= float(log_p.gather(-1, right).double().sum())
        loss -= float(log_q.gather(-1, right).double().sum())
        log_p, log_q = log_p.double(), log_q.double()
        p, q = log_p.exp(), log_q.exp()
        # `q - p` sums to zero but for the rounding of both norms, which it takes out: no term is
        # below zero.
        kl += float((p * (log_p - log_q) + q - p).sum())
    return Compared(len(labels), base_loss, loss, kl, agreed, largest(differences))


def largest(values: Sequence[float]) -> float:
    """The largest one, NaN where one is not finite: `max` passes over NaN."""
    return max(values) if all(map(math.isfinite, values)) else math.nan


def mean(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Mean of a token, and its standard error over windows, which may differ in length (a ratio
    estimate).

    Args:
        sums: of each window.
        counts: tokens in each window.

    Returns:
        NaN where a sum is not finite; no error for one window.
    """
    total, windows = sum(counts), len(counts)
    if not all(map(math.isfinite, sums)):
        return math.nan, None
    value = math.fsum(sums) / total
    if windows < 2:
        return value, None
    squares = math.fsum((one - value * count) ** 2 for one, count in zip(sums, counts, strict=True))
    return value, math.sqrt(squares * windows / (windows - 1)) / total


def mean_row(name: str, kind: str, identity: Json, dtype: str, found: Sequence[Compared]) -> Row:
    """One model over all windows.

    Args:
        name: as the model was named.
        kind: of its folder.
        identity: path, kind, digest.
        dtype: it computed in.
        found: of its windows, one or more.
    """
    counts = [one.tokens for one in found]
    loss, loss_error = mean([one.loss for one in found], counts)
    difference, error = mean([one.loss - one.base_loss for one in found], counts)
    ratio = _exp(difference)
    return Row(
        name, kind, dtype, identity,
        loss, loss_error, _exp(loss), difference, error, ratio, None if error is None else ratio * error,
        *mean([one.kl for one in found], counts),
        *mean([one.agreed for one in found], counts),
        largest([one.largest for one in found]),
    )  # fmt: skip


def _exp(value: float) -> float:
    return math.inf if value > 709 else math.exp(value)
