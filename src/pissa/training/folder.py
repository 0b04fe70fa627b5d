"""A run's folder: whose it is, what is in it, and what can be gone on from.

OUT/run.json        settings, data, versions, results; "status" says whether the run is finished
OUT/settings.yaml   the settings, to run them again
OUT/metrics.jsonl   one line per log event
OUT/adapter/        plain LoRA for the original base, with the tokenizer      (full: OUT/model/)
OUT/state/          the start, the drift since, the base's fingerprint        (full: absent)
OUT/residual/       the base in few bits with the start beside it, where a 16-bit base was quantised for the run
OUT/checkpoints/    checkpoint-N, whole if it holds the mark
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pissa.checkpoint.output import read_json, write_json
from pissa.errors import BusyError, OutputError
from pissa.surgery.folders import RESIDUAL
from pissa.untyped import Json

RECORD, SETTINGS, METRICS, REPORTS = "run.json", "settings.yaml", "metrics.jsonl", "tensorboard"
OURS = (
    SETTINGS,
    METRICS,
    "loss.png",
    "report.html",
    "adapter",
    "state",
    "model",
    "checkpoints",
    REPORTS,
    RESIDUAL,
)
CLEARED = "cleared"
LOCK = ".lock"
WHOLE = "whole"
"""Name of the empty file that is written last into a checkpoint."""
logger = logging.getLogger(__name__)


def previous_run(out: Path, *, resume: bool, force: bool) -> Json | None:
    """The record of the run to go on with, or None for a new run. Writes nothing.

    Raises:
        OutputError: the folder must not be used.
    """
    if out.is_file():
        raise OutputError(f"{out} is a file: choose a folder")
    found = _entries(out)
    if not found:
        return None
    if RECORD not in found:
        raise OutputError(f"{out} is not empty and holds no run: choose another folder")
    if not (resume or force):
        raise OutputError(
            f"{out} holds a run: go on with --resume, replace it with --force, or choose another folder"
        )
    record = read_json(out / RECORD)
    return record if resume and record.get("status") != CLEARED else None


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; the system lets go of it when this one dies.

    A folder that was not there and in which nothing was written is gone afterwards.

    Raises:
        BusyError: another process has it.
    """
    made, file = not out.exists(), out / LOCK
    out.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"another process is training into {out}: wait for it, or choose another folder"
            ) from error
        except (ImportError, OSError):  # Windows, or a file system without locks
            logger.warning(
                "%s cannot be locked on this system: see to it that one process writes there", out
            )
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            if made:
                with suppress(OSError):
                    out.rmdir()  # only if empty


def claim(out: Path, residual: str = "") -> None:
    """Say that a folder is a run's before it has one, and which job made the residual in it."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RECORD, {"status": CLEARED, "residual": residual})


def residual_of(out: Path) -> str | None:
    """The key of the job that made the residual of a run which did not come to begin."""
    whole = (out / RESIDUAL).is_dir() and (out / RECORD).is_file()
    return read_json(out / RECORD).get("residual") if whole else None


def clear(out: Path, but: str = "") -> None:
    """Remove a run's own files and folders, and nothing else; run.json stays to say whose folder it is."""
    if not (out / RECORD).is_file():
        return
    write_json(out / RECORD, {**_kept(out), "status": CLEARED})
    for name in OURS:
        if name == but:
            continue
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    return sorted((path.parent for path in folder.glob(f"checkpoint-*/{WHOLE}")), key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint; broken ones are removed."""
    whole = checkpoints(folder)
    for path in folder.glob("checkpoint-*"):
        if path not in whole:
            shutil.rmtree(path)
    return whole[-1] if whole else None


def step_of(checkpoint: Path | None) -> int:
    """The optimiser steps that a checkpoint has behind it; 0 for none."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def all_steps(checkpoint: Path) -> int:
    """How many steps the run of a checkpoint has in all."""
    return int(read_json(checkpoint / "trainer_state.json")["max_steps"])


def where_to_go_on(out: Path) -> tuple[Path | None, float]:
    """The newest whole checkpoint, and the seconds trained up to there; what lies past it is removed."""
    newest = newest_checkpoint(out / "checkpoints")
    return newest, cut_metrics(out / METRICS, step_of(newest))


def read_metrics(path: Path) -> list[Json]:
    """The lines of metrics.jsonl; a last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def cut_metrics(path: Path, step: int) -> float:
    """Drop the lines past `step` (all for 0, which evaluates again); returns the seconds trained up to there."""
    kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)
    return float(kept[-1]["seconds"]) if kept else 0.0


def _kept(out: Path) -> Json:
    """Of the record: which job made the residual."""
    return {key: value for key, value in read_json(out / RECORD).items() if key == "residual"}


def _entries(out: Path) -> set[str]:
    """What lies there, but for what an interrupted atomic write leaves."""
    return (
        {path.name for path in out.iterdir() if not path.name.startswith(".")}
        if out.is_dir()
        else set()
    )
