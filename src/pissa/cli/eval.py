"""`pissa eval RUN_OR_MODEL...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Context, Option

from pissa.cli import options, show
from pissa.errors import InputError
from pissa.untyped import Json

if TYPE_CHECKING:
    from pissa.evaluation.fidelity import Fidelity
    from pissa.evaluation.judge import Judge
    from pissa.evaluation.result import TaskResult

OF_BOTH = frozenset(
    {"models", "output", "batch_size", "base", "device", "dtype", "trust_remote_code", "as_json"}
)
"""Parameters that questions and --fidelity share; each refuses the other's."""
OF_FIDELITY = frozenset({"fidelity", "text", "tokens", "max_length"})


def evaluate(
    context: Context,
    models: Annotated[
        list[str], Argument(help="Runs, adapters or models: folders, or Hub ids of whole models.")
    ],
    tasks: Annotated[
        str,
        Option(
            help="gsm8k, math, humaneval, mbpp, mt_bench, with commas; on the standard track any of lm-eval's."
        ),
    ] = "gsm8k",
    output: Annotated[
        str | None,
        Option("--output", "-o", help="Folder of the results, where the same command goes on."),
    ] = None,
    track: Annotated[
        str, Option(help="paper: as the PiSSA paper asks; standard: lm-evaluation-harness's own.")
    ] = "paper",
    data: Annotated[
        str | None, Option(help="Folder with the questions as files. Default: the Hub.")
    ] = None,
    limit: Annotated[
        int | None, Option(min=1, help="Ask the first so many questions only. Default: all.")
    ] = None,
    batch_size: Annotated[
        int | None,
        Option(
            min=1,
            help="Questions at a time, sorted by length; windows of a text. Default: 16; 4 windows.",
        ),
    ] = None,
    backend: Annotated[str, Option(help="hf or vllm.")] = "hf",
    base: Annotated[str | None, Option(help="The base, if it lies elsewhere by now.")] = None,
    no_base_row: Annotated[
        bool, Option("--no-base-row", help="Do not evaluate the base of a run beside it.")
    ] = False,
    device: Annotated[
        str | None, Option(help="cpu, cuda, cuda:1. Default: cuda where there is one.")
    ] = None,
    dtype: Annotated[
        str | None, Option(help="float32, bfloat16 or float16. Default: as trained, or stored.")
    ] = None,
    allow_code_execution: options.RunCode = False,
    no_isolation: options.NoIsolation = False,
    judge: Annotated[
        str | None,
        Option(help="OpenAI-compatible address that marks MT-Bench, as https://api.openai.com/v1."),
    ] = None,
    judge_model: Annotated[str, Option(help="The judge's name at that address.")] = "",
    judge_key_env: Annotated[
        str, Option(help="Environment variable that holds the judge's key.")
    ] = "OPENAI_API_KEY",
    judge_jobs: Annotated[int, Option(min=1, help="Requests to the judge at a time.")] = 4,
    fidelity: Annotated[
        bool,
        Option("--fidelity", help="Instead: perplexity, KL and agreement with the base on --text."),
    ] = False,
    text: Annotated[
        str | None, Option(help="For --fidelity: a text file, or rows with `text`.")
    ] = None,
    tokens: Annotated[
        int | None, Option(min=2, help="For --fidelity: read the first so many. Default: all.")
    ] = None,
    max_length: Annotated[
        int | None,
        Option(
            min=2, help="For --fidelity: tokens in a window. Default: 512, or the base's positions."
        ),
    ] = None,
    force: Annotated[
        bool, Option("--force", help="Drop answers to another evaluation that are in the way.")
    ] = False,
    trust_remote_code: options.RemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Evaluate a run on its own base, which is checked, or any model; its base gets a row too."""
    given = _given(context, fidelity)
    settings: Json = {
        "base": base,
        "device": device,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    settings |= {"batch_size": batch_size} if batch_size else {}
    if fidelity:
        settings |= {"max_length": max_length} if max_length else {}
        _fidelity(models, text, output, {**settings, "limit_tokens": tokens}, as_json)
        return

    from pissa.checkpoint.output import read_json
    from pissa.comparison.grid import names
    from pissa.evaluation.evaluate import RESULTS
    from pissa.evaluation.evaluate import evaluate as run
    from pissa.evaluation.tracks import MT_BENCH
    from pissa.training.quiet import quiet

    judging = [flag for name, flag in given.items() if name.startswith("judge")]
    if judging and (judge is None or MT_BENCH not in names(tasks)):
        lacks = "mt_bench is not among --tasks" if judge else "no --judge says where the judge is"
        raise InputError(
            f"got {', '.join(judging)}, but {lacks}: add it, or leave {', '.join(judging)} out"
        )
    out = Path(output or "results")
    with quiet(), show.steps_progress() as say:
        found = run(
            models,
            names(tasks),
            out,
            track=track,
            data=data,
            limit=limit,
            backend=backend,
            base_row=not no_base_row,
            allow_code_execution=allow_code_execution,
            isolation=not no_isolation,
            judge=_judge(judge, judge_model, judge_key_env, judge_jobs),
            force=force,
            say=say,
            **settings,
        )
    if as_json:
        show.print_json(read_json(out / RESULTS))
        return
    print_results(found)
    show.say(f"{out / 'results.html'}: the page, with every answer; {out / RESULTS}: the numbers")


def print_results(found: list[TaskResult]) -> None:
    """One line a model and task, the figures as on the page."""
    from pissa.evaluation.page import figure

    rows = []
    for one in sorted(found, key=lambda result: (result.task, result.track)):
        head, authors = one.scores.get(one.headline), one.scores.get("authors")
        value, *interval = figure(one.headline, head) if head else ["no judge"]
        rows.append(
            [
                one.task if one.track == "paper" else f"{one.task} ({one.track})",
                one.model,
                value,
                *(interval or ["-"]),
                figure("authors", authors)[0] if authors else "-",
                f"{one.gold.value:.4g}" if one.gold else "-",
                str(head.count if head else one.data["rows"]),
            ]
        )
    columns = [
        "task",
        "model",
        "score",
        "95 % interval",
        "authors' scorer",
        "perplexity of right answers",
        "questions",
    ]
    show.print_table(columns, rows)
    for note in dict.fromkeys(
        f"{one.model} {one.task}: {note}" for one in found for note in one.notes
    ):
        show.say(note)


def _given(context: Context, fidelity: bool) -> dict[str, str]:
    """The parameters that were typed, by name as they are typed.

    Raises:
        InputError: one that would be ignored.
    """
    spelt = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    typed = [
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") != "DEFAULT"
    ]
    given = {name: spelt[name] for name in typed}
    if fidelity and (odd := [given[name] for name in typed if name not in OF_BOTH | OF_FIDELITY]):
        raise InputError(
            f"--fidelity compares models on a text and takes no {', '.join(odd)}: leave it out"
        )
    if not fidelity and (odd := [given[name] for name in typed if name in OF_FIDELITY]):
        raise InputError(
            f"got {', '.join(odd)}, which only --fidelity takes: add --fidelity, or leave it out"
        )
    return given


def _judge(url: str | None, model: str, key_env: str, jobs: int) -> Judge | None:
    from pissa.evaluation.judge import Judge

    return Judge(url, model, key_env, jobs=jobs) if url else None


def _fidelity(
    models: list[str], text: str | None, output: str | None, settings: Json, as_json: bool
) -> None:
    from pissa.evaluation.fidelity import FILE, fidelity
    from pissa.training.quiet import quiet

    if text is None:
        raise InputError("--fidelity compares models on a text: name a file with --text")
    with quiet(), show.steps_progress() as say:
        found = fidelity(models, text, output, say=say, **settings)
    if as_json:
        show.print_json(found.to_json())
        return
    print_fidelity(found)
    if output:
        show.say(f"{Path(output) / FILE}: the numbers")


def print_fidelity(found: Fidelity) -> None:
    """One line a model, then what must be known of them."""
    columns = ["model", "kind", "computes in", "perplexity", "against base", "KL, nats", "top-1 agreement",
               "largest logit difference"]  # fmt: skip
    rows = [
        [
            row.model,
            row.kind,
            row.dtype,
            f"{row.perplexity:.4f}",
            f"{100 * (row.ratio - 1):+.3f} % ± {100 * (row.ratio_stderr or 0):.3f} %",
            f"{row.kl:.3e}",
            f"{100 * row.agreement:.2f} %",
            f"{row.largest:.3g}",
        ]
        for row in found.rows
    ]
    show.print_table(columns, rows)
    show.say(f"{found.text['name']}: {found.text['predicted']} tokens predicted")
    for note in found.notes:
        show.say(note)
