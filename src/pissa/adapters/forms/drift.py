"""The drift from a start, on a base that is kept. What trains is dL and dR, both zero at first.

    y = W x + s (L R - L0 R0) x  =  W x + s (L dR x + dL R0 x),      L = L0 + dL,  R = R0 + dR

dL and dR live in peft's own lora_B and lora_A. The first step is then W x exactly in every dtype.
Gradients are those of L and R, so an optimizer takes the method's own path (arXiv 2404.02948,
section 3). The start L0, R0 is kept in buffers. Whatever stock tools save from such a layer is the
rank-2r plain LoRA ``[L, dL] @ [dR; R0]``, right on the original base; loading that pair gives dL,
dR bit for bit.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft.tuners.lora.layer import Embedding, _ConvNd
from torch import Tensor
from torch.autograd.function import once_differentiable

from pissa.adapters import factors, sharding, starts
from pissa.adapters.forms.form import NO_DROPOUT
from pissa.adapters.forms.variant import Variant
from pissa.method import Method
from pissa.splits import Factors, Lora, drift_as_lora, drift_as_pair
from pissa.untyped import Context, PeftLayer, StateDict


class DriftProduct(torch.autograd.Function):
    """``s (L dR + dL R0) x`` with the weight gradients of rank r that LoRA computes, not of the
    rank-2r pair.
    """

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, dL: Tensor, dR: Tensor, L0: Tensor, R0: Tensor, scale: float
    ) -> Tensor:
        """One product with both right factors, one with both left ones."""
        rank = dR.shape[0]
        flat = x.reshape(-1, x.shape[-1])
        hidden = flat @ torch.cat([dR, R0]).T
        ctx.save_for_backward(flat, dL, dR, L0, R0, hidden[:, :rank] + hidden[:, rank:])
        ctx.scale = scale
        product = hidden @ torch.cat([L0 + dL, dL], dim=1).T
        return (product if scale == 1.0 else scale * product).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, dL and dR."""
        flat, dL, dR, L0, R0, inner = ctx.saved_tensors
        rank, wanted = dR.shape[0], ctx.needs_input_grad
        flat_gradient = gradient.reshape(-1, gradient.shape[-1])
        if ctx.scale != 1.0:
            flat_gradient = ctx.scale * flat_gradient
        back = flat_gradient @ torch.cat([L0 + dL, dL], dim=1)
        grad_x = (back @ torch.cat([dR, R0])).view(*gradient.shape[:-1], -1) if wanted[0] else None
        grad_left = flat_gradient.T @ inner if wanted[1] else None
        grad_right = back[:, :rank].T @ flat if wanted[2] else None
        return grad_x, grad_left, grad_right, None, None, None


class Drift(Variant):
    """The base keeps W, the adapter adds the change."""

    export_ranks: ClassVar[int] = 2

    @staticmethod
    def fits(method: Method, base: str, quantized: bool) -> bool:
        """Both factors train from a part of a weight that stays as it is."""
        started = method.parts == ("left", "right") and not method.zero_start
        return started and base == "keep" and not quantized

    def forward(  # type: ignore[override]
        self, module: PeftLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The base layer's `result` plus the change's output."""
        L0, R0 = module.start_left[active_adapter], module.start_right[active_adapter]
        dL, dR = factors.trained(module, active_adapter)
        scale = module.scaling[active_adapter]
        if isinstance(module, (Embedding, _ConvNd)):
            return (
                result
                + starts.product(module, x, L0 + dL, dR, scale)
                + starts.product(module, x, dL, R0, scale)
            )
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            narrow = torch.get_autocast_dtype(device)
            x, dL, dR, L0, R0 = (tensor.to(narrow) for tensor in (x, dL, dR, L0, R0))
        change: Tensor = DriftProduct.apply(x, dL, dR, L0, R0, scale)  # type: ignore[no-untyped-call]
        return result + change

    def begin(self, layer: PeftLayer, adapter: str, start: Factors) -> None:
        """dL and dR zero."""
        if isinstance(layer, Embedding):
            layer._mixed_batch_forward = starts.refuse_mixed  # type: ignore[method-assign, assignment]
        dL, dR = factors.trained(layer, adapter)
        self.put(layer, adapter, start, like=dL)
        with torch.no_grad():
            dL.zero_()
            dR.zero_()

    def trained(self, layer: PeftLayer, adapter: str) -> Factors:
        """dL and dR."""
        return Factors(*factors.trained(layer, adapter))

    def current(self, layer: PeftLayer, adapter: str) -> tuple[Tensor, Tensor]:
        """L and R."""
        (L0, R0), (dL, dR) = starts.one(layer, adapter).pair, factors.trained(layer, adapter)
        return L0 + dL, R0 + dR

    def merged_change(self, layer: PeftLayer, adapter: str) -> Tensor:
        """``s (L R - L0 R0)``."""
        start, moved = self._wide(layer, adapter)
        return drift_as_lora(start, moved, layer.scaling[adapter]).delta()

    def emit(self, layer: PeftLayer, adapter: str, state: StateDict, keys: tuple[str, str]) -> None:
        """``[L, dL] @ [dR; R0]``."""
        moved = Factors(*(sharding.whole(state[key]).flatten(1) for key in keys))
        pair = drift_as_pair(starts.one(layer, adapter), moved)
        state.update(zip(keys, factors.as_stored(layer, pair.B, pair.A), strict=True))

    def take(self, layer: PeftLayer, adapter: str, state: StateDict, keys: tuple[str, str]) -> None:
        """dL and dR, bit for bit."""
        R0 = layer.start_right[adapter]
        rank = R0.shape[0]
        left, right = (state[key].flatten(1) for key in keys)
        if right.shape[0] != 2 * rank or not torch.equal(right[rank:].to(R0), R0):
            raise starts.foreign(keys[1], adapter)
        drifts = factors.as_stored(layer, left[:, rank:], right[:rank])
        for key, value, own in zip(keys, drifts, factors.parameters(layer, adapter), strict=True):
            state[key] = sharding.spread(value, own)

    def change(self, start: Factors, trained: Factors, scale: float) -> Lora:
        """``s (L R - L0 R0)``."""
        return drift_as_lora(start, trained, scale)

    def drift(self, start: Factors, trained: Factors) -> Factors:
        """It is what trains."""
        return trained

    def why_no_dropout(self, method: str) -> str | None:
        """What is dropped would be missing from the weight."""
        return f"expected 0 with {method}: {NO_DROPOUT}"

    def _wide(self, layer: PeftLayer, adapter: str) -> tuple[Factors, Factors]:
        """(start, drift) in float32 at least."""
        start, moved = starts.one(layer, adapter), self.trained(layer, adapter)
        like = factors.parameters(layer, adapter)[0]
        dtype = torch.promote_types(like.dtype, torch.float32)
        return start.to(dtype), Factors(*(part.detach() for part in moved.pair)).to(dtype)
