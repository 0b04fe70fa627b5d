"""What happens beside a training step: a line of metrics, a mark on a whole checkpoint, a progress bar."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pissa.errors import DivergedError
from pissa.training.folder import WHOLE, checkpoints

LOSSES = ("loss", "eval_loss", "old_loss")
SCORES = ("eval_accuracy", "eval_f1", "eval_matthews")
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
        logs: dict[str, Any] | None = None,
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
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called for its own evaluation too."""
        if "old_loss" not in (metrics or {}):
            self.trainer.evaluate(self.rows, metric_key_prefix="old")


class Checkpoints(TrainerCallback):
    """Marks a checkpoint as whole, last of all, and only then deletes the oldest ones."""

    def __init__(self, keep: int):
        self.keep = keep

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called when the trainer has written everything."""
        folder = Path(str(args.output_dir))
        (folder / f"checkpoint-{state.global_step}" / WHOLE).touch()
        if self.keep:
            for old in checkpoints(folder)[: -self.keep]:
                (old / WHOLE).unlink()  # first, so that half a deletion is no checkpoint
                shutil.rmtree(old)


class Progress(ProgressCallback):
    """transformers' bars on stderr, with the loss beside them rather than as lines on stdout."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest loss."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}")
