"""The `pissa` command: its subcommands, and how errors and warnings reach a person."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import NoReturn

import typer

from pissa.cli import (
    chat,
    compare,
    convert,
    decompose,
    demo,
    eval,
    glue,
    inspect,
    landscape,
    merge,
    methods,
    observe,
    plan,
    preview,
    recipes,
    report,
    score,
    train,
)
from pissa.errors import PissaError

INTERRUPTED = 130
app = typer.Typer(
    name="pissa",
    help="Fine-tune a language model from its own principal directions, and get a plain LoRA back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("decompose")(decompose.decompose)
app.command("observe")(observe.observe)
app.command("plan", context_settings={"ignore_unknown_options": True})(plan.plan)
app.command("preview", context_settings={"ignore_unknown_options": True})(preview.preview)
app.command("train", context_settings={"ignore_unknown_options": True})(train.train)
app.command("convert")(convert.convert)
app.command("merge")(merge.merge)
app.command("compare", context_settings={"ignore_unknown_options": True})(compare.compare)
app.command("landscape")(landscape.landscape)
app.command("inspect")(inspect.inspect)
app.command("methods")(methods.methods)
app.command("report")(report.report)
app.command("chat")(chat.chat)
app.command("eval")(eval.evaluate)
app.command("glue", context_settings={"ignore_unknown_options": True})(glue.glue)
app.command("score")(score.score)
app.command("demo")(demo.demo)
app.add_typer(recipes.app, name="recipes")


def main() -> NoReturn:
    """Run a command; what a user can mend is one line on stderr and exit status 2, never a traceback."""
    # Large tensors in huge pages: mapping small ones anew for every weight takes as long as the
    # algebra.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _say_warning
    # It reports optional kernels at import
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except PissaError as error:
        print(f"pissa: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print(
                "pissa: stopped. What is on disk is whole: the same command goes on (train: with --resume)",
                file=sys.stderr,
            )
        raise
    sys.exit(0)


def _say_warning(
    message: Warning | str, category: type[Warning], *args: object, **kwargs: object
) -> None:
    if category is UserWarning:
        print(f"pissa: warning: {message}", file=sys.stderr)
