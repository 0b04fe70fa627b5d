"""Several models on several benchmarks: what is missing is asked, all that is there is read.

OUT/MODEL/TASK.answers.jsonl   answers as they come, to go on from
OUT/MODEL/TASK.json            scores, and all that is needed to repeat them
OUT/MODEL/TASK.samples.jsonl   each prompt, answer, what was extracted, the verdict
OUT/results.json               all of them
OUT/results.html               the table; OUT/MODEL/TASK.html: right and wrong answers
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from pissa.checkpoint.output import read_json, write_json
from pissa.checks import chosen_device
from pissa.errors import ConfigError, OutputError
from pissa.evaluation.answers_page import write_answers
from pissa.evaluation.benchmark import benchmark, job_of, scoring_versions
from pissa.evaluation.harness import TASKS, Asked
from pissa.evaluation.judge import Judge
from pissa.evaluation.log import request_key
from pissa.evaluation.model import (
    DTYPES,
    Subject,
    base_of,
    check_backend,
    check_subject,
    refuse_inside,
    subject,
)
from pissa.evaluation.mt_bench import mt_bench, settings_of
from pissa.evaluation.page import write_results
from pissa.evaluation.questions import SOURCES, Questions, examples, questions
from pissa.evaluation.result import FORMAT, TaskResult
from pissa.evaluation.tracks import MT_BENCH, PAPER, Protocol, protocol
from pissa.scoring.answers import check_permission
from pissa.scoring.isolation.probe import find_isolation
from pissa.untyped import Json

RESULTS = "results.json"


def evaluate(
    models: Sequence[str],
    tasks: Sequence[str],
    output: str | Path,
    *,
    track: str = PAPER,
    data: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    backend: str = "hf",
    base: str | None = None,
    base_row: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    allow_code_execution: bool = False,
    isolation: bool = True,
    judge: Judge | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str, str, int, int], None] = lambda where, what, done, total: None,
) -> list[TaskResult]:
    """Evaluate runs, adapters and models.

    A run is what it learnt on its own base, whose fingerprint is checked; its base gets a row too.

    Args:
        models: folders of runs, plain LoRAs, decomposed or merged models, any model folders, or Hub
            ids.
        tasks: gsm8k, math, humaneval, mbpp, mt_bench; on the standard track any task of
            lm-evaluation-harness.
        output: a folder; what it holds of the same evaluation is kept and gone on with.
        track: paper or standard, see `pissa.evaluation.tracks`.
        data: a folder with the questions as local files; None for the Hub.
        limit: ask the first so many questions; None for all.
        batch_size: requests at a time, 1 or more.
        backend: hf or vllm.
        base: of the models that need one, if it lies elsewhere by now.
        base_row: evaluate the base of every run too.
        device: cpu, cuda, cuda:1. Default: cuda where there is one.
        dtype: float32, bfloat16 or float16 of the models. Default: as trained, or as stored.
        allow_code_execution: run the programs that a model wrote, behind walls.
        isolation: False accepts a mere process with limits where there are no walls.
        judge: of MT-Bench; None leaves it without a number.
        force: drop answers to another evaluation that are in the way.
        trust_remote_code: run Python code that comes with a model.
        say: told (model and task, what, done, in all).

    Returns:
        All results in the folder, those of earlier calls too.

    Raises:
        ConfigError: unknown tasks or track, or code without permission, before anything is loaded.
        InputError: no such device, or a base for what needs none.
        DataError: questions that are not there.
        WrongBaseError: a run on another base.
        OutputError: the folder holds something else, or answers to another evaluation.
    """
    out = Path(output)
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    chosen_device(device)
    protocols = _protocols(tasks, track, allow_code_execution)
    walls = (
        find_isolation(allow_none=not isolation) if any(p.runs_code for p in protocols) else None
    )
    asked = Asked(limit, batch_size, backend, walls, force)
    subjects = _subjects(
        models,
        base,
        base_row,
        {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code},
    )
    _check_place(out, subjects)
    check_backend(backend, subjects, protocols, TASKS, limit)
    found = {p.task: _questions(p, data, limit) for p in protocols}
    for one in subjects:
        for asks in protocols:
            where = f"{one.name} {asks.task}"
            _one(
                one,
                asks,
                found[asks.task],
                asked,
                judge,
                out / one.name,
                lambda *done, at=where: say(at, *done),
            )
        one.close()
        gc.collect()
    return report(out)


def report(out: Path) -> list[TaskResult]:
    """Read all results of a folder, and write results.json and the pages.

    Raises:
        OutputError: there are none.
    """
    found = _results(out)
    if not found:
        raise OutputError(f"{out} holds no results: run pissa eval first")
    write_json(
        out / RESULTS, {"format": FORMAT, "results": [one.to_json() for one in found.values()]}
    )
    for file, one in found.items():
        page = file.with_suffix(".html")
        if not page.is_file() or page.stat().st_mtime < _samples(file).stat().st_mtime:
            with _samples(file).open(encoding="utf-8") as lines:
                write_answers(one, [json.loads(line) for line in lines], page)
    write_results(list(found.values()), out)
    return list(found.values())


def _results(out: Path) -> dict[Path, TaskResult]:
    return {
        file: TaskResult.from_json(read_json(file), str(file))
        for file in sorted(out.glob("*/*.json"))
        if _samples(file).is_file()
    }


def _samples(result: Path) -> Path:
    return result.with_name(f"{result.stem}.samples.jsonl")


def _protocols(tasks: Sequence[str], track: str, allow_code_execution: bool) -> list[Protocol]:
    if not tasks or len(set(tasks)) < len(tasks):
        raise ConfigError(
            f"tasks: got {', '.join(tasks) or 'none'}, expected one or more, each once"
        )
    protocols = [protocol(task, track) for task in tasks]
    check_permission([p.task for p in protocols if p.runs_code], allow_code_execution)
    return protocols


def _questions(asks: Protocol, data: str | None, limit: int | None) -> Questions | None:
    """None for a task whose data are the harness's own business."""
    if asks.task not in SOURCES:
        return None
    found = questions(asks.task, data, limit)
    return (
        found
        if asks.track == PAPER
        else dataclasses.replace(found, examples=examples(asks.task, data))
    )


def _subjects(
    models: Sequence[str], base: str | None, base_row: bool, loading: Json
) -> list[Subject]:
    """The models, and behind them their bases, which are the right ones only if the runs say so; names of their own."""
    once = {os.path.realpath(path): path for path in models}
    own = [subject(path, base=base, **loading) for path in once.values()]
    bases: dict[tuple[str, str | None, str | None], Subject] = {}
    for one in own:
        check_subject(one)
        name, revision = base_of(one) or (None, None)
        one.identity["base"] = name
        if (
            name
            and base_row
            and (key := (os.path.realpath(name), revision, one.dtype)) not in bases
        ):
            bases[key] = subject(name, revision=revision, **{**loading, "dtype": one.dtype})
    there = {os.path.realpath(one.path) for one in own}
    subjects = [*own, *(origin for (place, *_), origin in bases.items() if place not in there)]
    names = Counter(one.name for one in subjects)
    for one in subjects:
        if names[one.name] > 1:
            one.name += "-" + request_key(one.identity.get("sha256") or one.path, one.dtype)[:8]
    return subjects


def _check_place(out: Path, subjects: Sequence[Subject]) -> None:
    """Before anything is asked: results that are there and broken would be found out at the end."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file: name a folder for the results")
    refuse_inside(out, subjects)
    for one in subjects:
        if Path(one.path).exists() and (out / one.name).resolve() == Path(one.path).resolve():
            raise OutputError(
                f"{out} would put results into {one.path}: name another folder for them"
            )
    _results(out)


def _one(
    subject: Subject,
    protocol: Protocol,
    found: Questions | None,
    asked: Asked,
    judge: Judge | None,
    folder: Path,
    say: Callable[[str, int, int], None],
) -> None:
    """What is there already is kept: the weights are not even loaded."""
    talk = found if protocol.task == MT_BENCH else None
    if talk is None:
        settings = job_of(subject, protocol, found, asked)
    else:
        settings = settings_of(subject, protocol, talk, asked, judge)
    file = folder / f"{protocol.stem}.json"
    if file.is_file() and not asked.force:
        there = TaskResult.from_json(read_json(file), str(file))
        if talk is not None and judge is None:
            settings["judge"] = there.settings.get("judge")  # a mark that is there stays
        if there.settings == settings and there.versions == scoring_versions():
            return
    if talk is None:
        benchmark(subject, protocol, found, asked, folder, say)
    else:
        mt_bench(subject, protocol, talk, asked, folder, judge, say)
