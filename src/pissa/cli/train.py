"""`pissa train CONFIG.yaml [--key value ...]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pissa.cli import options, show
from pissa.errors import ConfigError
from pissa.untyped import Json


def train(
    words: Annotated[
        list[str] | None,
        Argument(
            metavar="[CONFIG.yaml] [--KEY VALUE]...",
            help="Settings: a YAML file, then flags, which win.",
        ),
    ] = None,
    resume: Annotated[
        bool, Option("--resume", help="Go on from the newest checkpoint in the output folder.")
    ] = False,
    list_keys: Annotated[
        bool, Option("--list-keys", help="List all settings with their defaults, and stop.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Fine-tune a model as a YAML file and flags say.

    Every key of the file is also a flag: pissa train CONFIG.yaml --learning_rate 1e-4 --output run.
    """
    from pissa.config import load_settings

    if list_keys:
        _print_keys()
        return
    config, flags = split_words(words or [])
    settings = load_settings(config, flags)

    from pissa.reports import next_commands, plot_losses, write_card, write_report
    from pissa.training import train as run_training
    from pissa.training.distributed import is_first

    record = run_training(settings, resume=resume)
    if not is_first():
        return
    out = Path(settings.output)
    title = f"{settings.method} on {Path(settings.model).name}"
    picture = plot_losses({settings.method: out}, out / "loss.png", title=title)
    write_card(out)
    page = write_report(out)
    if as_json:
        show.print_json(record)
        return
    show.say(_course(record))
    show.say(f"{out}: done; curve in {picture}, everything about the run in {page}")
    show.say_next(*(command for _, command in next_commands(out, record)))


def _course(record: Json) -> str:
    """The first and the last loss, and why a run stopped early."""
    first, last = record.get("first_loss"), record.get("loss")
    losses = (
        "no loss logged"
        if first is None or last is None
        else f"loss {first:.4f} at first, {last:.4f} at last"
    )
    held = record.get("eval_loss")
    evaluated = (
        ""
        if held is None
        else f"evaluation loss {record['first_eval_loss']:.4f} at first, {held:.4f} at last"
    )
    return "; ".join(
        part
        for part in (f"steps: {record['steps']}", losses, evaluated, record.get("stopped"))
        if part
    )


def split_words(words: list[str]) -> tuple[Path | None, Json]:
    """The file, if the first word is one, and `--key value`, `--key=value` or a bare `--flag` as settings."""
    rest = list(words)
    config = Path(rest.pop(0)) if rest and not rest[0].startswith("--") else None
    flags: Json = {}
    own: list[str] = []
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(
                f"got {word!r}, expected --key value: the YAML file comes first, then flags"
            )
        key, equals, value = word[2:].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            value, equals = rest.pop(0), "="
        if key == "option" and equals:  # as in `pissa decompose`; may be given several times
            own.append(value)
        else:
            flags[key.replace("-", "_")] = value if equals else True
    if own:
        flags["options"] = options.named(own)
    return config, flags


def _print_keys() -> None:
    from pissa.config import TrainSettings

    rows = []
    for key, field in TrainSettings.model_fields.items():
        default = (
            "required"
            if field.is_required()
            else "see right"
            if field.default_factory
            else field.default
        )
        rows.append([key, default, field.description])
    show.print_table(["key", "default", "meaning"], rows)
