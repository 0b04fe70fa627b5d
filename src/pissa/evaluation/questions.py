"""The questions of each benchmark, from local files or from the Hub, with what makes them the same questions again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pissa.errors import DataError
from pissa.training.data import READERS, read
from pissa.untyped import Json


@dataclass(frozen=True)
class Source:
    """Where a benchmark's rows are.

    Attributes:
        hub: data set and subset on the Hub.
        split: there.
        files: under `--data`, without their ending; the first one that is there.
        columns: that every row must have, after `_named`.
    """

    hub: str
    split: str
    files: tuple[str, ...]
    columns: tuple[str, ...]


SOURCES = {
    "gsm8k": Source("openai/gsm8k:main", "test", ("gsm8k/test", "gsm8k"), ("question", "answer")),
    "math": Source(
        "HuggingFaceH4/MATH-500",
        "test",
        ("math/test", "math500/test", "math"),
        ("problem", "answer"),
    ),
    "humaneval": Source(
        "openai/openai_humaneval",
        "test",
        ("humaneval/HumanEval", "humaneval/test", "HumanEval"),
        ("task_id", "prompt", "entry_point", "canonical_solution", "test"),
    ),
    "mbpp": Source(
        "google-research-datasets/mbpp:full",
        "test",
        ("mbpp/mbpp", "mbpp/test", "mbpp"),
        ("task_id", "text", "test_list"),
    ),
    "mt_bench": Source(
        "HuggingFaceH4/mt_bench_prompts",
        "train",
        ("mt_bench/question", "mt_bench/test"),
        ("id", "category", "turns"),
    ),
}
EXAMPLES = {
    "gsm8k": Source("openai/gsm8k:main", "train", ("gsm8k/train",), ("question", "answer")),
    "mbpp": Source(
        "google-research-datasets/mbpp:full",
        "prompt",
        ("mbpp/mbpp", "mbpp/prompt"),
        ("text", "code"),
    ),
}
"""Of the few-shot prompts of the standard track, where a task draws them from its data."""
MBPP_TEST = range(11, 511)
"""Numbers of the test questions (Austin et al. 2021, section 2.1); the file has the others too."""


@dataclass(frozen=True)
class Questions:
    """Rows of one benchmark.

    Attributes:
        rows: as the data set has them, under one set of names.
        source: name and digest, and how many rows there are of how many.
        examples: for the few-shot prompts of the standard track, where they are drawn from data.
    """

    rows: list[Json]
    source: Json
    examples: Questions | None = None


def questions(
    task: str, data: str | Path | None = None, limit: int | None = None, *, whole: bool = False
) -> Questions:
    """The questions of a benchmark.

    Args:
        task: a key of `SOURCES`.
        data: a folder with local files; None for the Hub.
        limit: use the first so many; None for all.
        whole: of MBPP also those that are not for testing, where the file has them.

    Raises:
        DataError: no such file or data set, or a row that lacks a column.
    """
    tests = MBPP_TEST if task == "mbpp" and not whole else None
    return _read(task, SOURCES[task], data, limit, tests)


def examples(task: str, data: str | Path | None = None) -> Questions | None:
    """What few-shot prompts are drawn from; None where the protocol brings its own."""
    return _read(task, EXAMPLES[task], data) if task in EXAMPLES else None


def _read(
    task: str,
    source: Source,
    data: str | Path | None,
    limit: int | None = None,
    tests: range | None = None,
) -> Questions:
    place = source.hub if data is None else str(_file(task, source, Path(data).expanduser()))
    found, facts = read(place, source.split)
    rows = [_named(task, row.fields) for row in found]
    for row, said in zip(rows, found, strict=True):
        if missing := [name for name in source.columns if row.get(name) is None]:
            raise DataError(
                f"{said.where}: got fields {', '.join(said.fields)}, expected {', '.join(missing)} for {task}"
            )
    if tests is not None and len(rows) > len(tests):
        rows = [row for row in rows if int(row["task_id"]) in tests]
    kept = rows[:limit]
    return Questions(kept, {**facts, "rows": len(kept), "of": len(rows)})


def _file(task: str, source: Source, folder: Path) -> Path:
    names = [f"{name}{suffix}" for name in source.files for suffix in READERS]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    stems = " or ".join(source.files)
    raise DataError(
        f"{folder} holds no {stems} ({', '.join(READERS)}), where the questions of {task} are looked for"
    )


def _named(task: str, fields: Json) -> Json:
    """Local files and the Hub name some columns in two ways."""
    row = dict(fields)
    if task == "math":
        row.setdefault("answer", row.get("solution"))  # the whole MATH has only the worked solution
    if task == "mt_bench":
        row = {
            "id": row.get("question_id", row.get("prompt_id")),
            "category": row.get("category"),
            "turns": row.get("turns", row.get("prompt")),
            "reference": row.get("reference") or [],
        }
    return row
