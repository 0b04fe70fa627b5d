"""What this machine has: a GPU or main memory, and room on the disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from pissa.config import TrainSettings

CGROUP = Path("/sys/fs/cgroup")
TIGHT = 0.9
"""Share of the memory past which a plan is called tight: estimates err, and allocators leave holes."""


@dataclass(frozen=True)
class Machine:
    """Where the run is to fit.

    Attributes:
        kind: cpu or cuda.
        name: as a sentence names it.
        process_bytes: of this process, which training will be too.
        device_bytes: free on the device.
        host_bytes: free in main memory, what this process holds included.
        disk_bytes: free where the run's folder goes.
    """

    kind: str
    name: str
    process_bytes: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int

    def verdict(self, needed: int, on_host: int = 0) -> str:
        """yes, tight or no; "no: host" where loading does not fit into main memory."""
        if needed > self.device_bytes:
            return "no"
        if on_host > self.host_bytes:
            return "no: host"
        return "yes" if needed <= TIGHT * self.device_bytes else "tight"


def look(settings: TrainSettings, memory: int | None = None) -> Machine:
    """This machine, or one with a GPU of so many bytes.

    Args:
        settings: device and output are read.
        memory: of a GPU that is not here; None for this machine.
    """
    process = psutil.Process().memory_info().rss
    host, disk = _free_memory() + process, _free_disk(Path(settings.output))
    if memory is not None:
        return Machine("cuda", "a GPU of that size", process, memory, host, disk)
    if settings.device != "cpu" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return Machine(
            "cuda", f"this machine's {torch.cuda.get_device_name()}", process, free, host, disk
        )
    return Machine("cpu", "this machine, without a GPU,", process, host, host, disk)


def _free_memory() -> int:
    """Of the machine or, where that is less, of the container."""
    free: int = psutil.virtual_memory().available
    try:
        most = int((CGROUP / "memory.max").read_text())
        lines = (line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cache = int(dict(lines).get("inactive_file", 0))  # which the kernel gives back when asked
        free = min(free, most - int((CGROUP / "memory.current").read_text()) + cache)
    except (OSError, ValueError):  # no container, or no limit ("max")
        pass
    return free


def _free_disk(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
