"""Hostile programs: each is stopped, scored as a failure, and leaves nothing behind."""

from __future__ import annotations

import ast
import os
import platform
import re
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pissa.errors import InputError
from pissa.scoring.isolation import probe
from pissa.scoring.isolation import run as running
from pissa.scoring.isolation import walls as building
from pissa.scoring.isolation.probe import find_isolation
from pissa.scoring.isolation.run import Isolation, Limits, run
from pissa.scoring.isolation.syscalls import AUDIT_ARCH, REFUSED, SOCKETS, syscall_filter

LIMITS = Limits(seconds=1, memory_bytes=2**28, file_bytes=2**21, output_bytes=2**14)
SYSTEM = "/usr/bin/python3"
SOLUTION = "def f(x):\n    return x + 1\n"
TESTS = "assert f(1) == 2\nassert len([f(0)]) == 1\n"


@pytest.fixture(params=["bubblewrap", "namespaces"])
def walls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every wall of this machine; for root bubblewrap may need an interpreter that is not in root's home."""
    problem = probe._problem(request.param)
    if problem and request.param == "bubblewrap" and os.path.exists(SYSTEM):
        monkeypatch.setattr(building, "interpreter", lambda: os.path.realpath(SYSTEM))
        monkeypatch.setattr(sys, "base_prefix", "/usr")
        problem = probe._problem.__wrapped__(request.param)
    if problem and request.param == "namespaces" and kernel_permits():
        pytest.fail(f"the kernel permits namespaces, but ours do not come up: {problem}")
    if problem:
        pytest.skip(f"no {request.param} here: {problem}")
    return request.param


def kernel_permits() -> bool:
    """As another program than ours finds it."""
    command = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "--pid",
        "--net",
        "--ipc",
        "--uts",
        "--fork",
        "true",
    ]
    return (
        shutil.which("unshare") is not None
        and subprocess.run(command, capture_output=True).returncode == 0
    )


@pytest.fixture
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, mount or file after the test that was not there before."""
    marker, command = secrets.token_hex(8), building._inside
    monkeypatch.setattr(building, "_inside", lambda: [*command(), marker])
    mounts, files = Path("/proc/self/mountinfo").read_text(), set(os.listdir(tempfile.gettempdir()))
    yield
    lines = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines[process.name] = (process / "cmdline").read_bytes()
        except OSError:  # gone meanwhile
            continue
    assert not [name for name, line in lines.items() if marker.encode() in line]
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert not [
        name for name in set(os.listdir(tempfile.gettempdir())) - files if name.startswith("pissa-")
    ]


JUMP = """
import sys
def jump(frame, event, argument):
    if event == "line" and frame.f_code.co_filename != "program":
        try:
            frame.f_lineno = max(line for _, _, line in frame.f_code.co_lines() if line)
        except ValueError:
            pass
    return jump
sys.settrace(jump)
sys.settrace = lambda function: None
def f(x): return 0
"""
BACKGROUND = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
"""
HOSTILE = {
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timeout"),
    "fork bomb that raises": (  # silent, or what it prints may reach the limit of output first
        "import os\nos.dup2(os.open(os.devnull, os.O_WRONLY), 2)\nfor _ in range(99): os.fork()",
        "BlockingIOError|timeout",
    ),
    "threads without end": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
        "RuntimeError: can't start new thread|memory",
    ),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(2**24))", "memory"),
    "memory at once": ("x = 'x' * 10**12", "memory"),
    "endless loop": ("while True: pass", "timeout"),
    "endless loop in one call of C": ("sum(iter(int, 1))", "timeout"),
    "sleep": ("import time\ntime.sleep(60)", "timeout"),
    "write beside its folder": ("open('{victim}', 'w').write('x')", "FileNotFoundError"),
    "write at the root": ("open('/x', 'w')", "PermissionError|OSError: .*Read-only"),
    "write into the standard library": ("import os\nopen(os.__file__, 'a')", "PermissionError|OSError: .*Read-only"),
    "device": ("import os\nos.mknod('disk', 0o60600, os.makedev(8, 0))", "PermissionError"),
    "connect": ("import socket\nsocket.create_connection(('1.1.1.1', 53), 9)", "OSError: .*unreachable"),
    "connect to the host": ("import socket\nsocket.create_connection(('127.0.0.1', {port}), 9)", "OSError|Connection"),
    "connect to the host by an abstract name": (
        "import socket\nsocket.socket(socket.AF_UNIX).connect(chr(0) + '{name}')",
        "ConnectionRefusedError",
    ),
    "resolve a name": ("import socket\nsocket.getaddrinfo('example.com', 80)", "gaierror"),
    "read a file of the user": ("open('{victim}').read()", "FileNotFoundError"),
    "read the users": ("open('/etc/passwd').read()", "FileNotFoundError"),
    "read the passwords": ("open('/etc/shadow').read()", "FileNotFoundError"),
    "read processes": ("import os\nos.listdir('/proc')", "FileNotFoundError"),
    "read a device": ("open('/dev/mem', 'rb').read(1)", "FileNotFoundError"),
    "kill the parent": ("import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(60)", "timeout"),
    "kill all": ("import os, time\nos.kill(-1, 9)\ntime.sleep(60)", "ProcessLookupError"),
    "kill the host": ("import os\nos.kill({pid}, 9)", "ProcessLookupError"),
    "kill itself": ("import os\nos.kill(os.getpid(), 9)", "killed by SIGKILL"),
    "huge output": ("while True: print('x' * 999)", "output"),
    "huge output past the print function": ("import os\nwhile True: os.write(2, b'x' * 999)", "output"),
    "symbolic link out": (
        "import os\nos.symlink('{victim}', 'link')\nopen('link', 'w').write('x')",
        "FileNotFoundError",
    ),
    "hard link out": ("import os\nos.link(os.__file__, 'link')", "OSError|PermissionError"),
    "background child": (BACKGROUND + "time.sleep(60)", "timeout"),
    "deaf to signals": (
        "import signal\nfor n in set(signal.Signals) - {9, 19}: signal.signal(n, lambda *a: None)\nwhile True: pass",
        "timeout",
    ),
    "no handlers": (
        "import signal\nfor n in set(signal.Signals) - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "timeout",
    ),
    "import from the host's working folder": ("import treasure", "ModuleNotFoundError"),
    "import of this package": ("import pissa", "ModuleNotFoundError"),
    "import of an installed package": ("import torch", "ModuleNotFoundError"),
    "leave before the tests": ("import os\nos._exit(0)", "ended before its tests .exit code 0."),
    "leave with an odd code": ("import os\nos._exit(250)", "ended before its tests .exit code 250."),
    "leave by an exception": ("import sys\nsys.exit(0)", "SystemExit: 0"),
    "leave from a function": (SOLUTION.replace("return x + 1", "raise SystemExit"), "SystemExit"),
    "guess the word": (
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'0' * 32)\n    except OSError: pass\nos._exit(0)",
        "0{32}",
    ),
    "flood the channel": (
        "import os\nwhile True:\n  for n in range(3, 64):\n    try: os.write(n, b'0' * 999)\n    except OSError: pass",
        "output",
    ),
    "jump over the tests": (JUMP, "AssertionError"),
    "other built-in names": ("import builtins\nbuiltins.len = lambda x: 7\ndef f(x): return 2", ""),
    "an error whose text is an error": (
        "class E(Exception):\n    def __str__(self): raise SystemExit(0)\nraise E",
        "^E$",
    ),
    "deep recursion": ("def f(x): return f(x)", "RecursionError"),
    "deeper recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
        "memory|killed by SIGSEGV|timeout",
    ),
    "crash": ("import ctypes\nctypes.string_at(0)", "killed by SIGSEGV"),
    "fill the disk": (
        "for n in range(99):\n    with open(str(n), 'wb') as file: file.write(bytes(2**20))",
        "OSError: .*No space left",
    ),
    "one large file": ("open('x', 'wb').truncate(2**30)", "OSError: .*File too large"),
    "open files without end": ("x = []\nwhile True: x.append(open('/dev/null'))", "OSError: .*Too many open files"),
    "higher limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
        "ValueError: not allowed",
    ),
    "sleep at exit": (SOLUTION + "import atexit, time\natexit.register(time.sleep, 60)", "timeout"),
    "sleep in a thread": (
        SOLUTION + "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
        "timeout",
    ),
    "crash at exit": (SOLUTION + "import atexit, ctypes\natexit.register(ctypes.string_at, 0)", "killed by SIGSEGV"),
    "become root": ("import os\nos.setuid(0)", "PermissionError|OSError: .*Invalid"),
    "new namespaces": (
        "import ctypes, os\nassert ctypes.CDLL(None).unshare(0x10000000) == 0, 'refused'",
        "AssertionError: refused",
    ),
    "mount": (
        "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0, 'refused'",
        "AssertionError: refused",
    ),
    "shared memory that nobody maps": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.shmget(0, ctypes.c_size_t(2**26), 0o1600) < 0: raise OSError(ctypes.get_errno(), 'shmget')",
        "PermissionError: .*shmget",
    ),
    "file in memory": ("import os\nos.memfd_create('x')", "PermissionError"),
    "socket to the machine's host": ("import socket\nsocket.socket(40, 1)", "PermissionError"),
    "socket to the kernel": ("import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "PermissionError"),
    "wait for input": ("input()", "EOFError"),
    "syntax error": ("def f(x) return", "SyntaxError"),
    "null byte": ("x = 1\0", "ValueError|SyntaxError"),
    "half a character": ("raise ValueError('\\ud800')", "ValueError: "),
}  # fmt: skip


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_stopped_and_fails(
    name: str, walls: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    (tmp_path / "treasure.py").write_text("")
    monkeypatch.chdir(tmp_path)
    program, reason = HOSTILE[name]
    abstract = secrets.token_hex(8)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0" + abstract)
        local.listen()
        words = {
            "victim": victim,
            "port": server.getsockname()[1],
            "name": abstract,
            "pid": os.getpid(),
        }
        for word, value in words.items():
            program = program.replace("{" + word + "}", str(value))
        limits = replace(LIMITS, seconds=0.25) if "timeout" in reason else LIMITS
        outcome = run(program, Isolation(walls, limits), TESTS if "f(x)" in program else "")
    if reason:
        assert not outcome.passed
        assert re.search(reason, outcome.reason), outcome
    else:
        assert outcome.passed, outcome
    assert len(outcome.output) <= LIMITS.output_bytes
    assert victim.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["treasure.py", "victim.txt"]


@pytest.mark.usefixtures("nothing_left")
def test_a_child_does_not_outlive_a_program_that_passes(walls: str) -> None:
    assert run(SOLUTION + BACKGROUND, Isolation(walls, LIMITS), TESTS).passed


def test_a_program_finds_an_empty_folder_no_environment_and_nothing_of_home(
    walls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "1")
    home = Path.home()
    program = f"""
import os
home = {str(home)!r}
print([os.getcwd(), os.listdir(), dict(os.environ), os.path.isdir(home) and os.listdir(home)])
"""
    outcome = run(program, Isolation(walls, LIMITS))
    folder, listing, environment, seen = ast.literal_eval(outcome.output)
    assert (folder, listing, environment) == ("/tmp", [], {})
    prefix = Path(os.path.realpath(sys.base_prefix))
    assert not seen or set(seen) <= {prefix.relative_to(home).parts[0]}


def test_a_program_has_no_open_file_but_the_standard_ones_and_the_channel(walls: str) -> None:
    program = (
        "import os\nfor n in range(64):\n    try: os.fstat(n); print(n)\n    except OSError: pass"
    )
    with open(os.devnull) as file:
        os.set_inheritable(file.fileno(), True)
        assert len(run(program, Isolation(walls, LIMITS)).output.split()) == 4


def test_what_one_program_writes_the_next_does_not_find(walls: str) -> None:
    program = "import os\nassert os.listdir() == []\nopen('x', 'w').write('x')\nassert os.listdir() == ['x']"
    assert [run(program, Isolation(walls, LIMITS)).passed for _ in range(2)] == [True, True]


def test_the_same_program_has_the_same_outcome(walls: str) -> None:
    outputs = {run("print(set('abcdefgh'))", Isolation(walls, LIMITS)).output for _ in range(3)}
    assert len(outputs) == 1


def test_a_program_may_be_longer_than_a_pipe_and_have_any_letters(walls: str) -> None:
    program = f"x = {'é' * 300_000!r}\nassert len(x) == 300_000\nprint('ü')"
    outcome = run(program, Isolation(walls, LIMITS))
    assert outcome.passed and outcome.output == "ü\n"


def test_classes_of_a_program_know_their_module_and_its_main_does_not_run(walls: str) -> None:
    program = """
from __future__ import annotations
import dataclasses, pickle
@dataclasses.dataclass
class Point:
    x: dataclasses.InitVar[int]
    y: int = 2
p = pickle.loads(pickle.dumps(Point(1)))
if __name__ == "__main__":
    input()
"""
    outcome = run(program, Isolation(walls, LIMITS), "assert p.y == 2")
    assert outcome.passed, outcome


def test_threads_and_processes_within_the_limit_pass(walls: str) -> None:
    program = """
import os, threading
def f(x):
    found = []
    threads = [threading.Thread(target=found.append, args=(x + 1,)) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return found[0]
"""
    assert run(program, Isolation(walls, LIMITS), TESTS).passed


CHILDREN = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        x = b"x" * (60 * 2**20)
        time.sleep(60)
        os._exit(0)
"""


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    "also", ["", "os.close(1)\nos.close(2)\nos.closerange(3, 64)\n"], ids=["", "silent"]
)
def test_processes_that_keep_to_the_limit_of_memory_one_by_one_are_held_to_it_together(
    walls: str, also: str
) -> None:
    program = CHILDREN.replace("import os, time\n", f"import os, time\n{also}") + "time.sleep(60)"
    limits = replace(LIMITS, seconds=30)
    assert run(program, Isolation(walls, limits)).reason == "memory"
    assert (
        run(program, Isolation(walls, replace(limits, seconds=2, memory_bytes=2**30))).reason
        == "timeout"
    )


def ends(program: bytes, arch: int, number: int, argument: int = 0) -> str:
    """What a filter says of one system call, by an interpreter of the few instructions that it has."""
    data = struct.pack("=IIQ6Q", number, arch, 0, argument, 0, 0, 0, 0, 0)
    instructions = list(struct.iter_unpack("=HBBI", program))
    place = loaded = 0
    while True:
        opcode, holds, fails, operand = instructions[place]
        if opcode == 0x06:
            return {0x7FFF0000: "allow", 0x00050001: "EPERM"}[operand]
        if opcode == 0x20:
            loaded = int.from_bytes(data[operand : operand + 4], sys.byteorder)
        place += 1
        if opcode in (0x15, 0x35):
            place += (
                holds if (loaded == operand if opcode == 0x15 else loaded >= operand) else fails
            )


@pytest.mark.parametrize("machine", REFUSED)
def test_the_filter_refuses_its_system_calls_other_abis_and_no_other_call(machine: str) -> None:
    program, arch = syscall_filter(machine), AUDIT_ARCH[machine]
    refused, sockets = set(REFUSED[machine].values()), set(SOCKETS[machine].values())
    for number in range(500):
        if number not in sockets:
            assert ends(program, arch, number) == ("EPERM" if number in refused else "allow"), (
                number
            )
        assert ends(program, arch, 0x40000000 + number) == "EPERM"
        assert ends(program, 0x40000003, number) == "EPERM"  # i386
    for number in sockets:
        allowed = [family for family in range(64) if ends(program, arch, number, family) == "allow"]
        assert allowed == [socket.AF_UNIX, socket.AF_INET, socket.AF_INET6]


def test_a_machine_whose_numbers_are_not_known_has_no_filter() -> None:
    assert syscall_filter("riscv64") == b""


@pytest.mark.skipif(platform.machine() not in REFUSED, reason="no numbers of this machine")
def test_every_refused_call_fails_behind_walls_and_in_children(walls: str) -> None:
    numbers = REFUSED[platform.machine()]
    program = f"""
import ctypes, os
syscall = ctypes.CDLL(None, use_errno=True).syscall
if os.fork() == 0:
    for name, number in {numbers!r}.items():
        print(name, syscall(number, 0, 0, 0, 0, 0, 0), ctypes.get_errno(), flush=True)
    os._exit(0)
os.wait()
"""
    outcome = run(program, Isolation(walls, LIMITS))
    assert outcome.output.splitlines() == [f"{name} -1 1" for name in numbers]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the calls of i386")
def test_a_call_by_the_32_bit_interface_fails(walls: str) -> None:
    program = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(b"\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3")  # getpid by int 0x80
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
"""
    outcome = run(program, Isolation(walls, LIMITS))
    # A kernel without it
    assert outcome.output == "-1\n" or outcome.reason == "killed by SIGSEGV", outcome


def test_what_a_terminal_would_obey_is_written_out(walls: str) -> None:
    title = "\x1b]0;OWNED\x07"
    outcome = run(
        f"print({title!r}, 'é\\t\u202e', flush=True)\nraise ValueError({title + chr(0x202E)!r})",
        Isolation(walls, LIMITS),
    )
    assert outcome.reason == r"ValueError: \x1b]0;OWNED\x07\u202e"
    assert outcome.output == "\\x1b]0;OWNED\\x07 é\t\\u202e\n"
    forged = "import os\nos.write(3, b'x\\x1b[2J\\ny' + b'\\x1b' * 999)\nos._exit(1)"
    reason = run(forged, Isolation(walls, LIMITS)).reason
    assert reason.startswith(r"x\x1b[2J\ny\x1b") and len(reason) == 300


def test_walls_without_the_filter_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    if probe._problem("namespaces"):
        pytest.skip("no namespaces here")
    monkeypatch.setattr(running, "syscall_filter", lambda: b"")
    assert "no system call is refused" in probe._problem.__wrapped__("namespaces")


def test_walls_that_do_not_come_up_are_no_verdict(
    walls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = building.visible()
    monkeypatch.setattr(building, "visible", lambda: [*seen, "/no/such/folder"])
    with pytest.raises(InputError, match="no/such/folder"):
        run("", Isolation(walls, LIMITS))


def test_walls_are_not_believed_but_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    # Starts programs, isolates nothing
    monkeypatch.setitem(building.WALLS, "namespaces", building.none)
    assert "it is not nobody" in probe._problem.__wrapped__("namespaces")


@pytest.fixture
def no_walls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose kernel refuses, without bubblewrap."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(
        building.WALLS, "namespaces", lambda size: [*building.namespaces(size)[:-1], "x"]
    )
    monkeypatch.setattr(building, "visible", lambda: ["/no/such/folder"])
    probe._problem.cache_clear()
    yield
    probe._problem.cache_clear()


@pytest.mark.usefixtures("no_walls")
def test_without_walls_the_error_says_what_was_tried_and_what_to_do() -> None:
    with pytest.raises(InputError) as error:
        find_isolation()
    for words in (
        "bubblewrap (bwrap is not installed)",
        "namespaces (",
        "Install bubblewrap",
        "--no-isolation",
    ):
        assert words in str(error.value)


@pytest.mark.usefixtures("no_walls")
def test_without_walls_a_user_who_accepts_that_is_warned() -> None:
    with pytest.warns(UserWarning, match="without isolation"):
        assert find_isolation(LIMITS, allow_none=True) == Isolation("none", LIMITS)


def test_other_systems_have_no_walls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    for walls in ("bubblewrap", "namespaces"):
        with pytest.raises(InputError, match="needs Linux, this is Darwin"):
            run("", Isolation(walls))


def test_unknown_walls_are_refused() -> None:
    with pytest.raises(InputError, match="expected one of bubblewrap, namespaces, none"):
        run("", Isolation("brick"))


def test_where_there_are_walls_they_are_found_without_a_warning(walls: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_isolation(LIMITS, allow_none=True).walls in ("bubblewrap", "namespaces")


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    "name",
    ["memory bomb", "file in memory", "socket to the machine's host",
     "endless loop", "huge output", "leave before the tests", "jump over the tests", "crash",
     "one large file", "open files without end", "import from the host's working folder", "import of this package",
     "deaf to signals", "sleep at exit"],
)  # fmt: skip
def test_without_walls_limits_hold_all_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "treasure.py").write_text("")
    program, reason = HOSTILE[name]
    limits = replace(LIMITS, seconds=0.25 if reason == "timeout" else 5)
    outcome = run(program, Isolation("none", limits), TESTS if "f(x)" in program else "")
    assert not outcome.passed and re.search(reason, outcome.reason), outcome
