"""The demo, whole, as `make demo` runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pissa.demo.run import DATA, MODEL, demo


def test_the_carried_model_is_at_most_4_megabytes() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 4_000_000


def test_evaluation_rows_are_not_among_the_training_rows() -> None:
    train, held_out = (
        {line for line in (DATA / f"{name}.jsonl").open()} for name in ("train", "eval")
    )
    assert train
    assert held_out
    assert not train & held_out


@pytest.mark.slow
def test_the_demo_proves_its_plain_lora_with_stock_peft(tmp_path: Path) -> None:
    result = demo(tmp_path / "demo")
    losses = {row["method"]: row["end_loss"] for row in result["rows"]}
    assert len({row["start_loss"] for row in result["rows"]}) == 1, "all three start at the base"
    assert losses["pissa"] < losses["lora"]
    assert result["proof"]["difference"] < 1e-4 < 1 < result["proof"]["moved"]
    assert (tmp_path / "demo/loss.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "demo/demo.json").read_text()) == result
