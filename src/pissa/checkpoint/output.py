"""Outputs that appear whole or not at all: a staging folder beside the target, renamed at the end."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pissa.errors import CheckpointError, OutputError
from pissa.untyped import Json

JOB = "job.txt"
"""In a staging folder that can be gone on with: the job's key."""


@contextmanager
def staged_output(
    target: str | Path,
    *,
    force: bool = False,
    needs_bytes: int = 0,
    inputs: Iterable[Path] = (),
    job: str | None = None,
) -> Iterator[Path]:
    """Yield a hidden folder beside `target` that becomes `target` if the block ends well, and is
    removed if not.

    All checks come before anything is written. A symbolic link as `target` is followed.

    Args:
        target: The folder to make; it may exist if it is empty.
        force: Replace what is there. Never replaces an input, a git repository, the working or the
            home folder.
        needs_bytes: Free disk space to insist on; 0 for no check.
        inputs: Folders or files that are being read, so must not be touched.
        job: A key for work that can go on where a kill or an interrupt left it: the folder of a
            dead run with the same key is yielded again, with all that is in it. None for work that
            starts afresh.

    Raises:
        OutputError: The target must not be written, or the disk is full.

    Example:
        with staged_output("out", force=True) as folder:
            write_json(folder / "pissa.json", {"rank": 16})
    """
    path = Path(target).expanduser().resolve()
    _refuse_inputs(path, inputs)
    left = _sweep_leftovers(path, job)
    _refuse_target(path, force)
    if left is None:
        _refuse_full_disk(path, needs_bytes)

    staging = _sibling(path, "partial")
    try:
        if left is None:
            staging.mkdir(parents=True)
        else:
            os.replace(left, staging)
        if job:
            (staging / JOB).write_text(job)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error}): choose another folder") from error
    try:
        yield staging
        (staging / JOB).unlink(missing_ok=True)
        _publish(staging, path, force)
    except BaseException as error:
        if not (job and isinstance(error, KeyboardInterrupt)):
            _remove(staging)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"disk full while writing {path} ({error}); nothing is left behind: "
                "free some space or choose another disk"
            ) from error
        raise


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON in one step, see `write_text`."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a file in one step: a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_json(path: str | Path) -> Json:
    """Read a JSON object.

    Raises:
        CheckpointError: The file cannot be read, is not JSON, or is JSON but not an object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): check that it is there and readable"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}): download or write it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(content).__name__}, expected an object: fetch it again"
        )
    return content


def check_target(target: str | Path, *, force: bool = False) -> None:
    """What `staged_output` asks of its target, for work that takes long before it comes to write.

    Raises:
        OutputError: it must not be written.
    """
    _refuse_target(Path(target).expanduser().resolve(), force)


def _refuse_inputs(path: Path, inputs: Iterable[Path]) -> None:
    for source in inputs:
        resolved = Path(source).resolve()
        if path == resolved or path in resolved.parents or resolved in path.parents:
            relation = (
                "is" if path == resolved else "holds" if path in resolved.parents else "lies inside"
            )
            raise OutputError(
                f"the output {path} {relation} the input {resolved}: choose a folder apart from it"
            )


def _refuse_target(path: Path, force: bool) -> None:
    if not path.exists():
        return
    for name, precious in (("working", Path.cwd().resolve()), ("home", Path.home().resolve())):
        if path == precious or path in precious.parents:
            raise OutputError(
                f"{path} is or holds the {name} folder and is never replaced: choose another folder"
            )
    if path.is_dir() and not any(path.iterdir()):
        return
    if not force:
        kind = "is a folder with files in it" if path.is_dir() else "is a file"
        raise OutputError(f"{path} {kind}: use --force to replace it, or choose another folder")
    if (path / ".git").exists():
        raise OutputError(
            f"{path} is a git repository and is never replaced: choose another folder"
        )


def _refuse_full_disk(path: Path, needs_bytes: int) -> None:
    nearest = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(nearest).free
    if free < needs_bytes:
        raise OutputError(
            f"{path} needs {needs_bytes / 1e9:.2f} GB ({needs_bytes} bytes) and {nearest} has {free / 1e9:.2f} GB free "
            f"({free} bytes): free some space or choose another disk"
        )


def _sibling(path: Path, state: str) -> Path:
    # The owner is in the name, so that a later run can tell a dead run's leftovers from a live
    # run's work. The host is too: on a shared disk a process id means nothing elsewhere.
    return path.with_name(
        f".{path.name}.{state}-{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"
    )


def _sweep_leftovers(path: Path, job: str | None) -> Path | None:
    """Clear what a killed run to the same target left; give back the old output if it was killed
    while replacing it.

    Returns:
        What is left of the same job, to go on with.
    """
    if not path.parent.is_dir():
        return None
    left: Path | None = None
    pattern = re.compile(
        rf"\.{re.escape(path.name)}\.(partial|replaced)-{re.escape(platform.node())}-(\d+)-\w+"
    )
    for leftover in list(path.parent.iterdir()):
        found = pattern.fullmatch(leftover.name)
        if found is None or _is_alive(int(found[2])):
            continue
        if found[1] == "replaced" and not path.exists():
            os.replace(leftover, path)
        elif (
            job
            and left is None
            and (leftover / JOB).is_file()
            and (leftover / JOB).read_text() == job
        ):
            left = leftover
        else:
            _remove(leftover)
    return left


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # alive, and someone else's
        pass
    return True


def _publish(staging: Path, path: Path, force: bool) -> None:
    """Rename `staging` onto `path`; at every moment the old or the new output exists in whole."""
    if not (force and path.exists()):
        try:
            os.replace(staging, path)
        except OSError as error:
            raise OutputError(
                f"{path} appeared while it was being made ({error}): choose another folder"
            ) from error
        return
    replaced = _sibling(path, "replaced")
    os.replace(path, replaced)
    try:
        os.replace(staging, path)
    except BaseException:
        os.replace(replaced, path)
        raise
    # From here on it is rubbish, and named so: never to be given back half removed
    os.replace(replaced, staging)
    _remove(staging)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
