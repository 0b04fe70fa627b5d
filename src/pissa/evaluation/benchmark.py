"""One benchmark asked of one model through lm-evaluation-harness, answer by answer, and scored."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pissa.checkpoint.output import write_json
from pissa.checks import chosen_device
from pissa.errors import require
from pissa.evaluation.harness import (
    SEED,
    Asked,
    Sample,
    loaded_task,
    quiet,
    run_task,
    write_samples,
)
from pissa.evaluation.log import AnswerLog
from pissa.evaluation.model import Subject, harness_model
from pissa.evaluation.questions import Questions
from pissa.evaluation.result import SHARES, Perplexity, Score, TaskResult
from pissa.evaluation.tracks import PAPER, Protocol
from pissa.records import versions
from pissa.scoring.answers import score, walls
from pissa.scoring.code import verbatim
from pissa.scoring.isolation.run import Isolation
from pissa.scoring.verdict import Item, Share, summary
from pissa.untyped import Json

ANSWERING = ("torch", "transformers", "peft", "bitsandbytes")
"""Packages that answers depend on; scores depend on more."""
Say = Callable[[str, int, int], None]


def benchmark(
    subject: Subject,
    protocol: Protocol,
    found: Questions | None,
    asked: Asked,
    folder: Path,
    say: Say,
) -> TaskResult:
    """Ask, score, and write TASK.json and TASK.samples.jsonl; answers that are in
    TASK.answers.jsonl stay as they are.

    Args:
        subject: the model.
        protocol: how it is asked.
        found: the questions; None for a task that is the harness's own, data and all.
        asked: the rest.
        folder: of this model's results.
        say: told (what, done, in all).
    """
    require("lm_eval", "eval")
    from pissa.evaluation.asking import Asking

    begun = time.monotonic()
    job = job_of(subject, protocol, found, asked)
    with quiet(), loaded_task(protocol, found) as loaded:
        model = harness_model(subject, asked.backend, asked.batch_size)
        log = AnswerLog(folder / f"{protocol.stem}.answers.jsonl", job, force=asked.force)
        lm = Asking(model, log, asked.batch_size, lambda done, total: say("answers", done, total))
        raw, metrics = run_task(lm, loaded, protocol, None if found else asked.limit)
    lm.say = lambda done, total: say("right answers", done, total)
    samples, scores = _scored(protocol, raw, metrics, asked, say)
    with quiet():
        gold = _gold(lm, protocol, raw)
    result = TaskResult(
        subject.name,
        identity_of(subject, model),
        protocol.task,
        protocol.track,
        protocol.says,
        protocol.headline if protocol.headline in scores else next(iter(scores), ""),
        scores,
        gold,
        source_of(found)
        or {"name": f"as the harness's task {protocol.harness} names it", "rows": _questions(raw)},
        _notes(subject, protocol, lm, asked.isolation),
        job,
        scoring_versions(),
        time.monotonic() - begun,
    )
    write_samples(folder / f"{protocol.stem}.samples.jsonl", samples)
    write_json(folder / f"{protocol.stem}.json", result.to_json())
    return result


def job_of(subject: Subject, protocol: Protocol, found: Questions | None, asked: Asked) -> Json:
    """What must be the same for the answers to be the same."""
    places = ("path", "base", "name")  # may move
    source = source_of(found) or {}
    return {
        "model": {key: value for key, value in subject.identity.items() if key not in places},
        "task": protocol.task,
        "track": protocol.track,
        "data": {key: value for key, value in source.items() if key not in places},
        "limit": asked.limit,
        "batch_size": asked.batch_size,
        "backend": asked.backend,
        "device": chosen_device(subject.device).type,
        "dtype": subject.dtype or "auto",
        "seed": SEED,
        "versions": {name: version for name, version in versions().items() if name in ANSWERING},
    }


def source_of(found: Questions | None) -> Json | None:
    """Of the questions, and of the examples that prompts show."""
    if found is None or found.examples is None:
        return found.source if found else None
    return {**found.source, "examples_sha256": found.examples.source.get("sha256")}


def identity_of(subject: Subject, model: Any) -> Json:
    """Which weights answered, and in what they were computed."""
    own = getattr(getattr(model, "model", None), "dtype", None)
    return {**subject.identity, "dtype": str(own).removeprefix("torch.") if own else subject.dtype}


def scoring_versions() -> dict[str, str]:
    """Of all packages that a score depends on."""
    return versions("lm_eval", "datasets", "math_verify")


def _scored(
    protocol: Protocol, raw: list[Json], metrics: Json, asked: Asked, say: Say
) -> tuple[list[Sample], dict[str, Score]]:
    if not protocol.ours:
        return _as_the_harness(protocol, raw), _metrics(metrics)
    items, samples = [], []
    for done, one in enumerate(raw, 1):
        output, doc = one["resps"][0][0], one["doc"]
        item = _item(protocol, output, doc, asked.isolation, str(one["doc_id"]))
        items.append(item)
        prompt = one["arguments"][0][0]
        samples.append(
            {**item.to_json(), "prompt": prompt, "output": output, "gold": str(one["target"])}
        )
        say("scored", done, len(raw))
    names = {"ours": "ours" if protocol.track == PAPER else "pass@1", "authors": "authors"}
    return samples, {names[name]: _share(found) for name, found in summary(items).items()}


def _item(
    protocol: Protocol,
    output: str,
    doc: Mapping[str, Any],
    isolation: Isolation | None,
    number: str,
) -> Item:
    if protocol.track == PAPER:
        return score(protocol.task, output, {"id": number, **doc}, isolation=isolation)
    return verbatim(protocol.task, output, doc, walls(protocol.task, isolation))


def _as_the_harness(protocol: Protocol, raw: list[Json]) -> list[Sample]:
    """Samples of a task that the harness scored: one row a question and filter."""
    metric, _, wanted = protocol.headline.partition(",")
    samples = []
    for one in raw:
        name = metric if metric in one["metrics"] else one["metrics"][0]
        if wanted and one["filter"] != wanted:
            continue
        value = one[name]
        samples.append(
            {
                "id": str(one["doc_id"]),
                "correct": bool(value) if value in (0, 1) else None,  # None: a part of a point
                "extracted": str(one["filtered_resps"][0]),
                "reason": "",
                "authors": None,
                "prompt": one["arguments"][0][0],
                "output": str(one["resps"][0][0]),
                "gold": str(one["target"]),
            }
        )
    return samples


def _metrics(results: dict[str, Json]) -> dict[str, Score]:
    """The harness's own figures; those of several tasks under one name each."""
    scores = {}
    for task, figures in results.items():
        count = int(figures.get("sample_len", figures.get("samples", 0)) or 0)
        for key, value in figures.items():
            name, _, kind = key.partition(",")
            if not isinstance(value, (int, float)) or not kind or name.endswith("_stderr"):
                continue
            error = figures.get(f"{name}_stderr,{kind}")
            label = key if len(results) == 1 else f"{task}: {key}"
            right = round(value * count)
            whole = name in SHARES and count and math.isclose(right, value * count, abs_tol=1e-6)
            interval = Share(right, count).interval if whole else None
            scores[label] = Score(
                float(value), error if isinstance(error, float) else None, interval, count
            )
    return scores


def _share(found: Json) -> Score:
    low, high = found["interval"]
    return Score(found["value"], found["stderr"], (low, high), found["count"])


def _gold(lm: Any, protocol: Protocol, raw: list[Json]) -> Perplexity | None:
    """What the model thinks of the right answers, where the protocol is ours."""
    if protocol.track != PAPER:
        return None
    pairs = [(_trained_prompt(one["arguments"][0][0]), str(one["target"])) for one in raw]
    return perplexity(lm, [pair for pair in pairs if pair[1]])


def perplexity(lm: Any, pairs: list[tuple[str, str]]) -> Perplexity | None:
    """Of right answers behind their prompts; None where there are none."""
    if not pairs:
        return None
    found = lm.gold(pairs)
    tokens = sum(one.tokens for one in found)
    loss = -sum(one.loglikelihood for one in found) / max(tokens, 1)
    return Perplexity(math.exp(loss), tokens, len(found), sum(one.cut for one in found))


def _trained_prompt(prompt: str) -> str:
    """The prompt as training has it, without the words that begin the answer."""
    head, mark, _ = prompt.rpartition("### Response:")
    return head + mark


def _questions(raw: list[Json]) -> int:
    """How many there are; the harness has a sample for each of its filters."""
    return len({(one["task"], one["doc_id"]) for one in raw})


def _notes(subject: Subject, protocol: Protocol, lm: Any, isolation: Isolation | None) -> list[str]:
    """What a reader must know of how this model was asked."""
    notes: list[str] = lm.notes()
    if protocol.runs_code and isolation:
        limits = isolation.limits
        notes.append(
            f"programs had {limits.seconds:g} s and {limits.memory_bytes // 2**20} MiB, walls: {isolation.walls}"
        )
    if protocol.track == PAPER and subject.template not in (None, "alpaca"):
        notes.append(
            f"trained in the template {subject.template!r}, asked in Alpaca's as the paper does"
        )
    return notes
