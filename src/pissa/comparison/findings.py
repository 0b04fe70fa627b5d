"""What the numbers of a comparison support, and what they do not, in plain sentences."""

from __future__ import annotations

import math

from pissa.comparison.analysis import Comparison
from pissa.comparison.statistics import Difference, mean
from pissa.registry import CONTROL

PACKAGES = ("pissa", "torch", "transformers", "peft", "trl")
"""Whose versions may move a loss."""


def supported(comparison: Comparison) -> list[str]:
    """What was seen, one sentence a finding; also where a method loses."""
    reference, said = comparison.reference, _start(comparison)
    if reference in comparison.best:
        said.append(_baseline(comparison))
        said += [
            f"{_title(method)} at its own best rate ({comparison.best[method]:g}) {_verdict(test, reference)}."
            for method, test in comparison.at_best.items()
        ]
    for method in comparison.methods:
        if (
            method != reference
            and not method.endswith(CONTROL)
            and (line := _equal_rates(comparison, method))
        ):
            said.append(line)
    for method, test in comparison.against_control.items():
        said.append(
            f"Against random directions of its size, each at its best rate, {method} {_verdict(test, 'its control')}."
        )
        shares = {
            rate: share
            for rate in comparison.rates
            if (share := comparison.explained(method, rate)) is not None
        }
        owed = [f"{_share(share)} at {rate:g}" for rate, share in shares.items() if share]
        own = [f"{rate:g}" for rate, share in shares.items() if not share]
        if owed:
            said.append(
                f"Of {method}'s lead over {reference} at equal rates its random control has {', '.join(owed)}: that is "
                "owed to the size of the start, not to its directions."
            )
        if own:
            said.append(
                f"Of {method}'s lead over {reference} at {', '.join(own)} no part is seen in its random control."
            )
    return said + _forgetting(comparison)


def unsupported(comparison: Comparison) -> list[str]:
    """What must not be read into the numbers."""
    said = []
    if not comparison.same_start:
        said.append(
            "Not all methods start at the same loss (a base in few bits, or one that changed): what they gain differs."
        )
    versions = {
        name: {run.versions.get(name) for run in comparison.outcomes if run.finished}
        for name in PACKAGES
    }
    mixed = [
        f"{name} {' and '.join(sorted(map(str, found)))}"
        for name, found in versions.items()
        if len(found) > 1
    ]
    if mixed:
        said.append(f"The runs were made with different versions: {', '.join(mixed)}.")
    edges = [method for method in comparison.best if comparison.at_edge(method)]
    if edges:
        listed = ", ".join(f"{method} ({comparison.best[method]:g})" for method in edges)
        said.append(
            f"The best rate lies at the edge of the grid for {listed}: a better one may lie beyond, so nothing here "
            "is the last word on these. Add rates to the same folder."
        )
    grids = {
        method: tuple(grid) for method in comparison.methods if (grid := comparison.grid_of(method))
    }
    if len(set(grids.values())) > 1:
        said.append(
            "The methods have different grids ("
            + "; ".join(
                f"{method}: {', '.join(f'{rate:g}' for rate in grid)}"
                for method, grid in grids.items()
            )
            + "): a method with more rates has more chances."
        )
    if comparison.left_out:
        unused = (
            "1 run is" if len(comparison.left_out) == 1 else f"{len(comparison.left_out)} runs are"
        )
        said.append(
            f"{unused} in no mean, since not all methods and rates have that seed or some seed is missing there; the "
            f"means are over seeds {', '.join(map(str, comparison.seeds))}."
        )
    lost = [str(result.cell) for result in comparison.outcomes if not result.finished]
    if lost:
        count = (
            "1 run diverged and counts"
            if len(lost) == 1
            else f"{len(lost)} runs diverged and count"
        )
        said.append(f"{count} as worst: {'; '.join(lost[:6])}{' ...' if lost[6:] else ''}.")
    seeds = len(comparison.seeds)
    unseen = {
        m: test
        for m, test in comparison.at_best.items()
        if test.detectable is not None and not test.seen
    }
    if unseen:
        listed = ", ".join(f"{method} {test.detectable:.2g}" for method, test in unseen.items())
        said.append(
            f"“No difference seen” is not “no difference”: with {seeds} seeds and their spread, differences from "
            f"{comparison.reference} smaller than these could not have been seen: {listed}."
        )
    elif seeds < 2:
        said.append("One seed: no spread is known, so no difference is tested.")
    said.append(
        "The best rates were chosen by the same evaluation rows that are reported, for every method alike; the losses "
        "at them are therefore a little too good."
    )
    said.append(
        "One model, one data set, one number of steps: other sizes, data or longer trainings are not spoken for. Wall "
        "times are of the machines that ran them, with whatever ran beside."
    )
    return said


def _start(comparison: Comparison) -> list[str]:
    """Where the runs began, if all of a seed began there."""
    starts = {run.evaluation[0][1] for run in comparison.outcomes if run.evaluation}
    if not comparison.same_start or not starts:
        return []
    losses = ", ".join(f"{loss:.4f}" for loss in sorted(starts))
    return [
        f"All runs start at loss {losses}."
        if len(starts) == 1
        else f"With each seed all start alike: loss {losses}."
    ]


def _title(method: str) -> str:
    name = method.removesuffix(CONTROL)
    return f"The random control of {name}" if method.endswith(CONTROL) else name


def _baseline(comparison: Comparison) -> str:
    reference = comparison.reference
    rate = comparison.best[reference]
    found = mean([run.loss for run in comparison.runs(reference, rate)])
    loss = _plus_minus(found.mean, found.error)
    return f"{reference}'s best rate of those tried is {rate:g}: loss {loss}."


def _verdict(test: Difference, other: str) -> str:
    size = _plus_minus(abs(test.difference), test.error)
    if test.adjusted is None:
        side = "below" if test.difference < 0 else "above"
        return (
            f"ends {size} {side} {other} (not tested)"
            if math.isfinite(test.difference)
            else "diverged"
        )
    p = _p(test.adjusted)
    if not test.seen:
        return f"and {other}: no difference seen ({test.difference:+.3g} ± {test.error:.2g}, {p})"
    return f"ends {size} {'lower' if test.difference < 0 else 'higher'} than {other} ({p})"


def _equal_rates(comparison: Comparison, method: str) -> str:
    """At which of the equal rates a method is ahead of the reference, level with it, behind it."""
    found: dict[str, list[float]] = {"ends lower": [], "shows no difference": [], "ends higher": []}
    for rate in comparison.rates:
        test = comparison.at_equal.get((method, rate))
        if test is not None and test.p is not None:
            lower = "ends lower" if test.difference < 0 else "ends higher"
            found[lower if test.seen else "shows no difference"].append(rate)
    parts = [
        f"{verdict} at {', '.join(f'{rate:g}' for rate in rates)}"
        for verdict, rates in found.items()
        if rates
    ]
    return (
        f"At equal learning rates, against {comparison.reference}, {method} {'; '.join(parts)}."
        if parts
        else ""
    )


def _forgetting(comparison: Comparison) -> list[str]:
    reference = comparison.reference
    if not comparison.has_old or reference not in comparison.best:
        return []
    rate = comparison.best[reference]
    found = {
        method: value
        for method in comparison.best
        if (value := comparison.old_at_reference(method, comparison.best[method], rate)) is not None
    }
    start = next(iter(comparison.curve(reference, rate, "old")), (0, math.nan))[1]
    listed = ", ".join(
        f"{method} {value:.3f}" for method, value in sorted(found.items(), key=lambda item: item[1])
    )
    never = [method for method in comparison.best if method not in found]
    rest = f"; {', '.join(never)} never got there" if never else ""
    return [
        f"Forgetting, where each first knows the new data as well as {reference} does at its end: loss on the old "
        f"data, {start:.3f} before training, is {listed}{rest}. (Means at evaluated steps, each method at its best "
        "rate; not tested.)"
    ]


def _share(share: float) -> str:
    return f"all ({100 * share:.0f} %)" if share >= 1 else f"{100 * share:.0f} %"


def _plus_minus(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def _p(adjusted: float) -> str:
    return "p below 0.001 after Holm" if adjusted < 0.001 else f"p = {adjusted:.2g} after Holm"
