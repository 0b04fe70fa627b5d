"""A core that starts at zero between frozen factors: y = W x + s L dC R0 x, with L = L0 (+ dL).

dC lives in peft's own lora_A, dL, where the left factor trains too, in its lora_B; what does not
train has no place there. Whatever stock tools save from such a layer is ``L @ (dC R0)``, a plain
LoRA on the original base. Loading that pair finds dC by least squares, so nearly; a run keeps dC.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pissa.adapters import sharding, starts
from pissa.adapters.forms.form import PARTS_OF_A_START
from pissa.adapters.forms.variant import Variant
from pissa.linalg import relative_error
from pissa.method import Method
from pissa.splits import Factors, Lora, drift_as_lora, drift_as_pair, whole_core
from pissa.untyped import PeftLayer, StateDict

FITS = 1e-3
"""How near a pair's factors must be to what this start can give; rounding to 16 bits leaves less."""


class ZeroCore(Variant):
    """The base keeps W, of which nothing was taken; the adapter adds the change."""

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")
    beside_pair: ClassVar[tuple[str, ...]] = PARTS_OF_A_START
    undivided: ClassVar[tuple[str, ...]] = ("deepspeed",)

    @staticmethod
    def fits(method: Method, base: str, quantized: bool) -> bool:
        """A core trains, and the product with it is zero at first."""
        return "core" in method.parts and method.zero_start and not quantized

    def forward(  # type: ignore[override]
        self, module: PeftLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The base layer's `result` plus the change's output."""
        start, moved = starts.one(module, active_adapter), self.trained(module, active_adapter)
        _, right = start.pair
        hidden = F.linear(x.to(right.dtype), right)
        inner = through_core(module, active_adapter, hidden, start.pattern)
        change: Tensor = module.scaling[active_adapter] * F.linear(inner, moved_left(start, moved))
        return result + change

    def begin(self, layer: PeftLayer, adapter: str, start: Factors) -> None:
        """dC and, where it trains, dL zero."""
        like = layer.lora_A[adapter].weight
        self.put(layer, adapter, start, like)
        (left, right), pattern = start.pair, start.pattern
        shape = (right.shape[0],) * 2 if pattern is None else (1, pattern.shape[1])
        layer.lora_A[adapter].weight = nn.Parameter(like.new_zeros(shape))
        if "left" in self.parts:
            layer.lora_B[adapter].weight = nn.Parameter(like.new_zeros(left.shape))
        else:
            layer.lora_B[adapter] = nn.Identity()
        _note_diagonal(layer, adapter, pattern, right.shape[0])

    def trained(self, layer: PeftLayer, adapter: str) -> Factors:
        """dC and, where it trains, dL."""
        left = getattr(layer.lora_B[adapter], "weight", None)
        return Factors(left=left, core=layer.lora_A[adapter].weight)

    def exact(self, layer: PeftLayer, adapter: str) -> dict[str, nn.Parameter]:
        """All that trains: of a checkpoint's pair it comes back with rounding."""
        own = {"left": getattr(layer.lora_B[adapter], "weight", None)}
        own["core"] = layer.lora_A[adapter].weight
        return {part: parameter for part, parameter in own.items() if parameter is not None}

    def merged_change(self, layer: PeftLayer, adapter: str) -> Tensor:
        """``s (L C R0 - L0 C0 R0)``."""
        start, moved = self._wide(layer, adapter)
        return drift_as_lora(start, moved, layer.scaling[adapter]).delta()

    def emit(self, layer: PeftLayer, adapter: str, state: StateDict, keys: tuple[str, str]) -> None:
        """``L @ (dC R0)``."""
        key_left, key_right = keys
        left = sharding.whole(state[key_left]) if "left" in self.parts else None
        drift = Factors(left=left, core=sharding.whole(state[key_right]))
        pair = drift_as_pair(starts.one(layer, adapter), drift)
        state[key_left] = pair.B.clone() if left is None else pair.B
        state[key_right] = pair.A

    def take(self, layer: PeftLayer, adapter: str, state: StateDict, keys: tuple[str, str]) -> None:
        """dL by difference or from the pair itself, dC by least squares."""
        start, own = starts.one(layer, adapter), self.exact(layer, adapter)
        left, right = (factor.double() for factor in start.pair)
        (key_left, key_right), rank = keys, right.shape[0]
        pair_left, pair_right = state.pop(key_left).to(left), state[key_right].to(right)
        both = self.state_dict_ranks * rank
        if pair_left.shape != (len(left), both) or pair_right.shape != (both, right.shape[1]):
            raise starts.foreign(key_right, adapter)
        if both > rank:
            drift_left = pair_left[:, rank:]
        else:
            drift_left = pair_left - left if "left" in self.parts else torch.zeros_like(left)
        read = pair_right[:rank]
        core = torch.linalg.lstsq(right.T, read.T).solution.T
        misses = (
            relative_error(pair_left[:, :rank] - drift_left, left),
            relative_error(core @ right, read),
        )
        if max(misses) > FITS:
            raise starts.foreign(key_right, adapter)
        pattern = start.pattern
        found = {"core": core if pattern is None else core[pattern[0], pattern[1]][None]}
        found["left"] = drift_left
        for part, key in (("core", key_right), ("left", key_left)):
            if part in own:
                state[key] = sharding.spread(found[part].to(own[part].dtype), own[part])

    def change(self, start: Factors, trained: Factors, scale: float) -> Lora:
        """``s (L C R0 - L0 C0 R0)``."""
        return drift_as_lora(start, trained, scale)

    def drift(self, start: Factors, trained: Factors) -> Factors:
        """It is what trains."""
        return trained

    def why_no_dropout(self, method: str) -> str | None:
        """R0 is frozen, so what it reads cannot be made up for."""
        return f"expected 0 with {method}, whose core reads all inputs"

    def _wide(self, layer: PeftLayer, adapter: str) -> tuple[Factors, Factors]:
        """(start, drift), whole and in float32 at least."""
        moved = self.trained(layer, adapter).named()
        whole = Factors(**{part: sharding.whole(value.detach()) for part, value in moved.items()})
        dtype = torch.promote_types(layer.lora_A[adapter].weight.dtype, torch.float32)
        return starts.one(layer, adapter).to(dtype), whole.to(dtype)


def moved_left(start: Factors, moved: Factors) -> Tensor:
    """L, which is L0 where the left factor does not train."""
    left, _ = start.pair
    return left if moved.left is None else left + moved.left


def through_core(layer: PeftLayer, adapter: str, hidden: Tensor, pattern: Tensor | None) -> Tensor:
    """``dC h``; a core along its diagonal is never made a matrix."""
    values: Tensor = layer.lora_A[adapter].weight
    if layer.core_is_diagonal[adapter]:
        return hidden * values.flatten()
    return F.linear(hidden, whole_core(values, pattern, hidden.shape[-1]))


def _note_diagonal(layer: PeftLayer, adapter: str, pattern: Tensor | None, rank: int) -> None:
    if not hasattr(layer, "core_is_diagonal"):
        layer.core_is_diagonal = {}
        layer.other_param_names = (*layer.other_param_names, "core_is_diagonal")
    diagonal = pattern is not None and not pattern.is_meta and pattern.shape[1] == rank
    layer.core_is_diagonal[adapter] = diagonal and torch.equal(*pattern)  # type: ignore[misc]
