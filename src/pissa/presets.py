"""Names that users type: a method, or a preset that stands for a method with a quantiser."""

from __future__ import annotations

from dataclasses import dataclass

from pissa.errors import InputError
from pissa.registry import OBSERVED, PRESETS, get, methods


@dataclass(frozen=True)
class Choice:
    """A method with its quantiser, as asked for or by a preset's name.

    Attributes:
        method: a name listed by `pissa methods`.
        quant: a quantiser's name, or None.
        iterations: rounds of alternation; 1 where the method does not alternate.
    """

    method: str
    quant: str | None = None
    iterations: int = 1


def observed(method: str) -> str | None:
    """What a method or preset needs to have seen of each layer; None where weights suffice, as for `full`."""
    needs = "" if method == "full" else get(PRESETS.get(method, (method,))[0]).needs
    return needs if needs in OBSERVED else None


ITERATIONS = 5
"""Rounds of the methods that alternate, as in the scripts of PiSSA and LoftQ."""


def choose(method: str, quant: str | None = None, iterations: int | None = None, double_quant: bool = False) -> Choice:
    """Resolve a method or preset; `quant` wins over the preset's own.

    Raises:
        InputError: unknown, or a combination without a meaning.
    """
    method, preset_quant = PRESETS.get(method, (method, None))
    quant, alternates = quant or preset_quant, get(method).alternates
    if quant and get(method).full_rank:
        raise InputError(
            f"quant is {quant} with {method}, whose bases are larger in 32 bits than the weight in 16: leave it out"
        )
    if quant and not get(method).parts:
        raise InputError(f"quant is {quant} with {method}, which has a format of its own: leave it out")
    if quant is None and double_quant:
        raise InputError("double_quant has a meaning only with a quantiser: add --quant nf4")
    if quant is None and iterations is not None:
        raise InputError(f"iterations is {iterations}, which has a meaning only with a quantiser: add --quant nf4")
    if iterations is not None and iterations < 1:
        raise InputError(f"iterations is {iterations}, expected 1 or more")
    if not alternates and iterations not in (None, 1):
        able = ", ".join(known.name for known in methods().values() if known.alternates)
        raise InputError(
            f"iterations is {iterations} with {method}, whose factors do not follow the error of the quantised part: "
            f"leave it out, or use one of {able}"
        )
    return Choice(method, quant, (iterations or ITERATIONS) if alternates and quant else 1)
