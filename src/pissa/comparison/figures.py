"""Pictures of a comparison: loss over learning rate, loss over steps, old against new."""

from __future__ import annotations

import math
from typing import Any

from pissa.comparison.analysis import Comparison, studied
from pissa.errors import require
from pissa.registry import CONTROL
from pissa.reports.curves import COLOURS, MARKERS
from pissa.untyped import Figure, Json


def style(comparison: Comparison, method: str) -> Json:
    """A colour for each method, which its control shares in dashes."""
    order = list(dict.fromkeys(studied(name) for name in comparison.methods))
    index = order.index(studied(method))
    dashed = method.endswith(CONTROL)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "--" if dashed else "-",
        "markerfacecolor": "none" if dashed else COLOURS[index % len(COLOURS)],
        "label": method,
    }


def over_rates(comparison: Comparison) -> Any:
    """Loss at the end over the learning rate, with standard errors; a cross at the upper edge for what diverged."""
    figure, axes = _figure(6.4, 4.4)
    for method in comparison.methods:
        points = [
            (rate, found) for rate in comparison.rates if (found := comparison.mean(method, rate))
        ]
        finite = [
            (rate, found.mean, found.error or 0.0)
            for rate, found in points
            if math.isfinite(found.mean)
        ]
        if finite:
            axes.errorbar(*zip(*[point[:2] for point in finite], strict=True), yerr=[p[2] for p in finite], capsize=3,
                          markersize=6, linewidth=1.6, **style(comparison, method))  # fmt: skip
        lost = [rate for rate, found in points if not math.isfinite(found.mean)]
        if lost:
            axes.plot(lost, [1.0] * len(lost), linestyle="none", marker="x", color=style(comparison, method)["color"],
                      transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(comparison.rates, [f"{rate:g}" for rate in comparison.rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel("evaluation loss at the end")
    _finish(axes)
    return figure


def over_steps(comparison: Comparison, rates: dict[str, float]) -> Any:
    """Mean evaluation loss over steps, each method at the rate given."""
    figure, axes = _figure(6.4, 4.4)
    for method, rate in rates.items():
        curve = comparison.curve(method, rate)
        if curve:
            look = style(comparison, method) | {"label": f"{method}, {rate:g}"}
            axes.plot(*zip(*curve, strict=True), markersize=4, linewidth=1.6, **look)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("evaluation loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(axes)
    return figure


def old_against_new(comparison: Comparison) -> Any:
    """Loss on the old data against loss on the new along training, and where it ends at every rate."""
    figure, axes = _figure(6.4, 4.8)
    for method, best in comparison.best.items():
        look = style(comparison, method)
        new, old = dict(comparison.curve(method, best)), dict(comparison.curve(method, best, "old"))
        steps = sorted(new.keys() & old.keys())
        axes.plot(
            [new[step] for step in steps],
            [old[step] for step in steps],
            markersize=3.5,
            linewidth=1.4,
            **look,
        )
        for rate in comparison.rates:
            ends = [comparison.mean(method, rate, measure) for measure in ("loss", "old")]
            if rate != best and all(end is not None and math.isfinite(end.mean) for end in ends):
                axes.plot(*[end.mean for end in ends if end], linestyle="none", marker=look["marker"], markersize=8,
                          color=look["color"], markerfacecolor="none", alpha=0.7)  # fmt: skip
    axes.set_xlabel("loss on the new data (better to the left)")
    axes.set_ylabel("loss on the old data (better below)")
    _finish(axes)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Figure]:
    module = require("matplotlib.figure", "train")
    figure = module.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _finish(axes: Figure) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:  # nothing to name while seeds are missing
        axes.legend(frameon=False, fontsize="small")
