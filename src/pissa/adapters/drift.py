"""The two forms of a started adapter on a peft layer. In both, what trains is the drift dL, dR from the start.

    keep       y = W x + s (L R - L0 R0) x  =  W x + s (L dR x + dL R0 x),      L = L0 + dL,  R = R0 + dR
    residual   y = (W - s L0 R0) x + s L R x

dL and dR live in peft's own lora_B and lora_A, both zero at first. In the keep form the first step is then W x
exactly in every dtype. Gradients are those of L and R, so an optimiser takes the method's own path (arXiv
2404.02948, section 3). The start L0, R0 is kept in buffers. Whatever stock tools save from such a layer is the
rank-2r plain LoRA ``[L, dL] @ [dR; R0]``, right on the original base; loading that pair gives dL, dR bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora.layer import Embedding, LoraVariant, _ConvNd
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pissa.adapters import factors, sharding
from pissa.checkpoint.targets import target_of
from pissa.errors import InputError, WrongBaseError
from pissa.splits import drift_as_lora


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
            return result + _product(module, x, L0 + dL, dR, scale) + _product(module, x, dL, R0, scale)
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            x, dL, dR, L0, R0 = (t.to(torch.get_autocast_dtype(device)) for t in (x, dL, dR, L0, R0))
        return result + _DriftProduct.apply(x, dL, dR, L0, R0, scale)

    @staticmethod
    def change(module: Any, adapter: str) -> Tensor:
        """What merging adds to the layer's weight, in that weight's shape, at least float32."""
        L0, R0, dL, dR = _all_factors(module, adapter)
        return target_of("", module.get_base_layer()).from_matrix(
            drift_as_lora(L0, R0, dL, dR, module.scaling[adapter]).delta()
        )

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


class Residual(Keep):
    """The paper's form: the base holds W - s L0 R0, the adapter adds s L R."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The residual's `result` plus the trained product's output."""
        dL, dR = factors.trained(module, active_adapter)
        left, right = module.start_left[active_adapter] + dL, module.start_right[active_adapter] + dR
        return result + _product(module, x, left, right, module.scaling[active_adapter])

    @staticmethod
    def change(module: Any, adapter: str) -> Tensor:
        """``s L R``."""
        L0, R0, dL, dR = _all_factors(module, adapter)
        product = module.scaling[adapter] * ((L0 + dL) @ (R0 + dR))
        return target_of("", module.get_base_layer()).from_matrix(product)


def install(layer: Any, adapter: str, left: Tensor, right: Tensor) -> None:
    """Turn one adapter of a peft LoRA layer into the keep form with this start, drift zero.

    Args:
        layer: a peft Linear, Embedding or Conv2d layer that has `adapter` at the start's rank.
        adapter: its name.
        left: L0 [out, r].
        right: R0 [r, in].
    """
    if not hasattr(layer, "start_left"):
        hold_starts(layer)
        layer.register_state_dict_post_hook(_emit_plain_lora)
        layer.register_load_state_dict_pre_hook(_take_plain_lora)
        if isinstance(layer, Embedding):
            layer._mixed_batch_forward = refuse_mixed  # type: ignore[method-assign, assignment]
    dL, dR = factors.trained(layer, adapter)
    # Contiguous, as they come back from a file: another memory order rounds a product differently.
    layer.start_left[adapter] = left.to(dL).contiguous()
    layer.start_right[adapter] = right.to(dR).contiguous()
    with torch.no_grad():
        dL.zero_()
        dR.zero_()
    layer.lora_variant[adapter] = Keep()


def hold_starts(layer: Any) -> None:
    """Give a layer room for the start of each of its adapters."""
    layer.start_left = BufferDict({}, persistent=False)
    layer.start_right = BufferDict({}, persistent=False)
    # In this list an adapter's entry is dropped by peft's delete_adapter.
    layer.other_param_names = (*layer.other_param_names, "start_left", "start_right")


def install_residual(layer: Any, adapter: str, left: Tensor, right: Tensor, *, on_residual: bool) -> None:
    """The residual form: the layer's weight becomes W - s L0 R0, with W kept on the CPU as the undo.

    Args:
        layer: as for `install`; it must hold no other adapter.
        adapter: its name.
        left: L0 [out, r].
        right: R0 [r, in].
        on_residual: the weight is the residual already (a decomposed folder); then the undo is computed.
    """
    install(layer, adapter, left, right)
    layer.lora_variant[adapter] = Residual()
    weight = layer.get_base_layer().weight
    L0, R0 = layer.start_left[adapter].float(), layer.start_right[adapter].float()
    product = target_of("", layer.get_base_layer()).from_matrix(layer.scaling[adapter] * (L0 @ R0))
    if on_residual:
        layer.original_weight = (weight.data.float() + product).to(weight.dtype).cpu()
    else:
        layer.original_weight = weight.data.cpu().clone()
        weight.data.copy_((weight.data.float() - product).to(weight.dtype))
    layer.principal_hook = layer.register_forward_hook(give_back_principal)
    # peft asks a layer for these by name; bound to the instance they know the undo, also on a deep copy.
    for name, override in _RESIDUAL_OVERRIDES.items():
        setattr(layer, name, MethodType(override, layer))


def _restore(layer: Any) -> None:
    layer.get_base_layer().weight.data.copy_(layer.original_weight)


def _unload(layer: Any, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
    if merge:
        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    else:
        _restore(layer)
    return layer.get_base_layer()


def _delete(layer: Any, adapter: str) -> None:
    type(layer).delete_adapter(layer, adapter)
    if starts(layer):
        return  # a twin, for which the weight must stay the residual
    layer.principal_hook.remove()
    _restore(layer)
    for name in ("original_weight", "principal_hook", *_RESIDUAL_OVERRIDES):
        delattr(layer, name)


def refuse_second_adapter(*args: Any, **kwargs: Any) -> None:
    """In place of peft's method that adds one."""
    raise InputError(
        "this model's weights are a residual and carry exactly one adapter: attach with base='keep' for several"
    )


def refuse_mixed(*args: Any, **kwargs: Any) -> None:
    """In place of peft's method for a batch with several adapters."""
    raise InputError(
        "adapter_names (several adapters in one batch) works neither on a split embedding nor on a residual: "
        "use set_adapter, or attach linear layers with base='keep'"
    )


_RESIDUAL_OVERRIDES: dict[str, Callable[..., Any]] = {
    "unload_and_optionally_merge_module": _unload,
    "delete_adapter": _delete,
    "update_layer": refuse_second_adapter,
    "_mixed_batch_forward": refuse_mixed,
}


def starts(layer: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The start (L0, R0) of each started adapter of a layer."""
    if not hasattr(layer, "start_left"):
        return {}
    return {name: (layer.start_left[name], layer.start_right[name]) for name in layer.start_left}


def _all_factors(module: Any, adapter: str) -> tuple[Tensor, ...]:
    parts = (module.start_left[adapter], module.start_right[adapter], *factors.trained(module, adapter))
    return tuple(part.detach().to(torch.promote_types(part.dtype, torch.float32)) for part in parts)


def _product(module: Any, x: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``s left right x`` for each kind of layer."""
    if isinstance(module, Embedding):
        after = module._embed(x, right.T) @ left.T
        embed_scale = module._get_embed_scale()
        return scale * (after if embed_scale is None else after * embed_scale.to(after.dtype))
    x = x.to(right.dtype)
    if isinstance(module, _ConvNd):
        base: Any = module.get_base_layer()
        left, right = factors.as_stored(module, left, right)
        return scale * F.conv2d(F.conv2d(x, right, stride=base.stride, padding=base.padding), left)
    return scale * F.linear(F.linear(x, right), left)


def _emit_plain_lora(layer: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """state_dict hook: what leaves the layer is the rank-2r pair."""
    for adapter, (L0, R0) in starts(layer).items():
        key_left, key_right = factors.keys(layer, adapter, prefix)
        if key_left in state and not sharding.is_away(state[key_left]):
            dL, dR = (sharding.whole(state[key]).flatten(1) for key in (key_left, key_right))
            pair_left, pair_right = torch.cat([L0 + dL, dL], dim=1), torch.cat([dR, R0])
            state[key_left], state[key_right] = factors.as_stored(layer, pair_left, pair_right)
    if hasattr(layer, "original_weight") and f"{prefix}base_layer.weight" in state:
        # The pair belongs on the original: peft writes both into one file for an embedding.
        state[f"{prefix}base_layer.weight"] = layer.original_weight


def _take_plain_lora(layer: Any, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """load_state_dict hook: the rank-2r pair of this very start is taken apart again."""
    for adapter, (_, R0) in starts(layer).items():
        key_left, key_right = factors.keys(layer, adapter, prefix)
        if key_left not in state or sharding.is_away(state[key_left]):
            continue
        rank = R0.shape[0]
        pair_left, pair_right = state[key_left].flatten(1), state[key_right].flatten(1)
        if pair_right.shape[0] != 2 * rank or not torch.equal(pair_right[rank:].to(R0), R0):
            raise WrongBaseError(
                f"`{key_right}` does not carry the start of the attached adapter {adapter!r} "
                f"(rank {pair_right.shape[0]}, expected {2 * rank} with the start as its last {rank} rows): it was "
                "trained from another start. Load it on the plain base model, or go on from the run it belongs to"
            )
        drifts = factors.as_stored(layer, pair_left[:, rank:], pair_right[:rank])
        for key, value in zip((key_left, key_right), drifts, strict=True):
            state[key] = sharding.spread(value, layer.get_parameter(key.removeprefix(prefix)))
    key_base = f"{prefix}base_layer.weight"
    if hasattr(layer, "original_weight") and key_base in state:
        if not torch.equal(state[key_base].to(layer.original_weight), layer.original_weight):
            raise WrongBaseError(f"`{key_base}` is not the weight that this residual was made from: load its own base")
        state[key_base] = layer.get_base_layer().weight.data


def give_back_principal(layer: Any, args: Any, output: Tensor) -> Tensor:
    """forward hook of the residual form: what was taken out is there once, however many adapters are on."""
    there = starts(layer)
    active = 0 if layer.disable_adapters else sum(name in there for name in layer.active_adapters)
    if layer.merged or active == 1:
        return output
    adapter, (L0, R0) = next(iter(there.items()))
    return (output + (1 - active) * _product(layer, args[0], L0, R0, layer.scaling[adapter])).to(output.dtype)
