"""lm-evaluation-harness on our questions: one task, one model, its samples and its own metrics."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from pissa.checkpoint.output import write_text
from pissa.errors import ConfigError, did_you_mean
from pissa.evaluation.questions import Questions
from pissa.evaluation.tracks import Protocol
from pissa.scoring.isolation.run import Isolation
from pissa.untyped import Json

TASKS = Path(__file__).parent / "tasks"
SEED = 1234
"""Of few-shot draws, as the harness has it."""
BOOTSTRAP = 1000
RUN_UNSAID = ("cruxeval",)
"""Of the harness's tasks those that run programs and are not marked as unsafe."""
Sample = Json
"""One answer: id, correct, extracted, reason, authors, prompt, output, gold."""


@dataclass(frozen=True)
class Asked:
    """What is the same for all models and benchmarks of a call."""

    limit: int | None
    batch_size: int
    backend: str
    isolation: Isolation | None
    force: bool


@contextlib.contextmanager
def loaded_task(protocol: Protocol, found: Questions | None) -> Iterator[Json]:
    """The task on our rows, for `run_task`; its files are there as long as the block lasts.

    Raises:
        ConfigError: no such task, or one that runs programs without our walls, or asks a question
            several times.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    own = Path(lm_eval.__file__).parent / "tasks" / (protocol.folder or ".")
    # All of the harness's thousands of task files are read only where one of them was named by
    # hand.
    places = [str(TASKS), *([str(own)] if protocol.folder else [])]
    manager = TaskManager(include_path=places, include_defaults=found is None)
    if protocol.harness not in manager.all_tasks:
        near = did_you_mean(protocol.harness, manager.all_tasks)
        raise ConfigError(
            f"task is {protocol.harness!r}, expected one of lm-evaluation-harness's (lm_eval ls).{near}"
        )
    with TemporaryDirectory() as place:
        loaded = manager.load(
            [_task_file(manager, protocol, found, Path(place)) if found else protocol.harness]
        )
        for name, task in loaded["tasks"].items():
            if not protocol.ours:
                _refuse(name, task)
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
            if protocol.ours:
                # Scored by us, once, with the verdicts kept.
                task.override_metric("bypass")
                task.set_config(key="process_results", value=lambda doc, results: {"bypass": 0.0})
        yield loaded


def run_task(
    lm: Any, loaded: Json, protocol: Protocol, limit: int | None
) -> tuple[list[Json], Json]:
    """The harness's samples, and its own metrics."""
    import lm_eval

    told = lm_eval.evaluate(
        lm=lm,
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=BOOTSTRAP,
        confirm_run_unsafe_code=protocol.ours,
    )
    samples = [
        {"task": name, **sample}
        for name, all_of_it in told["samples"].items()
        for sample in all_of_it
    ]
    return samples, told["results"]


def _refuse(name: str, task: Any) -> None:
    """Tasks whose scorers run what a model wrote, as the user that types the command; not all of them say so."""
    if getattr(task, "UNSAFE_CODE", False) or name.startswith(RUN_UNSAID):
        raise ConfigError(
            f"task is {name!r}, which runs programs that a model wrote, without walls: expected humaneval or mbpp, "
            "which run behind ours, or lm_eval run --confirm_run_unsafe_code at your own risk"
        )
    if int(task.get_config("repeats") or 1) > 1:
        raise ConfigError(
            f"task is {name!r}, which draws several answers to a question: here each is asked once"
        )


def _task_file(manager: Any, protocol: Protocol, found: Questions, place: Path) -> str:
    """The task as it is, on our rows: a task file that includes it."""
    sets = {"test": found.rows}
    if found.examples:
        sets["train"] = sets["prompt"] = found.examples.rows
    for name, rows in sets.items():
        write_samples(place / f"{name}.jsonl", rows)
    config = {
        "include": str(manager.task_index[protocol.harness].yaml_path),
        "task": protocol.harness,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {name: str(place / f"{name}.jsonl") for name in sets},
            "cache_dir": str(place / "cache"),
        },
    }
    file = place / "task.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(file)


def write_samples(path: Path, samples: list[Sample]) -> None:
    """One JSON object a line, in one step."""
    write_text(path, "".join(json.dumps(sample) + "\n" for sample in samples))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The harness tells of every default that it takes."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
