"""`pissa plan CONFIG.yaml [--key value ...]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from pissa.cli import options, show
from pissa.cli.train import split_words

if TYPE_CHECKING:
    from pissa.planning import Cost, Plan


def plan(
    words: Annotated[
        list[str] | None,
        Argument(
            metavar="[CONFIG.yaml] [--KEY VALUE]...", help="Settings, as `pissa train` takes them."
        ),
    ] = None,
    measure: Annotated[
        bool,
        Option("--measure", help="Train a few real steps in a temporary folder, to know the time."),
    ] = False,
    memory: Annotated[
        str | None,
        Option(
            metavar="SIZE", help="Plan for a GPU of that size, 24GB or 80GB. Default: this machine."
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Say what a run will take: parameters, memory, disk, steps, and whether it fits.

    Loads no weights: a folder with a config.json is enough, so that a model can be planned before
    it is fetched.
    """
    from pissa.config import load_settings

    config, flags = split_words(words or [])
    settings = load_settings(config, flags)

    from pissa.planning import plan as make
    from pissa.training import quiet

    with quiet():
        found = make(settings, memory=memory, measured=measure)
    if as_json:
        show.print_json(found.to_json())
        return
    _print_costs(found.costs)
    for line in _sentences(found):
        print(line)
    typed = " ".join(words or [])
    show.say_next(f"pissa preview {typed}", f"pissa train {typed}")


def _print_costs(costs: list[Cost]) -> None:
    from pissa.reports.page import size

    columns = ["", *(cost.method for cost in costs)]
    device = ("weights", "adapters", "starts", "optimizer", "gradients", "activations", "total")
    rows = [["trainable", *(f"{cost.trainable:,}" if cost.device else "-" for cost in costs)]]
    for part, keys in (
        ("device", device),
        ("host", ("process", "loading", "splitting", "originals", "total")),
        ("disk", ("result", "residual", "checkpoint", "total")),
    ):
        for key in keys:
            label = part if key == "total" else f"  {key}"
            parts = [getattr(cost, part) for cost in costs]
            rows.append(
                [label, *("-" if found is None else size(getattr(found, key)) for found in parts)]
            )
    show.print_table(columns, rows)


def _sentences(plan: Plan) -> list[str]:
    """What the figures come to."""
    from pissa.reports.page import duration, size

    machine, counts, asked = plan.machine, plan.counts, plan.asked
    share = asked.trainable / max(asked.parameters, 1)
    verdicts = [
        f"{cost.method}: {cost.problem}"
        if cost.problem
        else f"{cost.method} needs {size(cost.needs)}: {cost.fits}"
        for cost in plan.costs
    ]
    on_disk = asked.disk.total if asked.disk else 0
    room = "yes" if on_disk <= machine.disk_bytes else "no"
    lines = [
        f"model   {plan.model}: {asked.parameters:,} parameters in {asked.dtype}",
        f"trains  {asked.trainable:,} parameters ({share:.2%}) with {asked.method}",
        f"memory  {machine.name} has {size(machine.device_bytes)} free; {'; '.join(verdicts)}",
        f"disk    {asked.method} needs {size(on_disk)}, {size(machine.disk_bytes)} are free: {room}",
    ]
    known = [
        f"{value:,} {what}"
        for value, what in (
            (counts.rows, "rows"),
            (counts.steps, "steps"),
            (counts.tokens, "tokens"),
        )
        if value is not None
    ]
    lines.append(f"steps   {', '.join([*known, *([counts.note] if counts.note else [])])}")
    if plan.measured is None:
        return [*lines, "time    unknown; --measure trains a few steps to tell"]
    taken = plan.measured
    rate = f", {plan.tokens_per_second:,.0f} tokens/s" if plan.tokens_per_second else ""
    total = f", {duration(plan.seconds)} in all" if plan.seconds is not None else ""
    return [
        *lines,
        f"time    {taken.step_seconds:.3g} s a step{rate}{total}",
        f"peak    {size(taken.peak_bytes)} measured, {size(asked.needs)} planned",
    ]
