"""Which system calls a program may not make: a filter for seccomp(2), as classic BPF.

Namespaces and limits leave holes: System V shared memory and memory files count towards no limit once they are not
mapped, sockets of some families (vsock) pass network namespaces, and some calls only widen what of the kernel can be
attacked. Numbers are those of the kernel's tables (arch/x86/entry/syscalls, include/uapi/asm-generic/unistd.h).
"""

from __future__ import annotations

import errno
import platform
import struct

REFUSED = {
    "x86_64": {
        "shmget": 29, "semget": 64, "msgget": 68, "ptrace": 101, "add_key": 248, "request_key": 249, "keyctl": 250,
        "perf_event_open": 298, "process_vm_readv": 310, "process_vm_writev": 311, "memfd_create": 319, "bpf": 321,
        "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "memfd_secret": 447,
    },
    "aarch64": {
        "shmget": 194, "semget": 190, "msgget": 186, "ptrace": 117, "add_key": 217, "request_key": 218, "keyctl": 219,
        "perf_event_open": 241, "process_vm_readv": 270, "process_vm_writev": 271, "memfd_create": 279, "bpf": 280,
        "userfaultfd": 282, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "memfd_secret": 447,
    },
}  # fmt: skip
SOCKETS = {
    "x86_64": {"socket": 41, "socketpair": 53},
    "aarch64": {"socket": 198, "socketpair": 199},
}
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}
"""Of sockets that may be made; without a network they reach the program itself."""
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000
"""Numbers from here on are x32's: the same calls once more."""

# struct seccomp_data, and the opcodes of linux/bpf_common.h
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM


def syscall_filter(machine: str | None = None) -> bytes:
    """The filter: what is refused fails with EPERM, all else is allowed. Calls of other ABIs are refused altogether.

    Args:
        machine: as `platform.machine` names it; None for this one.

    Returns:
        Instructions of 8 bytes (struct sock_filter); none for a machine whose numbers are not here, or another system.
    """
    machine = machine or (platform.machine() if platform.system() == "Linux" else "")
    if machine not in REFUSED:
        return b""
    refused, sockets = REFUSED[machine].values(), SOCKETS[machine].values()
    # (opcode, operand, where to go on if it holds); "" is the next instruction.
    checks = [
        (_EQUAL, AUDIT_ARCH[machine], "number"),
        (_RETURN, _REFUSE, ""),
        (_LOAD, _NUMBER, ""),
        (_AT_LEAST, X32, "refuse"),
        *((_EQUAL, number, "refuse") for number in refused),
        *((_EQUAL, number, "family") for number in sockets),
        (_RETURN, _ALLOW, ""),
        (_LOAD, _FIRST_ARGUMENT, ""),
        *((_EQUAL, family, "allow") for family in FAMILIES.values()),
        (_RETURN, _REFUSE, ""),
        (_RETURN, _ALLOW, ""),
    ]
    last = len(checks) - 1
    places = {"number": 2, "refuse": last - 1, "allow": last, "family": last - 2 - len(FAMILIES)}
    program = [(_LOAD, 0, _ARCH)]
    for place, (opcode, operand, target) in enumerate(checks):
        program.append((opcode, places[target] - place - 1 if target else 0, operand))
    return b"".join(
        struct.pack("HBBI", opcode, jump, 0, operand) for opcode, jump, operand in program
    )
