"""What writes a checkpoint goes on where it was stopped, and ends with the bytes of a run that never was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pissa
from conftest import TOKENS, build_pico
from pissa.jobs import DecomposeSettings
from pissa.observe import observe
from pissa.surgery.decompose import prepare
from pissa.surgery.streaming import PIECES, Piece, StreamJob, finished
from pissa.w4a4 import export_dense, svdquant
from runs import language_model, make_run

Job = Callable[..., Any]


@pytest.fixture
def jobs(pico_folder: Callable[..., Path], tmp_path: Path) -> dict[str, Job]:
    """Each job as a function of its output and keywords."""
    base = pico_folder()
    make_run(base, tmp_path / "run")
    seen = observe(language_model(base), [{"input_ids": TOKENS}], ("inputs",))
    rounds = {"options": {"smoothing": False, "rounds": 1}}
    svdquant(base, tmp_path / "few", seen, 4, **rounds)
    small = {"max_shard_bytes": 20_000}
    return {
        "merge": lambda out, **more: pissa.merge(base, tmp_path / "run", out, **small, **more),
        "merge in nf4": lambda out, **more: pissa.merge(
            base, tmp_path / "run", out, quant="nf4", **small, **more
        ),
        "svdquant": lambda out, **more: svdquant(base, out, seen, 4, **rounds, **small, **more),
        "export": lambda out, **more: export_dense(tmp_path / "few", out, **small, **more),
    }


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def as_of_a_dead_process(place: Path) -> Path:
    """The one folder there, under the name that a process which is gone would have given it."""
    (staging,) = place.iterdir()
    assert f"-{os.getpid()}-" in staging.name
    return staging.rename(place / staging.name.replace(f"-{os.getpid()}-", "-99999999-"))


def stop_after(count: int) -> Callable[[str, int, int], None]:
    """A progress that interrupts at its `count`-th call."""
    calls: list[str] = []

    def progress(name: str, done: int, total: int) -> None:
        calls.append(name)
        if len(calls) == count:
            raise KeyboardInterrupt

    return progress


@pytest.mark.filterwarnings("ignore:.*written unpacked")
@pytest.mark.parametrize("name", ["merge", "merge in nf4", "svdquant", "export"])
def test_an_interrupted_job_goes_on_to_the_same_bytes(
    name: str, jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "merge in nf4":
        wide = {"hidden_size": 64, "intermediate_size": 128}
        build_pico(**wide).save_pretrained(tmp_path / "base")
        make_run(tmp_path / "base", tmp_path / "run")
    job, out = jobs[name], tmp_path / "place" / "out"
    job(tmp_path / "whole")
    worked: list[str] = []
    kinds = [kind for kind in StreamJob.__subclasses__() if "piece" in vars(kind)]
    for kind in kinds:

        def piece(self: Any, tensor: str, own: Callable[..., Piece] = kind.piece) -> Piece:
            worked.append(tensor)
            return own(self, tensor)

        monkeypatch.setattr(kind, "piece", piece)
    one = {} if name == "export" else {"workers": 1}  # reads its parts in one thread
    with pytest.raises(KeyboardInterrupt):
        job(out, progress=stop_after(4), **one)
    assert not out.exists()
    staging = as_of_a_dead_process(tmp_path / "place")
    done = [piece.name for piece in finished(staging / PIECES)]
    assert len(done) == 4
    worked.clear()
    told: list[tuple[str, int, int]] = []
    job(out, progress=lambda *step: told.append(step), **one)
    assert set(worked).isdisjoint(done) and worked == [step[0] for step in told]
    assert contents(out) == contents(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["out"]


def test_a_merge_of_another_run_uses_nothing_of_an_interrupted_one(
    jobs: dict[str, Job], pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "place" / "out"
    with pytest.raises(KeyboardInterrupt):
        jobs["merge"](out, progress=stop_after(4))
    as_of_a_dead_process(tmp_path / "place")
    make_run(tmp_path / "base", tmp_path / "run", rank=3)  # another one in the same place
    told: list[str] = []
    jobs["merge"](out, progress=lambda name, done, total: told.append(name))
    jobs["merge"](tmp_path / "whole")
    assert len(told) == 20
    assert contents(out) == contents(tmp_path / "whole")


def test_a_job_is_the_same_however_its_folder_is_spelled(
    pico_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pico_folder()
    monkeypatch.chdir(tmp_path)
    places = (base, "base", f"../{tmp_path.name}/base")
    keys = {prepare(place, DecomposeSettings(rank=4)).key for place in places}
    assert len(keys) == 1
    assert prepare(base, DecomposeSettings(rank=3)).key not in keys


def test_a_receipt_stands_for_its_piece() -> None:
    text = torch.tensor([*b'{"a": 1}'], dtype=torch.uint8)
    piece = Piece("w", {"w.state": text, "w": torch.ones(2)}, {"base": {"w": {"float32": "x"}}})
    read = Piece.from_receipt(piece.receipt({"w.state"}))
    assert (read.name, read.facts) == (piece.name, piece.facts)
    assert set(read.tensors) == {"w.state"} and torch.equal(read.tensors["w.state"], text)
