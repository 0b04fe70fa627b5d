"""A core that starts as a part of the weight, on a base that is kept.

    y = W x + s (L C R0 - L0 C0 R0) x  =  W x + s (L dC h + dL C0 h),   h = R0 x,  C = C0 + dC

As for a core from zero dC and dL train. Where dL does, ``[L, dL] @ [dC R0; C0 R0]`` leaves, so that
both can be told apart again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pissa.adapters import starts
from pissa.adapters.forms.zero_core import ZeroCore, moved_left, through_core
from pissa.method import Method
from pissa.splits import Factors
from pissa.untyped import PeftLayer


class Core(ZeroCore):
    """The base keeps W, the adapter adds the change."""

    @staticmethod
    def fits(method: Method, base: str, quantized: bool) -> bool:
        """A core trains from a part of a weight that stays as it is."""
        started = "core" in method.parts and not method.zero_start
        return started and base == "keep" and not quantized

    @property
    def state_dict_ranks(self) -> int:
        """Two blocks where the left factor trains, see above."""
        return 2 if "left" in self.parts else 1

    def begin(self, layer: PeftLayer, adapter: str, start: Factors) -> None:
        """A weight of zero has a core of zero, which a start leaves out."""
        if start.core is None:
            _, right = start.pair
            start = dataclasses.replace(start, core=right.new_zeros((right.shape[0],) * 2))
        super().begin(layer, adapter, start)

    def forward(  # type: ignore[override]
        self, module: PeftLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The base layer's `result` plus the change's output."""
        start, moved = starts.one(module, active_adapter), self.trained(module, active_adapter)
        _, right = start.pair
        hidden = F.linear(x.to(right.dtype), right)
        inner = through_core(module, active_adapter, hidden, start.pattern)
        change = F.linear(inner, moved_left(start, moved))
        if moved.left is not None:
            change = change + F.linear(
                F.linear(hidden, module.start_core[active_adapter]), moved.left
            )
        scaled: Tensor = module.scaling[active_adapter] * change
        return result + scaled

    def product(self, layer: PeftLayer, adapter: str, x: Tensor) -> Tensor:
        """``s L C R0 x``, where the layer holds only the rest of the weight."""
        start, moved = starts.one(layer, adapter), self.trained(layer, adapter)
        _, right = start.pair
        hidden = F.linear(x.to(right.dtype), right)
        inner = through_core(layer, adapter, hidden, start.pattern)
        inner = inner + F.linear(hidden, layer.start_core[adapter])
        product: Tensor = layer.scaling[adapter] * F.linear(inner, moved_left(start, moved))
        return product
