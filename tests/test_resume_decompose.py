"""A decomposition that was killed goes on where it was, and ends with the bytes of one that never was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import pissa
from conftest import build_pico
from pissa.checkpoint.output import JOB
from pissa.checkpoint.reader import Checkpoint
from pissa.surgery.decomposition import Decomposition
from pissa.surgery.streaming import PIECES

pytestmark = pytest.mark.filterwarnings("ignore:.*written unpacked")
SIZES = {"hidden_size": 64, "intermediate_size": 96}
"""Of a pico model of which some weights can be packed and others not."""
SHARDED = {"rank": 4, "max_shard_bytes": 20_000}
QUANTS: dict[str, dict[str, Any]] = {"plain": {}, "nf4": {"quant": "nf4"}}
TENSORS = 20
"""Of a pico Llama; its first target is the third."""
# One process imports pissa and forks for each kill. "after": at the k-th call of progress.
# "splitting": in the k-th split. "writing": after the k-th tensor, so between the parts of a
# weight. "small files": all tensors are there. "again": the last receipt is cut short, then as
# "after".
RUNS_TO_BE_KILLED = """
import json, os, pathlib, signal, sys, torch, pissa
from pissa.checkpoint.writer import TensorFile
from pissa.surgery import decomposition
from pissa.surgery.decomposition import Decomposition

torch.set_num_threads(1)
assert os.environ["OMP_NUM_THREADS"] == "1"

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def interrupt(*_):
    raise KeyboardInterrupt

def at(count, act, work=None):
    calls = []
    def call(*args):
        calls.append(args)
        result = work(*args) if work else None
        if len(calls) == count:
            act()
        return result
    return call

jobs = json.loads(sys.argv[2])
pissa.decompose(jobs[0][0], sys.argv[1], rank=4, quant="nf4")  # imports all that the children need
for base, out, settings, where, count in jobs:
    if where == "again":
        for receipts in pathlib.Path(out).parent.glob(".out.partial-*/pieces.jsonl"):
            receipts.write_text(receipts.read_text()[:-100])
    child = os.fork()
    if child == 0:
        progress = None
        if where in ("after", "again", "interrupt"):
            progress = at(count, interrupt if where == "interrupt" else die)
        elif where == "splitting":
            Decomposition.piece = at(count, die)
        elif where == "writing":
            TensorFile.write = at(count, die, TensorFile.write)
        elif where == "small files":
            decomposition.write_small_files = die
        try:
            pissa.decompose(base, out, progress=progress, **settings)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
"""

KILLS = {
    "in the first split": ("splitting", 1, 0),
    "before the first target": ("after", 1, 1),
    "in the middle": ("after", 10, 10),
    "after the last tensor": ("after", 20, 20),
    "by an interrupt": ("interrupt", 10, 10),
}
"""Where a kill comes, and how many tensors are finished by then."""
TORN = (3, 27)
"""How many tensors are written before kills that come between a tensor and its receipt."""
CUTS = {"newline": -1, "half a line": -100}
"""Where the last receipt is cut."""
OTHERS: dict[str, dict[str, Any]] = {
    "rank": {"rank": 5},
    "store": {"store": "16bit"},
    "dtype": {"dtype": "bfloat16"},
    "shard size": {"max_shard_bytes": 30_000},
}
CHANGED, CHANGED_BASE = "base changed in place", "changing"


def kills() -> Iterator[tuple[str, dict[str, Any], str, int]]:
    """Case, settings beside `SHARDED`, and where the run is killed."""
    for quant, settings in QUANTS.items():
        for when, (where, count, _) in KILLS.items():
            yield f"{quant} {when}", settings, where, count
        for count in TORN:
            yield f"{quant} torn {count}", settings, "writing", count
        yield f"{quant} small files", settings, "small files", 0
        yield f"{quant} twice", settings, "after", 10
        yield f"{quant} twice", settings, "again", 5
    yield CHANGED, {"quant": "nf4"}, "after", 10
    yield "three workers", {"quant": "nf4", "workers": 3}, "after", 10


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "base"
    build_pico(**SIZES).save_pretrained(folder)
    assert len(Checkpoint.open(folder).tensors) == TENSORS
    return folder


@pytest.fixture(scope="module")
def killed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The output folder of each case, beside which a killed run left its work."""
    root = tmp_path_factory.mktemp("killed")
    outs = {case: root / case.replace(" ", "-") / "out" for case, *_ in kills()}
    shutil.copytree(base, root / CHANGED_BASE)
    jobs = [
        (
            str(root / CHANGED_BASE if case == CHANGED else base),
            str(outs[case]),
            {**SHARDED, **settings},
            where,
            count,
        )
        for case, settings, where, count in kills()
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUNS_TO_BE_KILLED, str(root / "first"), json.dumps(jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return outs


@pytest.fixture
def left(killed: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """An output folder beside which lies a copy of what the killed run of a case left."""

    def copy(case: str) -> Path:
        shutil.copytree(killed[case].parent, tmp_path / "left")
        return tmp_path / "left" / "out"

    return copy


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that were worked on, in no order."""
    names: list[str] = []
    work = Decomposition.piece

    def piece(self: Decomposition, name: str) -> Any:
        names.append(name)
        return work(self, name)

    monkeypatch.setattr(Decomposition, "piece", piece)
    return names


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; the folder's own name, which the adapter's config holds, is made the same for all."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes().replace(str(folder).encode(), b"OUT")
        for name, path in files.items()
    }


Whole = Callable[..., tuple[dict[str, bytes], list[tuple[str, int, int]]]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Contents and progress of a run that was never killed."""
    root = tmp_path_factory.mktemp("whole")

    @cache
    def make(base: Path, **settings: Any) -> tuple[dict[str, bytes], list[tuple[str, int, int]]]:
        told: list[tuple[str, int, int]] = []
        pissa.decompose(base, root / "out", **settings, progress=lambda *step: told.append(step))
        found = contents(root / "out")
        shutil.rmtree(root / "out")
        assert sum(name.startswith("model-") for name in found) >= 3
        assert "pissa_init/adapter_model.safetensors" in found
        assert not {JOB, PIECES} & found.keys()
        return found, told

    return make


def pieces(out: Path) -> Path:
    """The list of finished tensors that a killed run left."""
    assert not out.exists()
    (staging,) = out.parent.iterdir()
    return staging / PIECES


def finished_in(out: Path) -> int:
    return len(pieces(out).read_text().splitlines())


def assert_same(out: Path, expected: dict[str, bytes]) -> None:
    got = contents(out)
    assert got.keys() == expected.keys()
    assert [name for name in expected if got[name] != expected[name]] == []
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("when", KILLS)
@pytest.mark.parametrize("quant", QUANTS)
def test_a_killed_run_goes_on_after_its_last_whole_tensor(
    quant: str, when: str, base: Path, left: Callable[[str], Path], splits: list[str], whole: Whole
) -> None:
    settings, finished, out = {**SHARDED, **QUANTS[quant]}, KILLS[when][2], left(f"{quant} {when}")
    expected, steps = whole(base, **settings)
    splits.clear()
    assert finished_in(out) == finished
    told: list[tuple[str, int, int]] = []
    pissa.decompose(base, out, **settings, progress=lambda *step: told.append(step))
    assert sorted(splits) == sorted(name for name, _, _ in steps[finished:])
    assert told == steps[finished:]
    assert_same(out, expected)


@pytest.mark.parametrize("count", TORN)
@pytest.mark.parametrize("quant", QUANTS)
def test_a_kill_between_two_parts_of_a_weight_costs_that_weight(
    quant: str, count: int, base: Path, left: Callable[[str], Path], splits: list[str], whole: Whole
) -> None:
    settings, out = {**SHARDED, **QUANTS[quant]}, left(f"{quant} torn {count}")
    expected, _ = whole(base, **settings)
    splits.clear()
    finished = finished_in(out)
    assert finished < count
    pissa.decompose(base, out, **settings)
    assert len(splits) == TENSORS - finished
    assert_same(out, expected)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("quant", QUANTS)
def test_a_receipt_cut_short_does_not_count(
    quant: str, cut: str, base: Path, left: Callable[[str], Path], splits: list[str], whole: Whole
) -> None:
    settings, out = {**SHARDED, **QUANTS[quant]}, left(f"{quant} in the middle")
    expected, _ = whole(base, **settings)
    splits.clear()
    lines = pieces(out).read_text().splitlines(keepends=True)
    pieces(out).write_text("".join([*lines[:-1], lines[-1][: CUTS[cut]]]))
    pissa.decompose(base, out, **settings)
    assert len(splits) == TENSORS - 9
    assert_same(out, expected)


@pytest.mark.parametrize("quant", QUANTS)
def test_a_run_may_be_killed_twice(
    quant: str, base: Path, left: Callable[[str], Path], splits: list[str], whole: Whole
) -> None:
    """The first kill cut a receipt short, and the second run went on behind it."""
    settings, out = {**SHARDED, **QUANTS[quant]}, left(f"{quant} twice")
    expected, _ = whole(base, **settings)
    splits.clear()
    assert finished_in(out) == 9 + 5
    pissa.decompose(base, out, **settings)
    assert len(splits) == TENSORS - 14
    assert_same(out, expected)


@pytest.mark.parametrize("quant", QUANTS)
def test_a_kill_among_the_small_files_costs_no_tensor(
    quant: str, base: Path, left: Callable[[str], Path], splits: list[str], whole: Whole
) -> None:
    settings, out = {**SHARDED, **QUANTS[quant]}, left(f"{quant} small files")
    assert finished_in(out) == TENSORS
    pissa.decompose(base, out, **settings)
    assert splits == []
    assert_same(out, whole(base, **settings)[0])


@pytest.mark.parametrize("other", OTHERS)
def test_a_run_with_another_setting_uses_nothing_of_a_killed_one(
    other: str, base: Path, left: Callable[[str], Path], splits: list[str], whole: Whole
) -> None:
    settings, out = {**SHARDED, "quant": "nf4", **OTHERS[other]}, left("nf4 in the middle")
    assert finished_in(out) == 10
    pissa.decompose(base, out, **settings)
    assert len(splits) == TENSORS
    assert_same(out, whole(base, **settings)[0])


@pytest.mark.parametrize(("case", "workers"), [("nf4 in the middle", 3), ("three workers", 1)])
def test_another_number_of_workers_may_go_on(
    case: str,
    workers: int,
    base: Path,
    left: Callable[[str], Path],
    splits: list[str],
    whole: Whole,
) -> None:
    settings, out = {**SHARDED, "quant": "nf4"}, left(case)
    expected, _ = whole(base, **settings)
    splits.clear()
    pissa.decompose(base, out, **settings, workers=workers)
    assert len(splits) == TENSORS - 10
    assert_same(out, expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_base_in_another_folder_uses_nothing_of_a_killed_run(
    seed: int, left: Callable[[str], Path], splits: list[str], whole: Whole, tmp_path: Path
) -> None:
    settings, out = {**SHARDED, "quant": "nf4"}, left("nf4 in the middle")
    assert finished_in(out) == 10
    build_pico(seed, **SIZES).save_pretrained(tmp_path / "base")
    pissa.decompose(tmp_path / "base", out, **settings)
    assert len(splits) == TENSORS
    assert_same(out, whole(tmp_path / "base", **settings)[0])


def test_a_run_that_fails_leaves_nothing_of_a_killed_one(
    base: Path, left: Callable[[str], Path]
) -> None:
    out = left("nf4 in the middle")
    assert finished_in(out) == 10

    def fail(*_: object) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        pissa.decompose(base, out, **SHARDED, quant="nf4", progress=fail)
    assert list(out.parent.iterdir()) == []


def test_a_base_that_changed_in_place_uses_nothing_of_a_killed_run(
    killed: dict[str, Path], splits: list[str], whole: Whole
) -> None:
    """Other weights in a file of the same name and size."""
    settings, out = {**SHARDED, "quant": "nf4"}, killed[CHANGED]
    assert finished_in(out) == 10
    base = out.parents[1] / CHANGED_BASE
    size = (base / "model.safetensors").stat().st_size
    build_pico(seed=1, **SIZES).save_pretrained(base)
    assert (base / "model.safetensors").stat().st_size == size
    pissa.decompose(base, out, **settings)
    assert len(splits) == TENSORS
    assert_same(out, whole(base, **settings)[0])
