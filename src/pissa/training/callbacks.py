"""What happens beside a training step: a line of metrics, a mark on a whole checkpoint, a progress bar."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from pissa.adapters import exact
from pissa.errors import DivergedError
from pissa.training import distributed
from pissa.training.folder import WHOLE, checkpoints, read_metrics
from pissa.untyped import Json

LOSSES = ("loss", "eval_loss", "old_loss")
SCORES = ("eval_accuracy", "eval_f1", "eval_matthews", "eval_pearson", "eval_spearman")
MEASURED = (*LOSSES, *SCORES, "learning_rate", "grad_norm")


class Metrics(TrainerCallback):
    """Appends a line to metrics.jsonl at every log event; stops a run whose loss is not a number."""

    def __init__(self, path: Path, seconds_before: float):
        self.path = path
        self.start = time.monotonic() - seconds_before

    @property
    def seconds(self) -> float:
        """Time trained, over all resumptions."""
        return time.monotonic() - self.start

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Json | None = None,
        **kwargs: Any,
    ) -> None:
        """One line per event; the trainer's closing summary is none."""
        measured = {key: logs[key] for key in MEASURED if key in logs} if logs else {}
        if not measured.keys() & set(LOSSES):
            return
        for key in LOSSES:
            if key in measured and not math.isfinite(measured[key]):
                raise DivergedError(
                    f"{key} is {measured[key]} at step {state.global_step}: try a smaller learning_rate, "
                    "dtype: float32, or look for broken rows; go on from the last checkpoint with --resume"
                )
        if not state.is_world_process_zero:
            return
        finite = {key: value if math.isfinite(value) else None for key, value in measured.items()}
        line = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6), **finite}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "seconds": round(self.seconds, 3)}) + "\n")


class OldLoss(TrainerCallback):
    """At every evaluation also the loss on what the model knew before."""

    def __init__(self, trainer: Trainer, rows: Any):
        self.trainer, self.rows = trainer, rows

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Json | None = None,
        **kwargs: Any,
    ) -> None:
        """Called for its own evaluation too."""
        if "old_loss" not in (metrics or {}):
            self.trainer.evaluate(self.rows, metric_key_prefix="old")


class Checkpoints(TrainerCallback):
    """Marks a checkpoint as whole, last of all, and only then deletes the oldest ones.

    What comes back from the plain LoRA that the trainer writes only with rounding (a core) is
    written beside that as it is.
    """

    def __init__(self, keep: int, model: Any, resumed: Path | None):
        self.keep, self.resumed, self.model = keep, resumed, model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called when the trainer has read a checkpoint."""
        if self.resumed:
            exact.read(self.model, self.resumed)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called when the trainer has written everything."""
        distributed.wait()
        folder = Path(str(args.output_dir))
        exact.write(
            self.model, folder / f"checkpoint-{state.global_step}", first=distributed.is_first()
        )
        if not state.is_world_process_zero:
            return
        (folder / f"checkpoint-{state.global_step}" / WHOLE).touch()
        if self.keep:
            for old in checkpoints(folder)[: -self.keep]:
                (old / WHOLE).unlink()  # first, so that half a deletion is no checkpoint
                shutil.rmtree(old)


class EarlyStop(TrainerCallback):
    """Stops after so many evaluations in a row without a lower eval_loss; what has trained stays as
    it is then.

    Counted from metrics.jsonl rather than in memory, so that a resumed run stops where an unbroken
    one does. The loss before the first step counts too.
    """

    def __init__(self, patience: int, metrics: Path):
        self.patience = patience
        self.seen = [
            (line["step"], line["eval_loss"])
            for line in read_metrics(metrics)
            if "eval_loss" in line
        ]

    def reason(self) -> str | None:
        """Where and why the run stops, or None."""
        if not (self.patience and self.seen):
            return None
        losses = [loss for _, loss in self.seen]
        best = losses.index(min(losses))
        if len(losses) - 1 - best < self.patience:
            return None
        (step, loss), last = self.seen[best], self.seen[-1][0]
        count = f"{self.patience} evaluation{'s' if self.patience > 1 else ''}"
        return f"stopped at step {last}: {count} without a lower eval_loss than {loss:.4f} at step {step}"

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Json | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the newest loss."""
        if metrics and "eval_loss" in metrics:
            self.seen.append((state.global_step, metrics["eval_loss"]))
            control.should_training_stop |= self.reason() is not None


def place_reports(trainer: Trainer, folder: Path) -> None:
    """TensorBoard writes into the run's folder, not among its checkpoints, unless the environment names another."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)


class Progress(ProgressCallback):
    """transformers' bars on stderr, with the loss beside them rather than as lines on stdout."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Json | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest loss, learning rate and gradient norm; the bar itself shows the time left."""
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.4f}", "lr": f"{logs['learning_rate']:.1e}"}
            if "grad_norm" in logs:
                shown["grad"] = f"{logs['grad_norm']:.3g}"
            self.training_bar.set_postfix(shown)
