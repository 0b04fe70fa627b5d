"""`pissa preview CONFIG.yaml [--key value ...]`."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from pissa.cli import options, show
from pissa.cli.train import split_words

if TYPE_CHECKING:
    from pissa.planning.preview import Shown, Survey


def preview(
    words: Annotated[
        list[str] | None,
        Argument(
            metavar="[CONFIG.yaml] [--KEY VALUE]...", help="Settings, as `pissa train` takes them."
        ),
    ] = None,
    rows: Annotated[int, Option(help="Rows to show; 0 for the counts alone.")] = 3,
    as_json: options.Json = False,
) -> None:
    """Show rows as the model will see them, and count what is odd about the data.

    Tokens that carry loss are green on a terminal and between ⟦ and ⟧ elsewhere. Loads the
    tokenizer, no weights.
    """
    from pissa.config import load_settings

    config, flags = split_words(words or [])
    settings = load_settings(config, flags)

    from pissa.planning.preview import preview as look
    from pissa.training import quiet

    with quiet():
        survey = look(settings, rows)
    if as_json:
        show.print_json(dataclasses.asdict(survey))
        return
    for number, row in enumerate(survey.shown, 1):
        _print_row(number, row)
    _print_counts(survey)
    show.say_next(f"pissa plan {' '.join(words or [])}")


def _print_row(number: int, row: Shown) -> None:
    from rich.console import Console
    from rich.text import Text

    from pissa.planning.preview import printable

    console = Console(highlight=False, soft_wrap=True)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    plain = not console.is_terminal or console.no_color or console.color_system is None
    cut = f", {row.cut} more cut off" if row.cut else ""
    title = f"row {number}, {printable(row.where)}: {row.tokens} tokens{cut}"
    console.print(
        Text(
            title + (f", label {printable(row.label)}" if row.label is not None else ""),
            style="bold",
        )
    )
    body = Text()
    for segment in row.segments:
        text = printable(segment.text)
        if plain:
            body.append(f"⟦{text}⟧" if segment.loss else text)
        else:
            body.append(text, style="green" if segment.loss else "dim")
    console.print(body, end="\n\n")


def _print_counts(survey: Survey) -> None:
    from pissa.planning.preview import printable

    facts: dict[str, object] = {
        "rows": f"{survey.rows:,} to train on, {survey.evaluation:,} to evaluate on",
        "tokens": f"{survey.tokens:,} in a pass over the rows",
        "a row's": f"{survey.median:,} tokens (median), {survey.p95:,} (95 %), {survey.longest:,} (longest)",
        "cut": f"{survey.cut:,} rows at {survey.limit} tokens",
    }
    if survey.loss_share is not None:
        facts |= {
            "carry loss": f"{survey.loss_share:.1%} of the tokens",
            "dropped": f"{survey.dropped:,} rows, with no response left",
            "empty": f"{survey.empty:,} rows have a blank response",
        }
    else:
        facts["empty"] = f"{survey.empty:,} rows have no text"
        facts["labels"] = ", ".join(
            f"{printable(name)}: {count:,}" for name, count in survey.labels.items()
        )
    facts["duplicates"] = f"{survey.duplicates:,} rows are exactly an earlier one"
    if survey.evaluation:
        facts["leaked"] = f"{survey.leaked:,} evaluation rows are training rows too"
    for key, value in facts.items():
        print(f"{key:12} {value}")
