"""What a program is shut in by: the command that builds each wall around an interpreter."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import sys
from collections.abc import Callable
from glob import glob
from importlib.resources import files

from pissa.errors import InputError

NOBODY = 65534
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


def interpreter() -> str:
    """The Python below any virtual environment: the standard library, and no package that a user installed."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def visible() -> list[str]:
    """What an interpreter needs to start, seen read-only: system libraries, and the folder that Python was put into."""
    prefix = os.path.realpath(sys.base_prefix)
    system = ["/usr", *sorted(glob("/lib*")), "/etc/ld.so.cache", "/nix/store"]
    paths = [path for path in system if os.path.lexists(path)]
    return (
        paths
        if any(prefix == path or prefix.startswith(path + "/") for path in paths)
        else [*paths, prefix]
    )


def _inside() -> list[str]:
    # -I but for the environment, which is empty save for the seed: the same program has the same outcome
    return [interpreter(), "-s", "-P", "-S", "-B", "-c", _text("inside.py")]


@functools.cache
def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def bubblewrap(size: int) -> list[str]:
    """Of https://github.com/containers/bubblewrap, 0.8 or newer.

    Args:
        size: bytes of the folder that the program may write to.
    """
    binary = shutil.which("bwrap")
    if binary is None:
        raise InputError("bwrap is not installed")
    # fmt: off
    command = [binary, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--cap-drop", "ALL",
               "--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "none"]
    # fmt: on
    for path in visible():
        command += (
            ["--symlink", os.readlink(path), path]
            if os.path.islink(path)
            else ["--ro-bind", path, path]
        )
    for device in DEVICES:
        command += ["--dev-bind", device, device]
    return [
        *command,
        "--size",
        str(size),
        "--tmpfs",
        "/tmp",
        "--remount-ro",
        "/",
        "--chdir",
        "/tmp",
        "--",
        *_inside(),
    ]


def namespaces(size: int) -> list[str]:
    """Our own, of the same make, where bubblewrap is absent, or root keeps its interpreter where nobody else can go.

    Args:
        size: bytes of the folder that the program may write to.
    """
    python = [interpreter(), "-I", "-S", "-B", "-c", _text("namespaces.py")]
    return [*python, str(size), *visible(), "--", *_inside()]


def none(size: int) -> list[str]:
    """A process like any other."""
    return _inside()


WALLS: dict[str, Callable[[int], list[str]]] = {
    "bubblewrap": bubblewrap,
    "namespaces": namespaces,
    "none": none,
}
"""In order of preference."""


def command(walls: str, size: int) -> list[str]:
    """What starts `inside.py` behind these walls.

    Raises:
        InputError: they cannot be built here.
    """
    if walls not in WALLS:
        raise InputError(f"walls are {walls!r}, expected one of {', '.join(WALLS)}")
    if walls != "none" and platform.system() != "Linux":
        raise InputError(f"needs Linux, this is {platform.system()}")
    return WALLS[walls](size)
