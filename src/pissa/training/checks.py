"""What is asked of a run's settings before anything is read or written, and on resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pissa.checks import tolerance_of
from pissa.config import TrainSettings, config_error, default_of
from pissa.errors import InputError, require
from pissa.presets import choose, observed
from pissa.quant import quantiser
from pissa.registry import OPTIMISER, get
from pissa.training import options, residual
from pissa.training.arguments import device
from pissa.training.calibration import SAVED
from pissa.training.distributed import layout

NEUTRAL = frozenset(
    {"model", "revision", "data", "data_split", "eval_data", "eval_split", "output", "force", "trust_remote_code"}
    | {"logging_steps", "report_to", "save_steps", "save_total_limit", "calibration"}
)
"""What may differ on resuming: where things lie (their content is compared) and what does not touch a weight."""


def check(settings: TrainSettings, resume: bool) -> None:
    """What the settings alone cannot know: methods, extras, the machine."""
    for module in ("trl", "datasets"):
        require(module, "train")
    mistakes = []
    if resume and settings.force:
        mistakes.append("force: got true beside --resume, expected one of the two")
    if settings.method != "full":
        try:
            tolerance_of(settings.svd)
        except InputError as error:
            mistakes.append(f"svd: {error}")
        try:
            choice = choose(settings.method, settings.quant, settings.iterations, settings.double_quant)
            chosen = get(choice.method)
            chosen.checked(settings.options)
            if choice.quant:
                quantiser(choice.quant, double=settings.double_quant)
        except InputError as error:
            mistakes.append(f"method: {error}")
        else:
            if settings.dropout and chosen.has_core:
                mistakes.append(
                    f"dropout: got {settings.dropout:g}, expected 0 with {settings.method}, whose core reads all inputs"
                )
            elif settings.dropout and not chosen.zero_start:
                mistakes.append(
                    f"dropout: got {settings.dropout:g}, expected 0 with {settings.method}: the adapter starts as a "
                    "part of the weight itself, and dropping its inputs would change the model before the first step"
                )
            if not chosen.parts:
                mistakes.append(f"method: got {settings.method}, which trains nothing: see pissa decompose")
            mistakes += _about_calibration(settings)
    else:
        mistakes += [
            f"{key}: got {getattr(settings, key)}, expected {unset} with full, which has no adapter"
            for key, unset in (
                ("quant", "null"),
                ("iterations", "null"),
                ("double_quant", False),
                ("dropout", 0),
                ("options", "{}"),
                ("calibration", "null"),
            )
            if getattr(settings, key)
        ]
        if residual.is_decomposed(settings.model):
            mistakes.append(f"model: got {settings.model}, a residual, expected a whole model with full")
    if settings.old_data and settings.task != "language":
        mistakes.append(f"old_data: got it beside task {settings.task}, expected language: a new head knows nothing")
    if settings.old_data and not (settings.eval_data or settings.eval_size):
        mistakes.append(
            "old_data: got it without eval_data or eval_size, expected one of them: both losses are taken together"
        )
    mistakes += options.mistakes(settings)
    if mistakes:
        raise config_error(mistakes, "the settings")
    options.require_packages(settings)
    device(settings)


def _about_calibration(settings: TrainSettings) -> list[str]:
    """Where calibration would be passed over, or read as something that it is not."""
    if not settings.calibration:
        return []
    got = f"calibration: got {settings.calibration}, expected"
    if observed(settings.method) is None:
        return [f"{got} null with {settings.method}, which needs the weights alone"]
    if residual.is_decomposed(settings.model):
        return [f"{got} null with {settings.model}, which was decomposed with what was seen then"]
    if settings.task != "language" and not settings.calibration.endswith(SAVED):
        return [f"{got} null or a file of observations with task {settings.task}: a class of other rows is another one"]
    return []


def check_layout(settings: TrainSettings) -> None:
    """What a method cannot do where a launcher spreads what trains over processes."""
    sharding = layout()["sharding"]
    if settings.method == "full" or sharding not in ("fsdp", "deepspeed"):
        return
    chosen = get(choose(settings.method).method)
    # DeepSpeed steps inside the backward pass, on weights of its own, where nothing can be put back.
    if chosen.needs == OPTIMISER or (chosen.has_core and sharding == "deepspeed"):
        mistake = f"method: got {settings.method} under {sharding}, expected DDP or one process: it needs whole factors"
        raise config_error([mistake], "the settings")


def check_same_settings(before: dict[str, Any], settings: TrainSettings, out: Path) -> None:
    """A run goes on with the settings it began with, but for those in `NEUTRAL`."""
    now = settings.model_dump(mode="json")
    mistakes = [
        f"{key}: got {now[key]!r}, expected {before['settings'].get(key)!r} as the run began"
        for key in now
        if key not in NEUTRAL and now[key] != before["settings"].get(key, default_of(key))
    ]
    if mistakes:
        raise config_error(mistakes, f"the settings to resume {out} with")


def check_same_data(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """A run goes on with the content it began with, wherever it lies now."""

    def content(data: dict[str, Any]) -> dict[str, Any]:
        files = [{key: source[key] for key in ("sha256", "rows")} for source in data["sources"]]
        return {**data, "sources": files}

    old, new = content(before), content(now)
    differing = [key for key in new if new[key] != old.get(key)]
    if differing:
        lines = [f"{key}: got {new[key]}, expected {old.get(key)}" for key in differing]
        raise config_error(lines, f"the data to resume {out} with (it changed since the run began)")
