"""The two protocols: what each benchmark is called in the harness, how it is scored, and which sentence says so."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pissa.errors import ConfigError, did_you_mean
from pissa.evaluation.questions import SOURCES
from pissa.scoring.answers import CODE

PAPER, STANDARD = "paper", "standard"
TRACKS = (PAPER, STANDARD)
MT_BENCH = "mt_bench"
NAME = re.compile(r"\w[\w.+-]*")
"""A task's name is a file's name too."""


def file_stem(task: str, track: str) -> str:
    """Of the files of a task: both tracks may lie in one folder."""
    return task if track == PAPER else f"{task}.{track}"


@dataclass(frozen=True)
class Protocol:
    """How one benchmark is asked and scored.

    Attributes:
        task: ours, or the harness's own name on the standard track.
        track: paper or standard.
        harness: the task's name in the harness; empty for what it cannot ask (two turns).
        says: the protocol in one sentence, for the result.
        headline: the score that a table shows first.
        runs_code: whether answers are programs.
        folder: of the harness's task, where it is known.
    """

    task: str
    track: str
    harness: str
    says: str
    headline: str
    runs_code: bool = False
    folder: str | None = None

    @property
    def ours(self) -> bool:
        """Whether the task file and the scorer are ours."""
        return self.harness.startswith("pissa_")

    @property
    def stem(self) -> str:
        """See `file_stem`."""
        return file_stem(self.task, self.track)


_ASKED = "Alpaca prompt, no examples, greedy, at most 1024 new tokens, no stop words"
_PAPER = {
    "gsm8k": f'{_ASKED}; "Let\'s think step by step." begins the answer; the number after "The answer is"',
    "math": f'{_ASKED}; "Let\'s think step by step." begins the answer; \\boxed{{}} or what follows "The answer is"',
    "humaneval": f"{_ASKED}; asked to complete the function; pass@1 of one greedy answer, base tests",
    "mbpp": f"{_ASKED}; the text and its tests are shown; pass@1 of one greedy answer, base tests, questions 11 to 510",
    MT_BENCH: f"{_ASKED} (or the tokenizer's chat template); two turns; scored from 1 to 10 by a judge",
}
_STANDARD = {
    "gsm8k": ("gsm8k", "exact_match,flexible-extract", "gsm8k"),
    "math": ("minerva_math500", "math_verify,none", "minerva_math"),
    "humaneval": ("pissa_standard_humaneval", "pass@1", None),
    "mbpp": ("pissa_standard_mbpp", "pass@1", None),
}
"""Our name to the harness's, its score that we show first, and its folder."""


def protocol(task: str, track: str) -> Protocol:
    """How a task is asked on a track.

    On the standard track any task of the harness may be named, beside ours.

    Raises:
        ConfigError: no such track, or no such task on it.
    """
    if not NAME.fullmatch(task):
        raise ConfigError(f"task is {task!r}, expected a name: letters, digits, and any of _ . + -")
    if track not in TRACKS:
        raise ConfigError(f"track is {track!r}, expected one of {', '.join(TRACKS)}")
    if track == PAPER:
        if task not in SOURCES:
            near = did_you_mean(task, SOURCES)
            raise ConfigError(
                f"task is {task!r}, expected one of {', '.join(SOURCES)} on the paper track.{near} The harness's own "
                "tasks are on --track standard"
            )
        harness = "" if task == MT_BENCH else f"pissa_{task}"
        headline = "ours" if task != MT_BENCH else "judge"
        return Protocol(task, track, harness, _PAPER[task], headline, task in CODE)
    if task == MT_BENCH:
        raise ConfigError(
            "task is mt_bench, which the harness does not have: leave it out, or use --track paper"
        )
    harness, headline, folder = _STANDARD.get(task, (task, "", None))
    run = "; programs run behind our walls" if task in CODE else ""
    says = f"lm-evaluation-harness, task {harness.removeprefix('pissa_standard_')}, as it is{run}"
    return Protocol(task, track, harness, says, headline, task in CODE, folder)
