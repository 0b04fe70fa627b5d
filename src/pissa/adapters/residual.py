"""The paper's form on a live model: the layer's weight becomes W - s L0 R0, with W kept as the undo."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from pissa.adapters import starts
from pissa.checkpoint.targets import target_of
from pissa.errors import WrongBaseError
from pissa.untyped import PeftLayer, StateDict


def install(layer: PeftLayer, adapter: str, *, split: bool) -> None:
    """Take the start of a layer's adapter out of its weight, with W kept on the CPU.

    Args:
        layer: a peft layer that holds the start of this adapter and no other adapter.
        adapter: its name.
        split: the weight is the residual already (a decomposed folder); then the undo is computed.
    """
    weight = layer.get_base_layer().weight
    left, right = starts.taken(starts.one(layer, adapter))
    product = layer.scaling[adapter] * (left.float() @ right.float())
    product = target_of("", layer.get_base_layer()).from_matrix(product)
    if split:
        layer.original_weight = (weight.data.float() + product).to(weight.dtype).cpu()
    else:
        layer.original_weight = weight.data.cpu().clone()
        weight.data.copy_((weight.data.float() - product).to(weight.dtype))
    if not hasattr(layer, "original_hooked"):
        layer.original_hooked = True  # hooks outlive an adapter
        layer.register_state_dict_post_hook(_emit_original)
        layer.register_load_state_dict_pre_hook(_take_original)
    layer.principal_hook = layer.register_forward_hook(starts.give_back_principal)
    # peft asks a layer for these by name; bound to the instance they know the undo, also on a deep
    # copy.
    for name, override in _OVERRIDES.items():
        setattr(layer, name, MethodType(override, layer))


def _restore(layer: PeftLayer) -> None:
    layer.get_base_layer().weight.data.copy_(layer.original_weight)


def _unload(
    layer: PeftLayer, merge: bool, safe_merge: bool, adapter_names: list[str] | None
) -> nn.Module:
    if merge:
        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    else:
        _restore(layer)
    plain: nn.Module = layer.get_base_layer()
    return plain


def _delete(layer: PeftLayer, adapter: str) -> None:
    type(layer).delete_adapter(layer, adapter)
    if starts.of(layer):
        return  # a twin, for which the weight must stay the residual
    layer.principal_hook.remove()
    _restore(layer)
    for name in ("original_weight", "principal_hook", *_OVERRIDES):
        delattr(layer, name)


def _emit_original(layer: PeftLayer, state: StateDict, prefix: str, metadata: Any) -> None:
    """state_dict hook: an adapter's pair belongs on the original; peft writes both into one file for an embedding."""
    if hasattr(layer, "original_weight") and f"{prefix}base_layer.weight" in state:
        state[f"{prefix}base_layer.weight"] = layer.original_weight


def _take_original(layer: PeftLayer, state: StateDict, prefix: str, *args: Any) -> None:
    """load_state_dict hook: the original is known, and the weight stays the residual."""
    key = f"{prefix}base_layer.weight"
    if hasattr(layer, "original_weight") and key in state:
        if not torch.equal(state[key].to(layer.original_weight), layer.original_weight):
            raise WrongBaseError(
                f"`{key}` is not the weight that this residual was made from: load its own base"
            )
        state[key] = layer.get_base_layer().weight.data


_OVERRIDES: dict[str, Callable[..., Any]] = {
    "unload_and_optionally_merge_module": _unload,
    "delete_adapter": _delete,
    "update_layer": starts.refuse_second_adapter,
    "_mixed_batch_forward": starts.refuse_mixed,
}
