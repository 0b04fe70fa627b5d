"""`pissa compare CONFIG.yaml --methods full,lora,pissa --lr 1e-4,3e-4 --seeds 3 [--key value ...]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pissa.cli import options, show
from pissa.cli.train import split_words


def compare(
    words: Annotated[
        list[str] | None,
        Argument(
            metavar="[CONFIG.yaml] [--KEY VALUE]...", help="As for train: what all runs share."
        ),
    ] = None,
    methods: Annotated[
        str,
        Option(
            help="Names with commas; options as corda[mode=kpm]; NAME-control is the random control."
        ),
    ] = ("full,lora,pissa,pissa-control"),
    lr: Annotated[
        str, Option(help="Learning rates separated by commas, for every method.")
    ] = "1e-4,3e-4,1e-3",
    seeds: Annotated[str, Option(help="How many, counted from 0, or a list such as 3,4,5,.")] = "3",
    jobs: Annotated[
        int, Option(help="Runs side by side, 1 or more, sharing the cores or the GPUs.")
    ] = 1,
    part: Annotated[
        str | None, Option(help="i/n: only the i-th of n parts, for machines that share OUT.")
    ] = None,
    landscape: Annotated[
        bool, Option("--landscape", help="Also the loss around the start, see landscape.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Train several methods at several learning rates and seeds, and say what the numbers support.

    Cells that are done are not trained again: add methods, rates or seeds to the same output at any
    time.
    """
    from pissa.config import load_settings

    config, flags = split_words(words or [])
    settings = load_settings(config, flags)

    from pissa.checkpoint.output import read_json
    from pissa.comparison import compare as run_comparison
    from pissa.comparison.compare import PAGE, RESULT, add_landscape, missing
    from pissa.comparison.findings import supported, unsupported
    from pissa.comparison.grid import cells, names, numbers

    # A count, or a list
    count = range(int(seeds)) if seeds.isdecimal() else numbers(seeds.rstrip(","), int, "seeds")
    out = Path(settings.output)
    grid = names(methods), numbers(lr, float, "lr"), [int(seed) for seed in count]
    comparison = run_comparison(
        settings,
        *grid,
        jobs=jobs,
        which=part,
        say=show.counted("runs"),
    )
    if landscape:
        with show.points_progress("landscape") as points:
            add_landscape(out, say=points)
    if as_json:
        show.print_json(read_json(out / RESULT))
        return
    for line in (*supported(comparison), "", *unsupported(comparison)):
        print(line)
    if left := missing(cells(*grid), out):
        show.say(
            f"{left} of {len(cells(*grid))} runs are missing: type the other parts, or the same without --part"
        )
    show.say(f"{out / PAGE}: the page; {out / RESULT}: the numbers")
