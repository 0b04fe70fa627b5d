"""One run from settings to a saved adapter, or on from where it was interrupted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from peft import PeftModel
from transformers import PrinterCallback, ProgressCallback

from pissa.adapters import exact, runs, sharding
from pissa.adapters.attach import is_residual
from pissa.checkpoint.output import write_json
from pissa.config import TrainSettings
from pissa.errors import BusyError, DivergedError, require
from pissa.observe import Observations
from pissa.records import versions
from pissa.surgery.folders import RESIDUAL
from pissa.training import (
    classification,
    distributed,
    folder,
    language,
    regression,
    residual,
    starting,
)
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
)
from pissa.training.checks import check, check_layout, check_same_data, check_same_settings
from pissa.training.data import load_rows
from pissa.training.memory import peak_bytes, reset_peak
from pissa.training.models import load_tokenizer
from pissa.training.quiet import quiet
from pissa.untyped import Json, Tokenizer

TASKS: dict[str, ModuleType] = {
    "language": language,
    "classification": classification,
    "regression": regression,
}
logger = logging.getLogger(__name__)


def train(settings: TrainSettings, resume: bool = False) -> Json:
    """Fine-tune a model as `settings` say and leave a run's folder.

    Everything is checked before anything is written. A run that was killed goes on with `resume`
    and ends with the same bits as one that was not.

    Args:
        settings: from `pissa.config.load_settings`.
        resume: go on with the run in `settings.output`; starts it where there is none, does nothing
            where it is done.

    Returns:
        The content of run.json.

    Raises:
        ConfigError, DataError, CheckpointError, OutputError, WrongBaseError, InputError: see
            `pissa.errors`.
    """
    choice = check(settings, resume)
    settings = distributed.join(settings, device(settings))
    check_layout(settings, choice)
    out = Path(settings.output).expanduser()
    before = distributed.on_first(
        lambda: folder.previous_run(out, resume=resume, force=settings.force)
    )
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
        if (
            distributed.on_first(
                lambda: folder.previous_run(out, resume=resume, force=settings.force)
            )
            != before
        ):
            raise BusyError(
                f"another process has written into {out} just now: look at it, then start again"
            )

        def seen_by(load: Callable[[], Any]) -> Observations | None:  # loads a transformers model
            return observations(load, task, examples, tokenizer, settings, choice)

        loaded = residual.with_quantised_base(
            settings,
            choice,
            out,
            before,
            lambda: seen_by(lambda: task.load_model(settings, examples, tokenizer)),
        )
        model = residual.ready(task.load_model(loaded, examples, tokenizer), settings)
        data = {"sources": rows.sources, **examples.facts()}
        if before:
            check_same_data(before["data"], data, out)
        kept = RESIDUAL if loaded is not settings else ""
        record = before or {}
        started = is_residual(model) or (before and (out / "state").is_dir())
        # All processes look, each at rows of its own.
        seen = None if started else seen_by(lambda: model)
        with distributed.first_ahead(out):
            model, base = starting.start(model, loaded, choice, before, out / "state", seen)
            facts = {
                "data": data,
                "base": {**base, "name": settings.model},
                "labels": examples.names,
            }
            if distributed.is_first():
                record = before or _open_run(
                    out, settings, {**facts, "processes": distributed.layout()}, kept
                )
                if isinstance(model, PeftModel) and not (out / "state").is_dir():
                    runs.save(model, out)  # the start, so that nothing is decomposed twice
        newest, seconds = distributed.on_first(lambda: folder.where_to_go_on(out))
        metrics = Metrics(out / folder.METRICS, seconds)
        stop = EarlyStop(settings.early_stopping, out / folder.METRICS)
        callbacks = [
            metrics,
            Checkpoints(settings.save_total_limit, model, newest),
            stop,
            *starting.callbacks(model),
        ]
        trainer = task.build_trainer(
            model, tokenizer, examples, settings, str(out / "checkpoints"), callbacks
        )
        trainer.optimizer = starting.optimizer(model, settings)
        if examples.old:
            trainer.add_callback(
                OldLoss(trainer, require("datasets", "train").Dataset.from_list(examples.old))
            )
        try:
            place_reports(trainer, out / folder.REPORTS)
            _run(trainer, newest, stop)
        except DivergedError as error:
            if distributed.is_first():
                write_json(
                    out / folder.RECORD, {**record, "status": "diverged", "reason": str(error)}
                )
            raise
        _save(trainer, tokenizer, out)
        return distributed.on_first(lambda: _close_run(out, record, trainer, metrics, stop))


def _open_run(out: Path, settings: TrainSettings, facts: Json, kept: str) -> Json:
    """Clear what an earlier run left, but for what is `kept`, then say what this one is."""
    out.mkdir(parents=True, exist_ok=True)
    folder.clear(out, but=kept)
    packages = versions() | {
        name: require(name, "train").__version__ for name in ("trl", "datasets", "accelerate")
    }
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
        # Killed between the last step and the end. The trainer's own resume would train one step
        # more here.
        trainer._load_from_checkpoint(str(newest))
        exact.read(trainer.model, newest)
        trainer.state.global_step, trainer.state.max_steps = (
            folder.step_of(newest),
            folder.all_steps(newest),
        )
        return
    distributed.partition(trainer)
    trainer.args.eval_on_start = newest is None and trainer.eval_dataset is not None
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)


def _save(trainer: Any, tokenizer: Tokenizer, out: Path) -> None:
    """All processes lend what they hold, the first one writes."""
    if isinstance(trainer.model, PeftModel):
        with sharding.gathered(trainer.model):
            state = runs.state_of(trainer.model)
        if distributed.is_first():
            runs.write(state, out)
            tokenizer.save_pretrained(out / "adapter")
    else:
        # DeepSpeed's engine is asked for its shards; a run that was over when it was resumed has
        # none.
        no_engine = (
            distributed.layout()["sharding"] == "deepspeed"
            and trainer.model_wrapped is trainer.model
        )
        weights = (
            trainer.model.state_dict()
            if no_engine
            else trainer.accelerator.get_state_dict(trainer.model_wrapped)
        )
        if distributed.is_first():
            trainer.model.save_pretrained(out / "model", state_dict=weights)
            tokenizer.save_pretrained(out / "model")


def _close_run(out: Path, record: Json, trainer: Any, metrics: Metrics, stop: EarlyStop) -> Json:
    """Write the results into run.json, which makes the run finished."""
    lines = folder.read_metrics(out / folder.METRICS)
    last = {
        key: next((line[key] for line in reversed(lines) if key in line), None) for key in LOSSES
    }
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
            getattr(part, "ds_numel", part.numel())
            for part in trainer.model.parameters()
            if part.requires_grad
        ),
        **last,
        **scores,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json(out / folder.RECORD, record)
    return record
