"""The model of a run at its first step, and what its method brings along: an optimiser, a schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from pissa.adapters import runs
from pissa.adapters.attach import attach, is_residual, recipe_of
from pissa.checkpoint.fingerprint import check_same, fingerprint, model_tensors
from pissa.checkpoint.targets import find_targets, head_modules
from pissa.config import TrainSettings, config_error
from pissa.errors import OutputError
from pissa.observe import Observations
from pissa.registry import OPTIMISER, get
from pissa.training import distributed, residual
from pissa.training.arguments import device
from pissa.training.closing import CloseLeft
from pissa.training.lora_pro import LoraPro


def start(
    model: nn.Module,
    settings: TrainSettings,
    before: dict[str, Any] | None,
    state: Path,
    seen: Observations | None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The model ready to train from step 0, and what to record of the base."""
    base: dict[str, Any] = {"name": settings.model, "revision": settings.revision, "dtype": str(model.dtype)}
    if settings.method == "full":
        if model.dtype == torch.float16:
            mistake = (
                "dtype: got float16, expected bfloat16 or float32 with full: AdamW's small steps vanish in float16"
            )
            raise config_error([mistake], "the settings")
        tensors = model_tensors(model, skip=head_modules(model))
        if before:
            check_same(
                before["base"]["tensors"],
                tensors.get,
                what=f"the run in {state.parent}",
                advice="Use the base it began with",
            )
            return model, before["base"]
        return model, base | {"tensors": fingerprint(tensors)}
    if not distributed.is_first() and not state.is_dir():
        raise OutputError(
            f"{state} is not to be seen here, though the first process wrote it: use a shared file system"
        )
    if (before or not distributed.is_first()) and state.is_dir():
        model = runs.restart(model, state)
    elif is_residual(model):
        model = _load_decomposed(model, settings)
    else:
        heads = [*head_modules(model), *(settings.modules_to_save or ())]
        model = attach(
            model,
            settings.method,
            settings.rank,
            alpha=settings.alpha,
            targets=settings.targets,
            base=settings.base,
            svd=settings.svd,
            seed=settings.seed,
            modules_to_save=heads or None,
            observations=seen,
            options=settings.options,
            device=device(settings),
        )
    if settings.dropout:
        set_dropout(model, settings.dropout)
    return model, base


def _load_decomposed(model: nn.Module, settings: TrainSettings) -> PeftModel:
    """The start that lies beside a residual, which the settings must not contradict."""
    heads = [*head_modules(model), *(settings.modules_to_save or ())]
    attached = runs.load(model, settings.model, modules_to_save=heads)
    recipe = recipe_of(attached)
    mistakes = [
        f"{key}: got {got!r}, expected {expected!r}, as {settings.model} was decomposed"
        for key, got, expected in residual.differences(recipe, settings)
    ]
    if settings.targets != "all-linear":
        asked = find_targets(attached.get_base_model(), settings.targets, quantised=recipe.needs_residual)
        if {target.module for target in asked} != set(recipe.targets):
            mistakes.append(f"targets: got {settings.targets!r}, expected those of {settings.model}, or all-linear")
    if mistakes:
        raise config_error(mistakes, "the settings")
    return attached


def optimiser(model: nn.Module, settings: TrainSettings) -> LoraPro | None:
    """The method's own; None for the trainer's AdamW."""
    if not isinstance(model, PeftModel) or get(recipe_of(model).method).needs != OPTIMISER:
        return None
    return LoraPro(model, settings.learning_rate, weight_decay=settings.weight_decay, **recipe_of(model).options)


def callbacks(model: nn.Module) -> list[Any]:
    """What a method does beside the steps."""
    closing = isinstance(model, PeftModel) and get(recipe_of(model).method).parts == ("left", "core")
    return [CloseLeft(model)] if closing else []


def set_dropout(model: nn.Module, share: float) -> None:
    """Peft reads an adapter's dropout from its layers; only methods with a zero start get here."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.lora_dropout:
                layer.lora_dropout[name] = nn.Dropout(share)
