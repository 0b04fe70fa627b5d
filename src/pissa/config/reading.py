"""Settings from YAML files and flags: layers over one another, and all mistakes in one report."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pissa.config.files import read_chain
from pissa.config.settings import KEYS, TrainSettings
from pissa.config.spellings import ACCUMULATION, ALIASES, INIT, MEANINGS
from pissa.config.translation import READERS, combine, translate
from pissa.errors import ConfigError, did_you_mean

TAKES_BACK = {
    "batch_size": ACCUMULATION,
    ACCUMULATION: "batch_size",
    "epochs": "max_steps",
    "eval_data": "eval_size",
    "eval_size": "eval_data",
    "method": INIT,
}
"""A key of an upper layer to the key below that says otherwise about the same matter."""


def load_settings(path: Path | None, overrides: Mapping[str, object]) -> TrainSettings:
    """Read a YAML file and all that it extends, let `overrides` (the flags) win, check everything.

    Args:
        path: the YAML file, the name of a recipe where there is no such file, or None for flags
            alone.
        overrides: key to value; both may use the spellings of other tools.

    Raises:
        ConfigError: one line per mistake, all of them.
    """
    mistakes: list[str] = []
    values, origins = _layered(path, overrides, mistakes)
    combine(values, mistakes)
    try:
        settings = TrainSettings.model_validate(values)
    except ValidationError as error:
        mistakes += [_marked(line, origins.get(key)) for key, line in _lines(error).items()]
    if mistakes:
        raise config_error(mistakes, str(path) if path else "the settings")
    return settings


def merged_values(path: Path) -> dict[str, Any]:
    """What a YAML file and all that it extends say, in our spelling; not checked for what is
    missing.

    Raises:
        ConfigError: see `load_settings`.
    """
    mistakes: list[str] = []
    values, _ = _layered(path, {}, mistakes)
    combine(values, mistakes)
    if mistakes:
        raise config_error(mistakes, str(path))
    return values


def config_error(mistakes: list[str], where: str) -> ConfigError:
    """One error for all mistakes."""
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return ConfigError(f"{count} in {where}:\n" + "\n".join(f"  {line}" for line in mistakes))


def _layered(
    path: Path | None, overrides: Mapping[str, object], mistakes: list[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """All layers over one another, the flags on top, and the base file that a key came from."""
    chain = read_chain(path) if path else []
    layers: list[tuple[Mapping[str, object], list[str], str | None]] = [
        (file.values, file.mistakes, None if file is chain[-1] else file.path.name)
        for file in chain
    ]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    left_out: list[str] = []
    for layer, found, name in [*layers, (overrides, [], None)]:
        ours, ignored = translate(layer, found)
        mistakes += [_marked(line, name) for line in found]
        left_out += ignored
        for key, value in ours.items():
            rival = TAKES_BACK.get(key, "")
            if rival not in ours and value not in (None, 0, "0", "null"):
                values.pop(rival, None)
        values |= ours
        origins = {key: origin for key, origin in origins.items() if key not in ours}
        origins |= dict.fromkeys(ours, name) if name else {}
    if left_out:
        warnings.warn(
            f"left out, since they have no bearing here: {', '.join(dict.fromkeys(left_out))}",
            stacklevel=3,
        )
    return values, origins


def _marked(line: str, name: str | None) -> str:
    return f"{line} (in {name})" if name else line


def _lines(error: ValidationError) -> dict[str, str]:
    """`key: got ..., expected ...` for each mistake by key; the branches of a union in one line."""
    lines: dict[str, str] = {}
    for mistake in error.errors():
        key = str(mistake["loc"][0])
        if mistake["type"] == "default_factory_not_called":
            continue  # a default that follows from another key, which has a line of its own
        if mistake["type"] == "extra_forbidden":
            hint = did_you_mean(key, (*KEYS, *ALIASES, *MEANINGS, *READERS))
            lines[key] = (
                f"{key}: got an unknown key, expected one of those in `pissa train --list-keys`.{hint}"
            )
            continue
        expected = re.sub(
            r"^(Input|String|List|Value)? ?(should (be|have)|error,) ", "", mistake["msg"]
        )
        if key in lines:
            lines[key] += f", or {expected}"
        elif mistake["type"] == "missing":
            lines[key] = (
                f"{key}: got nothing, expected {TrainSettings.model_fields[key].description}"
            )
        else:
            got, names = mistake["input"], re.findall(r"'([^']*)'", mistake["msg"])
            hint = (
                did_you_mean(got, names)
                if isinstance(got, str) and mistake["type"] == "literal_error"
                else ""
            )
            lines[key] = f"{key}: got {got!r}, expected {expected}{hint}"
    return lines
