"""Loss curves of one run or of many, from their metrics.jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from pissa.errors import DataError, require
from pissa.untyped import Figure, Json

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, told apart with every form of colour blindness."""
UNITS = {
    "language": "nats per token",
    "classification": "nats per row",
    "regression": "squared error",
}
"""Of the loss, by task."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_losses(runs: Mapping[str, Path], output: Path, title: str | None = None) -> Path:
    """Draw training loss (smoothed, the raw line pale behind it) and evaluation loss (points) over
    steps.

    Args:
        runs: name in the legend to a metrics.jsonl, or to a folder that holds one.
        output: the PNG to write.
        title: above the picture; None for none.

    Returns:
        `output`.

    Raises:
        DataError: a file without a loss.

    Example:
        plot_losses({"LoRA": Path("runs/lora"), "PiSSA": Path("runs/pissa")}, Path("losses.png"))
    """
    figure_module = require("matplotlib.figure", "train")
    require("matplotlib.backends.backend_agg", "train")
    figure = figure_module.Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    evaluated = False
    for (name, path), colour, marker in zip(
        runs.items(), cycle(COLOURS), cycle(MARKERS), strict=False
    ):
        lines = read_metrics(Path(path))
        steps, losses = series(lines, "loss")
        if steps:
            axes.plot(steps, losses, color=colour, alpha=0.22, linewidth=1)
            axes.plot(steps, smooth(losses), color=colour, linewidth=2, label=name)
        points = series(lines, "eval_loss")
        if points[0]:
            evaluated = True
            axes.plot(
                *points,
                color=colour,
                marker=marker,
                markersize=7,
                markeredgecolor="white",
                linestyle="none",
            )
    if evaluated:
        axes.plot(
            [], [], color="grey", marker="o", linestyle="none", label="points: evaluation loss"
        )
    axes.set_xlabel("optimiser step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(f"loss ({_unit(runs)})")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    if title:
        axes.set_title(title)
    return save_png(figure, output)


def save_png(figure: Figure, output: Path) -> Path:
    """Write a matplotlib figure whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    figure.savefig(partial, format="png", dpi=150)
    os.replace(partial, output)
    return output


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of about a twentieth of the points; at the ends the window is cut, not padded."""
    half = max(1, len(values) // 40)
    windows = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def read_metrics(path: Path) -> list[Json]:
    """The lines of a metrics.jsonl, or of that in a run's folder; one that a kill cut short is left
    out.

    Raises:
        DataError: a file that is not there, is broken, or holds no loss.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        written = file.read_text(encoding="utf-8").splitlines(keepends=True)
        lines = [json.loads(line) for line in written if line.strip() and line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not a readable metrics.jsonl ({error})") from error
    if not any("loss" in line or "eval_loss" in line for line in lines):
        raise DataError(f"{file} holds no loss: train at least one step first")
    return lines


def series(lines: list[Json], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have the key."""
    pairs = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _unit(runs: Mapping[str, Path]) -> str:
    """Of the loss, as the scores beside it tell."""
    keys = {key for path in runs.values() for line in read_metrics(Path(path)) for key in line}
    return UNITS[
        "regression"
        if "eval_pearson" in keys
        else "classification"
        if "eval_accuracy" in keys
        else "language"
    ]
