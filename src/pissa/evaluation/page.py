"""results.html: models by benchmarks; MODEL/TASK.html: each answer, to be browsed without a script."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pissa.evaluation.paired import Paired, against_base, bases, bases_first
from pissa.evaluation.result import SHARES, Perplexity, Score, TaskResult
from pissa.evaluation.tracks import TRACKS, file_stem
from pissa.reports.page import cell, number, plain, render, write_page

TITLES = {
    "ours": "our scorer", "authors": "authors' scorer", "gold": "perplexity", "judge": "judge, 1 to 10",
    "": "no judge",
}  # fmt: skip
MOST = 5000
"""Answers on a page: as many as the largest of our benchmarks has."""
READING = (
    "A share is given with its standard error; below it is Wilson's 95 % interval. Both say what another draw of as "
    "many questions could change, not what another training would.",
    "Against the base, answer by answer: won is right here and wrong there, lost the reverse. p is McNemar's exact "
    "test, two-sided, not corrected for the number of comparisons.",
    "Our scorer compares exact values. The authors' scorer does what the scripts of the PiSSA paper do, faults and "
    "all: a number has one separator, so 1,234,567 is 1234; it is rounded, so 3.7 passes for 4; code is cut at the "
    "first assert. It is here to be compared with the paper's tables, and for nothing else.",
    "Perplexity is that of the right answers behind their prompts, of all tokens together; lower is better.",
    "The paper track asks in Alpaca's prompt and without examples, the standard track as lm-evaluation-harness does. "
    "Their numbers answer different questions, so they never share a column.",
    "MT-Bench is scored by a judge. Without one it has answers, and no number.",
)


@dataclass(frozen=True)
class Table:
    """One track.

    Attributes:
        track: its name.
        columns: by task its columns, key to title.
        rows: by model and task the cells of these columns, each of one or more lines; a task may be missing.
        bases: the models that others name as theirs, on any track.
    """

    track: str
    columns: dict[str, dict[str, str]]
    rows: dict[str, dict[str, list[list[str]]]]
    bases: list[str]


def write_results(found: list[TaskResult], out: Path) -> Path:
    """Write OUT/results.html; differences to the base are counted in OUT/MODEL/TASK.samples.jsonl.

    Args:
        found: one or more results, all below `out`.
        out: the folder of the evaluation.

    Raises:
        OutputError: it cannot be written.
    """
    found = bases_first(found)
    pairs = {
        (one.model, one.task, one.track): pair
        for one in found
        if (pair := against_base(one, found, out))
    }
    packages = sorted({name for one in found for name in one.versions})
    html = render(
        "results.html",
        tables=tables(found, pairs),
        tasks=_by(found, lambda one: (one.task, one.track, one.protocol)),
        warnings=_warnings(found),
        reading=READING,
        models={one.model: one.identity for one in found},
        asked=_asked,
        others=_others,
        settings=_settings,
        link=lambda model, task, track: quote(
            os.fsencode(f"{model}/{file_stem(task, track)}.html")
        ),
        versions={
            name: sorted({one.versions.get(name, "none") for one in found}) for name in packages
        },
    )
    return write_page(out / "results.html", visible(html))


def write_answers(result: TaskResult, samples: list[dict[str, Any]], path: Path) -> Path:
    """Write the page of one model's answers to one benchmark; past the first 5,000 it says that it leaves some out.

    Args:
        result: what they came to.
        samples: id, correct (None without a verdict), extracted, reason, authors, prompt, output, gold.
        path: of the HTML file, OUT/MODEL/TASK.html.

    Raises:
        OutputError: it cannot be written.
    """
    answers = [_answer(sample) for sample in samples]
    wrong = [answer for answer in answers if answer["verdict"] == "wrong"]
    shown = answers[:MOST]
    html = render(
        "answers.html",
        result=result,
        stem=file_stem(result.task, result.track),
        limited=_limited(result),
        shown=shown,
        count=len(answers),
        verdicts=Counter(answer["verdict"] for answer in answers),
        filters=_filters(shown),
        reasons=Counter(answer["reason"] or "no reason given" for answer in wrong).most_common(),
        scored_twice=any(answer["authors"] for answer in answers),
        only_ours=sum(answer["disagree"] and answer["verdict"] == "right" for answer in answers),
        only_authors=sum(answer["disagree"] and answer["verdict"] == "wrong" for answer in answers),
        figures={_title(name): figure(name, score) for name, score in result.scores.items()},
    )
    return write_page(path, visible(html))


def results_table(found: list[TaskResult]) -> list[str]:
    """The numbers of results.html as Markdown, one table a track.

    Returns:
        Lines without their ends.
    """
    lines: list[str] = []
    for table in tables(found):
        titles = [
            f"{task}, {title}" for task, group in table.columns.items() for title in group.values()
        ]
        lines += [f"{table.track.capitalize()} track:", ""]
        lines += [_row("model", *titles), _row("---", *["---:"] * len(titles))]
        for model, by_task in table.rows.items():
            cells = [
                by_task.get(task, [["–"]] * len(group)) for task, group in table.columns.items()
            ]
            lines.append(_row(model, *("; ".join(inside) for group in cells for inside in group)))
        lines.append("")
    return lines[:-1]


def tables(
    found: Sequence[TaskResult], pairs: Mapping[tuple[str, str, str], Paired] | None = None
) -> list[Table]:
    """One table a track: bases first, then the others in their order.

    Args:
        found: the results.
        pairs: by model, task and track, how it compares with its base.
    """
    made = []
    by_track = _by(bases_first(found), lambda one: one.track)
    for track, own in sorted(by_track.items(), key=lambda item: TRACKS.index(item[0])):
        columns = {task: _columns(group) for task, group in _by(own, lambda one: one.task).items()}
        rows = {
            model: {
                one.task: [
                    _cell(one, key, (pairs or {}).get((model, one.task, track)))
                    for key in columns[one.task]
                ]
                for one in group
            }
            for model, group in _by(own, lambda one: one.model).items()
        }
        made.append(Table(track, columns, rows, bases(found)))
    return made


def figure(key: str, score: Score) -> list[str]:
    """A score as all tables show it: value and error on one line, the interval on the next where there is one.

    Args:
        key: of the score; those of `SHARES` are in percent, others in the scorer's own unit.
        score: what it came to.
    """
    if key.rpartition(": ")[2].partition(",")[0] not in SHARES:
        return [
            number(score.value) + ("" if score.stderr is None else f" ± {number(score.stderr)}")
        ]
    error = "" if score.stderr is None else f" ± {100 * score.stderr:.1f}"
    between = (
        ["{:.1f}–{:.1f}".format(*(100 * end for end in score.interval))] if score.interval else []
    )
    return [f"{100 * score.value:.1f}{error} %", *between]


def visible(text: str) -> str:
    """Characters that a reader would not see, or that turn what follows around, by their code: ⟨U+202E⟩."""
    return re.sub(r"[^\x20-\x7e\n\t]", lambda found: _seen(found[0]), text)


def _seen(character: str) -> str:
    kind = unicodedata.category(character)
    return f"⟨U+{ord(character):04X}⟩" if kind[0] == "C" or kind in ("Zl", "Zp") else character


def _row(*cells: str) -> str:
    return f"| {' | '.join(map(cell, cells))} |"


def _by(
    found: Iterable[TaskResult], key: Callable[[TaskResult], Any]
) -> dict[Any, list[TaskResult]]:
    groups: dict[Any, list[TaskResult]] = {}
    for one in found:
        groups.setdefault(key(one), []).append(one)
    return groups


def _columns(group: Sequence[TaskResult]) -> dict[str, str]:
    """Of one task: all its results are of one track, and have one headline."""
    headline = next((one.headline for one in group if one.headline), "")
    further = {
        "authors": any("authors" in one.scores for one in group),
        "gold": any(one.gold for one in group),
    }
    return {
        key: _title(key) for key in (headline, *(key for key, there in further.items() if there))
    }


def _cell(one: TaskResult, key: str, pair: Paired | None) -> list[str]:
    if key == "gold":
        return [number(one.gold.value)] if one.gold else ["–"]
    lines = figure(key, one.scores[key]) if key in one.scores else ["no number"]
    if key == one.headline and pair:
        lines.append(f"{100 * pair.difference:+.1f} points to the base")
        lines.append(f"{pair.won:,} won, {pair.lost:,} lost of {pair.count:,}, p = {pair.p:.2g}")
    if key == one.headline and _limited(one):
        lines.append(f"only {_limited(one)}")
    return lines


def _title(key: str) -> str:
    return TITLES.get(key, key.removesuffix(",none").replace(",", ", "))


def _others(one: TaskResult) -> dict[str, list[str]]:
    """Scores that the table leaves out."""
    return {
        _title(k): figure(k, score)
        for k, score in one.scores.items()
        if k not in (one.headline, "authors")
    }


def _asked(one: TaskResult) -> str:
    """How many questions, and of how many where not all were asked."""
    rows, of = one.data["rows"], one.data.get("of")
    return f"{rows:,} questions" if of in (None, rows) else f"{rows:,} of {of:,} questions"


def _limited(one: TaskResult) -> str:
    """What was asked, where that is not all there is; else empty."""
    if "of" in one.data:
        return _asked(one) if one.data["rows"] < one.data["of"] else ""
    limit = one.settings.get("limit")
    return "" if limit is None else f"the first {limit:,} questions"


def _settings(one: TaskResult) -> str:
    told = {
        key: value
        for key, value in one.settings.items()
        if key not in ("model", "task", "track", "data", "limit")
    }
    return ", ".join(f"{key.replace('_', ' ')} {plain(value)}" for key, value in told.items())


def _warnings(found: Sequence[TaskResult]) -> list[str]:
    """What must be known before a number is quoted, the same sentence once for all models."""
    notes = [
        (f"{one.task}: not all questions were asked, only {_limited(one)}", one)
        for one in found
        if _limited(one)
    ]
    notes += [(f"{one.task}: {note}", one) for one in found for note in one.notes]
    notes += [(f"{one.task}: {_cut(one.gold)}", one) for one in found if one.gold and one.gold.cut]
    told: dict[str, list[str]] = {}
    for said, one in notes:
        told.setdefault(said, []).append(one.model)
    lines = [f"{said} ({', '.join(models)})." for said, models in told.items()]
    for (task, track), group in _by(found, lambda one: (one.task, one.track)).items():
        if len({(one.data.get("sha256"), one.data["rows"]) for one in group}) > 1:
            lines.append(f"{task}, {track} track: not all models were asked the same questions.")
    if len({tuple(sorted(one.versions.items())) for one in found}) > 1:
        lines.append("The results were made with different versions of the packages, see below.")
    return lines


def _cut(gold: Perplexity) -> str:
    return f"{gold.cut:,} of {gold.answers:,} right answers do not fit the model: perplexity is of the part that does"


def _answer(sample: Mapping[str, Any]) -> dict[str, Any]:
    """One answer as the page shows it."""
    correct, authors = sample["correct"], sample["authors"]
    return {
        "id": sample["id"],
        "verdict": _verdict(correct),
        "disagree": bool(authors) and correct is not None and authors["correct"] != correct,
        "reason": sample["reason"],
        "authors": {**authors, "verdict": _verdict(authors["correct"])} if authors else None,
        "taken": _short(_text(sample["extracted"])),
        "wanted": _short(_text(sample["gold"]).rpartition("####")[2]),
        **{key: _text(sample[key]) for key in ("prompt", "output", "extracted", "gold")},
    }


def _verdict(correct: bool | None) -> str:
    return "no verdict" if correct is None else "right" if correct else "wrong"


def _text(value: object) -> str:
    return "" if value is None else plain(value)


def _short(text: str, most: int = 60) -> str:
    return line if len(line := " ".join(text.split())) <= most else f"{line[:most]}…"


def _filters(answers: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, int]]:
    """By name the label of a filter and how many answers it shows; what none has, needs none."""
    counts = Counter(answer["verdict"] for answer in answers)
    filters = {
        "all": ("all", len(answers)),
        "right": ("right", counts["right"]),
        "wrong": ("wrong", counts["wrong"]),
    }
    if counts["no verdict"]:
        filters["open"] = ("no verdict", counts["no verdict"])
    if any(answer["authors"] for answer in answers):
        filters["disagree"] = ("scorers disagree", sum(answer["disagree"] for answer in answers))
    return filters
