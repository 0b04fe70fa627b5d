"""The table of quantizers, read from this folder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pissa.errors import InputError, did_you_mean
from pissa.quant.quantiser import FORMATS, Quantiser


def _read_folder() -> tuple[str, ...]:
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != "names":
            importlib.import_module(f"{package}.{module.name}")
    return tuple(sorted(FORMATS))


NAMES = _read_folder()
"""Of all formats, in alphabetical order."""


def quantiser(name: str, *, double: bool = False) -> Quantiser:
    """The quantizer of that name.

    Args:
        name: one of `NAMES`.
        double: quantize the scales of the blocks too, where there are any.

    Raises:
        InputError: unknown, or double where there are no blocks.
        MissingExtraError: bitsandbytes is absent; the message is the pip line.
    """
    if name not in FORMATS:
        known = ", ".join(NAMES)
        raise InputError(f"unknown quantiser {name!r}.{did_you_mean(name, NAMES)} Known: {known}")
    return FORMATS[name](name, double)


def of_config(config: Mapping[str, Any]) -> Quantiser | None:
    """What a model's `quantization_config` says its weights are packed with; None if it is no
    format of ours.

    Args:
        config: JSON.

    Raises:
        MissingExtraError: as for `quantiser`.
    """
    found = (kind.of_config(config) for kind in dict.fromkeys(FORMATS.values()))
    return next((packer for packer in found if packer is not None), None)
