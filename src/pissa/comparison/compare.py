"""Run the cells of a comparison that are missing, and read all that are there.

OUT/settings.yaml   what all cells share
OUT/cells/METHOD/lr-RATE/seed-SEED/   ordinary runs
OUT/compare.json    OUT/compare.html    OUT/landscape.json, if asked for
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import yaml

from pissa.checkpoint.output import read_json, write_json
from pissa.comparison.analysis import Comparison
from pissa.comparison.findings import supported, unsupported
from pissa.comparison.grid import CELLS, Cell, cells, check_common, check_jobs, part
from pissa.comparison.landscape import landscape, write
from pissa.comparison.outcome import outcome, outcomes
from pissa.comparison.page import write_comparison
from pissa.config import TrainSettings, config_error
from pissa.errors import BusyError, DivergedError, InputError, OutputError, PissaError
from pissa.registry import CONTROL
from pissa.training import train
from pissa.training.checks import check
from pissa.training.folder import RECORD, SETTINGS
from pissa.untyped import Json

RESULT, PAGE = "compare.json", "compare.html"
EVALUATIONS = 10


def compare(
    settings: TrainSettings,
    methods: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    *,
    jobs: int = 1,
    which: str | None = None,
    say: Callable[[Cell, int, int], None] = lambda cell, done, total: None,
) -> Comparison:
    """Train every method at every learning rate and seed: same start, same rows in the same order.

    Each cell is an ordinary run, so it goes on where a kill left it; cells that are there are not
    trained again, and later calls may add methods, rates and seeds.

    Args:
        settings: what all cells share; `output` is the comparison's folder. method, learning_rate
            and seed are ignored.
        methods: names for `TrainSettings.method`, NAME-control among them.
        rates: learning rates, the same for every method.
        seeds: of the start, a new head and the order of the data.
        jobs: cells trained side by side on this machine, each in a process with its share of the
            cores (or its GPU).
        which: "2/4" for the second of four such calls, on machines that share the folder; None for
            all cells.
        say: told of each cell that ends, with how many are done of how many.

    Raises:
        ConfigError: settings that are wrong, or other than those of the cells that are there.
        PissaError: what a cell raised, its name first; one whose loss is not a number any more is
            an outcome instead.
    """
    check_jobs(jobs)
    out = Path(settings.output)
    grid = part(cells(methods, rates, seeds), which)
    common = _common(settings)
    for cell in cells(methods, rates, seeds):
        own = cell.settings(common, out)
        if (cell.learning_rate, cell.seed) == (rates[0], seeds[0]):
            check(own, resume=True)
    _claim(out, common)
    open_cells = [cell for cell in grid if outcome(cell, out) is None]
    done = len(grid) - len(open_cells)
    for cell in _trained(open_cells, common, out, jobs):
        done += 1
        say(cell, done, len(grid))
    comparison = report(out)
    while len(outcomes(out)) != len(comparison.outcomes):  # another part ended a cell meanwhile
        comparison = report(out)
    return comparison


def missing(grid: Sequence[Cell], out: Path) -> int:
    """How many cells of a grid have no outcome yet."""
    return sum(outcome(cell, out) is None for cell in grid)


def report(out: Path) -> Comparison:
    """Read the cells that are done, and write compare.json and compare.html.

    Raises:
        OutputError: no cell is done.
        InputError: cells that did not see the same data.
    """
    found = outcomes(out)
    if not found:
        raise OutputError(f"{out} holds no finished run in {CELLS}/: run pissa compare first")
    for seed in {result.cell.seed for result in found}:
        rows = {
            result.tokens: result.cell
            for result in found
            if result.cell.seed == seed and result.tokens
        }
        if len(rows) > 1:
            first, second, *_ = rows.values()
            raise InputError(
                f"the data of two cells differ: {first} and {second}. Delete the folders of one kind and run again"
            )
    comparison = Comparison(found)
    facts = _facts(found[0].cell.folder(out), out)
    said = {"supported": supported(comparison), "unsupported": unsupported(comparison)}
    write_json(out / RESULT, {"format": 1, **facts, **said, **comparison.to_json()})
    write_comparison(comparison, facts, out / PAGE)
    return comparison


def add_landscape(
    out: Path, say: Callable[[int, int], None] = lambda done, total: None, **options: int
) -> Comparison:
    """Compute the loss around the start for the adapters at their best rates (first seed), and
    write it into the page.

    Args:
        out: a comparison's folder.
        say: told how many points of the grid are done.
        options: grid and rows of `landscape`.
    """
    comparison = report(out)
    runs = {
        method: Cell(method, rate, comparison.seeds[0]).folder(out)
        for method, rate in comparison.best.items()
        if method != "full" and not method.endswith(CONTROL)
    }
    if len(runs) < 2:
        raise InputError(
            f"{out} holds {len(runs)} adapters at their best rates, expected two or more for a landscape"
        )
    write(
        out,
        landscape(runs, say=say, **options),
        {method: comparison.best[method] for method in runs},
    )
    return report(out)


def _common(settings: TrainSettings) -> TrainSettings:
    if not (settings.eval_data or settings.eval_size):
        raise config_error(
            ["eval_data: got nothing, expected it, or eval_size, to compare by"], "the settings"
        )
    if settings.force:
        raise config_error(["force: got true, expected false: name another output"], "the settings")
    if settings.options:
        raise config_error(
            [
                f"options: got {settings.options}, expected them behind the method they are for, as corda[mode=kpm]"
            ],
            "the settings",
        )
    if settings.early_stopping:
        raise config_error(
            ["early_stopping: got it, expected 0: all cells have the same budget"], "the settings"
        )
    if not (settings.eval_steps or settings.max_steps):
        raise config_error(
            ["eval_steps: got 0 without max_steps, expected one of them, to see the course"],
            "the settings",
        )
    every = settings.eval_steps or max(settings.max_steps // EVALUATIONS, 1)
    return settings.model_copy(update={"eval_steps": every})


def _claim(out: Path, common: TrainSettings) -> None:
    """Say what all cells share, or check that those which are there share it."""
    file = out / SETTINGS
    if file.is_file() and not (out / RECORD).exists():
        check_common(yaml.safe_load(file.read_text(encoding="utf-8")), common, out)
        return
    if (out / RECORD).exists():
        raise OutputError(f"{out} holds a training run: choose another folder for the comparison")
    if out.exists() and (
        not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())
    ):
        raise OutputError(f"{out} is there and holds no comparison: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    partial.write_text(
        yaml.safe_dump(common.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
    )
    try:
        # Unlike a rename it never replaces what another part has just written
        os.link(partial, file)
    except FileExistsError:
        check_common(yaml.safe_load(file.read_text(encoding="utf-8")), common, out)
    finally:
        partial.unlink()


def _trained(open_cells: list[Cell], common: TrainSettings, out: Path, jobs: int) -> Iterator[Cell]:
    """Each cell as it ends."""
    if jobs == 1 or len(open_cells) < 2:
        for cell in open_cells:
            yield _train(cell, common, out)
        return
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for index in range(jobs):
        places.put(index)
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, context, _settle, (places, threads)) as pool:
        futures = [pool.submit(_train, cell, common, out) for cell in open_cells]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _settle(places: Any, threads: int) -> None:
    """Give a process its share of the machine, before it touches a GPU, and end it with the one that began it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place = places.get()
    if count := torch.cuda.device_count():
        asked = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = asked.split(",")[place % count]
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """A run that nobody waits for any more would go on for hours, and be in the way of the same command typed again."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _train(cell: Cell, common: TrainSettings, out: Path) -> Cell:
    try:
        train(cell.settings(common, out), resume=True)
    except DivergedError:
        pass  # run.json says so; an outcome like any other
    except BusyError:
        return cell  # another call is at it
    except PissaError as error:
        raise type(error)(f"{cell}: {error}") from error
    finally:
        gc.collect()  # models are in circles of references; the next cell must not be measured with this one
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if common.save_total_limit:  # 0 keeps all of them, for the paths of a landscape
        shutil.rmtree(cell.folder(out) / "checkpoints", ignore_errors=True)
    return cell


def _facts(run: Path, out: Path) -> Json:
    """What all cells share, from one of them."""
    record = read_json(run / RECORD)
    common = yaml.safe_load((out / SETTINGS).read_text(encoding="utf-8"))
    return {
        "settings": common,
        "data": record.get("data"),
        "base": {key: record["base"].get(key) for key in ("name", "revision", "dtype")},
        "versions": record.get("versions"),
        "threads": torch.get_num_threads(),
    }
