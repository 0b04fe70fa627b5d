"""`pissa glue MODEL --data DIR --tasks cola,mrpc --methods lora,pissa --lr 1e-4,3e-4 --output OUT [--key value]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pissa.cli import options, show
from pissa.cli.train import split_words
from pissa.errors import ConfigError


def glue(
    output: Annotated[
        Path, Option(help="Folder for everything; one that an earlier call made is added to.")
    ],
    words: Annotated[
        list[str] | None,
        Argument(
            metavar="MODEL [--KEY VALUE]...",
            help="A folder or Hub id, then settings of pissa train for all runs, as --max_steps 300 --rank 8.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        Option(
            help="Folder of GLUE's official files, CoLA/train.tsv and so on. Default: nyu-mll/glue on the Hub."
        ),
    ] = None,
    tasks: Annotated[str, Option(help="Names with commas; wnli is the ninth.")] = (
        "cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte"
    ),
    methods: Annotated[str, Option(help="Names with commas, as for compare.")] = "full,lora,pissa",
    lr: Annotated[
        str,
        Option(
            help="Learning rates with commas; behind semicolons others for a method, a task or TASK/METHOD, as in "
            "'3e-4,1e-3; full=3e-5,1e-4; cola/lora=3e-3'."
        ),
    ] = "1e-4,3e-4,1e-3",
    seeds: Annotated[str, Option(help="How many, counted from 0, or a list such as 3,4,5,.")] = "3",
    jobs: Annotated[
        int, Option(help="Runs side by side, 1 or more, sharing the cores or the GPUs.")
    ] = 1,
    as_json: options.Json = False,
) -> None:
    """Fine-tune a model on GLUE with several methods, and score it on the dev sets.

    Without --epochs or --max_steps a run is three epochs of 32 rows a step. Runs that are done are
    not trained again: add tasks, methods, rates or seeds to the same output at any time.
    """
    model, given = split_words(words or [])
    if model is None:
        raise ConfigError(
            "got no model, expected a folder or a Hub id first, as in pissa glue MODEL --output OUT"
        )

    from pissa.checkpoint.output import read_json
    from pissa.comparison.grid import names, numbers
    from pissa.evaluation.glue import glue as run_glue
    from pissa.evaluation.glue import read_rates
    from pissa.evaluation.glue_results import PAGE, RESULT
    from pissa.evaluation.glue_tasks import named

    chosen, able = named(tasks), names(methods)
    count = range(int(seeds)) if seeds.isdecimal() else numbers(seeds.rstrip(","), int, "seeds")
    results = run_glue(
        str(model),
        chosen,
        able,
        read_rates(lr, chosen, able),
        [int(seed) for seed in count],
        output,
        data=data,
        given=given,
        jobs=jobs,
        say=show.counted("runs"),
    )
    if as_json:
        show.print_json(read_json(output / RESULT))
        return
    show.print_table(
        *results.table(), title="GLUE dev sets, in percent: median (standard deviation) over seeds"
    )
    for line in results.notes():
        show.say(line)
    show.say(f"{output / PAGE}: the page, with how to read it; {output / RESULT}: the numbers")
    show.say_next(f"pissa report {results.best_run}")
