"""Builds namespaces around one command, without any tool's help.

    python namespaces.py BYTES PATH ... -- COMMAND ...

The text of this file is started by itself (`python -c`), before any wall is there, so it knows the standard library
alone. The command sees the paths, read-only, and an empty /tmp of so many bytes; no process, network, device or folder
else; it is nobody, without capabilities, and cannot gain any. Linux 5.12 or newer. What each call does is told in
unshare(2), user_namespaces(7), pid_namespaces(7), pivot_root(2) and mount_setattr(2).
"""

import ctypes
import os
import platform
import signal
import struct
import sys
from contextlib import suppress

NOBODY = 65534
NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NET = (
    1 << 17,
    1 << 26,
    1 << 27,
    1 << 28,
    1 << 29,
    1 << 30,
)
READ_ONLY, NO_SUID, NO_DEV, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
DETACH = 2
SET_DEATH_SIGNAL, SET_DUMPABLE, SET_NO_NEW_PRIVILEGES = 1, 4, 38
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR = 442
CAPABILITIES_3 = 0x20080522
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """A function of libc; its error as OSError that names it."""
    if getattr(LIBC, name)(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Attach a file system or a folder."""
    call(
        "mount",
        source.encode(),
        target.encode(),
        kind and kind.encode(),
        flags,
        data and data.encode(),
    )


def enter_namespaces() -> None:
    """New namespaces of this process, and for its next child one of processes.

    Whoever we are outside is nobody inside; root outside is, until it drops that, root inside too, because only root
    can reach an interpreter that lies in root's home. The ids are written by a child that stays outside: root may not
    write two of them from within.
    """
    root = os.getuid() == 0
    wait, go = os.pipe()
    writer = os.fork()
    if writer == 0:
        os.close(go)
        if os.read(wait, 1):
            process = f"/proc/{os.getppid()}"
            if not root:
                write(f"{process}/setgroups", "deny")
            write(
                f"{process}/uid_map",
                f"0 0 1\n{NOBODY} {NOBODY} 1" if root else f"{NOBODY} {os.getuid()} 1",
            )
            write(
                f"{process}/gid_map",
                f"0 0 1\n{NOBODY} {NOBODY} 1" if root else f"{NOBODY} {os.getgid()} 1",
            )
        os._exit(0)
    os.close(wait)
    call("unshare", NEW_USER | NEW_MOUNTS | NEW_PIDS | NEW_NET | NEW_IPC | NEW_UTS)
    os.write(go, b"+")
    os.close(go)
    if os.waitpid(writer, 0)[1]:
        raise PermissionError("the ids of the user namespace cannot be written")
    # Where /proc/sys cannot be written, the program may make namespaces within its own
    with suppress(OSError):
        write("/proc/sys/user/max_user_namespaces", "0")


def write(path: str, text: str) -> None:
    """At once: the kernel takes a map whole."""
    file = os.open(path, os.O_WRONLY)
    os.write(file, text.encode())
    os.close(file)


def build_root(size: int, paths: list[str]) -> None:
    """A root of our own: the paths, devices and /tmp; the old root is gone afterwards."""
    mount("none", "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", NO_SUID | NO_DEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    call("syscall", PIVOT_ROOT[platform.machine()], b"/tmp", b"/tmp/old")
    os.chdir("/")
    for path in (*paths, *DEVICES):
        bind(path)
    os.mkdir("/tmp")
    mount("tmpfs", "/tmp", "tmpfs", NO_SUID | NO_DEV, f"size={size},nr_inodes=4096,mode=1777")
    call("umount2", b"/old", DETACH)
    os.rmdir("/old")
    mount("none", "/", None, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEV)
    os.chdir("/tmp")


def bind(path: str) -> None:
    """What the old root has at `path`, read-only."""
    old = "/old" + path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(old):
        return os.symlink(os.readlink(old), path)
    if os.path.isdir(old):
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT))
    mount(old, path, None, BIND | RECURSIVE)
    attributes = READ_ONLY | NO_SUID | (0 if path in DEVICES else NO_DEV)
    said = struct.pack("4Q", attributes, 0, 0, 0)
    # 0x8000: with all mounts below
    call("syscall", MOUNT_SETATTR, -1, path.encode(), 0x8000, said, len(said))


def first_process(command: list[str]) -> int:
    """Of the namespace of processes: starts the command and outlives it; at its end the kernel ends all others.

    Returns:
        The command's exit code, or 128 + the signal that ended it.
    """
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call("prctl", SET_DEATH_SIGNAL, signal.SIGKILL)
    call("prctl", SET_DUMPABLE, 0)
    call("prctl", SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    call("capset", struct.pack("Ii", CAPABILITIES_3, 0), bytes(24))
    program = os.fork()
    if program == 0:
        os.execv(command[0], command)
    ended, status = os.wait()
    while ended != program:  # orphans come to us
        ended, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def main(arguments: list[str]) -> None:
    """See the top."""
    mark = arguments.index("--")
    call("prctl", SET_DEATH_SIGNAL, signal.SIGKILL)
    try:
        enter_namespaces()
        build_root(int(arguments[0]), arguments[1:mark])
    except (OSError, KeyError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    first = os.fork()
    if first == 0:
        os._exit(first_process(arguments[mark + 1 :]))
    os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
