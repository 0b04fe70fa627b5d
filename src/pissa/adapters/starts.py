"""The starts of a peft layer's adapters: buffers on the layer, beside what trains in peft's own parameters."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora.layer import Embedding, _ConvNd
from torch import Tensor

from pissa.adapters import factors
from pissa.errors import InputError, WrongBaseError
from pissa.splits import Factors
from pissa.untyped import PeftLayer

_BUFFERS = {part: f"start_{part}" for part in ("left", "right", "core", "pattern")}


def _hold(layer: PeftLayer) -> None:
    """Give a layer room for the start of each of its adapters."""
    if hasattr(layer, "start_left"):
        return
    for buffer in _BUFFERS.values():
        setattr(layer, buffer, BufferDict({}, persistent=False))
    # In this list an adapter's entry is dropped by peft's delete_adapter.
    layer.other_param_names = (*layer.other_param_names, *_BUFFERS.values())


def put(layer: PeftLayer, adapter: str, start: Factors, like: Tensor) -> None:
    """Keep an adapter's start on its layer, in the dtype and on the device of `like`."""
    _hold(layer)
    for part, tensor in start.named().items():
        # Contiguous, as they come back from a file: another memory order rounds a product
        # differently.
        ready = tensor.to(like.device if part == "pattern" else like).contiguous()
        getattr(layer, _BUFFERS[part])[adapter] = ready


def of(layer: PeftLayer) -> dict[str, Factors]:
    """The start of each started adapter of a layer."""
    return {adapter: one(layer, adapter) for adapter in getattr(layer, "start_left", ())}


def one(layer: PeftLayer, adapter: str) -> Factors:
    """The start of one started adapter of a layer."""
    held = ((part, getattr(layer, buffer)) for part, buffer in _BUFFERS.items())
    return Factors(**{part: tensors[adapter] for part, tensors in held if adapter in tensors})


def foreign(key: str, adapter: str) -> WrongBaseError:
    """The error of a pair that the attached start cannot give."""
    return WrongBaseError(
        f"`{key}` does not carry the start of the attached adapter {adapter!r}: it was trained from another start. "
        "Load it on the plain base model, or go on from the run it belongs to"
    )


def product(module: PeftLayer, x: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``s left right x`` for each kind of layer."""
    if isinstance(module, Embedding):
        after = module._embed(x, right.T) @ left.T
        embed_scale: Tensor | None = module._get_embed_scale()  # type: ignore[no-untyped-call]
        return scale * (after if embed_scale is None else after * embed_scale.to(after.dtype))
    x = x.to(right.dtype)
    if isinstance(module, _ConvNd):
        base: Any = module.get_base_layer()
        left, right = factors.as_stored(module, left, right)
        return scale * F.conv2d(F.conv2d(x, right, stride=base.stride, padding=base.padding), left)
    return scale * F.linear(F.linear(x, right), left)


def taken(start: Factors) -> tuple[Tensor, Tensor]:
    """What was taken out of the weight, as a pair: L0 C0 and R0."""
    left, right = start.pair
    return (left if start.core is None else left @ start.core), right


def give_back_principal(layer: PeftLayer, args: Any, output: Tensor) -> Tensor:
    """forward hook of the residual form: what was taken out is there once, however many adapters are on."""
    there = of(layer)
    active = 0 if layer.disable_adapters else sum(name in there for name in layer.active_adapters)
    if layer.merged or active == 1:
        return output
    adapter, start = next(iter(there.items()))
    return (
        output + (1 - active) * product(layer, args[0], *taken(start), layer.scaling[adapter])
    ).to(output.dtype)


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
