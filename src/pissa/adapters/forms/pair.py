"""Plain LoRA: y = W x + s L R x, where L R is zero at first and both factors train themselves.

Nothing is taken out of the weight, so a quantized one does as well, and nothing is kept of the
start: peft's own layer, forward pass and files are all that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pissa.adapters import factors
from pissa.adapters.forms.form import Form, remember
from pissa.method import Method
from pissa.splits import Factors, Lora
from pissa.untyped import PeftLayer


class Pair(Form):
    """Two factors that train from a product of zero."""

    @staticmethod
    def fits(method: Method, base: str, quantized: bool) -> bool:
        """Both factors train, and nothing was taken out of the weight."""
        return method.parts == ("left", "right") and method.zero_start

    def begin(self, layer: PeftLayer, adapter: str, start: Factors) -> None:
        """L and R, in peft's own lora_B and lora_A."""
        factors.assign(layer, adapter, *start.pair)
        remember(layer, adapter, self)

    def trained(self, layer: PeftLayer, adapter: str) -> Factors:
        """L and R."""
        return Factors(*factors.trained(layer, adapter))

    def begin_again(self, layer: PeftLayer, adapter: str, trained: Factors) -> None:
        """All of it, since no start is kept apart."""
        self.assign(layer, adapter, trained)

    def start(self, layer: PeftLayer, adapter: str, trained: Factors) -> Factors:
        """A left factor of zero beside the right factor as it is now."""
        return _no_product(trained)

    def change(self, start: Factors, trained: Factors, scale: float) -> Lora:
        """``s L R``."""
        left, right = trained.pair
        return Lora(right, scale * left)

    def drift(self, start: Factors, trained: Factors) -> Factors:
        """L itself; how R moved is not on record, and the change does not depend on it."""
        left, right = trained.pair
        return Factors(left, torch.zeros_like(right))

    def to_state(self, start: Factors, trained: Factors) -> dict[str, Tensor]:
        """L and R; the start is no part of what they change."""
        return trained.named()

    def from_state(self, stored: Mapping[str, Tensor]) -> tuple[Factors, Factors]:
        """L and R, and a start of which the left factor is zero."""
        trained = Factors(**{part: stored[part] for part in self.parts})
        return _no_product(trained), trained


def _no_product(trained: Factors) -> Factors:
    left, right = trained.pair
    return Factors(torch.zeros_like(left), right)
