"""A pair beside a frozen part in few bits: y = Q x + s L R x, where W is only nearly Q + s L0 R0.

Nothing can be given back exactly here, so L and R train themselves, in peft's own lora_B and
lora_A, and what any tool saves is a plain LoRA that is right on Q and on nothing else. The start
L0, R0 is kept in buffers: with the adapter off the layer still stands for W as nearly as it did at
the start, not for Q alone.
"""

from __future__ import annotations

from pissa.adapters import factors, quantized, starts
from pissa.adapters.forms.form import NO_DROPOUT, Form, remember
from pissa.method import Method
from pissa.splits import Factors, Lora
from pissa.untyped import PeftLayer


class PairBesideQuantized(Form):
    """Two factors that train from what quantization left of the weight, or from its principal part."""

    @staticmethod
    def fits(method: Method, base: str, quantized: bool) -> bool:
        """Both factors train, and the rest of the weight is in few bits."""
        return quantized and method.parts == ("left", "right") and not method.zero_start

    def install(self, layer: PeftLayer, adapter: str, start: Factors, *, split: bool) -> None:
        """With the adapter off, what was taken out of W is given back."""
        self.begin(layer, adapter, start)
        quantized.stand_beside(layer)

    def begin(self, layer: PeftLayer, adapter: str, start: Factors) -> None:
        """L and R at L0 and R0, which are kept."""
        factors.assign(layer, adapter, *start.pair)
        starts.put(layer, adapter, start, like=factors.trained(layer, adapter)[0])
        remember(layer, adapter, self)

    def trained(self, layer: PeftLayer, adapter: str) -> Factors:
        """L and R."""
        return Factors(*factors.trained(layer, adapter))

    def change(self, start: Factors, trained: Factors, scale: float) -> Lora:
        """``s L R``: beside Q all that was taken out of W is new."""
        left, right = trained.pair
        return Lora(right, scale * left)

    def drift(self, start: Factors, trained: Factors) -> Factors:
        """L - L0 and R - R0."""
        (left0, right0), (left, right) = start.pair, trained.pair
        return Factors(left - left0, right - right0)

    def why_no_dropout(self, method: str) -> str | None:
        """What is dropped would be missing from the weight."""
        return f"expected 0 with {method}: {NO_DROPOUT}"
