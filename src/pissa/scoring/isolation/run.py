"""One program behind walls, and how it ended."""

from __future__ import annotations

import marshal
import math
import os
import resource
import secrets
import selectors
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pissa.errors import InputError
from pissa.scoring.isolation.inside import BEGUN, LONGEST
from pissa.scoring.isolation.syscalls import syscall_filter
from pissa.scoring.isolation.walls import NOBODY, command

STARTUP = 30.0
"""Seconds for the walls to come up; a program's own time begins afterwards."""
LONGEST_ANSWER = 2**12
OPEN_FILES = 64
POLL = 0.05
"""Seconds between two looks at the memory of a program and of all that it started."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: of wall time.
        memory_bytes: of address space, each process; and resident, of all processes together.
        processes: at a time, threads included.
        file_bytes: of all that it writes into its folder.
        output_bytes: kept of what it prints; more ends it.
    """

    seconds: float = 20.0
    memory_bytes: int = 2**30
    processes: int = 32
    file_bytes: int = 2**24
    output_bytes: int = 2**16


@dataclass(frozen=True)
class Isolation:
    """The walls that are there on this machine.

    Attributes:
        walls: `bubblewrap`, `namespaces`, or `none`: then the program sees files and network as its user does, its
            number of processes is not limited, what it starts in a session of its own stays, and what has lost its
            parent is not counted in memory.
        limits: of each program.
    """

    walls: str
    limits: Limits = Limits()


@dataclass(frozen=True)
class Outcome:
    r"""How a program ended.

    Attributes:
        passed: it ran to its end, tests included.
        reason: why it did not, in a few words: `timeout`, `AssertionError: ...`, `memory`; empty where it passed.
        output: the start of what it printed, at most `Limits.output_bytes`. Here and in `reason` control characters and
            marks of direction are written out (`\x1b`), except line breaks and tabs of the output.
        seconds: of wall time.
    """

    passed: bool
    reason: str
    output: str
    seconds: float


class _Program(subprocess.Popen[bytes]):
    """A process whose output is read here."""

    stdout: IO[bytes]


def run(program: str, isolation: Isolation, tests: str = "") -> Outcome:
    """Run a Python program, then its tests in the same names, in a process of their own.

    They pass if both come to their end without an error and the process then ends well, in time. The program is a
    module named `program`: what stands under `if __name__ == "__main__":` does not run. It has the standard library, an
    empty folder, no standard input, no environment, always the same hash seed. Before the tests, tracing is switched
    off and the built-in names are as they were.

    Leaving early does not pass: the end is told by a random word over a channel that a program does not know of. A
    program that goes looking for both, in frames or memory of its own process, finds them and passes; so does one that
    returns objects equal to everything, or bends the standard library under its tests. That gains it a point that it
    does not deserve, not a way out: the walls do not rest on it.

    Args:
        program: Python source.
        isolation: walls and limits.
        tests: Python source; may be empty where the program has them.

    Raises:
        InputError: the walls did not come up, which says nothing of the program.
    """
    limits = isolation.limits
    argv = command(isolation.walls, limits.file_bytes)
    token = secrets.token_hex(16)
    request = marshal.dumps((token, _resource_limits(isolation), syscall_filter(), program, tests))
    # No limit on the number of processes binds root, not even within a user namespace; `namespaces` drops root itself.
    user = NOBODY if isolation.walls == "bubblewrap" and os.getuid() == 0 else None
    bare = isolation.walls == "none"
    place = (
        tempfile.TemporaryDirectory(prefix="pissa-", ignore_cleanup_errors=True)
        if bare
        else nullcontext("/")
    )
    channel, theirs = socket.socketpair()
    with place as folder, channel:
        try:
            process = _Program(
                argv, stdin=theirs.fileno(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder,
                env={"PYTHONHASHSEED": "0"}, start_new_session=True, user=user,
                group=user, extra_groups=() if user else None,
            )  # fmt: skip
        except OSError as error:
            raise InputError(f"{isolation.walls}: {error}") from error
        finally:
            theirs.close()
        try:
            channel.settimeout(STARTUP)
            with suppress(OSError):  # it is dead already, which is seen below
                channel.sendall(request)
                channel.shutdown(socket.SHUT_WR)
            return _listen(process, channel, token, isolation)
        finally:
            _stop(process, bare)
            process.stdout.close()


def _resource_limits(isolation: Isolation) -> dict[str, int]:
    limits = isolation.limits
    values = {
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_CPU": math.ceil(limits.seconds) + 1,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_CORE": 0,
    }
    # Counted per user: behind walls that user is the program's alone, and the namespace's first process is one more.
    return values if isolation.walls == "none" else {**values, "RLIMIT_NPROC": limits.processes + 1}


def _listen(process: _Program, channel: socket.socket, token: str, isolation: Isolation) -> Outcome:
    limits = isolation.limits
    heard = {process.stdout.fileno(): b"", channel.fileno(): b""}
    most = {process.stdout.fileno(): limits.output_bytes, channel.fileno(): LONGEST_ANSWER}
    start, seconds, reason = time.monotonic(), STARTUP, ""
    looked = start
    with selectors.DefaultSelector() as selector:
        for source in heard:
            os.set_blocking(source, False)
            selector.register(source, selectors.EVENT_READ)
        begun = over = False
        while not (over and not selector.get_map()) and not reason:
            left = start + seconds - time.monotonic()
            if left <= 0:
                reason = "timeout"
            elif not selector.get_map():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(min(left, POLL))
            events = selector.select(min(max(left, 0), 0.02)) if selector.get_map() else []
            for key, _ in events:
                part = b""
                with suppress(ConnectionResetError):
                    part = os.read(key.fd, 2**16)
                heard[key.fd] += part
                if not part:
                    selector.unregister(key.fd)
                elif len(heard[key.fd]) > most[key.fd]:
                    reason = "output"
            if not begun and heard[channel.fileno()].startswith(BEGUN):
                begun, start, seconds = True, time.monotonic(), limits.seconds
            if begun and not reason and time.monotonic() >= looked + POLL:
                looked = time.monotonic()
                if _resident(process.pid) > limits.memory_bytes:
                    reason = "memory"
            if over and not events:  # what a process left behind holds the pipes open: no walls
                break
            over = process.poll() is not None
    took = time.monotonic() - start
    printed, answer = (
        part[: most[source]].decode("utf-8", "replace") for source, part in heard.items()
    )
    if not begun:
        raise InputError(
            f"{isolation.walls}: {_visible(printed).strip() or reason or 'ended'}"[-500:]
        )
    passed, reason = _ending(reason, answer[len(BEGUN) :], token, process.returncode)
    return Outcome(
        passed, _visible(reason, "")[:LONGEST], _visible(printed)[: limits.output_bytes], took
    )


def _visible(text: str, kept: str = "\n\t") -> str:
    """With what a terminal would obey, or show in another order, written out as in a Python string."""
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text
    )


def _resident(process: int) -> int:
    """Bytes in memory of a process and all below it; pages that two of them share count twice. 0 without /proc."""
    folder, pages = Path(f"/proc/{process}"), 0
    with suppress(OSError):  # ended meanwhile
        pages = int((folder / "statm").read_text().split()[1])
        children = [
            child for task in folder.glob("task/*/children") for child in task.read_text().split()
        ]
        return pages * resource.getpagesize() + sum(_resident(int(child)) for child in children)
    return pages * resource.getpagesize()


def _ending(reason: str, answer: str, token: str, code: int) -> tuple[bool, str]:
    if reason:
        return False, reason
    if answer == token and code == 0:
        return True, ""
    if answer and answer != token:
        return False, answer
    number = -code if code < 0 else code - 128
    if number in {*signal.Signals}:
        return False, f"killed by {signal.Signals(number).name}"
    return False, f"ended before its tests (exit code {code})"


def _stop(process: subprocess.Popen[bytes], bare: bool) -> None:
    if not bare and process.poll() is None:
        # With the first process of a namespace the kernel ends all others, and only then lets its parent know.
        with suppress(OSError):
            for child in (
                Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            ):
                os.kill(int(child), signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
    if bare or process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
