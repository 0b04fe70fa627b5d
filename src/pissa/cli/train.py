"""`pissa train CONFIG.yaml [--key value ...]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from pissa.cli import options, show
from pissa.errors import ConfigError


def train(
    context: typer.Context,
    config: Annotated[Path | None, Argument(help="YAML settings; every key is also a flag, and the flag wins.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the newest checkpoint in the output folder.")] = False,
    as_json: options.Json = False,
) -> None:
    """Fine-tune a model as a YAML file and flags say.

    Every key of the file is also a flag: pissa train CONFIG.yaml --learning_rate 1e-4 --output run.
    """
    from pissa.config import load_settings
    from pissa.reports import plot_losses
    from pissa.training import train as run_training

    settings = load_settings(config, overrides(context.args))
    record = run_training(settings, resume=resume)
    out = Path(settings.output)
    plot_losses(
        {settings.method: out / "metrics.jsonl"}, out / "loss.png", title=f"{settings.method} on {settings.model}"
    )
    if as_json:
        show.print_json(record)
        return
    show.say(f"{out}: done; curve in {out / 'loss.png'}")
    if settings.method == "full":
        show.say_next(f"pissa inspect {out / 'model'}")
    else:
        show.say_next(
            f"pissa inspect {out} --base {settings.model}",
            f"pissa convert {out} {out}-lora",
            f"pissa merge {settings.model} {out} {out}-merged",
        )


def overrides(arguments: list[str]) -> dict[str, str | bool]:
    """`--key value`, `--key=value` and a bare `--flag` as settings; dashes and underscores are one."""
    found: dict[str, str | bool] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"got {word!r}, expected --key value: settings after the file are flags")
        key, equals, value = word[2:].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            value, equals = rest.pop(0), "="
        found[key.replace("-", "_")] = value if equals else True
    return found
