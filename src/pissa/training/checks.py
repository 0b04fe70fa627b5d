"""What is asked of a run's settings before anything is read or written, and on resuming."""

from __future__ import annotations

from pathlib import Path

from pissa.adapters.forms import form_of
from pissa.checks import tolerance_of
from pissa.config import TrainSettings, config_error, default_of
from pissa.errors import InputError, require
from pissa.presets import Choice, choose
from pissa.quant import quantiser
from pissa.training import options, residual
from pissa.training.arguments import device
from pissa.training.calibration import SAVED
from pissa.training.distributed import layout
from pissa.untyped import Json

NEUTRAL = frozenset(
    {
        "model",
        "revision",
        "data",
        "data_split",
        "eval_data",
        "eval_split",
        "output",
        "force",
        "trust_remote_code",
    }
    | {"logging_steps", "report_to", "save_steps", "save_total_limit", "calibration"}
)
"""What may differ on resuming: where things lie (their content is compared) and what does not touch a weight."""


def check(settings: TrainSettings, resume: bool) -> Choice | None:
    """What the settings alone cannot know: methods, extras, the machine.

    Returns:
        The method and quantizer that they name; None for full.

    Raises:
        ConfigError: all mistakes in one report.
    """
    for module in ("trl", "datasets"):
        require(module, "train")
    mistakes: list[str] = []
    choice: Choice | None = None
    if resume and settings.force:
        mistakes.append("force: got true beside --resume, expected one of the two")
    if settings.method != "full":
        try:
            tolerance_of(settings.svd)
        except InputError as error:
            mistakes.append(f"svd: {error}")
        try:
            choice = choose(
                settings.method, settings.quant, settings.iterations, settings.double_quant
            )
            choice.method.checked(settings.options)
        except InputError as error:
            mistakes.append(f"method: {error}")
        else:
            mistakes += _about_method(settings, choice)
            mistakes += _about_quantizer(settings, choice)
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
            mistakes.append(
                f"model: got {settings.model}, a residual, expected a whole model with full"
            )
    if settings.old_data and settings.task != "language":
        mistakes.append(
            f"old_data: got it beside task {settings.task}, expected language: a new head knows nothing"
        )
    if settings.old_data and not (settings.eval_data or settings.eval_size):
        mistakes.append(
            "old_data: got it without eval_data or eval_size, expected one of them: both losses are taken together"
        )
    mistakes += options.mistakes(settings)
    if mistakes:
        raise config_error(mistakes, "the settings")
    options.require_packages(settings)
    device(settings)
    return choice


def _about_method(settings: TrainSettings, choice: Choice) -> list[str]:
    """What a known method does not go with."""
    if not choice.method.parts:
        return [f"method: got {settings.method}, which trains nothing: see pissa decompose"]
    form = form_of(choice.method, settings.base, choice.quant is not None)
    why_not = form.why_no_dropout(settings.method) if settings.dropout else None
    refused = [f"dropout: got {settings.dropout:g}, {why_not}"] if why_not else []
    return refused + _about_calibration(settings, choice)


def _about_quantizer(settings: TrainSettings, choice: Choice) -> list[str]:
    """A format that is not known, or scales that it does not have."""
    try:
        if choice.quant:
            quantiser(choice.quant, double=settings.double_quant)
    except InputError as error:
        return [f"quant: {error}"]
    return []


def _about_calibration(settings: TrainSettings, choice: Choice) -> list[str]:
    """Where calibration would be passed over, or read as something that it is not."""
    if not settings.calibration:
        return []
    got = f"calibration: got {settings.calibration}, expected"
    if choice.method.observes is None:
        return [f"{got} null with {settings.method}, which needs the weights alone"]
    if residual.is_decomposed(settings.model):
        return [f"{got} null with {settings.model}, which was decomposed with what was seen then"]
    if settings.task != "language" and not settings.calibration.endswith(SAVED):
        return [
            f"{got} null or a file of observations with task {settings.task}: a class of other rows is another one"
        ]
    return []


def check_layout(settings: TrainSettings, choice: Choice | None) -> None:
    """What a method cannot do where a launcher spreads what trains over processes."""
    sharding = layout()["sharding"]
    if choice is None or sharding not in ("fsdp", "deepspeed"):
        return
    form = form_of(choice.method, settings.base, choice.quant is not None)
    # DeepSpeed steps inside the backward pass, on weights of its own, where nothing can be put
    # back.
    if choice.method.optimizer or sharding in form.undivided:
        mistake = f"method: got {settings.method} under {sharding}, expected DDP or one process: it needs whole factors"
        raise config_error([mistake], "the settings")


def check_same_settings(before: Json, settings: TrainSettings, out: Path) -> None:
    """A run goes on with the settings it began with, but for those in `NEUTRAL`."""
    now = settings.model_dump(mode="json")
    mistakes = [
        f"{key}: got {now[key]!r}, expected {before['settings'].get(key)!r} as the run began"
        for key in now
        if key not in NEUTRAL and now[key] != before["settings"].get(key, default_of(key))
    ]
    if mistakes:
        raise config_error(mistakes, f"the settings to resume {out} with")


def check_same_data(before: Json, now: Json, out: Path) -> None:
    """A run goes on with the content it began with, wherever it lies now."""

    def content(data: Json) -> Json:
        files = [{key: source[key] for key in ("sha256", "rows")} for source in data["sources"]]
        return {**data, "sources": files}

    old, new = content(before), content(now)
    differing = [key for key in new if new[key] != old.get(key)]
    if differing:
        lines = [f"{key}: got {new[key]}, expected {old.get(key)}" for key in differing]
        raise config_error(lines, f"the data to resume {out} with (it changed since the run began)")
