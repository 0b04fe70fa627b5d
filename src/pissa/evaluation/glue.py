"""GLUE: a model fine-tuned by several methods on several tasks, each task an ordinary comparison.

OUT/data/TASK/   the task's rows, checked, and where they came from
OUT/TASK/        the task's comparison, see `pissa.comparison`
OUT/glue.json    OUT/glue.html
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PrinterCallback

from pissa.adapters import runs
from pissa.checkpoint.output import read_json, write_json
from pissa.comparison import compare
from pissa.comparison.grid import Cell, cells, check_common, check_jobs, numbers, variant
from pissa.config import TrainSettings, config_error, load_settings
from pissa.config.spellings import ALIASES
from pissa.errors import DataError, InputError, OutputError, did_you_mean
from pissa.evaluation.glue_comparison import DATA, FURTHER, TaskComparison
from pissa.evaluation.glue_page import write_glue
from pissa.evaluation.glue_results import PAGE, RESULT, Results
from pissa.evaluation.glue_rows import FACTS, Loaded, load, stage, staged
from pissa.evaluation.glue_tasks import TASKS, Task
from pissa.surgery.folders import RESIDUAL
from pissa.training import classification
from pissa.training.checks import check
from pissa.training.data import Rows, read
from pissa.training.folder import RECORD, SETTINGS
from pissa.training.models import load_tokenizer
from pissa.training.quiet import quiet
from pissa.untyped import Json

USUAL: Json = {
    "rank": 8, "batch_size": 32, "epochs": 3, "max_length": 128, "warmup_ratio": 0.06, "lr_scheduler": "linear",
    "save_steps": 0,
}  # fmt: skip
"""Of BERT's and LoRA's runs on GLUE; what is given wins."""
OWN = frozenset(
    {
        "task",
        "data",
        "data_split",
        "eval_data",
        "eval_split",
        "eval_size",
        "old_data",
        "old_split",
        "fields",
        "model",
    }
    | {"method", "options", "learning_rate", "seed", "output", "force", "early_stopping"}
)
"""Settings that the tasks and the grid decide."""
Rates = Mapping[str, Sequence[float]]
"""Learning rates by TASK/METHOD, METHOD or TASK; "" for all else."""


def glue(
    model: str,
    tasks: Sequence[Task],
    methods: Sequence[str],
    rates: Rates,
    seeds: Sequence[int],
    output: str | Path,
    *,
    data: str | None = None,
    given: Mapping[str, Any] | None = None,
    jobs: int = 1,
    say: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Results:
    """Fine-tune a model on every task with every method, rate and seed, and score it on the dev sets.

    Runs that are done are not trained again: later calls may add tasks, methods, rates and seeds.

    Args:
        model: folder or Hub id; an encoder, or a decoder that gets a head on its last token.
        tasks: see `glue_tasks.named`.
        methods: names for `TrainSettings.method`, NAME-control among them, options as corda[mode=kpm].
        rates: see `read_rates`.
        seeds: of the start, the new head and the order of the data.
        output: folder for everything.
        data: folder of the official files, or of files in the Hub's columns; None for the Hub.
        given: further settings of all runs, over `USUAL`.
        jobs: runs side by side, see `compare`.
        say: told of each run that ends, with how many are done of how many.

    Raises:
        PissaError: wrong data, settings or names, before anything is trained; or what a run raised.
    """
    out = Path(output)
    check_jobs(jobs)
    if not (tasks and methods):
        raise InputError(
            f"got {len(tasks)} tasks and {len(methods)} methods, expected one or more of both"
        )
    _refuse_other_folder(out)
    loaded = [load(task, data) for task in tasks]
    common = {known.task: settings_of(model, known, out, given or {}) for known in loaded}
    groups = {task: _by_rates(rates, task, methods) for task in tasks}
    fresh = [known for known in loaded if not staged(known, out / DATA / known.task.name)]
    if fresh:
        load_tokenizer(common[fresh[0].task])  # a model that is not there is told now
    total = 0
    for task in tasks:
        folder = out / task.name
        if (folder / SETTINGS).is_file():
            check_common(
                yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8")),
                common[task],
                folder,
            )
        for grid, group in groups[task].items():
            for cell in cells(group, grid, seeds):
                check(cell.settings(common[task], folder), resume=True)
                total += 1
    for known in fresh:
        stage(known, out / DATA / known.task.name)
    del loaded, fresh
    before = 0
    for task in tasks:
        for grid, group in groups[task].items():
            told = _counting(say, task, before, total)
            compare(common[task], group, grid, seeds, jobs=jobs, say=told)
            before += len(group) * len(grid) * len(seeds)
        measure_further(TaskComparison.read(out, task))
        report(out)
    return Results.read(out)


def report(out: Path) -> Results:
    """Read the comparisons in a folder, and write glue.json and glue.html.

    Raises:
        OutputError: there are none.
    """
    results = Results.read(out)
    write_json(out / RESULT, results.to_json())
    write_glue(results, out / PAGE)
    return results


def read_rates(text: str, tasks: Sequence[Task], methods: Sequence[str]) -> Rates:
    """Learning rates as typed: `1e-4,3e-4`, and behind semicolons other ones for a method, a task or one in the other.

    Example:
        read_rates("3e-4,1e-3; full=3e-5,1e-4; cola/full=1e-5", tasks, methods)

    Raises:
        InputError: no number, or a name that is not asked for.
    """
    plain = [variant(method)[0] for method in methods]
    known = {
        *(task.name for task in tasks),
        *plain,
        *(f"{task.name}/{method}" for task in tasks for method in plain),
    }
    rates: dict[str, Sequence[float]] = {}
    for part in text.split(";"):
        name, equals, values = part.strip().rpartition("=")
        name = name.strip()
        if equals and name not in known:
            raise InputError(
                f"lr is given for {name!r}, expected a task or method that is asked for, or TASK/METHOD."
                f"{did_you_mean(name, known)}"
            )
        if name in rates:
            raise InputError(f"lr is given twice for {name or 'all'}: {text!r}")
        rates[name] = tuple(sorted(set(numbers(values, float, "lr"))))
    return rates


def rates_of(rates: Rates, task: Task, method: str) -> tuple[float, ...]:
    """Those of TASK/METHOD, else of METHOD, else of TASK, else of all."""
    name = variant(method)[0]
    for key in (f"{task.name}/{name}", name, task.name, ""):
        if key in rates:
            return tuple(rates[key])
    raise InputError(
        f"lr has no rates for {method} on {task.name}: say those of all others, as in 1e-4;cola=1e-3"
    )


def _by_rates(
    rates: Rates, task: Task, methods: Sequence[str]
) -> dict[tuple[float, ...], list[str]]:
    """The methods that share their rates, by these: each group is a grid."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for method in methods:
        groups.setdefault(rates_of(rates, task, method), []).append(method)
    return groups


def settings_of(model: str, loaded: Loaded, out: Path, given: Mapping[str, Any]) -> TrainSettings:
    """What all runs of a task share: `given` over `USUAL`, evaluated once an epoch and at the end.

    Raises:
        ConfigError: a setting that is wrong, or one that tasks and grid decide.
    """
    keys = {ALIASES.get(key, key): key for key in given}
    taken = [
        f"{keys[key]}: got {given[keys[key]]!r}, expected nothing: the tasks, --methods, --lr and --seeds decide it"
        for key in sorted(OWN & keys.keys())
    ]
    if taken:
        raise config_error(taken, "the settings of pissa glue")
    task, folder = loaded.task, out / DATA / loaded.task.name
    ours = {
        "model": model, "task": task.kind, "output": str(out / task.name), "data": str(folder / "train.jsonl"),
        "eval_data": str(folder / f"{task.parts[0]}.jsonl"),
    }  # fmt: skip
    usual = {key: value for key, value in USUAL.items() if key not in keys}
    settings = load_settings(None, {**usual, **given, **ours})
    rows = min(settings.data_limit or math.inf, loaded.facts["rows"]["train"])
    return settings.model_copy(
        update={"eval_steps": settings.eval_steps or math.ceil(rows / settings.batch_size)}
    )


def _counting(
    say: Callable[[str, int, int], None], task: Task, before: int, total: int
) -> Callable[[Cell, int, int], None]:
    """A grid's count as one of all tasks' runs."""
    return lambda cell, done, _: say(f"{task.title}: {cell}", before + done, total)


def _refuse_other_folder(out: Path) -> None:
    if any((out / DATA / name / FACTS).is_file() for name in TASKS):
        return
    # Of a call that was killed at its first task there are hidden folders in data/, and nothing else.
    others = [path for path in (*out.glob("*"), *(out / DATA).glob("[!.]*")) if path != out / DATA]
    if others or (out.exists() and not out.is_dir()):
        raise OutputError(
            f"{out} is there and holds no results of pissa glue: choose another folder"
        )


def measure_further(result: TaskComparison) -> None:
    """Score the runs at each method's best rate on the task's second evaluation set, which training never saw."""
    for part in result.task.parts[1:]:
        rows = result.folder.parent / DATA / result.task.name / f"{part}.jsonl"
        if not rows.is_file():
            continue
        for method, rate in result.best.items():
            for run in result.comparison.runs(method, rate):
                folder = run.cell.folder(result.folder)
                if run.finished and not (folder / FURTHER).is_file():
                    write_json(folder / FURTHER, scores_on(folder, rows))


def scores_on(run: Path, rows: Path) -> dict[str, float]:
    """The scores of a finished classification on other rows.

    Args:
        run: its folder; the base it names is checked before the adapter is put on it.
        rows: a data file with the columns and classes of the training.

    Returns:
        `eval_loss` and `eval_accuracy`.

    Raises:
        WrongBaseError: the base is another one by now.
        DataError: other classes.
    """
    record = read_json(run / RECORD)
    settings = TrainSettings.model_validate(record["settings"])
    tokenizer = load_tokenizer(settings)
    found, source = read(str(rows), "")
    found = found[: settings.eval_limit or None]
    examples = classification.encode(Rows(found, found, [source]), tokenizer, settings)
    if examples.names != record["labels"]:
        raise DataError(
            f"{rows}: got classes {', '.join(examples.names)}, expected {', '.join(record['labels'])}"
        )
    whole = settings.method == "full"
    base = run / "model" if whole else run / RESIDUAL
    loaded = (
        settings.model_copy(update={"model": str(base), "revision": None})
        if base.is_dir()
        else settings
    )
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        model = classification.load_model(loaded, examples, tokenizer)
        if not whole:
            model = runs.load(model, run, trainable=False)
        trainer = classification.build_trainer(model, tokenizer, examples, settings, scratch, [])
        trainer.remove_callback(PrinterCallback)
        return {
            key: value
            for key, value in trainer.evaluate().items()
            if key in ("eval_loss", "eval_accuracy")
        }
