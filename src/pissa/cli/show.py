"""Tables, progress bars and closing lines of the commands."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pissa.untyped import Json


def print_json(data: Any) -> None:
    """Data on stdout."""
    print(json.dumps(data, indent=2))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None
) -> None:
    """A table on stdout; numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and isinstance(rows[0][index], (int, float))
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*[_cell(value) for value in row])
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def say(text: str) -> None:
    """Talk on stderr."""
    print(text, file=sys.stderr)


def say_next(*commands: str) -> None:
    """The commands to type next."""
    say("next:")
    for command in commands:
        say(f"  {command}")


@contextmanager
def bytes_progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar with time left on stderr, for work that reports (name, bytes done, bytes in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)

        yield update


@contextmanager
def points_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with time left on stderr, for work that reports (done, in all)."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update


@contextmanager
def steps_progress() -> Iterator[Callable[[str, str, int, int], None]]:
    """A progress bar with time left on stderr for each of many works, told (where, what, done, in all)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: Json = {}

        def update(where: str, what: str, done: int, total: int) -> None:
            name = f"{where}: {what}"
            if name not in tasks:
                for old in tasks.values():
                    bar.update(old, visible=False)
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done, total=total)

        yield update


def counted(noun: str) -> Callable[[object, int, int], None]:
    """A line on stderr for each of many long works: how many are done, and about how long the rest takes."""
    begun, first = time.monotonic(), -1

    def say_done(name: object, done: int, total: int) -> None:
        nonlocal first
        first = done - 1 if first < 0 else first  # what was there before this call took no time
        left = (time.monotonic() - begun) / (done - first) * (total - done)
        rest = f", about {left / 60:.0f} min left" if done < total else ""
        say(f"[{done}/{total} {noun}] {name}{rest}")

    return say_done


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return "none" if not value else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
