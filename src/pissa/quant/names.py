"""The table of quantisers."""

from __future__ import annotations

from pissa.errors import InputError, did_you_mean
from pissa.quant.int8 import Int8
from pissa.quant.nf4 import FourBit
from pissa.quant.quantiser import Quantiser

NAMES = ("nf4", "fp4", "int8")


def quantiser(name: str, *, double: bool = False) -> Quantiser:
    """The quantiser of that name.

    Args:
        name: one of `NAMES`.
        double: quantise the scales of the blocks too (nf4 and fp4).

    Raises:
        InputError: unknown, or double where there are no blocks.
        MissingExtraError: bitsandbytes is absent; the message is the pip line.
    """
    if name not in NAMES:
        raise InputError(f"unknown quantiser {name!r}.{did_you_mean(name, NAMES)} Known: {', '.join(NAMES)}")
    if name == "int8":
        if double:
            raise InputError("double quantisation is of block scales, which int8 has not: leave --double-quant out")
        return Int8()
    return FourBit(name, double)
