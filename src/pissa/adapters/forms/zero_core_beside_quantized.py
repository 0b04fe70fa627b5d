"""A core that starts at zero beside a weight in few bits: y = Q x + s L dC R0 x.

Nothing was taken out of the weight, so with the adapter off the layer is Q. Merging into few bits
would lose what was trained, so it is refused.
"""

from __future__ import annotations

from pissa.adapters import quantized
from pissa.adapters.forms.zero_core import ZeroCore
from pissa.method import Method
from pissa.splits import Factors
from pissa.untyped import PeftLayer


class ZeroCoreBesideQuantized(ZeroCore):
    """The base holds Q, the adapter adds the change of it."""

    @staticmethod
    def fits(method: Method, base: str, quantized: bool) -> bool:
        """A core trains from zero, and the weight is in few bits."""
        return "core" in method.parts and method.zero_start and quantized

    def install(self, layer: PeftLayer, adapter: str, start: Factors, *, split: bool) -> None:
        """And refuse merging."""
        self.begin(layer, adapter, start)
        quantized.refuse_merging(layer)
