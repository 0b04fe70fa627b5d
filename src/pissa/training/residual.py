"""The base of a run in few bits: a folder that has it already, or a 16-bit base split and quantised into the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import prepare_model_for_kbit_training
from torch import nn

from pissa.checkpoint.output import read_json
from pissa.config import TrainSettings
from pissa.errors import CheckpointError
from pissa.jobs import DecomposeSettings
from pissa.observe import Observations
from pissa.presets import Choice, choose
from pissa.records import Recipe
from pissa.surgery.decompose import prepare
from pissa.surgery.decomposition import Decomposition
from pissa.surgery.folders import RESIDUAL
from pissa.surgery.packing import is_residual
from pissa.training import distributed, folder
from pissa.training.arguments import device
from pissa.untyped import Json

logger = logging.getLogger(__name__)
DEFAULT_SVD = TrainSettings.model_fields["svd"].default


def with_quantised_base(
    settings: TrainSettings,
    choice: Choice | None,
    out: Path,
    before: Json | None,
    seen: Callable[[], Observations | None],
) -> TrainSettings:
    """The settings with the model to load: the one they name, or its quantised residual in
    OUT/residual.

    Args:
        settings: of the run.
        choice: its method and quantizer; None for full.
        out: its folder.
        before: the record of the run to go on with, whose residual is kept as it is; None for a new
            run.
        seen: what the method needs to have been seen of the 16-bit base; all processes ask, where
            that is split.

    Raises:
        InputError, CheckpointError, OutputError: see `pissa.decompose`.
    """
    if choice is None or not choice.quant or is_decomposed(settings.model):
        return settings
    target = out / RESIDUAL
    if before:
        if not target.is_dir():
            raise CheckpointError(
                f"{target} is gone, and the run cannot go on without it: start it again with --force"
            )
        return settings.model_copy(update={"model": str(target)})

    observations = seen()

    def make() -> None:
        asked = DecomposeSettings(
            choice.method.name,
            settings.rank,
            alpha=settings.alpha,
            targets=settings.targets,
            svd=settings.svd,
            seed=settings.seed,
            dtype=None if settings.dtype == "auto" else settings.dtype,
            quant=choice.quant,
            iterations=settings.iterations,
            double_quant=settings.double_quant,
            device=device(settings),
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            observations=observations,
            options=settings.options,
        )
        _quantise(prepare(settings.model, asked, choice), settings.model, out)

    distributed.on_first(make)
    return settings.model_copy(update={"model": str(target)})


def _quantise(job: Decomposition, model: str, out: Path) -> None:
    """Make OUT/residual, unless an interrupted run left the very same one."""
    if folder.residual_of(out) != job.key:
        logger.warning("splitting and quantising %s into %s", model, out / RESIDUAL)
        folder.clear(out)  # an earlier run's adapter must never lie beside another residual
        folder.claim(out)
        job.into(out / RESIDUAL, force=True)
        folder.claim(out, job.key)


def is_decomposed(model: str) -> bool:
    """Whether a folder is the residual of a decomposition."""
    config = Path(model) / "config.json"
    return config.is_file() and is_residual(read_json(config))


def ready(model: nn.Module, settings: TrainSettings) -> nn.Module:
    """A model in few bits as training wants it: what is not quantised in float32, inputs ready for backward."""
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        prepare: Callable[..., nn.Module] = prepare_model_for_kbit_training
        return prepare(model, use_gradient_checkpointing=settings.gradient_checkpointing)
    return model


# Values of settings, each of its own type
def differences(
    recipe: Recipe, settings: TrainSettings, choice: Choice
) -> list[tuple[str, Any, Any]]:
    """(key, asked for, as it was decomposed) for all that differs.

    Args:
        recipe: of the decomposed folder.
        settings: of the run that trains it.
        choice: the method and quantizer that they name.
    """
    if recipe.quant and not settings.quant:  # the folder wins over a preset
        choice = choose(choice.method, recipe.quant, settings.iterations)
    asked = {
        "method": choice.method.name,
        "quant": choice.quant,
        "rank": settings.rank,
        "alpha": settings.alpha,
        "iterations": choice.iterations if settings.iterations else recipe.iterations,
        "options": choice.method.checked(settings.options) if settings.options else recipe.options,
        "double_quant": settings.double_quant or recipe.double_quant,
        "svd": recipe.svd if settings.svd == DEFAULT_SVD else settings.svd,
    }
    return [
        (key, value, getattr(recipe, key))
        for key, value in asked.items()
        if value != getattr(recipe, key)
    ]
