"""What a quantized part under a peft layer must be kept from: repacking, rounding, merging.

The adapter forms that live beside such a part are `pissa.adapters.forms.*_beside_quantized`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from pissa.adapters import starts
from pissa.errors import InputError
from pissa.untyped import PeftLayer


def stand_beside(layer: PeftLayer) -> None:
    """What an adapter needs that took a part out of the weight: given back while it is off, never merged."""
    layer.register_forward_hook(starts.give_back_principal)
    refuse_merging(layer)


def refuse_merging(layer: PeftLayer) -> None:
    """Let a peft layer over a quantised part refuse what would lose what was trained, and a second adapter."""
    for name, override in _OVERRIDES.items():
        setattr(layer, name, MethodType(override, layer))


def keep_codes(layer: PeftLayer) -> None:
    """Keep bitsandbytes from repacking the part under a peft layer.

    On some processors it does so at the first forward without gradients, an evaluation say: for
    good, with scales rounded to bf16, and from then on no gradient reaches what comes before the
    layer.
    """
    part = layer.get_base_layer()
    if hasattr(part, "support_avx512bf16_for_cpu"):
        part.support_avx512bf16_for_cpu = False


def keep_precision(model: Any) -> None:
    """Keep TRL's trainers from rounding what trains to bf16, as they do where a model says that it
    is quantised.

    The first step would differ from the start then. Layers know by their class in what format they
    are, and the model under peft's wrapper still says it.
    """
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise InputError(
        "the quantised part under this adapter is no model without it, and merging into few bits would lose what was "
        "trained: use `pissa merge FOLDER RUN OUT`, which writes both together in 16 bits"
    )


def _delete(layer: PeftLayer, adapter: str) -> None:
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
