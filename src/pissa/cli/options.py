"""Options that several commands share, each with its unit and its "off" value."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from pissa.errors import InputError
from pissa.jobs import DecomposeSettings
from pissa.keywords import documented

_MEANING = {name: meaning for name, (_, meaning) in documented(DecomposeSettings).items()}

Targets = Annotated[str, Option(help=_MEANING["targets"])]
Seed = Annotated[int, Option(help=_MEANING["seed"])]
Workers = Annotated[int | None, Option(help=_MEANING["workers"])]
Revision = Annotated[str | None, Option(help=_MEANING["revision"])]
RemoteCode = Annotated[bool, Option("--trust-remote-code", help=_MEANING["trust_remote_code"])]
Force = Annotated[bool, Option("--force", help=_MEANING["force"])]
Json = Annotated[bool, Option("--json", help="Print the result as JSON.")]
Calibration = Annotated[
    str | None,
    Option(
        help="For methods that observe the model: data (as for training), or a file of pissa observe."
    ),
]
CalibrationRows = Annotated[
    int, Option(help="Use the first so many rows of the calibration data, 1 or more.")
]
RunCode = Annotated[
    bool,
    Option(
        "--allow-code-execution",
        help="Run programs that a model wrote, without network, files or rights.",
    ),
]
NoIsolation = Annotated[
    bool,
    Option(
        "--no-isolation", help="Accept a process with limits only, where the machine has no walls."
    ),
]


def flags(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each documented field of a settings class.

    Args:
        settings: a dataclass, see `pissa.keywords`.

    Returns:
        A decorator. The command takes an object of that class as `settings`, and the flags stand in
        its place.
    """
    fields = {
        name: _flag(name, kind, meaning)
        for name, (kind, meaning) in documented(settings, flags=True).items()
    }
    defaults = {
        name: field.default for name, field in inspect.signature(settings).parameters.items()
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(command, include_extras=True)
        hints.pop("settings")
        parameters: list[inspect.Parameter] = []
        for name, own in inspect.signature(command).parameters.items():
            if name != "settings":
                parameters.append(own.replace(annotation=hints[name]))
                continue
            for flag, hint in fields.items():
                flagged = inspect.Parameter(
                    flag, own.KEYWORD_ONLY, default=defaults[flag], annotation=hint
                )
                parameters.append(flagged)
        # typer gives everything by name, so the order is that of the help alone.
        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters
        ]

        def flagged_command(**given: Any) -> None:  # as the signature says
            own = {name: _read(name, given.pop(name)) for name in fields}
            command(**given, settings=settings(**own))

        flagged_command.__name__, flagged_command.__doc__ = command.__name__, command.__doc__
        flagged_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        flagged_command.__annotations__ = {one.name: one.annotation for one in parameters}
        return flagged_command

    return decorate


def _flag(name: str, kind: Any, meaning: str) -> Any:
    """A field's type as a command line has it: words where a field takes more than one type."""
    if name == "options":
        return Annotated[list[str] | None, Option("--option", help=meaning)]
    if kind is bool:
        return Annotated[bool, Option(f"--{name.replace('_', '-')}", help=meaning)]
    kinds = {None if one is type(None) else one for one in typing.get_args(kind) or (kind,)}
    words = Path if Path in kinds else str
    simple = next((one for one in (int, float) if kinds <= {one, None}), words)
    return Annotated[simple | None if None in kinds else simple, Option(help=meaning)]


def _read(name: str, word: Any) -> Any:
    """A flag's word as the field takes it."""
    if name == "options":
        return named(word)
    return target_list(word) if name == "targets" else word


def named(settings: list[str] | None) -> dict[str, str]:
    """`mode=kpm` as a name and a value."""
    pairs = [setting.partition("=") for setting in settings or ()]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise InputError(
                f"--option is {name + equals!r}, expected NAME=VALUE, as in --option mode=kpm"
            )
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise InputError(f"--option is given twice for one name: {', '.join(settings or ())}")
    return {name: value for name, _, value in pairs}


def target_list(text: str) -> str | list[str]:
    """`q_proj,v_proj` is a list; a regular expression or a single name stays a string."""
    plain = all(character.isalnum() or character in "._-, " for character in text)
    return [name.strip() for name in text.split(",")] if plain and "," in text else text
