"""Work on tensors side by side with the results in order, so that reading, algebra and writing
overlap.

Each worker computes with a number of threads that the machine alone decides, so results do not
depend on how many workers there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from pissa.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")
MOST_WORKERS = 4
"""By default; each holds a tensor, its float32 copy and its decomposition."""
WAITING = 3
"""Results, begun or finished, for each worker."""


def check_workers(workers: int | None) -> None:
    """Refuse less than one worker."""
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}, expected 1 or more, or none for one a core")


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """``work(item)`` for each item, in order; a few results may wait, so that a slow disk does not
    stop the workers.

    Args:
        work: called in a thread of its own; what it raises is raised here.
        items: what to work on.
        workers: how many at a time, 1 or more; one for each core, up to 4, by default.

    """
    default = min(torch.get_num_threads(), MOST_WORKERS)
    threads = torch.get_num_threads() // default
    with ThreadPoolExecutor(workers or default, "split", torch.set_num_threads, (threads,)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > WAITING * (workers or default):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
