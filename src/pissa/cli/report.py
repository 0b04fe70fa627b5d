"""`pissa report RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pissa.cli import options, show


def report(
    run: Annotated[
        Path, Argument(help="A run's folder; it may be going on still, or have been killed.")
    ],
    output: Annotated[
        Path | None, Option(help="The HTML file to write. Default: report.html in the run.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write a run's page: curves, what changed in each layer, settings, and what to do next.

    One HTML file without scripts, to be read anywhere.
    """
    from pissa.reports import next_commands, read_run, write_report

    page = write_report(run, output)
    if as_json:
        show.print_json({"report": str(page)})
        return
    print(page)
    show.say_next(*(command for _, command in next_commands(run, read_run(run))))
