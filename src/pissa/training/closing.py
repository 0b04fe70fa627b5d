"""LaMDA's schedule: the left factor's columns stop one after another (arXiv 2406.12832).

A column whose gradient is zero still moves, by momentum and decay. Here a closed one is put back
after each step of the optimiser, so that it keeps its bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pissa.adapters.attach import adapter_layers, attachments_of
from pissa.adapters.forms import Form, on_layer
from pissa.errors import InputError
from pissa.untyped import PeftLayer


def closed(rank: int, step: int, steps: int, eta: float) -> int:
    """How many columns are closed when `step` of `steps` have been done: all from the share `eta` on."""
    return min(rank, int(rank * step / (eta * steps)))


class CloseLeft(TrainerCallback):
    """Closes the left factors of an attached `lamda` or `lamda++` adapter over the first share of
    the steps.

    Args:
        model: from `pissa.attach`.
        eta: share of the steps after which all columns are closed; what the method was attached
            with by default.

    Raises:
        InputError: its left factor does not train beside a core, or nothing says when to close it.
    """

    def __init__(self, model: Any, eta: float | None = None):
        self.layers: list[tuple[PeftLayer, str, Form, float]] = []
        for adapter, attachment in attachments_of(model).items():
            form = attachment.adaptation.form
            own = attachment.recipe.options.get("eta") if eta is None else eta
            there = adapter_layers(model, attachment.targets).values()
            layers = [layer for layer in there if adapter in on_layer(layer)]
            if not layers or not {"left", "core"} <= set(form.parts):
                continue
            if own is None:
                raise InputError(
                    "nothing says when the left factor is to be closed: give eta, a share of the steps"
                )
            self.layers += [(layer, adapter, form, float(own)) for layer in layers]
        if not self.layers:
            raise InputError(
                "this model has no left factor beside a core to close: attach lamda or lamda++ first"
            )
        self.kept: list[Tensor] = []

    @property
    def factors(self) -> list[Tensor]:
        """What may be closed, asked anew: FSDP2 puts other parameters into the layers."""
        found = (form.trained(layer, adapter).left for layer, adapter, form, _ in self.layers)
        return [left for left in found if left is not None]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember what must not move."""
        counts = [
            closed(left.shape[1], state.global_step, state.max_steps, eta)
            for left, (*_, eta) in zip(self.factors, self.layers, strict=True)
        ]
        self.kept = [
            left.detach()[:, :count].clone()
            for left, count in zip(self.factors, counts, strict=True)
        ]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put it back."""
        with torch.no_grad():
            for left, kept in zip(self.factors, self.kept, strict=True):
                left[:, : kept.shape[1]].copy_(kept)
