"""results.html: models by benchmarks."""

from __future__ import annotations

import os
import re
import unicodedata
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
        rows: by model and task the cells of these columns, each of one or more lines; a task may be
            missing.
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
    """A score as all tables show it: value and error on one line, the interval on the next where
    there is one.

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


def title_of(key: str) -> str:
    """A score as the head of a column has it."""
    return TITLES.get(key, key.removesuffix(",none").replace(",", ", "))


def limited_to(one: TaskResult) -> str:
    """What was asked, where that is not all there is; else empty."""
    if "of" in one.data:
        return _asked(one) if one.data["rows"] < one.data["of"] else ""
    limit = one.settings.get("limit")
    return "" if limit is None else f"the first {limit:,} questions"


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
        key: title_of(key) for key in (headline, *(key for key, there in further.items() if there))
    }


def _cell(one: TaskResult, key: str, pair: Paired | None) -> list[str]:
    if key == "gold":
        return [number(one.gold.value)] if one.gold else ["–"]
    lines = figure(key, one.scores[key]) if key in one.scores else ["no number"]
    if key == one.headline and pair:
        lines.append(f"{100 * pair.difference:+.1f} points to the base")
        lines.append(f"{pair.won:,} won, {pair.lost:,} lost of {pair.count:,}, p = {pair.p:.2g}")
    if key == one.headline and limited_to(one):
        lines.append(f"only {limited_to(one)}")
    return lines


def _others(one: TaskResult) -> dict[str, list[str]]:
    """Scores that the table leaves out."""
    return {
        title_of(k): figure(k, score)
        for k, score in one.scores.items()
        if k not in (one.headline, "authors")
    }


def _asked(one: TaskResult) -> str:
    """How many questions, and of how many where not all were asked."""
    rows, of = one.data["rows"], one.data.get("of")
    return f"{rows:,} questions" if of in (None, rows) else f"{rows:,} of {of:,} questions"


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
        (f"{one.task}: not all questions were asked, only {limited_to(one)}", one)
        for one in found
        if limited_to(one)
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
