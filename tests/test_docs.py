"""The documents say what is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import pissa
from pissa import registry

ROOT = Path(__file__).parents[1]


def test_the_drawn_tree_is_the_tree() -> None:
    package = ROOT / "src/pissa"
    files = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if file.name != "__init__.py" or file.parent == package
    }
    drawn: set[str] = set()
    folders: list[str] = []
    text = (ROOT / "docs/architecture.md").read_text()
    block = re.search(r"<!-- tree.*?-->\n```\n(.*?)```", text, re.DOTALL)
    assert block
    for line in block[1].splitlines()[1:]:
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        elif name.endswith(".py"):
            drawn.add("".join(folders) + name)
    assert drawn == files


def test_every_method_has_a_card() -> None:
    cards = {card.stem for card in (ROOT / "docs/methods").glob("*.md")}
    assert cards == set(registry.methods())


def test_public_names_are_exported_and_documented() -> None:
    for name in pissa.__all__:
        assert getattr(pissa, name).__doc__, name


def test_no_source_file_is_past_300_lines() -> None:
    long = {
        str(file): count
        for file in (ROOT / "src").rglob("*.py")
        if (count := len(file.read_text().split("\n"))) > 300
    }
    assert not long


def test_the_familys_page_is_that_of_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("write_family")
    page = script.PAGE.read_text()
    assert script.filled(page) == page
    for name in script.CASES:
        numbers = script.read(name)
        assert len(numbers["seeds"]) == 3 and len(numbers["methods"]) == 18, name
    for file in [script.DATA, *(ROOT / "docs/results").glob("family-*/*")]:
        text = file.read_text()
        assert "/work" not in text and "/tmp" not in text and "/root" not in text, file


def test_the_readmes_table_is_that_of_the_results() -> None:
    spec = importlib.util.spec_from_file_location(
        "write_results", ROOT / "scripts/write_results.py"
    )
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    results = script.read_results()
    found = script.TABLE.search((ROOT / "README.md").read_text())
    assert found[0] == found[1] + script.table(results) + found[2]
    assert (ROOT / "docs/results/README.md").read_text() == script.page(results)
    for name, numbers in results.items():
        assert len(numbers["methods"]) == 5 and len(numbers["seeds"]) == 3, name
        assert len(numbers["learning_rates"]) >= 3, name
        text = (ROOT / "docs/results" / name / "compare.html").read_text()
        assert "/work" not in text and "/tmp" not in text and "/root" not in text, name


def test_the_page_of_evaluations_is_that_of_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("write_evaluation")
    page = script.PAGE.read_text()
    assert script.filled(page) == page
    for file in [script.PAGE, *(ROOT / "docs/results").glob("eval-*/*")]:
        text = file.read_text()
        assert "/work" not in text and "/tmp" not in text and "/root" not in text, file
