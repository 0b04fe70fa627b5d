"""`pissa score TASK ANSWERS.jsonl`."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from pissa.cli import options, show


def score(
    task: Annotated[str, Argument(help="gsm8k, math, humaneval or mbpp.")],
    answers: Annotated[
        str, Argument(help="JSON lines: `output`, with `answer` (gsm8k, math) or `task_id` (code).")
    ],
    data: Annotated[
        str | None, Option(help="Folder with the questions as files, for code. Default: the Hub.")
    ] = None,
    allow_code_execution: options.RunCode = False,
    no_isolation: options.NoIsolation = False,
    as_json: options.Json = False,
) -> None:
    """Score answers that were generated anywhere, by our scorer and by the PiSSA authors'; needs no model."""
    from pissa.evaluation.answers_file import score_file

    with show.points_progress(task) as say:
        said = score_file(
            task,
            answers,
            data=data,
            allow_code_execution=allow_code_execution,
            isolation=not no_isolation,
            say=say,
        )
    if as_json:
        show.print_json(said)
        return
    rows = []
    for name, found in said["summary"].items():
        low, high = found["interval"]
        ends = f"{100 * low:.1f} to {100 * high:.1f}"
        rows.append(
            [name, f"{100 * found['value']:.2f}", ends, f"{found['correct']} of {found['count']}"]
        )
    show.print_table(["scorer", "correct, %", "95 % interval", "answers"], rows)
    if (covered := said["coverage"]) and covered["answered"] < covered["questions"]:
        show.say(f"answers to {covered['answered']} of {covered['questions']} questions")
    reasons = [item["reason"] for item in said["items"] if not item["correct"]]
    for reason, count in sorted(
        {reason: reasons.count(reason) for reason in reasons}.items(), key=lambda pair: -pair[1]
    ):
        show.say(f"{count} wrong: {reason}")
