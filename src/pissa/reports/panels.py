"""The pictures of a run's page: small figures that stay readable on a phone, black where the page's text is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pissa.errors import require
from pissa.reports.changes import Change
from pissa.reports.curves import COLOURS, series, smooth
from pissa.untyped import Figure, Json

SIZE = (5.2, 3.1)
LOSSES = {"loss": "training", "eval_loss": "evaluation", "old_loss": "old data"}
COURSES = {"grad_norm": "gradient norm", "learning_rate": "learning rate"}
CHOSEN = 6
"""Layers that are drawn one by one."""

Value = Callable[[Change], float | None]


def loss_figure(lines: list[Json], unit: str) -> Figure:
    """Training loss, smoothed with the raw line pale behind it, and each evaluation."""
    figure, axes = _axes("optimiser step", f"loss ({unit})")
    for key, colour in zip(LOSSES, COLOURS, strict=False):
        steps, values = series(lines, key)
        if not steps:
            continue
        if key == "loss":
            axes.plot(steps, values, color=colour, alpha=0.4, linewidth=0.8)
            axes.plot(steps, smooth(values), color=colour, label=LOSSES[key])
        else:
            axes.plot(
                steps,
                values,
                color=colour,
                marker="o",
                markersize=4,
                linewidth=0.8,
                label=LOSSES[key],
            )
    axes.legend(frameon=False)
    return figure


def course_figure(lines: list[Json], key: str, label: str) -> Figure:
    """One number over the steps."""
    figure, axes = _axes("optimiser step", label)
    axes.plot(*series(lines, key), color=COLOURS[0], linewidth=1.2)
    axes.set_ylim(bottom=0)
    return figure


def score_figure(lines: list[Json], keys: Sequence[str]) -> Figure:
    """Scores of each evaluation."""
    figure, axes = _axes("optimiser step", "score on evaluation rows")
    for key, colour in zip(keys, COLOURS, strict=False):
        axes.plot(
            *series(lines, key),
            color=colour,
            marker="o",
            markersize=4,
            label=key.removeprefix("eval_"),
        )
    axes.legend(frameon=False)
    return figure


def spectrum_figure(changes: Sequence[Change]) -> Figure:
    """Singular values of the change, of the layers that changed most; those of rounding are left out."""
    figure, axes = _axes("index", "singular value of ΔW")
    for change, colour in zip(changes[:CHOSEN], COLOURS, strict=False):
        values = [
            value for value in change.singular_values if value > 1e-6 * change.singular_values[0]
        ]
        axes.plot(
            range(1, len(values) + 1),
            values,
            color=colour,
            marker=".",
            markersize=4,
            label=change.label,
        )
    axes.set_yscale("log")
    _legend_above(figure, axes)
    return figure


def angle_figure(changes: Sequence[Change]) -> Figure:
    """All principal angles of the layers that changed most; left drawn through, right dashed."""
    figure, axes = _axes("index, from the direction that turned least", "principal angle (degrees)")
    for change, colour in zip(changes[:CHOSEN], COLOURS, strict=False):
        for angles, style in ((change.left_angles, "-"), (change.right_angles, "--")):
            label = change.label if style == "-" else None
            axes.plot(range(1, len(angles) + 1), angles, style, color=colour, label=label)
    axes.set_ylim(bottom=0)
    _legend_above(figure, axes)
    return figure


def layers_figure(
    changes: Sequence[Change], value: Value, label: str, percent: bool = False
) -> Figure | None:
    """A number of every layer as a heat map, a row for each block and a column for each kind of
    layer.

    Returns:
        None where there are no blocks, or no numbers.
    """
    cells = {change.place: value(change) for change in changes if change.place[0] is not None}
    blocks = sorted({block for block, _ in cells if block is not None})
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    if not blocks or all(cell is None for cell in cells.values()):
        return None
    factor = 100 if percent else 1
    grid = [[_or_nan(cells.get((block, kind)), factor) for kind in kinds] for block in blocks]
    figure, axes = _axes("", "block", height=1.6 + min(0.24 * len(blocks), 3.6))
    mesh = axes.pcolormesh(grid, cmap="cividis", edgecolors="face", linewidth=0.2)
    axes.invert_yaxis()
    axes.grid(visible=False)
    places = range(0, len(blocks), math.ceil(len(blocks) / 16))
    axes.set_yticks([place + 0.5 for place in places], [str(blocks[place]) for place in places])
    axes.set_xticks(
        [place + 0.5 for place in range(len(kinds))], _short(kinds), rotation=35, ha="right"
    )
    figure.colorbar(mesh, ax=axes, label=label)
    return figure


def _short(kinds: list[str]) -> list[str]:
    """The last part of each name, where that is enough to tell them apart."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return last if len(set(last)) == len(kinds) else kinds


def _or_nan(value: float | None, factor: float) -> float:
    return math.nan if value is None else factor * value


def _axes(x: str, y: str, height: float = SIZE[1]) -> tuple[Figure, Figure]:
    figure = require("matplotlib.figure", "train").Figure(
        figsize=(SIZE[0], height), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if x:
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def _legend_above(figure: Figure, axes: Figure) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=8)
