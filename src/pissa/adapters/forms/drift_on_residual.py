"""The paper's form: the layer's weight becomes the residual, and the adapter adds the whole
product.

    y = (W - s L0 R0) x + s L R x,      L = L0 + dL,  R = R0 + dR

As in the kept form the drift trains and a plain LoRA for the original base leaves; W is kept as the
undo (`pissa.adapters.residual`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pissa.adapters import factors, starts
from pissa.adapters.forms.drift import Drift
from pissa.adapters.forms.on_residual import OnResidual
from pissa.method import Method
from pissa.untyped import PeftLayer


class DriftOnResidual(OnResidual, Drift):
    """The base holds W - s L0 R0, the adapter adds s L R."""

    @staticmethod
    def fits(method: Method, base: str, quantized: bool) -> bool:
        """Both factors train from a part that is taken out of the weight."""
        started = method.parts == ("left", "right") and not method.zero_start
        return started and base == "residual" and not quantized

    def forward(  # type: ignore[override]
        self, module: PeftLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The residual's `result` plus the trained product's output."""
        dL, dR = factors.trained(module, active_adapter)
        L0, R0 = module.start_left[active_adapter], module.start_right[active_adapter]
        scale = module.scaling[active_adapter]
        return result + starts.product(module, x, L0 + dL, R0 + dR, scale)

    def merged_change(self, layer: PeftLayer, adapter: str) -> Tensor:
        """``s L R``."""
        start, moved = self._wide(layer, adapter)
        (L0, R0), (dL, dR) = start.pair, moved.pair
        product: Tensor = layer.scaling[adapter] * ((L0 + dL) @ (R0 + dR))
        return product
