"""The loss around the start, on the plane in which the paths of several runs lie best.

It is the picture of the PiSSA authors' repository, for language models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pissa.checkpoint.output import read_json, write_json
from pissa.checkpoint.targets import Target, plain_modules
from pissa.comparison.plane import Changes, direction_of, plane_of
from pissa.config import TrainSettings
from pissa.errors import InputError, require
from pissa.reports.curves import COLOURS, MARKERS
from pissa.surgery.folders import read_changes
from pissa.training import language
from pissa.training.data import load_rows
from pissa.training.folder import RECORD, checkpoints, step_of
from pissa.training.models import load_tokenizer
from pissa.training.quiet import quiet
from pissa.untyped import Json

MARGIN = 0.35
"""Of the paths' extent, around them."""
FILE = "landscape.json"


@dataclass(frozen=True)
class Landscape:
    """Losses on a plane, and the paths on it.

    Attributes:
        paths: name to the points (x, y) of its path, in units of the norm of the change; the first
            is the start.
        steps: name to the optimiser step of each point.
        x: grid positions along the first direction.
        y: along the second.
        losses: losses[j][i] at (x[i], y[j]), nats per token.
        share: of the squared length of all points that the plane holds; 1 if they lie in it.
        rows: evaluation rows that the losses are means over.
    """

    paths: dict[str, list[tuple[float, float]]]
    steps: dict[str, list[int]]
    x: list[float]
    y: list[float]
    losses: list[list[float]]
    share: float
    rows: int

    def to_json(self) -> Json:
        """As it is."""
        return asdict(self)


def landscape(
    runs: Mapping[str, Path],
    *,
    grid: int = 21,
    rows: int = 16,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> Landscape:
    """Compute the loss on the plane of the runs' paths.

    Args:
        runs: name to a finished language run from a 16-bit base that is kept; all of one base and
            one data set. Points between start and end are its checkpoints (train with
            `save_total_limit: 0` to have all).
        grid: points along each direction, 3 or more.
        rows: evaluation rows to take the loss over.
        say: told how many of the grid's points are done.

    Raises:
        InputError: runs that do not share a plane.
    """
    if grid < 3 or rows < 1:
        raise InputError(f"grid is {grid} and rows is {rows}, expected 3 or more and 1 or more")
    settings = _shared_settings(runs)
    points = {name: _points(path) for name, path in runs.items()}
    everything = [changes for path in points.values() for changes in path.values()]
    coordinates, weights, share = plane_of(everything)
    directions = [direction_of(everything, weights[:, k]) for k in range(2)]
    paths, steps, taken = {}, {}, 0
    for name, path in points.items():
        found = coordinates[taken : taken + len(path)].tolist()
        paths[name] = [(0.0, 0.0), *((a, b) for a, b in found)]
        steps[name] = [0, *path]
        taken += len(path)
    x, y = (_axis([point[k] for path in paths.values() for point in path], grid) for k in range(2))
    with quiet():
        losses, used = _losses(settings, directions, x, y, rows, say)
    return Landscape(paths, steps, x, y, losses, share, used)


def write(folder: Path, found: Landscape, rates: Mapping[str, float]) -> None:
    """Leave a landscape in a comparison's folder, with the learning rate of each run on it."""
    write_json(folder / FILE, {"rates": dict(rates), **found.to_json()})


def read(folder: Path, rates: Mapping[str, float]) -> Landscape | None:
    """What an earlier call left in a comparison's folder, if these are still the methods' rates."""
    if not (folder / FILE).is_file():
        return None
    stored = read_json(folder / FILE)
    if any(rates.get(method) != rate for method, rate in stored.pop("rates").items()):
        return None
    return Landscape(
        **stored
        | {"paths": {name: [tuple(p) for p in path] for name, path in stored["paths"].items()}}
    )


def draw(found: Landscape) -> Any:
    """Contours of the loss with the paths over them; returns a matplotlib figure."""
    module, ticker = require("matplotlib.figure", "train"), require("matplotlib.ticker", "train")
    figure = module.Figure(figsize=(7.2, 5.4), layout="constrained")
    axes = figure.add_subplot()
    losses = torch.tensor(found.losses)
    start = float(losses[_nearest(found.y, 0.0), _nearest(found.x, 0.0)])
    lowest = float(losses.min())
    # Far out the loss explodes; levels are spent where the paths are, a little above the start at
    # most.
    top = min(float(losses.max()), start + 0.25 * max(start - lowest, 0.02 * start))
    levels = torch.linspace(lowest, top, 18).tolist()
    filled = axes.contourf(
        found.x, found.y, found.losses, levels=levels, cmap="cividis", extend="max", alpha=0.9
    )
    axes.contour(
        found.x, found.y, found.losses, levels=levels, colors="white", linewidths=0.4, alpha=0.6
    )
    bar = figure.colorbar(
        filled, ax=axes, label=f"loss on {found.rows} evaluation rows (nats per token)"
    )
    bar.locator = ticker.MaxNLocator(6)
    bar.update_ticks()
    for (name, path), colour, marker in zip(
        found.paths.items(), COLOURS[1::2] + COLOURS[::2], MARKERS, strict=False
    ):
        axes.plot(
            *zip(*path, strict=True),
            color=colour,
            marker=marker,
            markersize=5,
            markeredgecolor="white",
            label=name,
        )
    axes.plot(
        0,
        0,
        marker="*",
        markersize=15,
        color="white",
        markeredgecolor="black",
        linestyle="none",
        label="start",
    )
    axes.set_xlabel("first direction (norm of the change)")
    axes.set_ylabel("second direction")
    axes.legend(loc="upper right", framealpha=0.85, fontsize="small")
    return figure


def _shared_settings(runs: Mapping[str, Path]) -> TrainSettings:
    records = {name: read_json(path / RECORD) for name, path in runs.items()}
    if not records:
        raise InputError("got no run, expected two or more")
    for name, record in records.items():
        settings = record["settings"]
        if (
            record["status"] != "finished"
            or settings["task"] != "language"
            or settings["method"] == "full"
        ):
            raise InputError(
                f"{name} is a run of {settings['method']} for {settings['task']} ({record['status']}), expected a "
                "finished one of an adapter for language"
            )
    first, *others = records
    for name in others:
        for key in ("name", "revision"):
            if records[name]["base"][key] != records[first]["base"][key]:
                raise InputError(
                    f"{first} and {name} have different bases: their paths share no plane"
                )
        if [s["sha256"] for s in records[name]["data"]["sources"]] != [
            s["sha256"] for s in records[first]["data"]["sources"]
        ]:
            raise InputError(f"{first} and {name} were trained on different data")
    return TrainSettings.model_validate(records[first]["settings"])


def _points(run: Path) -> dict[int, Changes]:
    """The change of all weights at each checkpoint and at the end, by step."""
    found: dict[int, Changes] = {}
    with warnings.catch_warnings():
        # Of checkpoints, which carry no record: the run above them does
        warnings.simplefilter("ignore")
        for checkpoint in checkpoints(run / "checkpoints"):
            found[step_of(checkpoint)] = read_changes(checkpoint).changes
    final = read_changes(run)
    if final.record is None or final.record.recipe is None or final.record.beside or final.extras:
        raise InputError(
            f"{run} trained on a quantised residual or with whole modules: its path is not one of adapters"
        )
    found[int(read_json(run / RECORD)["steps"])] = final.changes
    return found


def _nearest(axis: list[float], value: float) -> int:
    return min(range(len(axis)), key=lambda index: abs(axis[index] - value))


def _axis(values: list[float], grid: int) -> list[float]:
    """Equal steps over the values and a margin on both sides."""
    low, high = min(values), max(values)
    margin = MARGIN * (high - low)
    return torch.linspace(low - margin, high + margin, grid, dtype=torch.float64).tolist()


@torch.no_grad()
def _losses(
    settings: TrainSettings,
    directions: list[dict[Target, Tensor]],
    x: list[float],
    y: list[float],
    rows: int,
    say: Callable[[int, int], None],
) -> tuple[list[list[float]], int]:
    tokenizer = load_tokenizer(settings)
    examples = language.encode(load_rows(settings), tokenizer, settings)
    held = examples.evaluation[:rows]
    if not held:
        raise InputError(
            "the runs have no evaluation rows to take the loss over: train with eval_data or eval_size"
        )
    model = language.load_model(
        settings.model_copy(update={"dtype": "float32"}), examples, tokenizer
    ).eval()
    modules: dict[str, Any] = plain_modules(model)
    base = {
        target: modules[target.module].weight.detach().clone()
        for target in directions[0].keys() | directions[1]
    }
    losses = []
    for row, second in enumerate(y):
        line = []
        for first in x:
            for target, weight in base.items():
                moved = sum(
                    scale * direction[target]
                    for scale, direction in zip((first, second), directions, strict=True)
                    if target in direction
                )
                modules[target.module].weight.copy_(weight + target.from_matrix(moved))  # type: ignore[arg-type]
            line.append(_loss(model, held))
        losses.append(line)
        say(len(x) * (row + 1), len(x) * len(y))
    return losses, len(held)


def _loss(model: Any, rows: list[Json]) -> float:
    """Mean over all tokens that carry loss; a row at a time, so padding plays no part."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        tokens = int((labels[:, 1:] != language.MASKED).sum())
        total += float(model(input_ids=ids, labels=labels).loss) * tokens
        count += tokens
    return total / count
