"""The page of one run: its curves, what it changed in each layer, settings, data, and what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pissa.errors import DataError
from pissa.reports import panels
from pissa.reports.changes import Change, changes_of
from pissa.reports.commands import next_commands
from pissa.reports.curves import UNITS, read_metrics, series
from pissa.reports.page import render, svg, write_page
from pissa.reports.run_record import base_facts, defaults, read_run, set_by_hand
from pissa.untyped import Figure, Json

NAME = "report.html"
STATES = {
    "finished": "",
    "running": "It is not finished: it is still going, or it was stopped. What it changed is measured at its end.",
    "diverged": "It diverged and was stopped.",
}


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a run: one file, nothing else to load.

    Args:
        run: the folder that `pissa train` wrote; it may be going on, or have been killed.
        output: the HTML file. Default: report.html in the run.

    Returns:
        The file.

    Raises:
        CheckpointError: no run, or a damaged one.
        OutputError: the file cannot be written.

    Example:
        write_report("runs/pissa")
    """
    run = Path(run)
    record = read_run(run)
    lines = _lines(run)
    changes = changes_of(run) if record["status"] == "finished" else []
    page = render(
        "report.html",
        run=run.resolve().name,
        record=record,
        settings=record["settings"],
        state=STATES.get(record["status"], f"Its status is {record['status']}."),
        facts=_facts(record, lines),
        curves=_curves(record, lines),
        pictures=_pictures(changes),
        changes=_biggest(changes),
        turned=bool(changes) and bool(changes[0].left_angles),
        chosen=set_by_hand(record["settings"]),
        defaults=defaults(record["settings"]),
        base=base_facts(run, record),
        commands=next_commands(run, record),
    )
    return write_page(run / NAME if output is None else output, page)


def _lines(run: Path) -> list[Json]:
    """The metrics; none where nothing has been logged yet."""
    try:
        return read_metrics(run)
    except DataError:
        if (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size:
            raise
        return []


def _facts(record: Json, lines: list[Json]) -> list[tuple[str, Any, str]]:
    """(Name, value, filter) for the tiles at the top."""
    last = lines[-1] if lines else {}
    evaluations, old = series(lines, "eval_loss")[1], series(lines, "old_loss")[1]
    scores = {key.removeprefix("eval_"): series(lines, key)[1][-1] for key in _score_keys(lines)}
    facts = [
        ("optimiser steps", record.get("steps", last.get("step")), "number"),
        ("time", record.get("seconds", last.get("seconds")), "duration"),
        ("peak memory", record.get("peak_memory_bytes"), "size"),
        ("trained numbers", record.get("trainable_parameters"), "number"),
        ("evaluation loss, start", evaluations[0] if len(evaluations) > 1 else None, "number"),
        ("evaluation loss, end", evaluations[-1] if evaluations else None, "number"),
        ("loss on old data, start", old[0] if len(old) > 1 else None, "number"),
        ("loss on old data, end", old[-1] if old else None, "number"),
        *((name, value, "number") for name, value in scores.items()),
    ]
    return [fact for fact in facts if fact[1] is not None]


def _score_keys(lines: list[Json]) -> list[str]:
    keys = dict.fromkeys(key for line in lines for key in line)
    return [
        key
        for key in keys
        if key.startswith("eval_") and key != "eval_loss" and series(lines, key)[1]
    ]


def _curves(record: Json, lines: list[Json]) -> list[tuple[Figure, str]]:
    """(Picture, caption) of the course of the training."""
    if not lines:
        return []
    unit = UNITS[record["settings"].get("task", "language")]
    losses = series(lines, "loss")[1] or series(lines, "eval_loss")[1]
    alt = f"Loss over {lines[-1]['step']} steps, from {losses[0]:.3g} to {losses[-1]:.3g}"
    pictures = [
        (
            svg(panels.loss_figure(lines, unit), alt),
            "Pale: every logged step. Solid: their running mean.",
        )
    ]
    scores = _score_keys(lines)
    if scores:
        names = ", ".join(key.removeprefix("eval_") for key in scores)
        pictures.append(
            (
                svg(panels.score_figure(lines, scores), f"{names} at each evaluation"),
                f"Scores: {names}.",
            )
        )
    for key, label in panels.COURSES.items():
        if values := series(lines, key)[1]:
            words = f"{label} over the steps, between {min(values):.3g} and {max(values):.3g}"
            pictures.append(
                (svg(panels.course_figure(lines, key, label), words), f"{label.capitalize()}.")
            )
    return pictures


def _pictures(changes: list[Change]) -> dict[str, list[tuple[Figure, str]]]:
    """The pictures of the change by section: size, spectrum, turn."""
    biggest = _biggest(changes)
    if not biggest or not biggest[0].norm:
        return {"size": [], "spectrum": [], "turn": []}
    relative = all(change.relative is not None for change in changes)
    size = "|ΔW| / |W| (%)" if relative else "|ΔW|"
    made = panels.layers_figure(changes, _size, size, percent=relative)
    ranks = panels.layers_figure(
        changes, lambda change: change.effective_rank, "effective rank of ΔW"
    )
    sections = {
        "size": _figures([(made, f"{size} of every layer.")]),
        "spectrum": _figures(
            [
                (
                    panels.spectrum_figure(biggest),
                    "Singular values of ΔW, of the layers that changed most.",
                ),
                (
                    ranks,
                    "Effective rank of every layer: the exponential of the entropy of its singular values' shares.",
                ),
            ]
        ),
        "turn": [],
    }
    if biggest[0].left_angles:
        sides = {
            "left": lambda change: sum(change.left_angles) / len(change.left_angles),
            "right": lambda change: sum(change.right_angles) / len(change.right_angles),
        }
        maps = [
            (
                panels.layers_figure(changes, mean, "mean angle (degrees)"),
                f"Mean principal angle, {side} factor.",
            )
            for side, mean in sides.items()
        ]
        lines = "All principal angles of the layers that changed most; solid: left factor, dashed: right factor."
        sections["turn"] = _figures([(panels.angle_figure(biggest), lines), *maps])
    return sections


def _figures(made: Iterable[tuple[Figure | None, str]]) -> list[tuple[Figure, str]]:
    return [(svg(figure, caption), caption) for figure, caption in made if figure is not None]


def _size(change: Change) -> float:
    return change.norm if change.relative is None else change.relative


def _biggest(changes: list[Change]) -> list[Change]:
    """The layers that changed most, relative to their weights where those are known, first."""
    relative = all(change.relative is not None for change in changes)
    return sorted(changes, key=_size if relative else lambda change: change.norm, reverse=True)
