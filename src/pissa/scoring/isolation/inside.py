"""Runs one program and its tests, and says on a private channel that both came to their end.

The text of this file is started by itself (`python -c`), behind the walls, so it knows the standard library alone.
Standard input is the channel: the request comes in, the word that the program began goes out, then how it ended.
"""

import builtins
import ctypes
import marshal
import os
import resource
import sys
import types

BEGUN = b"+"
SET_NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2
LONGEST = 300
"""Characters of a reason."""


def main() -> None:
    """See the top."""
    channel = os.dup(0)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)  # takes the lowest number: 0
    request = b""
    while part := os.read(channel, 2**16):
        request += part
    token, limits, syscalls, program, tests = marshal.loads(request)
    os.environ.clear()
    refuse(syscalls)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    module = types.ModuleType("program")  # not __main__: a script's main() is not what is asked for
    sys.modules["program"] = module
    # What the program may have changed by the time it is over, and the tests stand on.
    settrace, setprofile, write, names = sys.settrace, sys.setprofile, os.write, vars(builtins)
    kept = dict(names)
    write(channel, BEGUN)
    try:
        exec(compile(program, "program", "exec", dont_inherit=True), module.__dict__)
        settrace(None)
        setprofile(None)
        names.update(kept)
        exec(compile(tests, "tests", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        write(channel, reason(error).encode("utf-8", "replace"))
        os._exit(1)
    write(channel, token.encode())


def refuse(syscalls: bytes) -> None:
    """Install a filter of system calls, if any, for this process and all that it starts; see seccomp(2).

    Where the kernel has none the program runs all the same: what walls must hold is tried beforehand.
    """
    if not syscalls:
        return
    instructions = ctypes.create_string_buffer(syscalls, len(syscalls))
    # Struct sock_fprog
    filter_program = (ctypes.c_size_t * 2)(len(syscalls) // 8, ctypes.addressof(instructions))
    prctl = ctypes.CDLL(None).prctl
    prctl(SET_NO_NEW_PRIVILEGES, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    prctl(SET_SECCOMP, ctypes.c_ulong(FILTER), filter_program)


def reason(error: BaseException) -> str:
    """`NameError: name 'x' is not defined`; `memory` where there was not enough of it."""
    if isinstance(error, MemoryError):
        return "memory"
    try:
        lines = str(error).splitlines()
    except BaseException:  # the program's own class
        lines = []
    said = type(error).__name__ + (f": {lines[0]}" if lines else "")
    return said[:LONGEST]


if __name__ == "__main__":
    main()
