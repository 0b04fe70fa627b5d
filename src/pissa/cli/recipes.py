"""`pissa recipes`, `pissa recipes show NAME` and `pissa recipes copy NAME [FILE]`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from pissa.cli import options, show

app = typer.Typer(help="Settings of known trainings: list, show, copy.", rich_markup_mode=None)
Name = Annotated[str, Argument(help="A name listed by `pissa recipes`.")]
FLAGS = " --model MODEL --data DATA --output RUN"


@app.callback(invoke_without_command=True)
def recipes(context: typer.Context, as_json: options.Json = False) -> None:
    """List the recipes. `pissa train NAME` runs one, and flags win over what it says."""
    if context.invoked_subcommand:
        return
    from pissa import recipes

    known = [asdict(recipe) for recipe in recipes.recipes()]
    if as_json:
        show.print_json(known)
        return
    show.print_table(list(known[0]), [list(recipe.values()) for recipe in known])
    show.say_next(
        "pissa recipes show NAME", "pissa recipes copy NAME", f"pissa train math-pissa-small{FLAGS}"
    )


@app.command("list")
def list_recipes(context: typer.Context, as_json: options.Json = False) -> None:
    """List the recipes, as without a word."""
    context.invoked_subcommand = None
    recipes(context, as_json)


@app.command("show")
def show_recipe(name: Name, as_json: options.Json = False) -> None:
    """Print a recipe's settings, all that it extends resolved."""
    import yaml

    from pissa import recipes

    text = recipes.text(name)
    if as_json:
        show.print_json(yaml.safe_load(text))
        return
    print(text, end="")
    show.say_next(f"pissa recipes copy {name}", _train(name, text))


@app.command("copy")
def copy(
    name: Name,
    file: Annotated[
        Path | None, Argument(help="The file to write. Default: NAME.yaml here.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the file if it is there.")
    ] = False,
) -> None:
    """Write a recipe as one YAML file of its own, to change."""
    from pissa import recipes

    path = recipes.copy(name, file, force=force)
    show.say(f"{path}: written")
    show.say_next(_train(str(path), recipes.text(name)))


def _train(name: str, text: str) -> str:
    return f"pissa train {name}" + (FLAGS if "\n# model:" in text else "")
