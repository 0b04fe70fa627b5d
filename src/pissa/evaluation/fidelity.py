"""How near models are to their base on a fixed text: before and after decomposing, quantising, converting, merging."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pissa.checkpoint.fingerprint import check_same, model_tensors
from pissa.checkpoint.output import write_json
from pissa.checks import chosen_device
from pissa.config import TrainSettings
from pissa.errors import InputError, OutputError, WrongBaseError
from pissa.evaluation.model import Subject, record_of, refuse_inside, subject
from pissa.evaluation.windows import (
    Compared,
    Row,
    check_tokenizer,
    compare,
    device_of,
    encode,
    mean_row,
    read_text,
    windows,
)
from pissa.records import Record, versions
from pissa.surgery.folders import RESIDUAL
from pissa.training.models import load_tokenizer
from pissa.training.opening import Opened
from pissa.untyped import Json
from pissa.w4a4 import load_w4a4

FORMAT, FILE = 1, "fidelity.json"
WHOLE = ("model", "merged", "hub")
"""Kinds that can be a base."""


@dataclass(frozen=True)
class Fidelity:
    """Several models beside one base.

    Attributes:
        base: path, kind, digest.
        text: name, sha256, tokens read, tokens predicted, windows and their length.
        device: the models were on.
        rows: the base, then the models in the order they were named.
        notes: what a reader must know: logits that are not finite, another dtype than the base's.
        versions: of the packages that matter.
    """

    base: Json
    text: Json
    device: str
    rows: list[Row]
    notes: list[str]
    versions: dict[str, str]

    def to_json(self) -> Json:
        """Everything."""
        said = asdict(self)
        for row in said["rows"]:
            row |= {
                key: None
                for key, value in row.items()
                if isinstance(value, float) and not math.isfinite(value)
            }
        return {"format": FORMAT, **said}


def fidelity(
    models: Sequence[str],
    text: str | Path,
    output: str | Path | None = None,
    *,
    base: str | None = None,
    max_length: int = 512,
    limit_tokens: int | None = None,
    batch_size: int = 4,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str, str, int, int], None] = lambda where, what, done, total: None,
) -> Fidelity:
    """Compare models with their base on a text; the base and one other model are in memory at a
    time.

    A decomposed folder is its residual with its start put back. A run is what it trained, and once
    more its plain LoRA on its base, so that a wrong export shows.

    Args:
        models: folders: decomposed, in few bits, runs, plain LoRAs, merged, w4a4, any model with
            the base's tokenizer.
        text: a UTF-8 file, or rows with a field `text`.
        output: a folder for `fidelity.json`, which is replaced, outside of all models; None writes
            nothing.
        base: the original model. Default: the one that all records name.
        max_length: tokens in a window, 2 or more; fewer where the base has fewer positions. Windows
            do not overlap and begin with BOS where the tokenizer writes one.
        limit_tokens: read the first so many tokens; None for all.
        batch_size: windows at a time, 1 or more.
        device: cpu, cuda, cuda:1. Default: cuda where there is one.
        dtype: float32, bfloat16 or float16. Default: each as stored, a run as trained. Models in
            few bits compute in the dtype that their config says, whatever this is; a note tells of
            it where it is not the base's.
        trust_remote_code: run Python code that comes with a model.
        say: told (model, what, done, in all).

    Raises:
        WrongBaseError: a model that was made from another base, or several bases on record.
        InputError: no base, no such device, another tokenizer, another number of logits, or
            settings below their least.
        DataError: no such text, or too little of it.
        OutputError: the output is no folder, or is or lies inside a model.
    """
    for name, value, least in (("max_length", max_length, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise InputError(f"{name} is {value}, expected {least} or more")
    chosen_device(device)
    content, source = read_text(Path(text))
    loading: Json = {
        "device": device,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    subjects = [subject(path, **loading) for path in models]
    records = [record_of(one) for one in subjects]
    origin = subject(base or _common_base(subjects, records), **loading)
    if origin.identity["kind"] not in WHOLE:
        raise InputError(
            f"the base {origin.path} is a {origin.identity['kind']} folder, expected a whole model"
        )
    if output is not None:
        refuse_inside(Path(output), [*subjects, origin])
    opened = origin.open()
    _check_bases(subjects, records, origin, opened.model)
    ids = encode(opened.tokenizer, content)[:limit_tokens]
    batches = windows(opened.model, opened.tokenizer, ids, max_length, batch_size)
    _prepare(output)
    count = sum(len(batch) for batch in batches)
    facts = {
        **source,
        "tokens": len(ids),
        "predicted": sum(batch[:, 1:].numel() for batch in batches),
        "windows": count,
        "max_length": batches[0].shape[1],
    }

    def row(name: str, kind: str, identity: Json, other: Any) -> Row:
        found: list[Compared] = []
        for batch in batches:
            found += compare(opened.model, other, batch, name)
            say(name, kind, len(found), count)
        return mean_row(name, kind, identity, _dtype(other), found)

    rows = [row(origin.path, "base", origin.identity, opened.model)]
    for one, record in zip(subjects, records, strict=True):
        if Path(one.path).resolve() == Path(origin.path).resolve():
            continue
        for kind, load in _forms(one, record, origin.path):
            other = load()
            check_tokenizer(other.tokenizer, opened.tokenizer, content, ids, one.path)
            rows.append(row(one.path, kind, one.identity, other.model))
            del other
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    result = Fidelity(
        origin.identity, facts, str(device_of(opened.model)), rows, _notes(rows), versions()
    )
    if output is not None:
        write_json(Path(output) / FILE, result.to_json())
    return result


def _prepare(output: str | Path | None) -> None:
    if output is None:
        return
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output} cannot be made ({error}): choose another folder") from error


def _common_base(subjects: Sequence[Subject], records: Sequence[Record | None]) -> str:
    pairs = zip(subjects, records, strict=True)
    named = {one.path: record.base for one, record in pairs if record and record.base}
    if not named:
        raise InputError("none of the models has its base on record: name it with --base")
    # One base has another digest where it was loaded in another dtype, and another name where it
    # was copied.
    names, digests = (
        {getattr(base, key) for base in named.values()} for key in ("name", "fingerprint")
    )
    if len(names) > 1 and len(digests) > 1:
        said = "; ".join(f"{path} was made from {base.name}" for path, base in named.items())
        raise WrongBaseError(
            f"the models have several bases, expected one: {said}. Compare those of one base"
        )
    return str(next(iter(named.values())).name)


def _check_bases(
    subjects: Sequence[Subject],
    records: Sequence[Record | None],
    origin: Subject,
    model: torch.nn.Module,
) -> None:
    """Before anything is run, because a layer in few bits may be repacked then."""
    tensors = model_tensors(model)
    for one, record in zip(subjects, records, strict=True):
        if record and record.base:
            advice = f"Use the base it was made on: {record.base.name}"
            check_same(
                record.base.tensors,
                tensors.get,
                what=f"{one.path}, compared with {origin.path},",
                advice=advice,
            )


def _forms(
    one: Subject, record: Record | None, base: str
) -> list[tuple[str, Callable[[], Opened]]]:
    """The models that a path stands for, by kind, each loaded when it is its turn."""
    kind, folder = str(one.identity["kind"]), Path(one.path)
    beside = record.beside if record else None

    def load(path: Path, on: str | None) -> Callable[[], Opened]:
        return replace(one, path=str(path), base=on).open

    if kind == "w4a4":
        return [(kind, lambda: _open_w4a4(one))]
    if kind == "run" and (folder / "adapter").is_dir():
        own = str(folder / RESIDUAL) if (folder / RESIDUAL).is_dir() else None
        trained = load(folder, None if beside else base)
        converted = load(folder / "adapter", own if beside else base)
        return [(kind, trained), ("run, converted", converted)]
    needs_base = kind in ("state", "lora") and not beside
    return [(kind, load(folder, base if needs_base else None))]


def _open_w4a4(one: Subject) -> Opened:
    model = load_w4a4(
        one.path, device=str(chosen_device(one.device)), trust_remote_code=one.trust_remote_code
    )
    settings = {
        "model": one.path,
        "data": "none",
        "output": "none",
        "trust_remote_code": one.trust_remote_code,
    }
    return Opened(
        model,
        load_tokenizer(TrainSettings.model_validate(settings)),
        "w4a4",
        one.path,
        None,
        None,
        {},
    )


def _notes(rows: Sequence[Row]) -> list[str]:
    base = rows[0]
    said = [
        f"{row.model} ({row.kind}): not all logits are finite here or in the base, so its figures say nothing"
        for row in rows
        if not math.isfinite(row.largest)
    ]
    return said + [
        f"{row.model} ({row.kind}) computes in {row.dtype} and the base in {base.dtype}, so a part of the difference "
        "is rounding: --dtype makes them equal, but for models in few bits, which compute as their config says"
        for row in rows
        if row.dtype != base.dtype
    ]


def _dtype(model: Any) -> str:
    """Of the first weight that is not in few bits."""
    return str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix(
        "torch."
    )
