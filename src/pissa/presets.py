"""Names that users type: a method, or a preset that stands for a method with a quantizer."""

from __future__ import annotations

from dataclasses import dataclass

from pissa.errors import InputError
from pissa.method import Method
from pissa.registry import PRESETS, get, methods

ITERATIONS = 5
"""Rounds of the methods that alternate, as in the scripts of PiSSA and LoftQ."""


@dataclass(frozen=True)
class Choice:
    """A method with its quantizer, as asked for or by a preset's name.

    Attributes:
        method: looked up once, here, and handed on.
        quant: a quantizer's name, or None.
        iterations: rounds of alternation; 1 where the method does not alternate.
    """

    method: Method
    quant: str | None = None
    iterations: int = 1


def find(name: str | Method) -> Method:
    """The method that a name stands for, that of a preset too; a method is itself.

    Raises:
        InputError: unknown, with the nearest name.
    """
    if isinstance(name, Method):
        return name
    method, _ = PRESETS.get(name, (name, None))
    return get(method)


def choose(
    method: str | Method,
    quant: str | None = None,
    iterations: int | None = None,
    double_quant: bool = False,
) -> Choice:
    """Resolve a method or preset; `quant` wins over the preset's own.

    Raises:
        InputError: unknown, or a combination without a meaning.
    """
    chosen = find(method)
    _, preset_quant = PRESETS.get(method, ("", None)) if isinstance(method, str) else ("", None)
    quant, name = quant or preset_quant, chosen.name
    if quant and chosen.full_rank:
        raise InputError(
            f"quant is {quant} with {name}, whose bases are larger in 32 bits than the weight in 16: leave it out"
        )
    if quant and not chosen.parts:
        raise InputError(
            f"quant is {quant} with {name}, which has a format of its own: leave it out"
        )
    if quant is None and double_quant:
        raise InputError("double_quant has a meaning only with a quantiser: add --quant nf4")
    if quant is None and iterations is not None:
        raise InputError(
            f"iterations is {iterations}, which has a meaning only with a quantiser: add --quant nf4"
        )
    if iterations is not None and iterations < 1:
        raise InputError(f"iterations is {iterations}, expected 1 or more")
    if not chosen.alternates and iterations not in (None, 1):
        able = ", ".join(known.name for known in methods().values() if known.alternates)
        raise InputError(
            f"iterations is {iterations} with {name}, whose factors do not follow the error of "
            f"the quantised part: leave it out, or use one of {able}"
        )
    return Choice(chosen, quant, (iterations or ITERATIONS) if chosen.alternates and quant else 1)
