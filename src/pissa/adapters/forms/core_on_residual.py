"""A core that starts as a part of the weight, beside what that leaves of it.

y = (W - s L0 C0 R0) x + s L C R0 x,      L = L0 + dL,  C = C0 + dC
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pissa.adapters import residual, starts
from pissa.adapters.forms.core import Core
from pissa.adapters.forms.zero_core import moved_left, through_core
from pissa.method import Method
from pissa.splits import Factors


class CoreOnResidual(Core):
    """The base holds what the start left of W, the adapter adds the whole product."""

    @staticmethod
    def fits(method: Method, base: str, quantized: bool) -> bool:
        """A core trains from a part that is taken out of the weight."""
        started = "core" in method.parts and not method.zero_start
        return started and base == "residual" and not quantized

    def install(self, layer: Any, adapter: str, start: Factors, *, split: bool) -> None:
        """Take the start out of the weight, unless that was done already."""
        self.begin(layer, adapter, start)
        residual.install(layer, adapter, on_residual=split)

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The frozen part's `result` plus the product's output."""
        start, moved = starts.one(module, active_adapter), self.trained(module, active_adapter)
        _, right = start.pair
        hidden = F.linear(x.to(right.dtype), right)
        inner = through_core(module, active_adapter, hidden)
        inner = inner + F.linear(hidden, module.start_core[active_adapter])
        change: Tensor = module.scaling[active_adapter] * F.linear(inner, moved_left(start, moved))
        return result + change

    def merged_change(self, layer: Any, adapter: str) -> Tensor:
        """``s L C R0``."""
        start, _ = self._wide(layer, adapter)
        product: Tensor = layer.scaling[adapter] * torch.mm(*starts.taken(start))
        return super().merged_change(layer, adapter) + product
