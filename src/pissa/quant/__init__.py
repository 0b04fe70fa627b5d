"""Frozen parts in few bits: one file per format. `quantiser` finds one by name."""

from pissa.quant.names import NAMES, quantiser
from pissa.quant.quantiser import Quantiser

__all__ = ["NAMES", "Quantiser", "quantiser"]
