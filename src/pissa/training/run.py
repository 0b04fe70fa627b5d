"""One run from settings to a saved adapter, or on from where it was interrupted."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PrinterCallback, ProgressCallback

from pissa.adapters import runs, sharding
from pissa.adapters.attach import attach, is_residual, recipe_of
from pissa.checkpoint.fingerprint import check_same, fingerprint, model_tensors
from pissa.checkpoint.output import write_json
from pissa.checkpoint.targets import find_targets, head_modules
from pissa.config import TrainSettings, config_error
from pissa.errors import BusyError, DivergedError, OutputError, require
from pissa.observe import Observations
from pissa.records import versions
from pissa.registry import OPTIMISER, get
from pissa.surgery.folders import RESIDUAL
from pissa.training import classification, distributed, folder, language, regression, residual
from pissa.training.arguments import device
from pissa.training.calibration import observations
from pissa.training.callbacks import (
    LOSSES,
    SCORES,
    Checkpoints,
    EarlyStop,
    Metrics,
    OldLoss,
    Progress,
    place_reports,
    read_exact,
)
from pissa.training.checks import check, check_layout, check_same_data, check_same_settings
from pissa.training.closing import CloseLeft
from pissa.training.data import load_rows
from pissa.training.lora_pro import LoraPro
from pissa.training.memory import peak_bytes, reset_peak
from pissa.training.models import load_tokenizer
from pissa.training.quiet import quiet

TASKS: dict[str, ModuleType] = {
    "language": language,
    "classification": classification,
    "regression": regression,
}
logger = logging.getLogger(__name__)


def train(settings: TrainSettings, resume: bool = False) -> dict[str, Any]:
    """Fine-tune a model as `settings` say and leave a run's folder.

    Everything is checked before anything is written. A run that was killed goes on with `resume` and ends with the
    same bits as one that was not.

    Args:
        settings: from `pissa.config.load_settings`.
        resume: go on with the run in `settings.output`; starts it where there is none, does nothing where it is done.

    Returns:
        The content of run.json.

    Raises:
        ConfigError, DataError, CheckpointError, OutputError, WrongBaseError, InputError: see `pissa.errors`.
    """
    check(settings, resume)
    settings = distributed.join(settings, device(settings))
    check_layout(settings)
    out = Path(settings.output).expanduser()
    before = distributed.on_first(lambda: folder.previous_run(out, resume=resume, force=settings.force))
    if before:
        check_same_settings(before, settings, out)
        distributed.check_same_layout(before, out)
        if before["status"] == "finished":
            logger.warning("%s is finished: nothing to do", out)
            return before
    task = TASKS[settings.task]
    rows = load_rows(settings)
    tokenizer = load_tokenizer(settings)
    examples = task.encode(rows, tokenizer, settings)
    reset_peak(device(settings))
    with quiet(), ExitStack() as stack:
        distributed.on_first(lambda: stack.enter_context(folder.held(out)))
        if distributed.on_first(lambda: folder.previous_run(out, resume=resume, force=settings.force)) != before:
            raise BusyError(f"another process has written into {out} just now: look at it, then start again")
        loaded = residual.with_quantised_base(
            settings,
            out,
            before,
            lambda: observations(
                lambda: task.load_model(settings, examples, tokenizer), task, examples, tokenizer, settings
            ),
        )
        model = residual.ready(task.load_model(loaded, examples, tokenizer), settings)
        data = {"sources": rows.sources, **examples.facts()}
        if before:
            check_same_data(before["data"], data, out)
        kept = RESIDUAL if loaded is not settings else ""
        record = before or {}
        started = is_residual(model) or (before and (out / "state").is_dir())
        # All processes look, each at rows of its own.
        seen = None if started else observations(lambda: model, task, examples, tokenizer, settings)
        with distributed.first_ahead(out):
            model, base = _start(model, loaded, before, out / "state", seen)
            facts = {"data": data, "base": {**base, "name": settings.model}, "labels": examples.names}
            if distributed.is_first():
                record = before or _open_run(out, settings, {**facts, "processes": distributed.layout()}, kept)
                if isinstance(model, PeftModel) and not (out / "state").is_dir():
                    runs.save(model, out)  # the start, so that nothing is decomposed twice
        newest, seconds = distributed.on_first(lambda: folder.where_to_go_on(out))
        metrics = Metrics(out / folder.METRICS, seconds)
        stop = EarlyStop(settings.early_stopping, out / folder.METRICS)
        callbacks = [metrics, Checkpoints(settings.save_total_limit, model, newest), stop, *_of_the_method(model)]
        trainer = task.build_trainer(model, tokenizer, examples, settings, str(out / "checkpoints"), callbacks)
        trainer.optimizer = _optimiser(model, settings)
        if examples.old:
            trainer.add_callback(OldLoss(trainer, require("datasets", "train").Dataset.from_list(examples.old)))
        try:
            place_reports(trainer, out / folder.REPORTS)
            _run(trainer, newest, stop)
        except DivergedError as error:
            if distributed.is_first():
                write_json(out / folder.RECORD, {**record, "status": "diverged", "reason": str(error)})
            raise
        _save(trainer, tokenizer, out)
        return distributed.on_first(lambda: _close_run(out, record, trainer, metrics, stop))


def _start(
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


def _optimiser(model: nn.Module, settings: TrainSettings) -> LoraPro | None:
    """The method's own; None for the trainer's AdamW."""
    if not isinstance(model, PeftModel) or get(recipe_of(model).method).needs != OPTIMISER:
        return None
    return LoraPro(model, settings.learning_rate, weight_decay=settings.weight_decay, **recipe_of(model).options)


def _of_the_method(model: nn.Module) -> list[Any]:
    """What a method does beside the steps."""
    closing = isinstance(model, PeftModel) and get(recipe_of(model).method).parts == ("left", "core")
    return [CloseLeft(model)] if closing else []


def set_dropout(model: nn.Module, share: float) -> None:
    """Peft reads an adapter's dropout from its layers; only methods with a zero start get here."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.lora_dropout:
                layer.lora_dropout[name] = nn.Dropout(share)


def _open_run(out: Path, settings: TrainSettings, facts: dict[str, Any], kept: str) -> dict[str, Any]:
    """Clear what an earlier run left, but for what is `kept`, then say what this one is."""
    out.mkdir(parents=True, exist_ok=True)
    folder.clear(out, but=kept)
    packages = versions() | {name: require(name, "train").__version__ for name in ("trl", "datasets", "accelerate")}
    written = settings.model_dump(mode="json")
    record = {"status": "running", "settings": written, **facts, "versions": packages}
    write_json(out / folder.RECORD, record)
    (out / folder.SETTINGS).write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    return record


def _run(trainer: Any, newest: Path | None, stop: EarlyStop) -> None:
    """Train, on from a checkpoint if there is one."""
    trainer.remove_callback(PrinterCallback)
    distributed.adapt(trainer)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(Progress)
    if newest and (stop.reason() or folder.step_of(newest) >= folder.all_steps(newest)):
        # Killed between the last step and the end. The trainer's own resume would train one step more here.
        trainer._load_from_checkpoint(str(newest))
        read_exact(trainer.model, newest)
        trainer.state.global_step, trainer.state.max_steps = folder.step_of(newest), folder.all_steps(newest)
        return
    distributed.partition(trainer)
    trainer.args.eval_on_start = newest is None and trainer.eval_dataset is not None
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)


def _save(trainer: Any, tokenizer: Any, out: Path) -> None:
    """All processes lend what they hold, the first one writes."""
    if isinstance(trainer.model, PeftModel):
        with sharding.gathered(trainer.model):
            state = runs.state_of(trainer.model)
        if distributed.is_first():
            runs.write(state, out)
            tokenizer.save_pretrained(out / "adapter")
    else:
        # DeepSpeed's engine is asked for its shards; a run that was over when it was resumed has none.
        no_engine = distributed.layout()["sharding"] == "deepspeed" and trainer.model_wrapped is trainer.model
        weights = trainer.model.state_dict() if no_engine else trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if distributed.is_first():
            trainer.model.save_pretrained(out / "model", state_dict=weights)
            tokenizer.save_pretrained(out / "model")


def _close_run(out: Path, record: dict[str, Any], trainer: Any, metrics: Metrics, stop: EarlyStop) -> dict[str, Any]:
    """Write the results into run.json, which makes the run finished."""
    lines = folder.read_metrics(out / folder.METRICS)
    last = {key: next((line[key] for line in reversed(lines) if key in line), None) for key in LOSSES}
    scores = {key: value for line in lines for key, value in line.items() if key in SCORES}
    record = {
        **record,
        "status": "finished",
        "steps": trainer.state.global_step,
        "stopped": stop.reason() if trainer.state.global_step < trainer.state.max_steps else None,
        "first_loss": next((line["loss"] for line in lines if "loss" in line), None),
        "first_eval_loss": next((line["eval_loss"] for line in lines if "eval_loss" in line), None),
        "seconds": round(metrics.seconds, 3),
        "peak_memory_bytes": peak_bytes(trainer.args.device.type),
        "trainable_parameters": sum(
            getattr(part, "ds_numel", part.numel()) for part in trainer.model.parameters() if part.requires_grad
        ),
        **last,
        **scores,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json(out / folder.RECORD, record)
    return record
