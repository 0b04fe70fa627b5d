"""A decomposition that was killed goes on where it was, and ends with the bytes of one that never was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pissa
from conftest import build_pico
from pissa.checkpoint.output import JOB
from pissa.surgery.decomposition import PIECES, Decomposition

SHARDED = {"rank": 4, "max_shard_bytes": 6000}
QUANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nf4": {"quant": "nf4"},
    "double": {"quant": "nf4", "double_quant": True},
    "int8": {"quant": "int8"},
}
TENSORS = 20
"""Of a pico Llama; its first target is the third."""
# One process imports pissa and forks for each kill. "after": at the k-th call of progress. "splitting": in the k-th
# split. "writing": after the k-th tensor, so between the parts of a weight. "small files": all tensors are there.
RUNS_TO_BE_KILLED = """
import json, os, signal, sys, torch, pissa
from pissa.checkpoint.writer import TensorFile
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
        if len(calls) == count and work is None:
            act()
        result = work(*args) if work else None
        if len(calls) == count:
            act()
        return result
    return call

jobs = json.loads(sys.argv[2])
pissa.decompose(jobs[0][0], sys.argv[1], rank=4, quant="nf4")  # imports all that the children need
for base, out, settings, where, count in jobs:
    child = os.fork()
    if child == 0:
        progress = None
        if where in ("after", "interrupt"):
            progress = at(count, die if where == "after" else interrupt)
        elif where == "splitting":
            Decomposition.split_tensor = at(count, die)
        elif where == "writing":
            TensorFile.write = at(count, die, TensorFile.write)
        elif where == "small files":
            Decomposition.init_config = die
        try:
            pissa.decompose(base, out, progress=progress, **settings)
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

# Where a kill comes, and how many tensors are finished by then.
KILLS = {
    "in the first split": ("splitting", 1, 0),
    "before the first target": ("after", 1, 1),
    "early": ("after", 3, 3),
    "in the middle": ("after", 10, 10),
    "late": ("after", 19, 19),
    "after the last tensor": ("after", 20, 20),
    "by an interrupt": ("interrupt", 10, 10),
}
TORN = (3, 10, 27, 40)
"""Tensors written, across the parts of weights and the factors, before kills between a tensor and its receipt."""
OTHERS: dict[str, dict[str, Any]] = {
    "rank": {"rank": 5},
    "alpha": {"alpha": 8},
    "method": {"method": "milora"},
    "targets": {"targets": ["q_proj", "v_proj"]},
    "quantiser": {"quant": "fp4"},
    "no quantiser": {"quant": None},
    "double quantisation": {"double_quant": True},
    "rounds": {"iterations": 1},
    "store": {"store": "16bit"},
    "dtype": {"dtype": "bfloat16"},
    "svd": {"svd": "exact"},
    "seed": {"seed": 1},
    "shard size": {"max_shard_bytes": 7000},
}


def cases() -> dict[str, tuple[dict[str, Any], str, int]]:
    found: dict[str, tuple[dict[str, Any], str, int]] = {}
    for quant, settings in QUANTS.items():
        for when, (where, count, _) in KILLS.items():
            found[f"{quant} {when}"] = (settings, where, count)
        for count in TORN:
            found[f"{quant} torn {count}"] = (settings, "writing", count)
        for cut in CUTS:
            found[f"{quant} cut {cut}"] = (settings, "after", 10)
        found[f"{quant} small files"] = (settings, "small files", 0)
    for other in (*OTHERS, "other base", "base of the same size", "base elsewhere", "workers 1", "workers 3", "twice"):
        workers = {"workers": int(other[-1])} if other.startswith("workers") else {}
        found[other] = ({"quant": "nf4", **workers}, "after", 10)
    return found


CUTS = {"newline": -1, "half a line": -100, "all but a byte": None}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "base"
    build_pico().save_pretrained(folder)
    assert len(pissa.checkpoint.reader.Checkpoint.open(folder).tensors) == TENSORS
    return folder


@pytest.fixture(scope="module")
def killed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The output folder of each case, beside which a killed run left its work."""
    root = tmp_path_factory.mktemp("killed")
    outs = {case: root / case.replace(" ", "-") / "out" for case in cases()}
    jobs = [
        (str(base), str(outs[case]), {**SHARDED, **settings}, where, count)
        for case, (settings, where, count) in cases().items()
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUNS_TO_BE_KILLED, str(root / "first"), json.dumps(jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = [130 if where == "interrupt" else -signal.SIGKILL for _, _, _, where, _ in jobs]
    assert [int(line) for line in done.stdout.split()] == expected
    return outs


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that were worked on, in no order."""
    names: list[str] = []
    work = Decomposition.split_tensor

    def split_tensor(self: Decomposition, name: str) -> Any:
        names.append(name)
        return work(self, name)

    monkeypatch.setattr(Decomposition, "split_tensor", split_tensor)
    return names


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pieces(out: Path) -> Path:
    (staging,) = out.parent.iterdir()
    return staging / PIECES


def assert_as_if_never_killed(base: Path, out: Path, **settings: Any) -> None:
    """In the same place, since the adapter's config names it; `out` is left absent."""
    got = contents(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    shutil.rmtree(out)
    pissa.decompose(base, out, **settings)
    expected = contents(out)
    shutil.rmtree(out)
    assert got.keys() == expected.keys()
    assert [name for name in expected if got[name] != expected[name]] == []
    assert not {JOB, PIECES} & got.keys()
    assert sum(name.startswith("model-") for name in got) > 3


@pytest.mark.parametrize("when", KILLS)
@pytest.mark.parametrize("quant", QUANTS)
def test_a_killed_run_goes_on_after_its_last_whole_tensor(
    quant: str, when: str, base: Path, killed: dict[str, Path], splits: list[str]
) -> None:
    out, finished = killed[f"{quant} {when}"], KILLS[when][2]
    settings = {**SHARDED, **QUANTS[quant]}
    assert not out.exists()
    assert len(pieces(out).read_text().splitlines()) == finished
    told: list[tuple[str, int, int]] = []
    pissa.decompose(base, out, **settings, progress=lambda *step: told.append(step))
    assert len(splits) == TENSORS - finished
    assert sorted(name for name, _, _ in told) == sorted(splits)
    if told:
        assert told[0][1] > told[0][2] * finished / TENSORS / 3  # progress goes on too
        assert told[-1][1] == told[-1][2]
    assert_as_if_never_killed(base, out, **settings)


@pytest.mark.parametrize("count", TORN)
@pytest.mark.parametrize("quant", QUANTS)
def test_a_kill_between_two_tensors_of_a_piece_costs_that_piece(
    quant: str, count: int, base: Path, killed: dict[str, Path], splits: list[str]
) -> None:
    out, settings = killed[f"{quant} torn {count}"], {**SHARDED, **QUANTS[quant]}
    finished = len(pieces(out).read_text().splitlines())
    assert finished < count
    pissa.decompose(base, out, **settings)
    assert len(splits) == TENSORS - finished
    assert_as_if_never_killed(base, out, **settings)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("quant", QUANTS)
def test_a_receipt_cut_short_does_not_count(
    quant: str, cut: str, base: Path, killed: dict[str, Path], splits: list[str]
) -> None:
    out, settings = killed[f"{quant} cut {cut}"], {**SHARDED, **QUANTS[quant]}
    lines = pieces(out).read_text().splitlines(keepends=True)
    pieces(out).write_text("".join([*lines[:-1], lines[-1][: CUTS[cut] or 1]]))
    pissa.decompose(base, out, **settings)
    assert len(splits) == TENSORS - 9
    assert_as_if_never_killed(base, out, **settings)


@pytest.mark.parametrize("quant", QUANTS)
def test_a_kill_among_the_small_files_is_no_obstacle(quant: str, base: Path, killed: dict[str, Path]) -> None:
    out, settings = killed[f"{quant} small files"], {**SHARDED, **QUANTS[quant]}
    pissa.decompose(base, out, **settings)
    assert_as_if_never_killed(base, out, **settings)


@pytest.mark.parametrize("other", OTHERS)
def test_a_run_with_another_setting_uses_nothing_of_a_killed_one(
    other: str, base: Path, killed: dict[str, Path], splits: list[str]
) -> None:
    out, settings = killed[other], {**SHARDED, "quant": "nf4", **OTHERS[other]}
    pissa.decompose(base, out, **settings)
    assert len(splits) == TENSORS
    assert_as_if_never_killed(base, out, **settings)


def other_weights(base: Path, folder: Path) -> Path:
    build_pico(seed=1).save_pretrained(folder)
    return folder


def changed(base: Path, folder: Path) -> Path:
    """The same folder and the same sizes, other weights."""
    before = (base / "model.safetensors").stat().st_size
    build_pico(seed=1).save_pretrained(base)
    assert (base / "model.safetensors").stat().st_size == before
    return base


def moved(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    return folder


@pytest.mark.parametrize(
    ("case", "make"),
    [("other base", other_weights), ("base elsewhere", moved), ("base of the same size", changed)],
    ids=str,
)
def test_a_run_on_another_base_uses_nothing_of_a_killed_one(
    case: str,
    make: Callable[[Path, Path], Path],
    base: Path,
    killed: dict[str, Path],
    splits: list[str],
    tmp_path: Path,
) -> None:
    out, settings = killed[case], {**SHARDED, "quant": "nf4"}
    kept = tmp_path / "kept"
    shutil.copytree(base, kept)
    times = (base / "model.safetensors").stat()
    try:
        other = make(base, tmp_path / "other")
        pissa.decompose(other, out, **settings)
        assert len(splits) == TENSORS
        assert_as_if_never_killed(other, out, **settings)
    finally:
        shutil.copyfile(kept / "model.safetensors", base / "model.safetensors")
        os.utime(base / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("workers", [(1, 3), (3, 1)], ids=str)
def test_another_number_of_workers_may_go_on(
    workers: tuple[int, int], base: Path, killed: dict[str, Path], splits: list[str]
) -> None:
    out, settings = killed[f"workers {workers[0]}"], {**SHARDED, "quant": "nf4"}
    pissa.decompose(base, out, **settings, workers=workers[1])
    assert len(splits) == TENSORS - 10
    assert_as_if_never_killed(base, out, **settings)


def test_a_run_that_fails_leaves_nothing_of_a_killed_one(base: Path, killed: dict[str, Path]) -> None:
    out, settings = killed["twice"], {**SHARDED, "quant": "nf4"}

    def fail(*_: object) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        pissa.decompose(base, out, **settings, progress=fail)
    assert list(out.parent.iterdir()) == []
    assert torch.get_num_threads() == 1
