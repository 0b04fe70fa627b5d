"""One run from settings to a saved adapter, or on from where it was interrupted."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PrinterCallback, ProgressCallback

from pissa.adapters import runs
from pissa.adapters.attach import attach, is_residual, recipe_of
from pissa.checkpoint.fingerprint import check_same, fingerprint, model_tensors
from pissa.checkpoint.output import write_json
from pissa.checkpoint.targets import find_targets, head_modules
from pissa.config import TrainSettings, config_error
from pissa.errors import InputError, require
from pissa.quant import quantiser
from pissa.records import versions
from pissa.registry import choose, get, tolerance_of
from pissa.surgery.folders import RESIDUAL
from pissa.training import classification, folder, language, residual
from pissa.training.arguments import device
from pissa.training.callbacks import Checkpoints, Metrics, Progress
from pissa.training.data import load_rows
from pissa.training.models import load_tokenizer
from pissa.training.quiet import quiet

TASKS: dict[str, ModuleType] = {"language": language, "classification": classification}
NEUTRAL = frozenset(
    {"model", "revision", "data", "data_split", "eval_data", "eval_split", "output", "force", "trust_remote_code"}
    | {"logging_steps", "report_to", "save_steps", "save_total_limit"}
)
"""What may differ on resuming: where things lie (their content is compared) and what does not touch a weight."""

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
    _check(settings, resume)
    out = Path(settings.output).expanduser()
    before = folder.previous_run(out, resume=resume, force=settings.force)
    if before:
        _check_same_settings(before, settings, out)
        if before["status"] == "finished":
            logger.warning("%s is finished: nothing to do", out)
            return before
    task = TASKS[settings.task]
    rows = load_rows(settings)
    tokenizer = load_tokenizer(settings)
    examples = task.encode(rows, tokenizer, settings)
    with quiet():
        loaded = residual.with_quantised_base(settings, out, before)
        model = residual.ready(task.load_model(loaded, examples, tokenizer), settings)
        model, base = _start(model, loaded, before, out / "state")
        base = {**base, "name": settings.model}
        data = {"sources": rows.sources, **examples.facts()}
        if before:
            _check_same_data(before["data"], data, out)
        kept = RESIDUAL if loaded is not settings else ""
        record = before or _open_run(out, settings, {"data": data, "base": base, "labels": examples.names}, kept)
        if isinstance(model, PeftModel) and not (out / "state").is_dir():
            runs.save(model, out)  # the start, so that resuming never decomposes again
        newest = folder.newest_checkpoint(out / "checkpoints")
        metrics = Metrics(out / folder.METRICS, folder.cut_metrics(out / folder.METRICS, folder.step_of(newest)))
        callbacks = [metrics, Checkpoints(settings.save_total_limit)]
        trainer = task.build_trainer(model, tokenizer, examples, settings, str(out / "checkpoints"), callbacks)
        _run(trainer, newest)
        _save(trainer.model, tokenizer, out)
    return _close_run(out, record, trainer, metrics)


def _check(settings: TrainSettings, resume: bool) -> None:
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
            zero_start = get(choice.method).zero_start
            if choice.quant:
                quantiser(choice.quant, double=settings.double_quant)
        except InputError as error:
            mistakes.append(f"method: {error}")
        else:
            if settings.dropout and not zero_start:
                mistakes.append(
                    f"dropout: got {settings.dropout:g}, expected 0 with {settings.method}: the adapter starts as a "
                    "part of the weight itself, and dropping its inputs would change the model before the first step"
                )
    else:
        mistakes += [
            f"{key}: got {getattr(settings, key)}, expected {unset} with full, which has no adapter"
            for key, unset in (("quant", "null"), ("iterations", "null"), ("double_quant", False), ("dropout", 0))
            if getattr(settings, key)
        ]
        if residual.is_decomposed(settings.model):
            mistakes.append(f"model: got {settings.model}, a residual, expected a whole model with full")
    if mistakes:
        raise config_error(mistakes, "the settings")
    device(settings)


def _check_same_settings(before: dict[str, Any], settings: TrainSettings, out: Path) -> None:
    now = settings.model_dump(mode="json")
    mistakes = [
        f"{key}: got {now[key]!r}, expected {before['settings'].get(key)!r} as the run began"
        for key in now
        if key not in NEUTRAL and now[key] != before["settings"].get(key)
    ]
    if mistakes:
        raise config_error(mistakes, f"the settings to resume {out} with")


def _check_same_data(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    def content(data: dict[str, Any]) -> dict[str, Any]:
        files = [{key: source[key] for key in ("sha256", "rows")} for source in data["sources"]]
        return {**data, "sources": files}

    old, new = content(before), content(now)
    differing = [key for key in new if new[key] != old.get(key)]
    if differing:
        lines = [f"{key}: got {new[key]}, expected {old.get(key)}" for key in differing]
        raise config_error(lines, f"the data to resume {out} with (it changed since the run began)")


def _start(
    model: nn.Module, settings: TrainSettings, before: dict[str, Any] | None, state: Path
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
    if before and state.is_dir():
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
        )
    if settings.dropout:
        _set_dropout(model, settings.dropout)
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


def _set_dropout(model: nn.Module, share: float) -> None:
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


def _run(trainer: Any, newest: Path | None) -> None:
    """Train, on from a checkpoint if there is one."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(Progress)
    if newest and folder.step_of(newest) >= folder.all_steps(newest):
        # Killed between the last step and the end. The trainer's own resume would train one step more here.
        trainer._load_from_checkpoint(str(newest))
        trainer.state.global_step = folder.step_of(newest)
        return
    trainer.args.eval_on_start = newest is None and trainer.eval_dataset is not None
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)


def _save(model: nn.Module, tokenizer: Any, out: Path) -> None:
    if isinstance(model, PeftModel):
        runs.save(model, out)
        tokenizer.save_pretrained(out / "adapter")
    else:
        model.save_pretrained(out / "model")  # type: ignore[operator]
        tokenizer.save_pretrained(out / "model")


def _close_run(out: Path, record: dict[str, Any], trainer: Any, metrics: Metrics) -> dict[str, Any]:
    """Write the results into run.json, which makes the run finished."""
    lines = folder.read_metrics(out / folder.METRICS)
    last = {key: next((line[key] for line in reversed(lines) if key in line), None) for key in ("loss", "eval_loss")}
    scores = {key: value for line in lines for key, value in line.items() if key in ("eval_accuracy", "eval_f1")}
    record = {
        **record,
        "status": "finished",
        "steps": trainer.state.global_step,
        "seconds": round(metrics.seconds, 3),
        "trainable_parameters": sum(part.numel() for part in trainer.model.parameters() if part.requires_grad),
        **last,
        **scores,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json(out / folder.RECORD, record)
    return record
