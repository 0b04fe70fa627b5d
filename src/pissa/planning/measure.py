"""A few real steps in a temporary folder: seconds a step, tokens a second, and the memory they took."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from pissa.config import TrainSettings
from pissa.training.folder import METRICS, read_metrics
from pissa.training.run import train

STEPS = 4
"""The first one is not counted: it allocates and compiles."""


@dataclass(frozen=True)
class Measured:
    """What a few steps took.

    Attributes:
        step_seconds: of a step, on average.
        peak_bytes: the most memory: of torch's allocator on a GPU, of the whole process on a CPU.
    """

    step_seconds: float
    peak_bytes: int


def measure(settings: TrainSettings) -> Measured:
    """Train a few steps as the settings say, without evaluation and checkpoints.

    Raises:
        PissaError: all that `train` raises.
    """
    few = {
        "max_steps": STEPS,
        "eval_data": None,
        "eval_size": 0,
        "eval_steps": 0,
        "old_data": None,
        "save_steps": 0,
    }
    plain = {"logging_steps": 1, "report_to": "none", "early_stopping": 0, "force": False}
    if settings.task == "language":  # the classes of a classification must all be there
        rows = STEPS * settings.batch_size * (settings.max_length // 16 if settings.packing else 1)
        few["data_limit"] = min(settings.data_limit or rows, rows)
    with tempfile.TemporaryDirectory(prefix="pissa-plan-") as folder:
        out = Path(folder) / "run"
        record = train(settings.model_copy(update={**few, **plain, "output": str(out)}))
        seconds = [line["seconds"] for line in read_metrics(out / METRICS) if "loss" in line]
    step_seconds = (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1)
    return Measured(step_seconds, record["peak_memory_bytes"] or 0)
