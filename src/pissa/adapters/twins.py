"""A second adapter with the start of an attached one, as TRL's preference trainers ask for as their
reference.

They call `model.add_adapter("ref", model.peft_config["default"])` and copy into it what trains.
Stock peft would build a plain adapter of rank 2r there, since that is what the config tells stock
tools. A twin has the same start, whose tensors it shares, and its own drift, zero at first: it is
the same change of the same base.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from peft import PeftModel

from pissa.adapters.forms import on_layer
from pissa.adapters.plain import whole
from pissa.untyped import PeftLayer


def offer(model: PeftModel) -> None:
    """Let the model's own `add_adapter` answer the config of an attached adapter with its twin."""
    model.add_adapter = MethodType(_add_adapter, model)  # type: ignore[method-assign]


def _add_adapter(
    model: PeftModel, adapter_name: str, peft_config: Any, *args: Any, **options: Any
) -> None:
    """peft's `add_adapter`, which also knows a config that is the very one of an attached adapter."""
    source = next((name for name, config in model.peft_config.items() if config is peft_config), "")
    layers: list[PeftLayer] = [layer for layer in model.modules() if source in on_layer(layer)]
    add = type(model).add_adapter
    if not layers:
        add(model, adapter_name, peft_config, *args, **options)
        return
    form, scale = on_layer(layers[0])[source], layers[0].scaling[source]
    config = copy.deepcopy(peft_config)
    # The ranks of the start itself; what stock tools are told comes back below.
    own = {name: r // form.state_dict_ranks for name, r in peft_config.rank_pattern.items()}
    config.rank_pattern = own
    config.alpha_pattern = {name: whole(scale * rank) for name, rank in own.items()}
    config.r = peft_config.r // form.state_dict_ranks
    config.lora_alpha = whole(scale * config.r)
    refusals = {
        layer: layer.__dict__.pop("update_layer")
        for layer in layers
        if "update_layer" in layer.__dict__
    }
    try:
        with torch.random.fork_rng(devices=[]):  # peft draws a start that is overwritten
            add(model, adapter_name, config, *args, **options)
    finally:
        for layer, refusal in refusals.items():
            layer.update_layer = refusal
    config.r, config.lora_alpha = peft_config.r, peft_config.lora_alpha
    config.rank_pattern = dict(peft_config.rank_pattern)
    config.alpha_pattern = dict(peft_config.alpha_pattern)
    for layer in layers:
        start = form.start(layer, source, form.trained(layer, source))
        form.begin(layer, adapter_name, start)
