"""One file for each way an adapter lives on a layer. `form_of` finds the one that a recipe asks for."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

from pissa.adapters.forms.form import Form, on_layer
from pissa.errors import InputError
from pissa.method import Method

__all__ = ["Form", "form_of", "forms", "on_layer"]


def forms() -> list[type[Form]]:
    """All forms, read from this folder."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found = {kind for kind in _below(Form) if not inspect.isabstract(kind)}
    return sorted(found, key=lambda kind: kind.__module__)


def _below(kind: type) -> Iterator[Any]:  # classes, of which mypy would have only concrete ones
    below: list[Any] = kind.__subclasses__()
    for one in below:
        yield one
        yield from _below(one)


def form_of(method: Method, base: str, quantized: bool) -> Form:
    """The one form in which what this method trains lives on a layer.

    Args:
        method: which parts of a split train.
        base: "keep" or "residual": whether the layer's weight stays as it is.
        quantized: whether what does not train is stored in few bits.

    Raises:
        InputError: no form can hold these parts, or several claim to.
    """
    fitting = [kind for kind in forms() if kind.fits(method, base, quantized)]
    if len(fitting) != 1:
        names = ", ".join(kind.__name__ for kind in fitting) or "none"
        raise InputError(
            f"{method.name} trains {' and '.join(method.parts) or 'nothing'} "
            f"(base {base!r}, quantized: {quantized}), and the forms for that are {names}, "
            "expected exactly one: see pissa/adapters/forms"
        )
    return fitting[0](method.parts)
