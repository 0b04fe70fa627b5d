"""A core that starts as a part of the weight, beside the rest of it in few bits.

    y = Q x + s L C R0 x,      where W is only nearly Q + s L0 C0 R0

Alone what was trained is right beside Q, so what is saved is the whole product, ``L @ (C R0)``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pissa.adapters import quantized, sharding, starts
from pissa.adapters.forms.core import Core
from pissa.method import Method
from pissa.splits import Factors, Lora
from pissa.untyped import PeftLayer, StateDict


class CoreBesideQuantized(Core):
    """The base holds Q, the adapter adds the whole product."""

    @staticmethod
    def fits(method: Method, base: str, quantized: bool) -> bool:
        """A core trains from a part of the weight, and the rest is in few bits."""
        return "core" in method.parts and not method.zero_start and quantized

    @property
    def state_dict_ranks(self) -> int:
        """The product alone."""
        return 1

    def install(self, layer: PeftLayer, adapter: str, start: Factors, *, split: bool) -> None:
        """With the adapter off, what was taken out of W is given back."""
        self.begin(layer, adapter, start)
        quantized.stand_beside(layer)

    def forward(  # type: ignore[override]
        self, module: PeftLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The quantized part's `result` plus the product's output."""
        return result + self.product(module, active_adapter, x)

    def emit(self, layer: PeftLayer, adapter: str, state: StateDict, keys: tuple[str, str]) -> None:
        """``L @ (C R0)``."""
        left, right = starts.one(layer, adapter).pair
        core, (key_left, key_right) = layer.start_core[adapter], keys
        moved = left + sharding.whole(state[key_left]) if "left" in self.parts else left.clone()
        state[key_left] = moved
        state[key_right] = (core + sharding.whole(state[key_right])) @ right

    def take(self, layer: PeftLayer, adapter: str, state: StateDict, keys: tuple[str, str]) -> None:
        """dL by difference, dC by least squares once C0 R0 is taken off."""
        _, right = starts.one(layer, adapter).pair
        if state[keys[1]].shape != right.shape:
            raise starts.foreign(keys[1], adapter)
        state[keys[1]] = state[keys[1]].to(right) - layer.start_core[adapter] @ right
        super().take(layer, adapter, state, keys)

    def change(self, start: Factors, trained: Factors, scale: float) -> Lora:
        """``s L C R0``: beside Q all that was taken out of W is new."""
        change = super().change(start, trained, scale)
        left, _ = start.pair
        if start.core is None:
            return change
        return Lora(change.A, change.B + scale * (left @ start.core))
