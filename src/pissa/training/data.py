"""Rows of a data set: read from a file, a folder or the Hub, each with the place it came from."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pissa.config import TrainSettings
from pissa.errors import DataError, require
from pissa.untyped import Json


@dataclass(frozen=True)
class Row:
    """One row of a data set.

    Attributes:
        fields: column name to value.
        where: file and line (file and row for parquet, split and row for the Hub), for messages.
    """

    fields: Json
    where: str


@dataclass(frozen=True)
class Rows:
    """What a run reads: rows to train on, rows to evaluate on, and where both came from.

    Attributes:
        train: rows to train on.
        evaluation: rows to evaluate on; empty for none.
        old: rows of what the model knew before; empty for none.
        sources: name, SHA-256 (of the file; of the rows for the Hub) and number of rows read, per
            source.
    """

    train: list[Row]
    evaluation: list[Row]
    sources: list[Json]
    old: list[Row] = field(default_factory=list)


def load_rows(settings: TrainSettings) -> Rows:
    """Read `data`, `eval_data` and `old_data`, rename columns by `fields`, hold out `eval_size`.

    Raises:
        DataError: naming file and line.
    """
    train, source = read(settings.data, settings.data_split)
    train = train[: settings.data_limit or None]
    sources = [source | {"rows": len(train)}]
    if settings.eval_data:
        evaluation, source = read(settings.eval_data, settings.eval_split)
        evaluation = evaluation[: settings.eval_limit or None]
        sources.append(source | {"rows": len(evaluation)})
    else:
        train, evaluation = hold_out(train, settings.eval_size, settings.seed)
    old: list[Row] = []
    if settings.old_data:
        old, source = read(settings.old_data, settings.old_split)
        old = old[: settings.eval_limit or None]
        sources.append(source | {"rows": len(old)})
    return Rows(renamed(train, settings.fields), renamed(evaluation, settings.fields), sources, old)


def read(data: str, split: str) -> tuple[list[Row], Json]:
    """All rows of a source, and what to record of it.

    Args:
        data: a file, a folder that holds `split`.(json|jsonl|csv|tsv|parquet), or a Hub
            id[:subset].
        split: which one, of a folder or the Hub; unused for a file.

    Raises:
        DataError: no such source, a broken row, or no row at all.
    """
    path = Path(data).expanduser()
    if not path.exists():
        return _read_hub(data, split)
    if path.is_dir():
        path = _file_of_split(path, split)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(READERS)}")
    try:
        rows = list(reader(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}): convert it") from error
    if not rows:
        raise DataError(f"{path} holds no rows")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return rows, {"name": str(path), "sha256": digest}


def hold_out(rows: list[Row], size: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split off `size` rows (below 1: that share) by a seeded draw; both parts keep the file's order."""
    count = round(size * len(rows)) if size < 1 else int(size)
    if size and not 0 < count < len(rows):
        raise DataError(
            f"eval_size {size:g} takes {count} of {len(rows)} rows, expected some to train and some to hold out"
        )
    held = set(random.Random(seed).sample(range(len(rows)), count))
    kept = [row for index, row in enumerate(rows) if index not in held]
    return kept, [rows[index] for index in sorted(held)]


def check_rows(rows: list[Row], problem: Callable[[Row], str | None]) -> None:
    """Raise one DataError for the first row with a problem, with the number of others."""
    found = [(row, text) for row in rows if (text := problem(row))]
    if found:
        row, text = found[0]
        more = f" ({len(found) - 1} more rows are wrong too)" if len(found) > 1 else ""
        raise DataError(f"{row.where}: {text}{more}")


def renamed(rows: list[Row], names: Mapping[Any, str]) -> list[Row]:
    """Columns under the names that `fields` gives them."""
    if not names:
        return rows

    def lacks(row: Row) -> str | None:
        missing = [repr(name) for name in names.values() if name not in row.fields]
        return (
            f"got fields {', '.join(row.fields)}, expected {', '.join(missing)} as `fields` says"
            if missing
            else None
        )

    check_rows(rows, lacks)
    taken = set(names.values())
    return [
        Row(
            {key: value for key, value in row.fields.items() if key not in taken}
            | {known: row.fields[name] for known, name in names.items()},
            row.where,
        )
        for row in rows
    ]


def _file_of_split(folder: Path, split: str) -> Path:
    found = [path for suffix in READERS if (path := folder / f"{split}{suffix}").is_file()]
    if len(found) != 1:
        got = ", ".join(path.name for path in found) or "none"
        raise DataError(
            f"{folder}: got {got}, expected one file {split}.(json|jsonl|csv|tsv|parquet): name the file"
        )
    return found[0]


def _read_hub(data: str, split: str) -> tuple[list[Row], Json]:
    name, _, subset = data.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or Path(name).suffix in READERS:
        raise DataError(
            f"{data} does not exist: expected a file, a folder, or a Hub id such as openai/gsm8k:main"
        )
    datasets = require("datasets", "train")
    try:
        table = _load_hub(datasets, name, subset, split)
    except Exception as error:  # the Hub client raises many kinds
        raise DataError(
            f"{data} is no file here and split {split!r} cannot be had from the Hub: {error}"
        ) from error
    rows = [
        Row(dict(fields), f"{data}, {split}, row {index}") for index, fields in enumerate(table, 1)
    ]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.fields, sort_keys=True, default=str).encode())
    return rows, {"name": data, "split": split, "sha256": digest.hexdigest()}


def _load_hub(datasets: Any, name: str, subset: str, split: str) -> Any:
    """A subset is a named configuration, or a folder of a data set that names none."""
    try:
        return datasets.load_dataset(name, subset or None, split=split)
    except ValueError as error:
        if not subset or "BuilderConfig" not in str(error):
            raise
        return datasets.load_dataset(name, data_dir=subset, split=split)


def _read_json(path: Path) -> Iterator[Row]:
    """An array of objects, or objects one per line."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    position, line, counted = text.index("[") + 1, 1, 0
    try:
        while True:
            position = space.match(text, position).end()  # type: ignore[union-attr]
            line, counted = line + text.count("\n", counted, position), position
            if text[position : position + 1] == "]":
                return
            fields, position = decoder.raw_decode(text, position)
            yield _row(fields, f"{path}, line {line}")
            position = space.match(text, position).end()  # type: ignore[union-attr]
            if text[position : position + 1] == ",":
                position += 1
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})"
        ) from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})"
                ) from error
            yield _row(fields, f"{path}, line {number}")


def _row(fields: Any, where: str) -> Row:
    if not isinstance(fields, dict):
        raise DataError(
            f"{where}: got {type(fields).__name__}, expected an object with named fields"
        )
    return Row(fields, where)


def _read_table(path: Path, **dialect: Any) -> Iterator[Row]:
    # The default, 128 KiB, is less than a long document
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **dialect)
        try:
            header = next(reader, [])
            line = reader.line_num + 1
            for cells in reader:
                where, line = f"{path}, line {line}", reader.line_num + 1
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{where}: got {len(cells)} fields, expected {len(header)}: {', '.join(header)}"
                    )
                yield Row(dict(zip(header, cells, strict=True)), where)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _read_tsv(path: Path) -> Iterator[Row]:
    # As GLUE and most tab-separated sets are written: a quotation mark is a quotation mark.
    return _read_table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_csv(path: Path) -> Iterator[Row]:
    return _read_table(path, strict=True)


def _read_parquet(path: Path) -> Iterator[Row]:
    parquet = require("pyarrow.parquet", "train")
    try:
        table = parquet.read_table(path)
    except (ValueError, OSError) as error:  # pyarrow's errors are subclasses
        raise DataError(f"{path} is not a readable parquet file: {error}") from error
    for number, fields in enumerate(table.to_pylist(), 1):
        yield Row(fields, f"{path}, row {number}")


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
