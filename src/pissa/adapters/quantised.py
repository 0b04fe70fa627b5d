"""An adapter beside a frozen part in few bits: y = Q x + s L R x, where W is only nearly Q + s L0 R0.

Nothing can be given back exactly here, so L and R train themselves, in peft's own lora_B and lora_A, and what any tool
saves is a plain LoRA that is right on Q and on nothing else. The start L0, R0 is kept in buffers: with the adapter off
the layer still stands for W as nearly as it did at the start, not for Q alone.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from pissa.adapters import factors, starts
from pissa.errors import InputError
from pissa.splits import Factors


def install(layer: Any, adapter: str, start: Factors) -> None:
    """Give one adapter of a peft layer its start.

    Args:
        layer: a peft layer over the quantised part; it must hold no other adapter.
        adapter: its name.
        start: L0 [out, r] and R0 [r, in].
    """
    starts.hold(layer)
    begin(layer, adapter, start)
    layer.register_forward_hook(starts.give_back_principal)
    refuse_merging(layer)


def refuse_merging(layer: Any) -> None:
    """Let a peft layer over a quantised part refuse what would lose what was trained, and a second adapter."""
    for name, override in _OVERRIDES.items():
        setattr(layer, name, MethodType(override, layer))


def begin(layer: Any, adapter: str, start: Factors) -> None:
    """Put an adapter of the layer at its start, and keep the start."""
    factors.assign(layer, adapter, *start.pair)
    starts.put(layer, adapter, start, like=factors.trained(layer, adapter)[0])


def keep_codes(layer: Any) -> None:
    """Keep bitsandbytes from repacking the part under a peft layer.

    On some processors it does so at the first forward without gradients, an evaluation say: for good, with scales
    rounded to bf16, and from then on no gradient reaches what comes before the layer.
    """
    part = layer.get_base_layer()
    if hasattr(part, "support_avx512bf16_for_cpu"):
        part.support_avx512bf16_for_cpu = False


def keep_precision(model: Any) -> None:
    """Keep TRL's trainers from rounding what trains to bf16, as they do where a model says that it is quantised.

    The first step would differ from the start then. Layers know by their class in what format they are, and the model
    under peft's wrapper still says it.
    """
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise InputError(
        "the quantised part under this adapter is no model without it, and merging into few bits would lose what was "
        "trained: use `pissa merge FOLDER RUN OUT`, which writes both together in 16 bits"
    )


def _delete(layer: Any, adapter: str) -> None:
    if set(starts.of(layer)) <= {adapter}:
        _refuse()
    type(layer).delete_adapter(layer, adapter)


_OVERRIDES: dict[str, Callable[..., Any]] = {
    "merge": _refuse,
    "unload_and_optionally_merge_module": _refuse,
    "delete_adapter": _delete,
    "update_layer": starts.refuse_second_adapter,
    "_mixed_batch_forward": starts.refuse_mixed,
}
