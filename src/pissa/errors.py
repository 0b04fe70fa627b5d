"""Every error this package raises on purpose.

    PissaError
    ├── InputError          a weight, rank, alpha, method or target that cannot be right
    ├── ConfigError         settings of a run: all mistakes in one report
    ├── DataError           a data set or a row of it, with file and line
    ├── CheckpointError     a folder that is not a readable safetensors checkpoint
    ├── WrongBaseError      an adapter or state beside a base it does not belong to
    ├── DivergedError       a training whose loss is not a number any more
    ├── OutputError         a place that must not or cannot be written
    │   └── BusyError       another process is writing there
    └── MissingExtraError   an optional dependency, with the pip line that brings it

A message says what was got, what was expected and what to do.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class PissaError(Exception):
    """Base of all errors that a user can cause and mend."""


class InputError(PissaError, ValueError):
    """A weight, rank, alpha, method or target that cannot be right."""


class ConfigError(PissaError, ValueError):
    """Settings of a run; the message lists every mistake at once."""


class DataError(PissaError, ValueError):
    """A data set, or a row of one; the message names file and line."""


class CheckpointError(PissaError):
    """A folder that is not a readable, safe, complete checkpoint."""


class WrongBaseError(PissaError):
    """An adapter or a training state beside a base it was not made for."""


class DivergedError(PissaError):
    """A training whose loss is not a number any more."""


class OutputError(PissaError):
    """An output that must not be overwritten, or cannot be written."""


class BusyError(OutputError):
    """A folder that another process is writing."""


class MissingExtraError(PissaError, ImportError):
    """An optional dependency is absent; the message is the pip line."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def require(module: str, extra: str) -> ModuleType:
    """Import `module` or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is needed for this: pip install 'pissa[{extra}]' ({error})"
        ) from error
