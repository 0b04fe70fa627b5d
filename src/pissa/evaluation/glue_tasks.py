"""The nine tasks of GLUE (arXiv 1804.07461): names, columns, classes, measures, evaluation sets."""

from __future__ import annotations

from dataclasses import dataclass

from pissa.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: of the subset on the Hub.
        title: as papers write it, and the folder of the official files.
        measures: in GLUE's order, named as in a run's scores; the first one chooses the learning
            rate.
        official: columns of the texts and of the label in the official files.
        hub: the same on the Hub.
        classes: names in the Hub's order; empty for a score from 0 to 5.
        parts: the evaluation sets.
        header: columns of official files that do not name them.
    """

    name: str
    title: str
    measures: tuple[str, ...]
    official: tuple[str, ...]
    hub: tuple[str, ...]
    classes: tuple[str, ...] = ("0", "1")
    parts: tuple[str, ...] = ("dev",)
    header: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """`classification` or `regression`, as `TrainSettings.task`."""
        return "classification" if self.classes else "regression"


MISMATCHED = "accuracy_mismatched"
SHORT = {
    "matthews": "Matthews", "accuracy": "accuracy", "f1": "F1", "pearson": "Pearson", "spearman": "Spearman",
    MISMATCHED: "accuracy mism.",
}  # fmt: skip
"""Measures as the head of a table has them."""
PAIR = ("sentence1", "sentence2", "label")
ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    task.name: task
    for task in (
        Task("cola", "CoLA", ("matthews",), ("sentence", "label"), ("sentence", "label"),
             header=("source", "label", "mark", "sentence")),
        Task("sst2", "SST-2", ("accuracy",), ("sentence", "label"), ("sentence", "label")),
        Task("mrpc", "MRPC", ("accuracy", "f1"), ("#1 String", "#2 String", "Quality"), PAIR),
        Task("stsb", "STS-B", ("pearson", "spearman"), ("sentence1", "sentence2", "score"), PAIR, classes=()),
        Task("qqp", "QQP", ("accuracy", "f1"), ("question1", "question2", "is_duplicate"),
             ("question1", "question2", "label")),
        Task("mnli", "MNLI", ("accuracy", MISMATCHED), ("sentence1", "sentence2", "gold_label"),
             ("premise", "hypothesis", "label"), ("entailment", "neutral", "contradiction"),
             ("dev_matched", "dev_mismatched")),
        Task("qnli", "QNLI", ("accuracy",), ("question", "sentence", "label"), ("question", "sentence", "label"),
             ENTAILMENT),
        Task("rte", "RTE", ("accuracy",), PAIR, PAIR, ENTAILMENT),
        Task("wnli", "WNLI", ("accuracy",), PAIR, PAIR),
    )
}  # fmt: skip


def named(text: str) -> list[Task]:
    """`cola,SST-2` as tasks.

    Raises:
        InputError: none, one twice, or one that GLUE does not have.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if plain(word) not in TASKS:
            raise InputError(
                f"task is {word!r}, expected some of {', '.join(TASKS)}.{did_you_mean(plain(word), TASKS)}"
            )
    if not words or len({plain(word) for word in words}) < len(words):
        raise InputError(
            f"tasks is {text!r}, expected one or more of {', '.join(TASKS)}, each once"
        )
    return [TASKS[plain(word)] for word in words]


def plain(word: str) -> str:
    """`SST-2` as sst2."""
    return word.lower().replace("-", "").replace("_", "")
