"""The rows of GLUE's tasks, checked and staged for runs.

They are in official files, in files with the Hub's columns, or on the Hub.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pissa.checkpoint.output import read_json, staged_output, write_json
from pissa.errors import DataError, OutputError
from pissa.evaluation.glue_tasks import TASKS, Task, plain
from pissa.training.data import Row, check_rows, hold_out, read
from pissa.untyped import Json

HUB = "nyu-mll/glue"
SUFFIXES = (".tsv", ".parquet", ".jsonl")
HELD_OUT = 0.2
"""Share of dev to measure on, where there is nothing else to train on than the rest of it."""
TORN = 1 / 1000
"""Rows that may have a wrong number of columns: QQP's official file has some, which the Hub leaves out too."""
FACTS = "data.json"


@dataclass(frozen=True)
class Loaded:
    """A task's rows.

    Attributes:
        task: which.
        rows: by part, train and the evaluation sets. Columns: sentence, or sentence1 and sentence2,
            and label.
        facts: by part `sources` (name, sha256, rows, torn lines left out) and `rows`; the training
            rows' `majority` class; and `split`, a sentence, where training rows were taken from
            dev.
    """

    task: Task
    rows: dict[str, list[Row]]
    facts: Json


def load(task: Task, data: str | None) -> Loaded:
    """Read and check a task's rows; test splits are never read, since their labels are not public.

    Args:
        task: which.
        data: folder of the tasks' folders; None for the Hub.

    Raises:
        DataError: missing files or wrong rows, with file and line.
    """
    found = {part: _part(task, part, data) for part in ("train", *task.parts)}
    first = task.parts[0]
    evaluation = found[first]
    if evaluation is None:
        raise DataError(
            f"{task.title}: got no file {_expected(first)} in its folder in {data}: put it there"
        )
    rows = {part: known[0] for part, known in found.items() if known}
    split = None
    if "train" not in rows:
        rows["train"], rows[first] = hold_out(evaluation[0], HELD_OUT, seed=0)
        split = f"trained and measured on parts of {first}, drawn with a seed, since there is no training file"
    counted = Counter(row.fields["label"] for row in rows["train"])
    facts = {
        "sources": {part: known[1] for part, known in found.items() if known},
        "rows": {part: len(known) for part, known in rows.items()},
        "split": split,
        "majority": counted.most_common(1)[0][0] if task.classes else None,
    }
    return Loaded(task, rows, facts)


def stage(loaded: Loaded, folder: Path) -> None:
    """Write FOLDER/train.jsonl and FOLDER/PART.jsonl for ordinary runs to read, and
    FOLDER/data.json.

    Raises:
        OutputError: FOLDER is there.
    """
    with staged_output(folder) as fresh:
        for part, rows in loaded.rows.items():
            lines = (json.dumps(row.fields, ensure_ascii=False) + "\n" for row in rows)
            (fresh / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        write_json(fresh / FACTS, loaded.facts)


def staged(loaded: Loaded, folder: Path) -> bool:
    """Whether FOLDER holds these rows already.

    Raises:
        OutputError: it holds other ones.
    """
    if not (folder / FACTS).is_file():
        return False
    if _content(read_json(folder / FACTS)) != _content(loaded.facts):
        names = ", ".join(source["name"] for source in loaded.facts["sources"].values())
        raise OutputError(
            f"{folder} holds other rows than {names}, and runs on both cannot be compared: choose another output"
        )
    return True


def _content(facts: Json) -> list[Any]:
    """What must be the same wherever the files lie."""
    return [facts["rows"], *({**source, "name": part} for part, source in facts["sources"].items())]


def _part(task: Task, part: str, data: str | None) -> tuple[list[Row], Json] | None:
    """A part's rows and their source, or None where a folder has no file for it."""
    if data is None:
        rows, source = read(f"{HUB}:{task.name}", part.replace("dev", "validation"))
        torn = 0
    else:
        file = _file(_folder(task, Path(data).expanduser()), part)
        if file is None:
            return None
        if file.suffix.lower() == ".tsv":
            rows, source, torn = _read_tsv(file, task)
        else:
            (rows, source), torn = read(str(file), part), 0
    rows = _checked(rows, task)
    return rows, {**source, "rows": len(rows), "left_out": torn}


def _folder(task: Task, data: Path) -> Path:
    if not data.is_dir():
        raise DataError(
            f"{data} is no folder: name one that holds {', '.join(t.title for t in TASKS.values())}"
        )
    folders = {plain(path.name): path for path in sorted(data.iterdir()) if path.is_dir()}
    if task.name in folders:
        return folders[task.name]
    names = ", ".join(path.name for path in folders.values()) or "none"
    raise DataError(
        f"{data} holds no folder {task.title} in any spelling, but {names}: "
        f"put GLUE's official files there, leave {task.name} out of --tasks, or leave out --data for the Hub"
    )


def _file(folder: Path, part: str) -> Path | None:
    """The file of a part: named so exactly, or the only one that begins so (train_10k.tsv, train-00000-of-00001...)."""
    stems = (part, part.replace("dev", "validation"))
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    begun = [path for path in files if path.stem.startswith(stems)]
    found = [path for path in begun if path.stem in stems] or begun
    if len(found) > 1:
        raise DataError(
            f"{folder}: got {', '.join(path.name for path in found)}, expected one file {_expected(part)}: "
            "leave one of them there"
        )
    return found[0] if found else None


def _expected(part: str) -> str:
    return f"{part}.({'|'.join(suffix[1:] for suffix in SUFFIXES)})"


def _read_tsv(path: Path, task: Task) -> tuple[list[Row], Json, int]:
    """Rows of an official file: tabs between columns, quotation marks are text, a line is a row."""
    # Unlike training's own reader, since there a torn row is an error and the first line has names.
    content = path.read_bytes()
    try:
        lines = [line.rstrip("\r") for line in content.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}): convert it") from error
    header = task.header or tuple(lines[0].split("\t"))
    rows, torn = [], []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and not task.header):
            continue
        cells = line.split("\t")
        if len(cells) == len(header):
            rows.append(Row(dict(zip(header, cells, strict=True)), f"{path}, line {number}"))
        else:
            torn.append(
                f"{path}, line {number}: got {len(cells)} columns, expected {len(header)}: {', '.join(header)}"
            )
    if len(torn) > TORN * len(rows):
        raise DataError(
            f"{torn[0]}. {len(torn)} of {len(lines)} lines are so: fetch the file again"
        )
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows, {"name": str(path), "sha256": hashlib.sha256(content).hexdigest()}, len(torn)


def _checked(rows: list[Row], task: Task) -> list[Row]:
    """The texts and the label alone, under names that training knows."""
    known = rows[0].fields
    columns = next(
        (names for names in (task.official, task.hub) if all(name in known for name in names)), None
    )
    if columns is None:
        raise DataError(
            f"{rows[0].where}: got columns {', '.join(known)}, expected those of {task.title}, "
            f"{', '.join(task.official)} or {', '.join(task.hub)}"
        )
    *texts, label = columns
    check_rows(rows, lambda row: _problem(row, texts, label, task))
    names = ("sentence",) if len(texts) == 1 else ("sentence1", "sentence2")
    return [
        Row(
            {name: row.fields[text] for name, text in zip(names, texts, strict=True)}
            | {"label": _label(row.fields[label], task)},
            row.where,
        )
        for row in rows
    ]


def _problem(row: Row, texts: list[str], label: str, task: Task) -> str | None:
    for text in texts:
        if not isinstance(row.fields.get(text), str):
            return f"expected a text in {text}, got {row.fields.get(text)!r}"
    if _label(row.fields.get(label), task) is None:
        expected = f"one of {', '.join(task.classes)}" if task.classes else "a score from 0 to 5"
        return f"expected {expected} in {label}, got {row.fields.get(label)!r}"
    return None


def _label(value: Any, task: Task) -> str | float | None:
    """A class's name or its index on the Hub, or a score; None for anything else."""
    if not task.classes:
        try:
            score = float(value)
        except (TypeError, ValueError):
            return None
        return score if math.isfinite(score) and 0 <= score <= 5 else None
    text = str(value)
    if text in task.classes:
        return text
    return task.classes[int(text)] if text.isdecimal() and int(text) < len(task.classes) else None
