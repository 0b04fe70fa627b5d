"""Answers as they come: a file that grows by whole batches, so that an evaluation that was stopped
goes on.

The first line says what was asked of which model; the same file is never gone on with for another
one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pissa.errors import CheckpointError, OutputError
from pissa.untyped import Json

FORMAT = 1


def request_key(kind: str, *args: Any) -> str:
    """What a request is, for looking it up."""
    return hashlib.sha256(
        json.dumps([kind, *args], sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()


class AnswerLog:
    """The answers of one model to one task."""

    def __init__(self, path: Path, job: Json, *, force: bool = False) -> None:
        """Open it, or begin it.

        Args:
            path: of the file.
            job: what must be the same for the answers to be the same: model, protocol, batches.
            force: drop the answers to another job that are there.

        Raises:
            OutputError: the file holds the answers to another job.
            CheckpointError: it is no such file.
        """
        self.path = path
        self.answers: Json = {}
        self.reused = 0
        lines = _whole_lines(path)
        header = {"format": FORMAT, **job}
        if lines and not force and lines[0] != header:
            changed = [
                key for key in sorted({*header, *lines[0]}) if header.get(key) != lines[0].get(key)
            ]
            said = "; ".join(
                f"{key} was {lines[0].get(key)!r} and is {header.get(key)!r}" for key in changed
            )
            raise OutputError(
                f"{path} holds the answers to another evaluation ({said}): name another output, or --force"
            )
        if lines and lines[0] == header:
            self.answers = {line["key"]: line["answer"] for line in lines[1:]}
            self.reused = len(self.answers)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")

    def add(self, batch: Sequence[tuple[str, Any]]) -> None:
        """Keep the answers of a batch: all of them are on the disk when this returns."""
        text = "".join(json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in batch)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.answers.update(batch)


def _whole_lines(path: Path) -> list[Json]:
    """What is there, without a last line that a kill cut off; that one is cut away from the file too."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): delete it, and its answers are generated anew"
        ) from error
    if lines and (not isinstance(lines[0], dict) or "format" not in lines[0]):
        raise CheckpointError(
            f"{path} does not begin as a file of answers: delete it, or name another output"
        )
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return lines
