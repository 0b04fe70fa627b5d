"""Frozen parts in few bits: one file per format. `quantiser` finds one by name."""

from pissa.quant.names import NAMES, of_config, quantiser
from pissa.quant.quantiser import Quantiser, quantizer_format

__all__ = ["NAMES", "Quantiser", "of_config", "quantiser", "quantizer_format"]
