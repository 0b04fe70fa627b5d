"""Folders that an earlier commit wrote are read to the same bits; see old_folders/README.md.

Bits are compared where processor and versions are those of `expected.json`, and everywhere for what
is only copied or computed entry by entry; elsewhere the norm and a weighted sum of each tensor are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from old_folders import checks
from old_folders.checks import CHECKS, Check

COUNTS = {
    "load": 23,
    "resume": 7,
    "convert": 19,
    "merge": 18,
    "inspect": 43,
    "decompose": 5,
    "save": 16,
    "model": 2,
    "observations": 1,
}
"""How many checks there are of a kind: none may vanish."""


Repeat = Callable[[Check], None]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads(checks.EXPECTED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checks.place(tmp_path_factory.mktemp("old"))


@pytest.fixture
def repeat(root: Path, tmp_path: Path, expected: dict[str, Any]) -> Repeat:
    """Do again what a check does, and assert that the result is what it was."""

    def assert_as_it_was(check: Check) -> None:
        same = checks.surroundings() == expected["surroundings"]
        got = checks.described(check.run(root, tmp_path))
        found = checks.differences(check, got, expected["checks"][check.id], same=same)
        where = "" if same else " on another processor"
        assert not found, f"{check.id}{where}: {'; '.join(found)}"

    return assert_as_it_was


def of_kind(kind: str) -> pytest.MarkDecorator:
    chosen = [check for check in CHECKS if check.kind == kind]
    return pytest.mark.parametrize("check", chosen, ids=[check.name for check in chosen])


@of_kind("load")
def test_an_old_folder_loads_to_the_same_model(check: Check, repeat: Repeat) -> None:
    repeat(check)


@of_kind("resume")
def test_an_old_interrupted_run_goes_on_to_the_same_end(check: Check, repeat: Repeat) -> None:
    repeat(check)


@of_kind("convert")
def test_an_old_run_converts_to_the_same_lora(check: Check, repeat: Repeat) -> None:
    repeat(check)


@of_kind("merge")
def test_an_old_run_merges_to_the_same_model(check: Check, repeat: Repeat) -> None:
    repeat(check)


@of_kind("inspect")
def test_an_old_folder_is_taken_for_what_it_is(check: Check, repeat: Repeat) -> None:
    repeat(check)


@of_kind("decompose")
def test_a_base_decomposes_as_it_did(check: Check, repeat: Repeat) -> None:
    repeat(check)


@of_kind("save")
def test_an_old_run_is_saved_as_it_was_read(check: Check, repeat: Repeat) -> None:
    repeat(check)


@of_kind("model")
def test_an_old_whole_model_answers_the_same(check: Check, repeat: Repeat) -> None:
    repeat(check)


@of_kind("observations")
def test_old_observations_are_read_as_they_were_seen(check: Check, repeat: Repeat) -> None:
    repeat(check)


def test_no_old_file_has_changed(expected: dict[str, Any]) -> None:
    assert checks.kept_files() == expected["files"]


def test_no_check_has_vanished(expected: dict[str, Any]) -> None:
    assert [check.id for check in CHECKS] == list(expected["checks"])
    assert Counter(check.kind for check in CHECKS) == COUNTS


def test_no_old_file_says_where_it_was_made() -> None:
    names = tuple(f"/{part}/".encode() for part in ("tmp", "work", "root", "home"))
    files = [checks.HERE / name for name in checks.kept_files()]
    assert len(files) > 400
    assert not [file for file in files if any(name in file.read_bytes() for name in names)]
    assert not [file for file in files if file.suffix in (".bin", ".pkl")]
