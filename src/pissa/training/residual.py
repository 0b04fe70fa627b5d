"""The base of a run in few bits: a folder that has it already, or a 16-bit base split and quantised into the run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from peft import prepare_model_for_kbit_training
from torch import nn

from pissa.adapters.plain import RECORD
from pissa.checkpoint.output import read_json
from pissa.config import TrainSettings
from pissa.records import Recipe, Record
from pissa.registry import choose
from pissa.surgery.decompose import decompose
from pissa.training import folder

logger = logging.getLogger(__name__)


def with_quantised_base(settings: TrainSettings, out: Path, *, resumed: bool) -> TrainSettings:
    """The settings with the model to load: the one they name, or its quantised residual in OUT/residual.

    Args:
        settings: of the run.
        out: its folder.
        resumed: whether a residual that is there already, whole or begun, is the run's own.

    Raises:
        InputError, CheckpointError, OutputError: see `pissa.decompose`.
    """
    choice = choose(settings.method, settings.quant, settings.iterations) if settings.method != "full" else None
    if choice is None or not choice.quant or is_decomposed(settings.model):
        return settings
    target = out / folder.RESIDUAL
    folder.claim(out)
    if not resumed and target.exists():
        shutil.rmtree(target)
    if not (target.is_dir() and _made_for(target, settings)):
        logger.warning("splitting and quantising %s into %s", settings.model, target)
        decompose(
            settings.model,
            target,
            settings.method,
            settings.rank,
            alpha=settings.alpha,
            targets=settings.targets,
            svd=settings.svd,
            seed=settings.seed,
            dtype=None if settings.dtype == "auto" else settings.dtype,
            quant=settings.quant,
            iterations=settings.iterations,
            double_quant=settings.double_quant,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            force=True,
        )
    return settings.model_copy(update={"model": str(target)})


def is_decomposed(model: str) -> bool:
    """Whether a folder is the residual of a decomposition."""
    config = Path(model) / "config.json"
    note = read_json(config).get("pissa") if config.is_file() else None
    return isinstance(note, dict) and note.get("kind") == "residual"


def ready(model: nn.Module, settings: TrainSettings) -> nn.Module:
    """A model in few bits as training wants it: what is not quantised in float32, inputs ready for backward."""
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=settings.gradient_checkpointing)
    return model


def differences(recipe: Recipe, settings: TrainSettings) -> list[tuple[str, Any, Any]]:
    """(key, asked for, as it was decomposed) for all that differs."""
    choice = choose(settings.method, settings.quant or recipe.quant, settings.iterations)
    asked = {
        "method": choice.method,
        "quant": choice.quant,
        "rank": settings.rank,
        "alpha": settings.alpha,
        "iterations": choice.iterations if settings.iterations else recipe.iterations,
    }
    return [(key, value, getattr(recipe, key)) for key, value in asked.items() if value != getattr(recipe, key)]


def _made_for(target: Path, settings: TrainSettings) -> bool:
    record = Record.from_json(read_json(target / RECORD), str(target / RECORD))
    assert record.recipe is not None
    same = (record.recipe.svd, record.recipe.seed, record.recipe.double_quant)
    return not differences(record.recipe, settings) and same == (settings.svd, settings.seed, settings.double_quant)
