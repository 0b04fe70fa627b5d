"""An output appears whole or not at all, and nothing that matters is overwritten."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pissa.checkpoint import output
from pissa.checkpoint.output import read_json, staged_output, write_json
from pissa.errors import CheckpointError, OutputError

SOURCE = Path(output.__file__).parents[2]
DEAD_PID = 2**30  # above the largest process id of Linux, 2**22
WRITER_KILLED_MIDWAY = """
import os, signal, sys, torch
from pissa.checkpoint.output import staged_output
from pissa.checkpoint.writer import CheckpointWriter

plan = {"a": (torch.float32, (256,)), "b": (torch.float32, (256,))}
with staged_output(sys.argv[1]) as folder, CheckpointWriter(folder, plan, max_shard_bytes=1024) as writer:
    writer.write("a", torch.ones(256))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leftover(target: Path, state: str, pid: int = DEAD_PID) -> Path:
    folder = target.with_name(f".{target.name}.{state}-{platform.node()}-{pid}-0123abcd")
    folder.mkdir()
    (folder / "file").write_text("left over")
    return folder


def write_and_raise(target: Path, error: BaseException) -> None:
    with staged_output(target, force=True) as folder:
        (folder / "new").write_text("new")
        raise error


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")
    return folder


def test_output_appears_only_when_the_block_ends(tmp_path: Path):
    target = tmp_path / "deep" / "out"
    with staged_output(target) as folder:
        (folder / "new").write_text("new")
        assert folder.parent == target.parent
        assert not target.exists()
    assert names(target.parent) == ["out"]
    assert names(target) == ["new"]


def test_output_keeps_the_permissions_of_an_ordinary_folder(tmp_path: Path):
    (tmp_path / "ordinary").mkdir()
    with staged_output(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_empty_folder_is_filled_without_force(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with staged_output(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path / "out") == ["new"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_remains_after_an_exception(filled: Path, error: type[BaseException]):
    with pytest.raises(error):
        write_and_raise(filled, error())
    assert names(filled.parent) == ["out"]
    assert names(filled) == ["old"]


def test_filled_folder_needs_force(filled: Path):
    with (
        pytest.raises(OutputError, match=r"out is a folder with files.*--force"),
        staged_output(filled),
    ):
        pytest.fail("the block must not run")
    assert names(filled) == ["old"]


def test_file_needs_force(tmp_path: Path):
    (tmp_path / "out").write_text("a file")
    with (
        pytest.raises(OutputError, match=r"out is a file.*--force"),
        staged_output(tmp_path / "out"),
    ):
        pytest.fail("the block must not run")
    with staged_output(tmp_path / "out", force=True) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path / "out") == ["new"]
    assert names(tmp_path) == ["out"]


def test_force_replaces_and_leaves_nothing_of_the_old(filled: Path):
    with staged_output(filled, force=True) as folder:
        (folder / "new").write_text("new")
        assert names(filled) == ["old"]
    assert names(filled) == ["new"]
    assert names(filled.parent) == ["out"]


def test_force_through_a_link_replaces_the_folder_it_points_to(filled: Path):
    link = filled.parent / "link"
    link.symlink_to(filled)
    with staged_output(link, force=True) as folder:
        (folder / "new").write_text("new")
    assert link.is_symlink()
    assert names(filled) == ["new"]


@pytest.mark.parametrize(
    ("target", "relation"), [("base", "is"), ("base/out", "lies inside"), (".", "holds")]
)
def test_inputs_are_safe_even_from_force(tmp_path: Path, target: str, relation: str):
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_text("weights")
    with (
        pytest.raises(OutputError, match=rf"{relation} the input .*base"),
        staged_output(tmp_path / target, force=True, inputs=[base]),
    ):
        pytest.fail("the block must not run")
    assert names(base) == ["model.safetensors"]


def test_force_never_replaces_home_root_or_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("home", "work"):
        (tmp_path / name / "inner").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "inner"))
    monkeypatch.chdir(tmp_path / "work" / "inner")
    for target in ("/", ".", "..", "~", tmp_path / "home"):
        with pytest.raises(OutputError, match="never replaced"), staged_output(target, force=True):
            pytest.fail("the block must not run")


def test_force_never_replaces_a_git_repository(filled: Path):
    (filled / ".git").mkdir()
    with (
        pytest.raises(OutputError, match=r"out is a git repository"),
        staged_output(filled, force=True),
    ):
        pytest.fail("the block must not run")
    assert names(filled) == [".git", "old"]


def test_parent_that_cannot_be_made_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with (
        pytest.raises(OutputError, match=r"file/out cannot be written"),
        staged_output(tmp_path / "file" / "out"),
    ):
        pytest.fail("the block must not run")


def test_too_little_disk_names_both_figures(tmp_path: Path):
    needed = 10**18
    with (
        pytest.raises(OutputError, match=rf"{needed} bytes.*GB free \(\d+ bytes\)"),
        staged_output(tmp_path / "deep" / "out", needs_bytes=needed),
    ):
        pytest.fail("the block must not run")
    assert names(tmp_path) == []


def test_disk_full_in_the_block_is_an_output_error_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(OutputError, match=r"disk full while writing .*out"):
        write_and_raise(tmp_path / "out", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert names(tmp_path) == []


def test_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "theirs").write_text("theirs")
    with pytest.raises(OutputError, match="out appeared while"), staged_output(tmp_path / "out"):
        (tmp_path / "elsewhere").rename(tmp_path / "out")
    assert names(tmp_path / "out") == ["theirs"]
    assert names(tmp_path) == ["out"]


def test_old_output_comes_back_when_the_new_one_cannot_take_its_place(filled: Path):
    with pytest.raises(FileNotFoundError), staged_output(filled, force=True) as folder:
        shutil.rmtree(folder)
    assert names(filled) == ["old"]
    assert names(filled.parent) == ["out"]


def test_killed_run_leaves_no_target_and_the_next_run_sweeps(tmp_path: Path):
    target = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    killed = subprocess.run(
        [sys.executable, "-c", WRITER_KILLED_MIDWAY, str(target)], env=environment, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    (partial,) = tmp_path.iterdir()
    assert names(partial) == ["model-00001-of-00002.safetensors"]
    with staged_output(target) as folder:
        assert names(tmp_path) == [folder.name]
    assert names(tmp_path) == ["out"]


def test_sweep_spares_the_living_and_other_targets(tmp_path: Path):
    living = leftover(tmp_path / "out", "partial", os.getppid())
    other = leftover(tmp_path / "out2", "partial")
    abroad = tmp_path / f".out.partial-not-{platform.node()}-{DEAD_PID}-0123abcd"
    abroad.mkdir()
    with staged_output(tmp_path / "out"):
        pass
    assert names(tmp_path) == sorted([living.name, other.name, abroad.name, "out"])


def test_old_output_of_a_run_killed_while_replacing_is_given_back(tmp_path: Path):
    leftover(tmp_path / "out", "replaced")
    leftover(tmp_path / "out", "partial")
    with pytest.raises(OutputError, match="--force"), staged_output(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file"]


def test_old_output_is_swept_where_the_new_one_is_in_place(filled: Path):
    leftover(filled, "replaced")
    with staged_output(filled, force=True):
        pass
    assert names(filled.parent) == ["out"]


def test_json_round_trip_keeps_the_order_and_ends_in_a_newline(tmp_path: Path):
    content = {"zebra": 1, "ape": {"name": "Öl"}, "list": [1.5, None]}
    write_json(tmp_path / "a.json", content)
    assert list(read_json(tmp_path / "a.json")) == ["zebra", "ape", "list"]
    assert read_json(tmp_path / "a.json") == content
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "zebra"')
    assert text.endswith("}\n")


def test_json_that_cannot_be_written_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_json(tmp_path / "a.json", {"new": 2})
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[" * 200_000, b"[1]", b""])
def test_bad_json_is_an_error_that_names_the_file(tmp_path: Path, text: bytes):
    (tmp_path / "bad.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"bad\.json"):
        read_json(tmp_path / "bad.json")


def test_absent_json_is_an_error_that_names_the_file(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"absent\.json cannot be read"):
        read_json(tmp_path / "absent.json")
