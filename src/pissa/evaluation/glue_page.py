"""glue.html: the table, its pictures, and what a reader must know of both."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

from pissa.comparison.figures import style
from pissa.comparison.grid import DIFFER
from pissa.errors import require
from pissa.evaluation.glue_comparison import TaskComparison, spread
from pissa.evaluation.glue_results import FLOOR, PROTOCOL, Results
from pissa.evaluation.glue_tasks import SHORT
from pissa.reports.page import render, svg, write_page
from pissa.reports.run_record import set_by_hand
from pissa.untyped import Figure

OF_TASK = frozenset({"data", "eval_data", "output", "task", "model"})
"""Settings that say which task it is."""


def write_glue(results: Results, path: Path) -> Path:
    """Write the page.

    Args:
        results: of all tasks.
        path: of the HTML file.
    """
    numbers = results.to_json()
    settings = {
        task.task.title: {
            k: v
            for k, v in set_by_hand(task.facts["settings"]).items()
            if k not in DIFFER | OF_TASK
        }
        for task in results.tasks
    }
    first, *others = settings.values()
    shared = {
        key: value
        for key, value in first.items()
        if all(other.get(key) == value for other in others)
    }
    columns, rows = results.table()
    html = render(
        "glue.html",
        name=Path(results.tasks[0].facts["settings"]["model"]).name,
        numbers=numbers,
        columns=[column.split("\n") for column in columns],
        rows=[[cell.split("\n") for cell in row] for row in rows],
        floor=FLOOR,
        short=SHORT,
        protocol=PROTOCOL,
        notes=results.notes(),
        picture=svg(over_rates(results), "Each task's first measure over the learning rate"),
        pages={
            task.task.name: os.path.relpath(task.folder / "compare.html", path.parent)
            for task in results.tasks
        },
        seconds=seconds(results),
        shared=shared,
        own={
            title: {k: v for k, v in found.items() if k not in shared}
            for title, found in settings.items()
        },
    )
    return write_page(path, html)


def over_rates(results: Results) -> Any:
    """For each task its first measure in percent over the learning rate, median and range over seeds."""
    module = require("matplotlib.figure", "train")
    columns = min(3, len(results.tasks))
    lines = -(-len(results.tasks) // columns)
    figure = module.Figure(figsize=(3.4 * columns, 2.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, task in zip(panels, results.tasks, strict=False):
        _draw(axes, task)
    for axes in panels[len(results.tasks) :]:
        axes.set_visible(False)
    known = {
        label: line
        for axes in panels
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        known.values(),
        known.keys(),
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize="small",
    )
    return figure


def _draw(axes: Figure, result: TaskComparison) -> None:
    comparison, measure = result.comparison, result.task.measures[0]
    for method in comparison.methods:
        grid = comparison.grid_of(method)
        found = [spread(result.values(method, rate, measure)) for rate in grid]
        if found:
            bars = [
                [100 * (at.median - at.low) for at in found],
                [100 * (at.high - at.median) for at in found],
            ]
            axes.errorbar(grid, [100 * at.median for at in found], yerr=bars, capsize=3, markersize=5, linewidth=1.4,
                          **style(comparison, method))  # fmt: skip
    axes.axhline(100 * result.floor[measure], color="grey", linestyle=":", label=FLOOR)
    axes.set_xscale("log")
    axes.set_xticks(
        comparison.rates,
        [f"{rate:g}" for rate in comparison.rates],
        fontsize="x-small",
        rotation=30,
    )
    axes.minorticks_off()
    axes.set_title(f"{result.task.title}, {SHORT[measure]}", fontsize="medium")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def seconds(results: Results) -> dict[str, dict[str, float]]:
    """By task and method the median wall time of a run that was finished."""
    times: dict[str, dict[str, float]] = {}
    for task in results.tasks:
        for method in task.comparison.methods:
            found = [
                run.seconds
                for run in task.comparison.outcomes
                if run.cell.method == method and run.finished
            ]
            if found:
                times.setdefault(task.task.name, {})[method] = statistics.median(found)
    return times
