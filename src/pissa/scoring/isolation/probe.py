"""Which walls this machine has, tried with a program that looks about."""

from __future__ import annotations

import functools
import warnings

from pissa.errors import InputError
from pissa.scoring.isolation.run import Isolation, Limits, run
from pissa.scoring.isolation.walls import WALLS

PROBE = """
import array, ctypes, errno, fcntl, os, socket, struct
assert os.getuid() == os.geteuid() == 65534, "it is not nobody"
names = array.array("B", bytes(4096))  # of all interfaces that have an address: SIOCGIFCONF of netdevice(7)
request = struct.pack("iP", len(names), names.buffer_info()[0])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as anything:
    size, _ = struct.unpack("iP", fcntl.ioctl(anything, 0x8912, request))
assert size <= 40 and bytes(names[:3]) in (b"lo\\0", bytes(3)), "there is a network"
assert ctypes.CDLL(None).prctl(21, 0, 0, 0, 0) == 2, "no system call is refused"
try:
    socket.socket(40, 1)
except PermissionError:
    pass
else:
    raise AssertionError("a socket to the machine's host can be made")
assert os.getcwd() == "/tmp" and os.listdir("/tmp") == [], "its folder is not empty"
assert not os.path.exists("/proc") and not os.path.exists("/sys"), "the machine can be seen"
assert not os.path.exists("/etc/passwd"), "the machine's settings can be read"
"""
"""What must be true behind walls; a binary that is there may still not be allowed to build them."""


def find_isolation(limits: Limits | None = None, *, allow_none: bool = False) -> Isolation:
    """The best walls of this machine, tried with a program.

    Args:
        limits: of each program.
        allow_none: accept a separate process with limits only, where there are no namespaces; warns.

    Raises:
        InputError: none can be had, with what to do.
    """
    tried = []
    for walls in WALLS:
        if walls == "none":
            continue
        problem = _problem(walls)
        if not problem:
            return Isolation(walls, limits or Limits())
        tried.append(f"{walls} ({problem})")
    if allow_none:
        warnings.warn(f"programs run without isolation: tried {', '.join(tried)}", stacklevel=2)
        return Isolation("none", limits or Limits())
    raise InputError(
        f"no isolation for programs that a model wrote: tried {', '.join(tried)}. Install bubblewrap, permit user "
        "namespaces (Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0; Docker: a seccomp profile with "
        "unshare and mount), or run with --no-isolation if you accept that they can do what you can do"
    )


@functools.cache
def _problem(walls: str) -> str:
    try:
        return run(PROBE, Isolation(walls)).reason
    except InputError as error:
        return str(error)
