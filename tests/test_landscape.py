"""The plane of the runs' paths, and the loss on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pissa
from pissa.comparison.landscape import draw, landscape, read, write
from pissa.errors import InputError
from pissa.surgery.folders import read_changes
from pissa.training import language, train
from pissa.training.data import load_rows


@pytest.fixture
def runs(settings: Any, tmp_path: Path) -> dict[str, Path]:
    """LoRA and PiSSA with all their checkpoints."""
    for method in ("lora", "pissa"):
        train(settings(method, method=method, save_steps=2, save_total_limit=0))
    return {method: tmp_path / method for method in ("lora", "pissa")}


def dense(run: Path) -> torch.Tensor:
    """The whole change of a run as one vector."""
    changes = read_changes(run).changes
    return torch.cat(
        [changes[target].delta().flatten() for target in sorted(changes, key=lambda t: t.module)]
    ).double()


def loss_of(model: Any, rows: list[dict[str, Any]]) -> float:
    total, count = 0.0, 0
    for row in rows:
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        for position, label in enumerate(labels[0, 1:].tolist()):
            if label != -100:
                total, count = total - float(scores[position, label]), count + 1
    return total / count


@torch.no_grad()
def test_distances_on_the_plane_are_those_of_the_weights_and_losses_those_of_the_models(
    runs: dict[str, Path], settings: Any, base: Path
) -> None:
    found = landscape(runs, grid=5, rows=4)
    assert found.steps == {"lora": [0, 2, 4, 6], "pissa": [0, 2, 4, 6]}
    assert found.share > 0.9
    vectors = {name: dense(run) for name, run in runs.items()}
    ends = {name: torch.tensor(path[-1]).double() for name, path in found.paths.items()}
    apart = (vectors["lora"] - vectors["pissa"]).norm()
    assert (ends["lora"] - ends["pissa"]).norm() == pytest.approx(float(apart), rel=0.05)
    assert ends["pissa"].norm() <= vectors["pissa"].norm() * (1 + 1e-6)

    # The grid's loss at a point is that of the base moved there: here along both paths' ends.
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    rows = language.encode(load_rows(settings()), tokenizer, settings()).evaluation[:4]
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    corners = dataclasses.replace(found)
    middle = [
        [axis.index(value) for value in axis if abs(value) < 1e-9]
        for axis in (corners.x, corners.y)
    ]
    start = loss_of(model, rows)
    assert min(min(line) for line in found.losses) < start < max(max(line) for line in found.losses)
    for column, row in zip(*middle, strict=True):
        assert found.losses[row][column] == pytest.approx(start, rel=1e-5)


@torch.no_grad()
def test_two_ends_span_a_plane_that_holds_them_exactly(
    runs: dict[str, Path], settings: Any, base: Path
) -> None:
    for run in runs.values():
        for checkpoint in (run / "checkpoints").glob("*/whole"):
            checkpoint.unlink()
    found = landscape(runs, grid=3, rows=4)
    assert found.share == pytest.approx(1)
    for name, run in runs.items():
        assert torch.tensor(found.paths[name][-1]).norm() == pytest.approx(
            float(dense(run).norm()), rel=1e-5
        )
    figure = draw(found)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "lora",
        "pissa",
        "start",
    ]


@torch.no_grad()
def test_the_loss_at_a_runs_end_is_the_trained_models(
    runs: dict[str, Path], settings: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in runs.values():
        for checkpoint in (run / "checkpoints").glob("*/whole"):
            checkpoint.unlink()
    coordinates = landscape(runs, grid=3, rows=4).paths["pissa"][-1]
    monkeypatch.setattr(
        "pissa.comparison.landscape._axis",
        lambda values, grid: [0.0, values_of(values, coordinates)],
    )
    found = landscape(runs, grid=3, rows=4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    rows = language.encode(load_rows(settings()), tokenizer, settings()).evaluation[:4]
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert found.losses[0][0] == pytest.approx(loss_of(plain, rows), rel=1e-5)
    trained = pissa.load(plain, runs["pissa"], trainable=False).eval()
    assert found.losses[1][1] == pytest.approx(loss_of(trained, rows), rel=1e-4)


def values_of(values: list[float], point: tuple[float, float]) -> float:
    """Which of the point's two coordinates is among the values."""
    return next(part for part in point if part in values)


def test_a_landscape_is_read_back(runs: dict[str, Path], tmp_path: Path) -> None:
    found = landscape(runs, grid=3, rows=2)
    rates = {"lora": 1e-3, "pissa": 3e-4}
    assert read(tmp_path, rates) is None
    write(tmp_path, found, rates)
    assert read(tmp_path, {**rates, "full": 1e-4}) == found
    assert read(tmp_path, {**rates, "pissa": 1e-3}) is None  # its best rate is another now


def test_runs_without_a_shared_plane_are_refused(
    runs: dict[str, Path], settings: Any, words: Path, tmp_path: Path
) -> None:
    for run in runs.values():
        for checkpoint in (run / "checkpoints").glob("*/whole"):
            checkpoint.unlink()
    with pytest.raises(InputError, match="on one line"):
        landscape({"lora": runs["lora"]}, grid=3)
    with pytest.raises(InputError, match="grid is 2"):
        landscape(runs, grid=2)
    train(settings("whole", method="full"))
    with pytest.raises(InputError, match=r"whole is a run of full for language \(finished\)"):
        landscape({**runs, "whole": tmp_path / "whole"})
    words.write_text(words.read_text() + '{"prompt": "x", "completion": "y"}\n')
    train(settings("other"))
    with pytest.raises(InputError, match="different data"):
        landscape({**runs, "other": tmp_path / "other"})
