"""Tensors whose length only their making tells, and files that a killed run left: the same bytes as in one go."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pissa.checkpoint.layout import INDEX_NAME, Plan, read_header
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.writer import CheckpointWriter, TensorFile
from pissa.errors import InputError, OutputError

LATE = ("one.state", "two.state", "elsewhere.state")
ROOM = 256


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "one.codes": torch.randint(256, (33, 1), dtype=torch.uint8),
        "one.state": torch.frombuffer(bytearray(b'{"shape": [8, 8]}'), dtype=torch.uint8),
        "norm": torch.randn(5).bfloat16(),
        "two.codes": torch.randint(256, (7, 1), dtype=torch.uint8),
        "two.state": torch.frombuffer(bytearray(b"{}"), dtype=torch.uint8),
        "wide": torch.randn(8, 8),
    }


def plan_of(tensors: dict[str, Tensor], late: Sequence[str] = LATE) -> Plan:
    return {
        name: (t.dtype, (ROOM,) if name in late else tuple(t.shape)) for name, t in tensors.items()
    }


def write(
    path: Path,
    tensors: dict[str, Tensor],
    done: Sequence[str] | None = None,
    order: Sequence[str] = (),
) -> bytes:
    with TensorFile(path, plan_of(tensors), {"note": "ja"}, LATE, done) as file:
        for name in order or tensors:
            if name not in (done or ()):
                file.write(name, tensors[name])
    return path.read_bytes()


def killed(work: Callable[[], TensorFile | CheckpointWriter]) -> None:
    """Run in a process of its own that ends by SIGKILL, with the file still open."""
    child = os.fork()
    if child == 0:
        try:
            output = work()
            os.kill(os.getpid(), signal.SIGKILL)
            output.abandon()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def killed_file(path: Path, tensors: dict[str, Tensor], names: Sequence[str]) -> None:
    def work() -> TensorFile:
        file = TensorFile(path, plan_of(tensors), {"note": "ja"}, LATE)
        for name in names:
            file.write(name, tensors[name])
        return file

    killed(work)


def test_stock_safetensors_reads_late_tensors_whatever_the_order(
    tmp_path: Path, tensors: dict[str, Tensor]
):
    path = tmp_path / "a.safetensors"
    expected = write(path, tensors)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(path, framework="pt") as stock:
        assert stock.metadata() == {"format": "pt", "note": "ja"}
    for number, order in enumerate(itertools.permutations(tensors)):
        if number % 97 == 0:
            assert write(tmp_path / f"{number}.safetensors", tensors, order=order) == expected


def test_data_has_no_gap_and_late_tensors_lie_behind_all_others(
    tmp_path: Path, tensors: dict[str, Tensor]
):
    raw = write(tmp_path / "a.safetensors", tensors)
    header_bytes = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + header_bytes])
    found = sorted(
        (entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__"
    )
    ends = [0, *(offsets[1] for offsets, _ in found)]
    assert [offsets[0] for offsets, _ in found] == ends[:-1]
    assert (
        ends[-1] == len(raw) - 8 - header_bytes == sum(tensor.nbytes for tensor in tensors.values())
    )
    assert [name for _, name in found][-2:] == ["one.state", "two.state"]
    assert header_bytes % 8 == 0
    assert all(offsets[0] % tensors[name].dtype.itemsize == 0 for offsets, name in found)
    assert read_header(tmp_path / "a.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("lengths", [(0, 0), (0, ROOM), (ROOM, 1), (ROOM, ROOM), (99, 100)])
def test_a_late_tensor_may_have_any_length_up_to_the_planned_one(
    lengths: tuple[int, int], tmp_path: Path, tensors: dict[str, Tensor]
):
    for name, length in zip(LATE, lengths, strict=False):
        tensors[name] = torch.arange(length).to(torch.uint8)
    write(tmp_path / "a.safetensors", tensors)
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_late_tensor_that_the_plan_does_not_bound_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor]
):
    file = TensorFile(tmp_path / "a.safetensors", plan_of(tensors), late=LATE)
    state = tensors["one.state"]
    with pytest.raises(
        InputError, match=rf"'one\.state' is torch\.uint8 \[257\].* says torch\.uint8 \[{ROOM}\]"
    ):
        file.write("one.state", torch.zeros(ROOM + 1, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"'one\.state' is torch\.uint8 \[17, 1\]"):
        file.write("one.state", state[:, None])
    with pytest.raises(InputError, match=r"'one\.state' is torch\.int8 \[17\]"):
        file.write("one.state", state.to(torch.int8))
    with pytest.raises(InputError, match=r"'norm' is torch\.bfloat16 \[4\]"):
        file.write("norm", tensors["norm"][:4])  # only what is late may be shorter
    file.write("one.state", state)
    with pytest.raises(InputError, match=r"'one\.state' was written"):
        file.write("one.state", state)
    assert file.missing == tensors.keys() - {"one.state"}
    file.abandon()


def test_a_file_without_its_late_tensor_is_no_file(tmp_path: Path, tensors: dict[str, Tensor]):
    path = tmp_path / "a.safetensors"
    file = TensorFile(path, plan_of(tensors), late=LATE)
    for name in tensors.keys() - {"two.state"}:
        file.write(name, tensors[name])
    with pytest.raises(OutputError, match=r"lacks 1 planned tensors, 'two\.state' first"):
        file.close()
    with pytest.raises(SafetensorError):
        load_file(path)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shard_bytes", [300, 600, 10**6])
def test_shards_with_late_tensors_are_read_by_stock_tools_and_indexed_at_their_real_size(
    shard_bytes: int, reverse: bool, tmp_path: Path, tensors: dict[str, Tensor]
):
    with CheckpointWriter(tmp_path, plan_of(tensors), shard_bytes, LATE) as writer:
        for name in sorted(tensors, reverse=reverse):
            writer.write(name, tensors[name])
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == {300: 3, 600: 2, 10**6: 1}[shard_bytes]
    stock = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert stock.keys() == tensors.keys()
    assert all(torch.equal(stock[name], tensors[name]) for name in tensors)
    checkpoint = Checkpoint.open(tmp_path, need_config=False)
    assert all(torch.equal(checkpoint.read(name), tensors[name]) for name in tensors)
    if len(shards) > 1:
        index = json.loads((tmp_path / INDEX_NAME).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("late_came", [False, True])
@pytest.mark.parametrize("count", range(5))
def test_a_killed_file_is_gone_on_with_to_the_same_bytes(
    count: int, late_came: bool, tmp_path: Path, tensors: dict[str, Tensor]
):
    """Late tensors wait in memory, so they come again, whether they had come before the kill or not."""
    path = tmp_path / "killed.safetensors"
    done = ("norm", "two.codes", "wide", "one.codes")[:count]
    killed_file(path, tensors, (*(LATE[:1] if late_came else ()), *done))
    with pytest.raises(SafetensorError):
        load_file(path)
    assert write(path, tensors, done) == write(tmp_path / "whole.safetensors", tensors)


def test_a_file_that_must_be_new_is_not_gone_on_with(tmp_path: Path, tensors: dict[str, Tensor]):
    killed_file(tmp_path / "killed.safetensors", tensors, ("wide",))
    with pytest.raises(OutputError, match=r"killed\.safetensors exists already"):
        write(tmp_path / "killed.safetensors", tensors)


def test_what_is_done_is_neither_missing_nor_written_again(
    tmp_path: Path, tensors: dict[str, Tensor]
):
    path = tmp_path / "killed.safetensors"
    killed_file(path, tensors, ("norm", "wide"))
    file = TensorFile(path, plan_of(tensors), late=LATE, done=("norm", "wide"))
    assert file.missing == tensors.keys() - {"norm", "wide"}
    with pytest.raises(InputError, match="'norm' was written to .* before"):
        file.write("norm", tensors["norm"])
    file.abandon()


def test_going_on_with_a_file_that_is_gone_is_an_error(tmp_path: Path, tensors: dict[str, Tensor]):
    with pytest.raises(OutputError, match=r"killed\.safetensors is gone.*start again"):
        TensorFile(tmp_path / "killed.safetensors", plan_of(tensors), late=LATE, done=["norm"])
    with pytest.raises(OutputError, match=r"model-00001-of-00003\.safetensors is gone"):
        CheckpointWriter(tmp_path, plan_of(tensors), 300, LATE, done=["norm"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("receipts_lost", [0, 1])
@pytest.mark.parametrize("count", [2, 4, 5, 6])
@pytest.mark.parametrize("shard_bytes", [40, 300, 10**6])
def test_killed_shards_are_gone_on_with_to_the_same_bytes(
    shard_bytes: int, count: int, receipts_lost: int, tmp_path: Path, tensors: dict[str, Tensor]
):
    """The kill comes after `count` tensors, with whole shards, a begun one, some that are not there
    yet, some of which nothing is known, and some in which only late tensors came.
    """
    part, whole = tmp_path / "part", tmp_path / "whole"
    names = list(tensors)

    def work() -> CheckpointWriter:
        writer = CheckpointWriter(part, plan_of(tensors), shard_bytes, LATE)
        for name in names[:count]:
            writer.write(name, tensors[name])
        return writer

    killed(work)
    done = [name for name in names[: count - receipts_lost] if name not in LATE]
    for folder, before in ((part, done), (whole, None)):
        with CheckpointWriter(folder, plan_of(tensors), shard_bytes, LATE, before) as writer:
            for name in (name for name in names if name not in (before or ())):
                writer.write(name, tensors[name])
    assert {path.name: path.read_bytes() for path in part.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
