"""compare.html: the numbers, the pictures, and what they support."""

from __future__ import annotations

from pathlib import Path

from pissa.comparison import figures
from pissa.comparison.analysis import Comparison
from pissa.comparison.findings import supported, unsupported
from pissa.comparison.grid import DIFFER
from pissa.comparison.landscape import draw, read
from pissa.reports.page import render, svg, write_page
from pissa.reports.run_record import set_by_hand
from pissa.untyped import Json


def write_comparison(comparison: Comparison, facts: Json, path: Path) -> Path:
    """Write the page.

    Args:
        comparison: the outcomes.
        facts: settings, data, base and versions that all cells share.
        path: of the HTML file.
    """
    data = comparison.to_json()
    settings = facts["settings"]
    equal = {
        rate: svg(
            figures.over_steps(comparison, runs),
            f"Evaluation loss over steps, all at learning rate {rate:g}",
        )
        for rate in comparison.rates
        if (
            runs := {method: rate for method in comparison.methods if comparison.runs(method, rate)}
        )
    }
    found = read(path.parent, comparison.best)
    html = render(
        "compare.html",
        name=Path(settings["model"]).name,
        data_name="/".join(Path(settings["data"]).parts[-2:]),
        comparison=comparison,
        numbers=data,
        facts=facts,
        supported=supported(comparison),
        unsupported=unsupported(comparison),
        changed={key: value for key, value in set_by_hand(settings).items() if key not in DIFFER},
        over_rates=svg(
            figures.over_rates(comparison), "Evaluation loss at the end over the learning rate"
        ),
        at_best=svg(
            figures.over_steps(comparison, comparison.best),
            "Loss over steps, each at its best rate",
        ),
        equal=equal,
        forgetting=svg(
            figures.old_against_new(comparison), "Loss on old data against loss on new data"
        )
        if comparison.has_old
        else None,
        landscape=found
        and {"picture": svg(draw(found), "Loss around the start"), "share": found.share},
        cost=_cost(comparison),
    )
    return write_page(path, html)


def _cost(comparison: Comparison) -> dict[str, Json]:
    """Medians over all finished cells of a method: time, memory, parameters."""
    costs = {}
    for method in comparison.methods:
        runs = [run for run in comparison.outcomes if run.cell.method == method and run.finished]
        if runs:
            seconds = sorted(run.seconds for run in runs)
            memory = sorted(run.peak_memory_bytes for run in runs if run.peak_memory_bytes)
            costs[method] = {
                "trainable": runs[0].trainable,
                "seconds": seconds[len(seconds) // 2],
                "memory": memory[len(memory) // 2] if memory else None,
            }
    return costs
