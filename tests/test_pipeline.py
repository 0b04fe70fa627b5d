"""Tensors side by side: order, bits and errors do not depend on the workers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pissa
from pissa.linalg import truncated_svd
from pissa.surgery.pipeline import WAITING, in_order


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order_though_the_first_take_longest(workers: int) -> None:
    def work(item: int) -> int:
        time.sleep(0.02 if item < 2 else 0)
        return item * item

    assert list(in_order(work, range(12), workers)) == [item * item for item in range(12)]


def test_no_more_is_begun_than_may_wait() -> None:
    begun: list[int] = []
    results = in_order(lambda item: begun.append(item) or item, range(100), 2)
    assert next(results) == 0
    time.sleep(0.05)
    assert len(begun) <= WAITING * 2 + 1
    results.close()
    time.sleep(0.05)
    assert len(begun) < 20


def test_an_error_of_the_work_is_raised_in_its_place_and_ends_it() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    results = in_order(work, range(1000), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert threading.active_count() < 20


def test_workers_leave_the_threads_of_the_caller_alone() -> None:
    before = torch.get_num_threads()
    list(in_order(lambda item: torch.randn(64, 64) @ torch.randn(64, 64), range(4), 2))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("svd", ["fast", "exact"])
def test_outputs_are_bit_identical_with_one_two_and_three_workers(
    svd: str, tmp_path: Path, pico_folder: Callable[..., Path]
) -> None:
    base = pico_folder(hidden_size=160, intermediate_size=288, dtype=torch.bfloat16)
    for workers in (1, 2, 3):
        pissa.decompose(base, tmp_path / str(workers), rank=4, svd=svd, workers=workers)
    for part in ("model.safetensors", "pissa_init/adapter_model.safetensors"):
        one, two, three = ((tmp_path / str(workers) / part).read_bytes() for workers in (1, 2, 3))
        assert one == two == three


TWO_THREADS = """
import sys, torch
from pathlib import Path
import pissa
assert torch.get_num_threads() == 2, torch.get_num_threads()
for workers in (1, 2):
    pissa.decompose(sys.argv[1], Path(sys.argv[2]) / str(workers), rank=4, workers=workers)
"""


def test_outputs_are_bit_identical_on_two_threads_too(
    tmp_path: Path, pico_folder: Callable[..., Path]
) -> None:
    base = pico_folder(hidden_size=160, intermediate_size=288, dtype=torch.bfloat16)
    subprocess.run(
        [sys.executable, "-c", TWO_THREADS, base, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=True,
    )
    for part in ("model.safetensors", "pissa_init/adapter_model.safetensors"):
        assert (tmp_path / "1" / part).read_bytes() == (tmp_path / "2" / part).read_bytes()


def test_bits_do_not_depend_on_the_order_of_the_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer.{index}": torch.randn(300, 200, generator=generator) for index in range(6)}

    def work(name: str) -> torch.Tensor:
        return truncated_svd(weights[name], 8, "fast", name=name).Vh

    forwards = dict(zip(weights, in_order(work, weights, 2), strict=True))
    names = list(reversed(weights))
    backwards = dict(zip(names, in_order(work, names, 2), strict=True))
    assert all(torch.equal(forwards[name], backwards[name]) for name in weights)
