"""The cells of a comparison: one ordinary run for each method, learning rate and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pissa.config import TrainSettings, config_error, default_of
from pissa.errors import ConfigError, InputError
from pissa.presets import find
from pissa.randomness import tensor_seed

CELLS = "cells"
DIFFER = frozenset({"method", "options", "calibration", "learning_rate", "seed", "output", "force"})
"""Settings in which the cells of one comparison differ; all others are the same for all."""


@dataclass(frozen=True, order=True)
class Cell:
    """One run of a comparison; a method may bear options of its own, as corda[mode=kpm]."""

    method: str
    learning_rate: float
    seed: int

    def folder(self, out: Path) -> Path:
        """Where its run lies."""
        return out / CELLS / self.method / f"lr-{self.learning_rate!r}" / f"seed-{self.seed}"

    def settings(self, common: TrainSettings, out: Path) -> TrainSettings:
        """Those of all cells with this cell's own."""
        method, options = variant(self.method)
        own = {
            "method": method,
            "options": options,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }
        if method == "full" or find(method).observes is None:
            own["calibration"] = None
        try:
            return TrainSettings.model_validate(
                {**common.model_dump(), **own, "output": str(self.folder(out)), "force": False}
            )
        except ValidationError as error:
            raise config_error(
                [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()], str(self)
            ) from error

    def __str__(self) -> str:
        return f"{self.method}, learning rate {self.learning_rate:g}, seed {self.seed}"


def variant(name: str) -> tuple[str, dict[str, str]]:
    """`svft[pattern=banded;width=4]` as a method and its options.

    Raises:
        InputError: brackets that hold something else.
    """
    method, bracket, rest = name.partition("[")
    if not bracket:
        return name, {}
    pairs = [setting.partition("=") for setting in rest.removesuffix("]").split(";")]
    if not rest.endswith("]") or not all(key and value for key, _, value in pairs):
        raise InputError(
            f"method is {name!r}, expected options as in corda[mode=kpm] or svft[pattern=banded;width=4]"
        )
    return method, {key.strip(): value.strip() for key, _, value in pairs}


def cells(methods: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """All of them; a seed is finished for every method and rate before the next one begins, so that
    a comparison that is stopped early has whole seeds.
    """
    for name, values in (("methods", methods), ("learning rates", rates), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise ConfigError(
                f"{name}: got {', '.join(map(str, values)) or 'none'}, expected one or more, each once"
            )
    return [Cell(method, rate, seed) for seed in seeds for rate in rates for method in methods]


def check_jobs(jobs: int) -> None:
    """Refuse less than one run at a time."""
    if jobs < 1:
        raise InputError(f"jobs is {jobs}, expected 1 or more")


def part(grid: Sequence[Cell], which: str | None) -> list[Cell]:
    """The cells of one of several processes.

    Args:
        grid: all cells.
        which: "2/4" for the second of four; None for all.

    Raises:
        InputError: anything else.
    """
    if which is None:
        return list(grid)
    index, _, count = which.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise InputError(f"part is {which!r}, expected i/n with i from 1 to n, as in 2/4")
    # Mixed, so that no machine has one method to itself.
    mixed = sorted(grid, key=lambda cell: tensor_seed(0, str(cell)))
    own = set(mixed[int(index) - 1 :: int(count)])
    return [cell for cell in grid if cell in own]


def check_common(before: dict[str, object], now: TrainSettings, out: Path) -> None:
    """Cells that are added later must be comparable with those that are there.

    Raises:
        ConfigError: every setting that differs.
    """
    current = now.model_dump(mode="json")
    mistakes = [
        f"{key}: got {current[key]!r}, expected {before.get(key, default_of(key))!r} as in the cells that are there"
        for key in current
        if key not in DIFFER and current[key] != before.get(key, default_of(key))
    ]
    if mistakes:
        raise config_error(
            mistakes, f"the settings to add to {out} with; another folder takes other settings"
        )


def numbers(text: str, kind: type[int] | type[float], name: str) -> list[float]:
    """`1e-4,3e-4` as numbers.

    Raises:
        InputError: something that is no number.
    """
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError as error:
        raise InputError(f"{name} is {text!r}, expected numbers separated by commas") from error


def names(text: str) -> list[str]:
    """`full,lora,pissa` as names."""
    return [word.strip() for word in text.split(",") if word.strip()]
