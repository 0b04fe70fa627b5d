"""The model of a run at its first step, and what its method brings along: an optimiser, a schedule."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from pissa.adapters import runs
from pissa.adapters.attach import adaptation_of, attach, is_residual
from pissa.adapters.initial import load_initial
from pissa.checkpoint.fingerprint import check_same, fingerprint, model_tensors
from pissa.checkpoint.targets import find_targets, head_modules
from pissa.config import TrainSettings, config_error
from pissa.errors import OutputError
from pissa.method import brought
from pissa.observe import Observations
from pissa.presets import Choice
from pissa.training import distributed, residual
from pissa.training.arguments import device
from pissa.untyped import Json


def start(
    model: nn.Module,
    settings: TrainSettings,
    choice: Choice | None,
    before: Json | None,
    state: Path,
    seen: Observations | None,
) -> tuple[nn.Module, Json]:
    """The model ready to train from step 0, and what to record of the base.

    Args:
        model: as it was loaded.
        settings: of the run.
        choice: its method; None for full.
        before: the record of the run to go on with.
        state: where the run keeps its start.
        seen: what the method needs to have been seen of the base.
    """
    base: Json = {
        "name": settings.model,
        "revision": settings.revision,
        "dtype": str(model.dtype),
    }
    if choice is None:
        if model.dtype == torch.float16:
            mistake = (
                "dtype: got float16, expected bfloat16 or float32 with full: AdamW's small steps "
                "vanish in float16"
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
        model = _load_decomposed(model, settings, choice)
    else:
        heads = [*head_modules(model), *(settings.modules_to_save or ())]
        model = attach(
            model,
            choice.method,
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


def _load_decomposed(model: nn.Module, settings: TrainSettings, choice: Choice) -> PeftModel:
    """The start that lies beside a residual, which the settings must not contradict."""
    heads = [*head_modules(model), *(settings.modules_to_save or ())]
    attached = load_initial(
        model, Path(settings.model), modules_to_save=heads, method=choice.method
    )
    recipe = adaptation_of(attached).recipe
    mistakes = [
        f"{key}: got {got!r}, expected {expected!r}, as {settings.model} was decomposed"
        for key, got, expected in residual.differences(recipe, settings, choice)
    ]
    if settings.targets != "all-linear":
        asked = find_targets(
            attached.get_base_model(), settings.targets, quantised=recipe.quant is not None
        )
        if {target.module for target in asked} != set(recipe.targets):
            mistakes.append(
                f"targets: got {settings.targets!r}, expected those of {settings.model}, or all-linear"
            )
    if mistakes:
        raise config_error(mistakes, "the settings")
    return attached


def optimizer(model: nn.Module, settings: TrainSettings) -> Optimizer | None:
    """The method's own; None for the trainer's AdamW."""
    if not isinstance(model, PeftModel):
        return None
    adaptation = adaptation_of(model)
    if adaptation.method.optimizer is None:
        return None
    make, options = brought(adaptation.method.optimizer), adaptation.recipe.options
    made: Optimizer = make(
        model, settings.learning_rate, weight_decay=settings.weight_decay, **options
    )
    runs.note_optimizer(model, make)
    return made


def callbacks(model: nn.Module) -> list[TrainerCallback]:
    """What a method does beside the steps."""
    if not isinstance(model, PeftModel):
        return []
    adaptation = adaptation_of(model)
    if adaptation.method.schedule is None:
        return []
    return [brought(adaptation.method.schedule)(model, **adaptation.recipe.options)]


def set_dropout(model: nn.Module, share: float) -> None:
    """Peft reads an adapter's dropout from its layers; only methods with a zero start get here."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.lora_dropout:
                layer.lora_dropout[name] = nn.Dropout(share)
