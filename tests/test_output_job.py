"""Work that can go on: what a killed run left is yielded to the same job, and to no other."""

from __future__ import annotations

import errno
import os
import platform
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pissa.checkpoint.output import JOB, staged_output
from pissa.errors import OutputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_in_a_process(work: Callable[[], None]) -> int:
    """The wait status of a process that did the work; a KeyboardInterrupt ends it as usual."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except KeyboardInterrupt:
            os._exit(130)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def killed(target: Path, job: str | None, file: str = "half", force: bool = False) -> Path:
    """The staging folder of a run that was killed after it wrote a file."""
    before = set(target.parent.iterdir())

    def work() -> None:
        with staged_output(target, job=job, force=force) as folder:
            (folder / file).write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(run_in_a_process(work)) == signal.SIGKILL
    (left,) = set(target.parent.iterdir()) - before
    return left


def leave(target: Path, job: str, error: BaseException) -> None:
    with staged_output(target, job=job) as folder:
        (folder / "half").write_text("half")
        raise error


def test_a_killed_job_is_given_its_folder_again(tmp_path: Path):
    target = tmp_path / "out"
    left = killed(target, "rank 4")
    assert names(left) == ["half", JOB]
    with staged_output(target, job="rank 4") as folder:
        assert (folder / "half").read_text() == "half"
        assert names(folder) == ["half", JOB]
        assert names(tmp_path) == [folder.name]
        assert f"-{os.getpid()}-" in folder.name  # by which others tell that it is alive again
        (folder / "rest").write_text("rest")
    assert names(tmp_path) == ["out"]
    assert names(target) == ["half", "rest"]


def test_a_job_may_be_killed_again_and_again(tmp_path: Path):
    target = tmp_path / "out"
    killed(target, "rank 4", "one")
    killed(target, "rank 4", "two")
    assert len(names(tmp_path)) == 1
    with staged_output(target, job="rank 4") as folder:
        assert names(folder) == [JOB, "one", "two"]
    assert names(target) == ["one", "two"]


@pytest.mark.parametrize("job", ["rank 8", "rank", None])
def test_another_job_sweeps_and_starts_afresh(tmp_path: Path, job: str | None):
    killed(tmp_path / "out", "rank 4")
    with staged_output(tmp_path / "out", job=job) as folder:
        assert names(folder) == ([JOB] if job else [])
        assert names(tmp_path) == [folder.name]
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("text", [None, "", "rank"])
def test_a_folder_that_does_not_name_the_job_in_full_is_swept(tmp_path: Path, text: str | None):
    left = killed(tmp_path / "out", None)
    if text is not None:
        (left / JOB).write_text(text)
    with staged_output(tmp_path / "out", job="rank 4") as folder:
        assert names(folder) == [JOB]
        assert names(tmp_path) == [folder.name]


def test_the_job_of_another_target_is_left_alone(tmp_path: Path):
    left = killed(tmp_path / "out2", "rank 4")
    with staged_output(tmp_path / "out", job="rank 4") as folder:
        assert names(folder) == [JOB]
    assert names(tmp_path) == sorted([left.name, "out"])


def test_of_two_dead_runs_of_a_job_one_goes_on_and_the_other_is_swept(tmp_path: Path):
    left = killed(tmp_path / "out", "rank 4")
    other = left.with_name(left.name[:-1] + ("0" if left.name[-1] != "0" else "1"))
    other.mkdir()
    (other / JOB).write_text("rank 4")
    (other / "half").write_text("half")
    with staged_output(tmp_path / "out", job="rank 4") as folder:
        assert names(folder) == ["half", JOB]
        assert names(tmp_path) == [folder.name]


def test_a_live_run_of_the_same_job_keeps_its_folder(tmp_path: Path):
    living = tmp_path / f".out.partial-{platform.node()}-{os.getppid()}-0123abcd"
    living.mkdir()
    (living / JOB).write_text("rank 4")
    with staged_output(tmp_path / "out", job="rank 4") as folder:
        assert names(folder) == [JOB]
    assert names(tmp_path) == sorted([living.name, "out"])
    assert names(living) == [JOB]


def test_an_interrupt_keeps_the_work_for_a_later_process(tmp_path: Path):
    status = run_in_a_process(lambda: leave(tmp_path / "out", "rank 4", KeyboardInterrupt()))
    assert os.waitstatus_to_exitcode(status) == 130
    assert not (tmp_path / "out").exists()
    with staged_output(tmp_path / "out", job="rank 4") as folder:
        assert names(folder) == ["half", JOB]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "error", [ValueError(), SystemExit(1), OSError(errno.ENOSPC, "full"), GeneratorExit()]
)
def test_any_other_exception_removes_the_work(tmp_path: Path, error: BaseException):
    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        leave(tmp_path / "out", "rank 4", error)
    assert names(tmp_path) == []


def test_what_a_failed_run_had_from_a_killed_one_is_removed_too(tmp_path: Path):
    killed(tmp_path / "out", "rank 4")
    with pytest.raises(ValueError, match="no"):
        leave(tmp_path / "out", "rank 4", ValueError("no"))
    assert names(tmp_path) == []


def test_a_refused_target_does_not_cost_the_work(tmp_path: Path):
    target = tmp_path / "out"
    left = killed(target, "rank 4")
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(OutputError, match="--force"), staged_output(target, job="rank 4"):
        pytest.fail("the block must not run")
    assert names(tmp_path) == sorted([left.name, "out"])
    with staged_output(target, job="rank 4", force=True) as folder:
        assert names(folder) == ["half", JOB]
        assert names(target) == ["old"]
    assert names(target) == ["half"]
    assert names(tmp_path) == ["out"]


def test_room_that_is_taken_already_is_not_asked_for_again(tmp_path: Path):
    killed(tmp_path / "out", "rank 4")
    with staged_output(tmp_path / "out", job="rank 4", needs_bytes=10**18) as folder:
        assert names(folder) == ["half", JOB]
    with (
        pytest.raises(OutputError, match="bytes"),
        staged_output(tmp_path / "more", job="rank 4", needs_bytes=10**18),
    ):
        pytest.fail("the block must not run")
