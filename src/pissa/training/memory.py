"""The most memory that a stretch of work held, as the machine saw it."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(kind: str) -> None:
    """Begin a stretch.

    Args:
        kind: of device, cpu or cuda.
    """
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    # Not Linux, or a container that forbids it: then the peak is the process's so far
    with suppress(OSError):
        _RESET.write_text("5")  # the high-water mark of the resident set starts anew


def peak_bytes(kind: str) -> int | None:
    """The peak since `reset_peak`: of torch's tensors on a CUDA device, else of the process; None where none says."""
    if kind == "cuda":
        return int(torch.cuda.max_memory_allocated())
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()) if _STATUS.exists() else None
    return 1024 * int(found[1]) if found else None
