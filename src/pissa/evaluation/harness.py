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
from pissa.evaluation.questions import Questions, examples
from pissa.evaluation.tracks import PAPER, Protocol
from pissa.scoring.isolation.run import Isolation

TASKS = Path(__file__).parent / "tasks"
SEED = 1234
"""Of few-shot draws, as the harness has it."""
BOOTSTRAP = 1000
Sample = dict[str, Any]
"""One answer: id, correct, extracted, reason, authors, prompt, output, gold."""


@dataclass(frozen=True)
class Asked:
    """What is the same for all models and benchmarks of a call."""

    track: str
    data: str | None
    limit: int | None
    batch_size: int
    backend: str
    isolation: Isolation | None
    force: bool


def run_task(
    lm: Any, protocol: Protocol, found: Questions | None, asked: Asked
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The harness's samples, and its own metrics."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    assert protocol.harness is not None
    ours = protocol.harness.startswith("pissa_")
    own = Path(lm_eval.__file__).parent / "tasks" / (protocol.folder or ".")
    # All of the harness's thousands of task files are read only where one of them was named by hand.
    places = [str(TASKS), *([str(own)] if protocol.folder else [])]
    manager = TaskManager(include_path=places, include_defaults=found is None)
    if protocol.harness not in manager.all_tasks:
        near = did_you_mean(protocol.harness, manager.all_tasks)
        raise ConfigError(f"task is {protocol.harness!r}, expected one of lm-evaluation-harness's (lm_eval ls).{near}")
    with TemporaryDirectory() as place:
        loaded = manager.load([_task_file(manager, protocol, found, asked, Path(place)) if found else protocol.harness])
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
            if ours:
                # Scored below, once, with the verdicts kept.
                task.override_metric("bypass")
                task.set_config(key="process_results", value=lambda doc, results: {"bypass": 0.0})
        told = lm_eval.evaluate(
            lm=lm,
            task_dict=loaded,
            limit=None if found else asked.limit,
            bootstrap_iters=BOOTSTRAP,
            confirm_run_unsafe_code=ours,
        )
    samples = [{"task": name, **sample} for name, all_of_it in told["samples"].items() for sample in all_of_it]
    return samples, told["results"]


def _task_file(manager: Any, protocol: Protocol, found: Questions, asked: Asked, place: Path) -> str:
    """The task as it is, on our rows: a task file that includes it."""
    sets = {"test": found.rows}
    if asked.track != PAPER and (more := examples(protocol.task, asked.data)):
        sets["train"] = sets["prompt"] = more.rows
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
