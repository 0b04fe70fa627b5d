"""A core that starts as a part of the weight, beside what that leaves of it.

y = (W - s L0 C0 R0) x + s L C R0 x,      L = L0 + dL,  C = C0 + dC
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pissa.adapters import starts
from pissa.adapters.forms.core import Core
from pissa.adapters.forms.on_residual import OnResidual
from pissa.method import Method
from pissa.untyped import PeftLayer


class CoreOnResidual(OnResidual, Core):
    """The base holds what the start left of W, the adapter adds the whole product."""

    @staticmethod
    def fits(method: Method, base: str, quantized: bool) -> bool:
        """A core trains from a part that is taken out of the weight."""
        started = "core" in method.parts and not method.zero_start
        return started and base == "residual" and not quantized

    def forward(  # type: ignore[override]
        self, module: PeftLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The frozen part's `result` plus the product's output."""
        return result + self.product(module, active_adapter, x)

    def merged_change(self, layer: PeftLayer, adapter: str) -> Tensor:
        """``s L C R0``."""
        start, _ = self._wide(layer, adapter)
        product: Tensor = layer.scaling[adapter] * torch.mm(*starts.taken(start))
        return super().merged_change(layer, adapter) + product
