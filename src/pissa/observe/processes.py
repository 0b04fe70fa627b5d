"""Sums and lists over the processes of a `torch.distributed` group; with one process, what it has itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PIECE = 2**24
"""Entries that are sent at a time."""


def process() -> int:
    """This process's place in the group."""
    return dist.get_rank() if _many() else 0


def gathered(own: Any) -> list[Any]:
    """What each process has, in their order, on every process; for small things."""
    if not _many():
        return [own]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return parts


def add_up(total: Tensor) -> None:
    """Put the sum over all processes into a contiguous tensor on the CPU, in place and piece by piece."""
    if not _many():
        return
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    for piece in torch.split(total.view(-1), PIECE):
        sent = piece.to(device)
        dist.all_reduce(sent)
        piece.copy_(sent)


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
