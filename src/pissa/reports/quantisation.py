"""Errors of a quantised residual for each type of layer, as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pissa.errors import InputError, require
from pissa.reports.curves import COLOURS, save_png
from pissa.untyped import Json

NORMS = {
    "frobenius": "Frobenius error",
    "nuclear": "nuclear error",
    "output": "error of the output",
}


def plot_errors(rows: Sequence[Json], output: Path, title: str | None = None) -> Path:
    """Draw one panel a norm, a group of bars a type of layer, a bar a form; relative to the
    weights.

    Args:
        rows: from `pissa.inspect(..., errors=True).errors`.
        output: the PNG to write.
        title: above the picture; None for none.

    Returns:
        `output`.

    Raises:
        InputError: no rows.
    """
    if not rows:
        raise InputError("there are no errors to draw: ask for them with errors=True")
    figure_module = require("matplotlib.figure", "train")
    require("matplotlib.backends.backend_agg", "train")
    forms = list(rows[-1]["errors"])
    norms = [norm for norm in NORMS if norm in rows[-1]["errors"][forms[0]]]
    size = (max(6.4, 1.1 * len(rows) + 1.5), 2.5 * len(norms) + 0.6)
    figure = figure_module.Figure(figsize=size, dpi=150, layout="constrained")
    for index, (axes, norm) in enumerate(
        zip(figure.subplots(len(norms), squeeze=False)[:, 0], norms, strict=True)
    ):
        width = 0.8 / len(forms)
        for place, (form, colour) in enumerate(zip(forms, COLOURS, strict=False)):
            heights = [100 * row["errors"][form].get(norm, 0) for row in rows]
            where = [x + (place - (len(forms) - 1) / 2) * width for x in range(len(rows))]
            bars = axes.bar(
                where, heights, width, color=colour, label="this folder" if form == "this" else form
            )
            axes.bar_label(bars, [f"{height:.1f}" for height in heights], fontsize=6, padding=1)
        axes.set_xticks(range(len(rows)), [row["type"] for row in rows])
        axes.set_ylabel(f"{NORMS[norm]} (%)")
        axes.margins(y=0.08)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if index == 0:
            axes.legend(frameon=False, ncols=len(forms), loc="lower right", bbox_to_anchor=(1, 1))
            axes.set_title(title or "", loc="left", fontsize=10)
    return save_png(figure, output)
