"""The two forms of a started adapter on a peft layer. In both, what trains is the drift dL, dR from the start.

    keep       y = W x + s (L R - L0 R0) x  =  W x + s (L dR x + dL R0 x),      L = L0 + dL,  R = R0 + dR
    residual   y = (W - s L0 R0) x + s L R x

dL and dR live in peft's own lora_B and lora_A, both zero at first. In the keep form the first step is then W x
exactly in every dtype. Gradients are those of L and R, so an optimiser takes the method's own path (arXiv
2404.02948, section 3). The start L0, R0 is kept in buffers. Whatever stock tools save from such a layer is the
rank-2r plain LoRA ``[L, dL] @ [dR; R0]``, right on the original base; loading that pair gives dL, dR bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Embedding, LoraVariant, _ConvNd
from torch import Tensor
from torch.autograd.function import once_differentiable

from pissa.adapters import factors, residual, sharding, starts
from pissa.checkpoint.targets import target_of
from pissa.splits import Factors, drift_as_lora


class _DriftProduct(torch.autograd.Function):
    """``s (L dR + dL R0) x`` with the weight gradients of rank r that LoRA computes, not of the rank-2r pair."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dL: Tensor, dR: Tensor, L0: Tensor, R0: Tensor, scale: float) -> Tensor:
        rank = dR.shape[0]
        flat = x.reshape(-1, x.shape[-1])
        hidden = flat @ torch.cat([dR, R0]).T
        ctx.save_for_backward(flat, dL, dR, L0, R0, hidden[:, :rank] + hidden[:, rank:])
        ctx.scale = scale
        product = hidden @ torch.cat([L0 + dL, dL], dim=1).T
        return (product if scale == 1.0 else scale * product).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, dL, dR, L0, R0, inner = ctx.saved_tensors
        rank = dR.shape[0]
        flat_gradient = gradient.reshape(-1, gradient.shape[-1])
        if ctx.scale != 1.0:
            flat_gradient = ctx.scale * flat_gradient
        back = flat_gradient @ torch.cat([L0 + dL, dL], dim=1)
        grad_x = (back @ torch.cat([dR, R0])).view(*gradient.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        grad_left = flat_gradient.T @ inner if ctx.needs_input_grad[1] else None
        grad_right = back[:, :rank].T @ flat if ctx.needs_input_grad[2] else None
        return grad_x, grad_left, grad_right, None, None, None


class Keep(LoraVariant):
    """peft's per-adapter hook into a LoRA layer: the base keeps W, the adapter adds the change."""

    def supports_lora_conversion(self) -> bool:
        """peft's own conversion reads lora_A and lora_B as a plain pair, which they are not here."""
        return False

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The base layer's `result` plus the change's output."""
        L0, R0 = module.start_left[active_adapter], module.start_right[active_adapter]
        dL, dR = factors.trained(module, active_adapter)
        scale = module.scaling[active_adapter]
        if isinstance(module, (Embedding, _ConvNd)):
            return result + starts.product(module, x, L0 + dL, dR, scale) + starts.product(module, x, dL, R0, scale)
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            x, dL, dR, L0, R0 = (t.to(torch.get_autocast_dtype(device)) for t in (x, dL, dR, L0, R0))
        return result + _DriftProduct.apply(x, dL, dR, L0, R0, scale)

    @staticmethod
    def change(module: Any, adapter: str) -> Tensor:
        """What merging adds to the layer's weight, in that weight's shape, at least float32."""
        L0, R0, dL, dR = _all_factors(module, adapter)
        change = drift_as_lora(Factors(L0, R0), Factors(dL, dR), module.scaling[adapter])
        return target_of("", module.get_base_layer()).from_matrix(change.delta())

    @classmethod
    def merge_safe(cls, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight with the adapter in it, summed in float32 and rounded once."""
        change = cls.change(module, active_adapter)
        return (orig_weight.to(change.dtype) + change).to(orig_weight.dtype)

    @classmethod
    def merge_unsafe(cls, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """The same, in place."""
        orig_weight.data.copy_(cls.merge_safe(module, active_adapter, orig_weight.data))

    @classmethod
    def unmerge(cls, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight without the adapter, exact up to one rounding of its dtype."""
        change = cls.change(module, active_adapter)
        return (orig_weight.to(change.dtype) - change).to(orig_weight.dtype)

    def emit(self, layer: Any, adapter: str, state: dict[str, Any], keys: tuple[str, str]) -> None:
        """Put the rank-2r pair into a state dict, in place of the drift."""
        L0, R0 = layer.start_left[adapter], layer.start_right[adapter]
        dL, dR = (sharding.whole(state[key]).flatten(1) for key in keys)
        pair = factors.as_stored(layer, torch.cat([L0 + dL, dL], dim=1), torch.cat([dR, R0]))
        state.update(zip(keys, pair, strict=True))

    def take(self, layer: Any, adapter: str, state: dict[str, Any], keys: tuple[str, str]) -> None:
        """The way back, bit for bit.

        Raises:
            WrongBaseError: a pair of another start.
        """
        R0 = layer.start_right[adapter]
        rank = R0.shape[0]
        left, right = (state[key].flatten(1) for key in keys)
        if right.shape[0] != 2 * rank or not torch.equal(right[rank:].to(R0), R0):
            starts.refuse_foreign(keys[1], adapter)
        drifts = factors.as_stored(layer, left[:, rank:], right[:rank])
        for key, value, own in zip(keys, drifts, factors.parameters(layer, adapter), strict=True):
            state[key] = sharding.spread(value, own)


class Residual(Keep):
    """The paper's form: the base holds W - s L0 R0, the adapter adds s L R."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The residual's `result` plus the trained product's output."""
        dL, dR = factors.trained(module, active_adapter)
        L0, R0 = module.start_left[active_adapter], module.start_right[active_adapter]
        return result + starts.product(module, x, L0 + dL, R0 + dR, module.scaling[active_adapter])

    @staticmethod
    def change(module: Any, adapter: str) -> Tensor:
        """``s L R``."""
        L0, R0, dL, dR = _all_factors(module, adapter)
        product = module.scaling[adapter] * ((L0 + dL) @ (R0 + dR))
        return target_of("", module.get_base_layer()).from_matrix(product)


def install(layer: Any, adapter: str, start: Factors, *, on_residual: bool | None = None) -> None:
    """Turn one adapter of a peft LoRA layer into the keep or the residual form with this start, drift zero.

    Args:
        layer: a peft Linear, Embedding or Conv2d layer that has `adapter` at the start's rank.
        adapter: its name.
        start: L0 [out, r] and R0 [r, in].
        on_residual: None for the keep form; else whether the weight is the residual already.
    """
    starts.hold(layer)
    if isinstance(layer, Embedding):
        layer._mixed_batch_forward = starts.refuse_mixed  # type: ignore[method-assign, assignment]
    dL, dR = factors.trained(layer, adapter)
    starts.put(layer, adapter, start, like=dL)
    with torch.no_grad():
        dL.zero_()
        dR.zero_()
    layer.lora_variant[adapter] = Keep() if on_residual is None else Residual()
    if on_residual is not None:
        residual.install(layer, adapter, on_residual=on_residual)


def _all_factors(module: Any, adapter: str) -> tuple[Tensor, ...]:
    parts = (*starts.one(module, adapter).pair, *factors.trained(module, adapter))
    return tuple(part.detach().to(torch.promote_types(part.dtype, torch.float32)) for part in parts)
