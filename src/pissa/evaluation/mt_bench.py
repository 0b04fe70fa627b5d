"""MT-Bench: 80 questions of two turns (Zheng et al. 2023, arXiv 2306.05685): answered, and graded
if there is a judge.

FOLDER/mt_bench.answers.jsonl    answers as they come, to go on from
FOLDER/mt_bench.judge.jsonl      judgements as they come
FOLDER/mt_bench.fastchat.jsonl   answers as FastChat has them, for other judges
FOLDER/mt_bench.samples.jsonl    each turn with its rating and the judge's words
FOLDER/mt_bench.json             the result

All answers are greedy, so that the same model answers the same again; FastChat samples at
temperature 0.7 in writing and roleplay and 0.1 in stem and humanities. With the judge's words,
which are ours, this makes the numbers comparable among models that one judge saw here, and not with
those of a leaderboard.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from pissa.checkpoint.output import write_json, write_text
from pissa.errors import require
from pissa.evaluation.benchmark import Say, identity_of, job_of, perplexity, scoring_versions
from pissa.evaluation.harness import Asked, Sample, quiet, write_samples
from pissa.evaluation.judge import LEAST, MOST, Judge, Judgement, Message, conversation
from pissa.evaluation.log import AnswerLog
from pissa.evaluation.model import Subject, harness_model
from pissa.evaluation.mt_bench_turns import Turn, answer_turns
from pissa.evaluation.questions import Questions
from pissa.evaluation.result import Score, TaskResult
from pissa.evaluation.tracks import MT_BENCH, Protocol
from pissa.scoring.verdict import Z
from pissa.training.data import read
from pissa.untyped import Json

WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories that are graded beside a reference answer, as in MT-Bench."""
REFERENCES = "reference_answer_gpt-4.jsonl"
"""FastChat's file, beside the questions."""


def mt_bench(
    subject: Subject,
    protocol: Protocol,
    found: Questions,
    asked: Asked,
    folder: Path,
    judge: Judge | None,
    say: Say,
) -> TaskResult:
    """Answer both turns, have them graded, write the files above; what is answered or graded
    already stays as it is.

    Args:
        subject: the model.
        protocol: of mt_bench.
        found: the questions; FastChat's reference answers are read from a file beside them, where
            there is one.
        asked: what is the same for all models.
        folder: of this model's results.
        judge: None leaves the answers without a score.
        say: told (what, done, in all).

    Raises:
        ConfigError: a judge that does not work.
        OutputError: answers, or judgements of another judge, are in the way.
    """
    require("lm_eval", "eval")
    from pissa.evaluation.asking import Asking

    begun = time.monotonic()
    references, reference_source = _references(found)
    settings = settings_of(subject, protocol, found, asked, judge)
    job = job_of(subject, protocol, found, asked)
    with quiet():
        inner = harness_model(subject, asked.backend, asked.batch_size)
    log = AnswerLog(folder / f"{MT_BENCH}.answers.jsonl", job, force=asked.force)
    lm = Asking(inner, log, asked.batch_size)
    in_chat = subject.template in (None, "chat") and bool(
        getattr(lm.tokenizer, "chat_template", None)
    )
    turns, notes = answer_turns(subject, lm, found.rows, in_chat, asked.backend, say)
    lm.say = lambda done, total: say("right answers", done, total)
    firsts = [turn for turn in turns if turn.number == 1]
    pairs = [
        (turn.prompt, references[turn.row["id"]][0])
        for turn in firsts
        if turn.row["id"] in references
    ]
    with quiet():
        gold = perplexity(lm, [pair for pair in pairs if pair[1]])
    _write_fastchat(folder / f"{MT_BENCH}.fastchat.jsonl", subject.name, turns)
    judgements: list[Judgement | None] = [None] * len(turns)
    if judge:
        kept = AnswerLog(
            folder / f"{MT_BENCH}.judge.jsonl", {"judge": judge.facts}, force=asked.force
        )
        judgements = list(_judged(judge, kept, turns, references, say))
        missing = sum(one is not None and one["rating"] is None for one in judgements)
        if missing:
            notes.append(
                f"{missing} of {len(turns)} answers got no rating from the judge, and no mean counts them"
            )
    else:
        notes.append(
            f"no judge, no number: answers are in {MT_BENCH}.fastchat.jsonl; name a judge with --judge"
        )
    scores = _scores(turns, judgements)
    result = TaskResult(
        subject.name,
        identity_of(subject, inner),
        protocol.task,
        protocol.track,
        protocol.says,
        protocol.headline if protocol.headline in scores else "",
        scores,
        gold,
        {**found.source, "references": reference_source},
        notes,
        settings,
        scoring_versions(),
        time.monotonic() - begun,
    )
    samples = [_sample(turn, one, references) for turn, one in zip(turns, judgements, strict=True)]
    write_samples(folder / f"{MT_BENCH}.samples.jsonl", samples)
    write_json(folder / f"{MT_BENCH}.json", result.to_json())
    return result


def settings_of(
    subject: Subject, protocol: Protocol, found: Questions, asked: Asked, judge: Judge | None
) -> Json:
    """What must be the same for the result to be the same: the answers' own, and the judge."""
    return {**job_of(subject, protocol, found, asked), "judge": judge.facts if judge else None}


def _references(found: Questions) -> tuple[dict[Any, list[str]], Json | None]:
    """Reference answers of both turns by question: FastChat's file, else what the questions carry."""
    file = Path(str(found.source["name"])).parent / REFERENCES
    known: dict[Any, list[str]] = {}
    source = None
    if file.is_file():
        rows, source = read(str(file), "references")
        known = {row.fields["question_id"]: row.fields["choices"][0]["turns"] for row in rows}
    references = {}
    for row in found.rows:
        turns = known.get(row["id"]) or row["reference"]
        if row["category"] in WITH_REFERENCE and any(turns):
            references[row["id"]] = [str(turn or "") for turn in [*turns, "", ""][:2]]
    return references, source


def _judged(
    judge: Judge, log: Any, turns: Sequence[Turn], references: dict[Any, list[str]], say: Say
) -> list[Judgement]:
    """A judgement of each turn, several asked for at a time, each kept as soon as it is there."""
    from pissa.evaluation.log import request_key

    keys, asked = [], dict[str, tuple[Turn, list[Message]]]()
    for turn in turns:
        so_far = [other for other in turns if other.row is turn.row and other.number <= turn.number]
        right = references.get(turn.row["id"], [])
        messages = conversation(
            turn.row["turns"][: turn.number], [other.answer for other in so_far], right
        )
        keys.append(request_key("judgement", messages))
        asked[keys[-1]] = (turn, messages)
    left = [key for key in asked if key not in log.answers]
    failed, one_at_a_time = list[BaseException](), Lock()

    def grade(key: str) -> None:
        if failed:
            return
        turn, messages = asked[key]
        try:
            rating, replies = judge.grade(messages)
        except BaseException as error:  # what others are waiting for still comes, and is kept
            failed.append(error)
            return
        with one_at_a_time:
            log.add(
                [
                    (
                        key,
                        {
                            "id": turn.row["id"],
                            "turn": turn.number,
                            "rating": rating,
                            "replies": replies,
                        },
                    )
                ]
            )
            say("judged", sum(key in log.answers for key in asked), len(asked))

    with ThreadPoolExecutor(judge.jobs) as pool:
        try:
            list(pool.map(grade, left))
        except BaseException as error:  # from the keyboard
            failed.append(error)
    if failed:
        raise failed[0]
    return [log.answers[key] for key in keys]


def _scores(turns: Sequence[Turn], judgements: Sequence[Judgement | None]) -> dict[str, Score]:
    """Means of ratings: of all, by turn, by category."""
    rated = [
        (turn, one["rating"])
        for turn, one in zip(turns, judgements, strict=True)
        if one and one["rating"]
    ]
    groups: dict[str, list[tuple[Any, float]]] = {}
    for turn, rating in rated:
        for name in ("judge", f"judge, turn {turn.number}", f"judge, {turn.row['category']}"):
            groups.setdefault(name, []).append((turn.row["id"], rating))
    order = ["judge", "judge, turn 1", "judge, turn 2"]
    return {
        name: _score(groups[name])
        for name in [*order, *(g for g in groups if g not in order)]
        if name in groups
    }


def _score(rated: Sequence[tuple[Any, float]]) -> Score:
    """Mean of ratings with its error over questions, whose two turns hang together; the interval is normal."""
    value = statistics.fmean(rating for _, rating in rated)
    by_question: dict[Any, list[float]] = {}
    for question, rating in rated:
        by_question.setdefault(question, []).append(rating)
    means = [statistics.fmean(ratings) for ratings in by_question.values()]
    if len(means) < 2:
        return Score(value, None, None, len(rated))
    error = statistics.stdev(means) / math.sqrt(len(means))
    return Score(
        value, error, (max(LEAST, value - Z * error), min(MOST, value + Z * error)), len(rated)
    )


def _write_fastchat(path: Path, model: str, turns: Sequence[Turn]) -> None:
    """FastChat's lines; identity and time stamp are the same for the same answers."""
    lines = []
    for first, second in zip(turns[::2], turns[1::2], strict=True):
        answers = [first.answer, second.answer]
        digest = hashlib.sha256(json.dumps([model, first.row["id"], *answers]).encode()).hexdigest()
        names = {"question_id": first.row["id"], "answer_id": digest[:22], "model_id": model}
        lines.append({**names, "choices": [{"index": 0, "turns": answers}], "tstamp": 0.0})
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _sample(turn: Turn, judgement: Judgement | None, references: dict[Any, list[str]]) -> Sample:
    rating = judgement["rating"] if judgement else None
    return {
        "id": f"{turn.row['id']}, turn {turn.number}",
        "correct": None,
        "extracted": None if rating is None else f"{rating:g}",
        "reason": judgement["replies"][-1] if judgement else "",
        "authors": None,
        "prompt": turn.prompt,
        "output": turn.answer,
        "gold": references.get(turn.row["id"], ["", ""])[turn.number - 1],
    }
