"""An adapter whose core trains between frozen factors; where the method says so, the left factor trains too.

    keep       y = W x + s (L C R0 - L0 C0 R0) x  =  W x + s (L dC h + dL C0 h),    h = R0 x,  L = L0 + dL,  C = C0 + dC
    product    y = (W - s L0 C0 R0) x + s L C h

dC lives in peft's own lora_A, dL in its lora_B, both zero at first; what does not train has no place there. Whatever
stock tools save from such a layer is a plain LoRA that is right on the original base: ``[L, dL] @ [dC R0; C0 R0]``, or
``L0 @ (dC R0)`` where the core starts at zero. Loading that pair finds dC by least squares, so nearly; a run keeps dC.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pissa.adapters import drift, plain, quantised, residual, sharding, starts
from pissa.checkpoint.targets import target_of
from pissa.errors import CheckpointError
from pissa.linalg import relative_error
from pissa.splits import Factors, drift_as_lora, whole_core

FITS = 1e-3
"""How near a pair's factors must be to what this start can give; rounding to 16 bits leaves less."""


class Keep(drift.Keep):
    """The base keeps W, the adapter adds the change.

    Attributes:
        diagonal: whether the core's pattern is its diagonal, which is never made a matrix.
    """

    def __init__(self, start: Factors) -> None:
        pattern = start.pattern
        self.diagonal = pattern is not None and pattern.shape[1] == start.pair[1].shape[0] and _same(*pattern)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The base layer's `result` plus the change's output."""
        start, moved = starts.one(module, active_adapter), trained(module, active_adapter)
        _, right = start.pair
        hidden = F.linear(x.to(right.dtype), right)
        inner = _through_core(hidden, moved.core, start, module.lora_variant[active_adapter].diagonal)
        change = F.linear(inner, _moved_left(start, moved))
        if moved.left is not None and start.core is not None:
            change = change + F.linear(F.linear(hidden, start.core), moved.left)
        return result + module.scaling[active_adapter] * change

    @staticmethod
    def change(module: Any, adapter: str) -> Tensor:
        """What merging adds to the layer's weight, in that weight's shape, at least float32."""
        start, moved = _wide(module, adapter)
        change = drift_as_lora(start, moved, module.scaling[adapter])
        return target_of("", module.get_base_layer()).from_matrix(change.delta())

    def emit(self, layer: Any, adapter: str, state: dict[str, Any], keys: tuple[str, str]) -> None:
        """Put the plain LoRA into a state dict, in place of the drift."""
        start = starts.one(layer, adapter)
        left, right = start.pair
        key_left, key_right = keys
        moved = whole_core(sharding.whole(state[key_right]), start.pattern, right.shape[0]) @ right
        if start.core is None:
            state[key_left], state[key_right] = left.clone(), moved
        else:
            dL = sharding.whole(state[key_left])
            state[key_left], state[key_right] = torch.cat([left + dL, dL], 1), torch.cat([moved, start.core @ right])

    def take(self, layer: Any, adapter: str, state: dict[str, Any], keys: tuple[str, str]) -> None:
        """The way back; dC by least squares.

        Raises:
            WrongBaseError: a pair of another start.
        """
        start, own = starts.one(layer, adapter), trained(layer, adapter)
        left, right = (factor.double() for factor in start.pair)
        key_left, key_right = keys
        pair_left, pair_right, rank = state.pop(key_left).to(left), state[key_right].to(right), right.shape[0]
        blocks = 1 if start.core is None else 2
        if pair_left.shape != (left.shape[0], blocks * rank) or pair_right.shape != (blocks * rank, right.shape[1]):
            starts.refuse_foreign(key_right, adapter)
        moved = pair_right[:rank]
        core = torch.linalg.lstsq(right.T, moved.T).solution.T
        drift_left = pair_left[:, rank:] if blocks == 2 else torch.zeros_like(left)
        fits = relative_error(pair_left[:, :rank] - drift_left, left), relative_error(core @ right, moved)
        if max(fits) > FITS:
            starts.refuse_foreign(key_right, adapter)
        values = core if start.pattern is None else core[start.pattern[0], start.pattern[1]][None]
        found = {key_right: (values, own.core), key_left: (drift_left, own.left)}
        for key, (value, parameter) in found.items():
            if parameter is not None:
                state[key] = sharding.spread(value.to(parameter.dtype), parameter)


class Product(Keep):
    """The base holds what the start left of W, the adapter adds the whole product."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The frozen part's `result` plus the product's output."""
        start, moved = starts.one(module, active_adapter), trained(module, active_adapter)
        _, right = start.pair
        hidden = F.linear(x.to(right.dtype), right)
        inner = _through_core(hidden, moved.core, start, module.lora_variant[active_adapter].diagonal)
        if start.core is not None:
            inner = inner + F.linear(hidden, start.core)
        return result + module.scaling[active_adapter] * F.linear(inner, _moved_left(start, moved))

    @staticmethod
    def change(module: Any, adapter: str) -> Tensor:
        """``s L C R0``."""
        start, moved = _wide(module, adapter)
        product = drift_as_lora(start, moved, module.scaling[adapter]).delta()
        product += module.scaling[adapter] * torch.mm(*starts.taken(start))
        return target_of("", module.get_base_layer()).from_matrix(product)


class OnQuantised(Product):
    """The same beside a quantised part, where alone what was trained is right: what is saved is the whole product."""

    def emit(self, layer: Any, adapter: str, state: dict[str, Any], keys: tuple[str, str]) -> None:
        """Put ``L @ (C R0)`` into a state dict, in place of the drift."""
        start = starts.one(layer, adapter)
        assert start.core is not None
        left, right = start.pair
        key_left, key_right = keys
        state[key_left] = left + sharding.whole(state[key_left]) if key_left in state else left.clone()
        state[key_right] = (start.core + sharding.whole(state[key_right])) @ right

    def take(self, layer: Any, adapter: str, state: dict[str, Any], keys: tuple[str, str]) -> None:
        """The way back; dC by least squares.

        Raises:
            WrongBaseError: a pair of another start.
        """
        start = starts.one(layer, adapter)
        assert start.core is not None
        left, right = start.pair
        key_left, key_right = keys
        if state[key_left].shape != left.shape or state[key_right].shape != right.shape:
            starts.refuse_foreign(key_right, adapter)
        # In the form that the base class takes apart.
        drift_left = state[key_left].to(left) - left
        moved = state[key_right].to(right) - start.core @ right
        state[key_left], state[key_right] = (
            torch.cat([left + drift_left, drift_left], 1),
            torch.cat([moved, start.core @ right]),
        )
        super().take(layer, adapter, state, keys)


def install(
    layer: Any, adapter: str, start: Factors, parts: tuple[str, ...], *, on_residual: bool | None, few_bits: bool
) -> None:
    """Turn one adapter of a peft layer into a core between this start's factors, drift zero.

    Args:
        layer: a peft Linear layer that has `adapter`.
        adapter: its name.
        start: L0 [out, k], R0 [k, in], C0 [k, k] unless it is zero, and the core's pattern if it has one.
        parts: what trains, "core" among it.
        on_residual: None where the weight stays as it is; else whether it is the residual already.
        few_bits: the layer's weight is a quantised residual.
    """
    starts.hold(layer)
    begin(layer, adapter, start, left="left" in parts)
    taken = start.core is not None and (few_bits or on_residual is not None)
    kind = (OnQuantised if few_bits else Product) if taken else Keep
    layer.lora_variant[adapter] = kind(start)
    if few_bits:
        quantised.refuse_merging(layer)
    if taken and few_bits:
        layer.register_forward_hook(starts.give_back_principal)
    elif taken:
        residual.install(layer, adapter, on_residual=bool(on_residual))


def begin(layer: Any, adapter: str, start: Factors, *, left: bool) -> None:
    """Put an adapter of the layer at its start; `left` says whether the left factor trains."""
    like = layer.lora_A[adapter].weight
    starts.put(layer, adapter, start, like)
    left_start, right = start.pair
    shape = (right.shape[0],) * 2 if start.pattern is None else (1, start.pattern.shape[1])
    layer.lora_A[adapter].weight = nn.Parameter(like.new_zeros(shape))
    if left:
        layer.lora_B[adapter].weight = nn.Parameter(like.new_zeros(left_start.shape))
    else:
        layer.lora_B[adapter] = nn.Identity()


def is_core(layer: Any, adapter: str) -> bool:
    """Whether a layer's adapter is one of these."""
    return isinstance(getattr(layer, "lora_variant", {}).get(adapter), Keep)


def trained(layer: Any, adapter: str) -> Factors:
    """dC and, where it trains, dL: the adapter's own parameters."""
    return Factors(left=getattr(layer.lora_B[adapter], "weight", None), core=layer.lora_A[adapter].weight)


def assign(layer: Any, adapter: str, drift: Factors) -> None:
    """Overwrite the adapter's own parameters."""
    own = trained(layer, adapter).named()
    with torch.no_grad():
        for part, value in drift.named().items():
            own[part].copy_(value)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains of all cores in a model, by name."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        for adapter in getattr(module, "lora_variant", {}):
            if is_core(module, adapter):
                own = trained(module, adapter).named()
                found |= {f"{name}.{part}.{adapter}": parameter for part, parameter in own.items()}  # type: ignore[misc]
    return found


def write(parameters: dict[str, nn.Parameter], file: Path, *, first: bool) -> None:
    """Write them as they are; where FSDP2 spread them all processes call this, and the `first` one writes."""
    whole = {name: sharding.whole(parameter.detach()).cpu().contiguous() for name, parameter in parameters.items()}
    if first:
        plain.save_tensors(whole, file)


def read(parameters: dict[str, nn.Parameter], file: Path) -> None:
    """Put back what `write` wrote.

    Raises:
        CheckpointError: the file is not there, or is of another model.
    """
    try:
        stored = load_file(file)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(sharding.spread(stored[name].to(parameter.dtype), parameter))
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): go on from another checkpoint") from error


def _moved_left(start: Factors, moved: Factors) -> Tensor:
    """L, which is L0 where the left factor does not train."""
    left, _ = start.pair
    return left if moved.left is None else left + moved.left


def _through_core(hidden: Tensor, values: Tensor | None, start: Factors, diagonal: bool) -> Tensor:
    """``dC h``."""
    assert values is not None
    if diagonal:
        return hidden * values.flatten()
    return F.linear(hidden, whole_core(values, start.pattern, hidden.shape[-1]))


def _same(rows: Tensor, columns: Tensor) -> bool:
    return not rows.is_meta and torch.equal(rows, columns)


def _wide(layer: Any, adapter: str) -> tuple[Factors, Factors]:
    moved = trained(layer, adapter)
    whole = Factors(**{part: sharding.whole(value.detach()) for part, value in moved.named().items()})
    dtype = torch.promote_types(layer.lora_A[adapter].weight.dtype, torch.float32)
    return starts.one(layer, adapter).to(dtype), whole.to(dtype)
