"""`pissa landscape RUN RUN ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pissa.cli import options, show


def landscape(
    runs: Annotated[
        list[Path], Argument(help="Finished language runs from one base on one data set.")
    ],
    output: Annotated[Path, Option(help="The picture.")] = Path("landscape.png"),
    grid: Annotated[
        int, Option(help="Points along each direction, 3 or more; the time grows with its square.")
    ] = 21,
    rows: Annotated[int, Option(help="Evaluation rows to take the loss over, 1 or more.")] = 16,
    force: Annotated[bool, Option("--force", help="Replace the picture if it is there.")] = False,
    as_json: options.Json = False,
) -> None:
    """Draw the loss around the start, on the plane of the paths that the runs took.

    Points between start and end are a run's checkpoints: train with --save_steps N
    --save_total_limit 0 to have them.
    """
    from pissa.comparison.landscape import draw
    from pissa.comparison.landscape import landscape as compute
    from pissa.errors import InputError, OutputError
    from pissa.reports.curves import save_png

    if output.exists() and not force:
        raise OutputError(f"{output} is there: name another --output, or replace it with --force")
    names = {run.name: run for run in runs}
    if len(names) < len(runs):
        names = {str(run): run for run in runs}
    if len(names) < len(runs):
        raise InputError("got one run twice, expected each once")
    with show.points_progress("landscape") as points:
        found = compute(names, grid=grid, rows=rows, say=points)
    save_png(draw(found), output)
    if as_json:
        show.print_json(found.to_json())
    show.say(f"{output}: the plane holds {found.share:.1%} of the paths' squared length")
