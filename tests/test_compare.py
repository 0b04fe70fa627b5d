"""A comparison is fair, goes on, and says no more than its numbers."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from markupsafe import escape
from scipy import stats

from pissa.comparison import compare, report
from pissa.comparison.analysis import Comparison
from pissa.comparison.findings import supported, unsupported
from pissa.comparison.grid import Cell, cells, part
from pissa.comparison.outcome import Outcome, outcomes
from pissa.comparison.page import write_comparison
from pissa.comparison.statistics import holm, mean, paired
from pissa.errors import BusyError, ConfigError, InputError, OutputError, PissaError
from pissa.training import train
from pissa.training.folder import held, read_metrics

METHODS, RATES, SEEDS = ["full", "lora", "pissa", "pissa-control"], [1e-3, 1e-2], [0, 1]


def made(
    method: str, rate: float, seed: int, end: float, old: float = 2.0, start: float = 5.0
) -> Outcome:
    """An outcome with a straight curve from `start` to `end` in four steps, old loss rising from 1 to `old`."""
    cell = Cell(method, rate, seed)
    if math.isinf(end):
        return Outcome(cell, finished=False)
    curve = [(step, start + (end - start) * step / 4) for step in range(5)]
    forgotten = [(step, 1 + (old - 1) * step / 4) for step in range(5)]
    return Outcome(cell, True, 10, 1.0, 1000, curve, curve, forgotten)


def grid(ends: dict[tuple[str, float], list[float]], **more: float) -> Comparison:
    return Comparison(
        [
            made(method, rate, seed, end, **more)
            for (method, rate), found in ends.items()
            for seed, end in enumerate(found)
        ]
    )


def test_means_and_paired_tests_are_those_of_scipy():
    first, second = [3.0, 3.2, 3.1, 2.7], [3.3, 3.3, 3.5, 2.8]
    assert mean(first).mean == pytest.approx(3.0)
    assert mean(first).error == pytest.approx(stats.sem(first))
    test = paired(first, second)
    assert test.p == pytest.approx(stats.ttest_rel(first, second).pvalue)
    assert test.difference == pytest.approx(-0.225)
    # The shared part of a seed cancels out: an unpaired test does not see this difference.
    assert test.p < 0.06 < stats.ttest_ind(first, second).pvalue
    assert paired([1.0], [2.0]).p is None
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert paired([2.0, 2.0], [2.5, 2.5]).p is None  # seeds that change nothing are one run


def test_holm_multiplies_the_smallest_p_by_the_number_of_tests():
    tests = {
        name: paired([0.0, size, 2 * size + 0.1], [1.0, 1.15, 1.3])
        for name, size in zip("abc", (0.1, 0.4, 0.5), strict=True)
    }
    p = sorted(test.p for test in tests.values())
    adjusted = sorted(test.adjusted for test in holm(tests).values())
    assert adjusted[0] == pytest.approx(min(1, 3 * p[0]))
    assert adjusted[1] == pytest.approx(max(adjusted[0], min(1, 2 * p[1])))
    assert adjusted[2] == pytest.approx(max(adjusted[1], p[2]))


def test_the_best_rate_is_of_the_mean_and_a_diverged_seed_rules_a_rate_out():
    found = grid(
        {
            ("lora", 1e-3): [3.0, 3.1],
            ("lora", 1e-2): [1.0, math.inf],
            ("pissa", 1e-3): [2.5, 2.6],
            ("pissa", 1e-2): [2.8, 2.2],
        }
    )
    assert found.best == {"lora": 1e-3, "pissa": 1e-2}
    assert ("pissa", 1e-2) not in found.at_equal
    assert "1 run diverged" in " ".join(unsupported(found))


def test_means_are_over_the_seeds_with_which_most_can_be_compared():
    whole = {("lora", rate): [3.0, 3.1, 3.2] for rate in RATES}
    assert grid(whole | {("pissa", 1e-3): [1.0]}).seeds == [0, 1, 2]
    assert grid(whole | {("pissa", 1e-3): [2.0] * 4, ("pissa", 1e-2): [2.0] * 4}).seeds == [0, 1, 2]
    lone = Comparison([made("lora", 1e-3, 0, 3.0), made("pissa", 1e-3, 1, 2.0)])  # two parts, begun
    assert lone.seeds == [1]
    assert "in no mean" in " ".join(unsupported(lone))
    assert supported(lone) is not None


def test_a_page_of_a_comparison_that_has_just_begun_is_whole(tmp_path):
    facts = {
        "settings": {"model": "m", "data": "d", "output": "o", "rank": 4, "batch_size": 8}, "versions": {},
        "threads": 1,
        "data": {"sources": []}, "base": {},
    }  # fmt: skip
    lone = Comparison(
        [made("lora", 1e-3, 0, 3.0), made("pissa", 1e-3, 1, 2.0), made("milora", 1e-3, 1, math.inf)]
    )
    text = write_comparison(lone, facts, tmp_path / "compare.html").read_text()
    assert text.endswith("</html>\n") or text.rstrip().endswith("</html>")


def test_a_rate_with_a_seed_missing_is_no_mean():
    found = grid({("lora", 1e-3): [3.0, 3.1], ("lora", 1e-2): [1.0]})
    assert found.best == {"lora": 1e-3}
    assert found.mean("lora", 1e-2) is None


def test_a_small_difference_is_no_difference_seen_and_a_steady_one_is():
    noise = {
        ("lora", 1e-3): [3.0, 3.2, 3.1],
        ("milora", 1e-3): [3.1, 3.1, 3.12],
        ("pissa", 1e-3): [2.5, 2.7, 2.61],
    }
    said = " ".join(supported(grid(noise)))
    assert "milora at its own best rate (0.001) and lora: no difference seen" in said
    assert "pissa at its own best rate (0.001) ends 0.4967" in said
    assert "lower than lora" in said


def test_where_pissa_loses_it_is_said():
    said = " ".join(
        supported(grid({("lora", 1e-3): [3.0, 3.2, 3.1], ("pissa", 1e-3): [3.5, 3.7, 3.61]}))
    )
    assert "higher than lora" in said
    assert "pissa ends higher at 0.001" in said


def test_what_a_control_has_of_the_lead_is_a_share_of_it():
    found = grid(
        {
            ("lora", 1e-3): [4.0, 4.2, 4.1],
            ("pissa", 1e-3): [3.0, 3.2, 3.11],
            ("pissa-control", 1e-3): [3.5, 3.7, 3.61],
        }
    )
    assert found.explained("pissa", 1e-3) == pytest.approx(0.5, abs=0.01)
    assert "its random control has 50 % at 0.001" in " ".join(supported(found))
    level = grid(
        {
            ("lora", 1e-3): [4.0, 4.2, 4.1],
            ("pissa", 1e-3): [4.1, 4.1, 4.1],
            ("pissa-control", 1e-3): [3.5, 3.7, 3.61],
        }
    )
    assert level.explained("pissa", 1e-3) is None  # no lead, no share
    behind = grid(
        {
            ("lora", 1e-3): [4.0, 4.2, 4.1],
            ("pissa", 1e-3): [3.0, 3.2, 3.11],
            ("pissa-control", 1e-3): [4.5, 4.7, 4.61],
        }
    )
    # A control that is worse than LoRA explains nothing
    assert behind.explained("pissa", 1e-3) == 0
    assert "lead over lora at 0.001 no part is seen in its random control" in " ".join(
        supported(behind)
    )


def test_steps_to_loras_end_and_what_was_forgotten_by_then():
    found = grid(
        {("lora", 1e-3): [3.0, 3.0], ("pissa", 1e-3): [1.0, 1.0], ("milora", 1e-3): [4.0, 4.0]},
        old=3.0,
    )
    assert found.steps_to_reference("pissa", 1e-3, 1e-3) == 2  # 5, 4, 3, 2, 1
    assert found.old_at_reference("pissa", 1e-3, 1e-3) == pytest.approx(2.0)
    assert found.steps_to_reference("milora", 1e-3, 1e-3) is None
    said = " ".join(supported(found))
    assert "pissa 2.000, lora 3.000; milora never got there" in said


def test_a_best_rate_at_the_edge_and_unequal_grids_are_named():
    said = " ".join(
        unsupported(
            grid(
                {
                    ("lora", 1e-3): [3.0, 3.0],
                    ("lora", 1e-2): [2.0, 2.0],
                    ("pissa", 1e-3): [1.0, 1.0],
                }
            )
        )
    )
    assert "edge of the grid for lora (0.01), pissa (0.001)" in said
    assert "different grids" in said


def test_parts_share_out_all_cells_once():
    whole = cells(METHODS, RATES, SEEDS)
    shared = [cell for index in range(1, 4) for cell in part(whole, f"{index}/3")]
    assert sorted(shared) == sorted(whole)
    assert [cell.seed for cell in whole] == sorted(cell.seed for cell in whole)
    for wrong in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(InputError, match="expected i/n"):
            part(whole, wrong)


@pytest.fixture
def common(settings, words) -> Any:
    def make(output: str = "compare", **more: Any) -> Any:
        return settings(output, eval_size=0, eval_data=str(words), old_data=str(words), eval_limit=6, eval_steps=2,
                        max_steps=4, save_steps=0, **more)  # fmt: skip

    return make


def test_all_cells_start_from_the_base_and_see_the_same_rows(common, tmp_path):
    found = compare(common(), METHODS, RATES, SEEDS)
    out = tmp_path / "compare"
    assert len(found.outcomes) == 16
    assert {result.evaluation[0][1] for result in found.outcomes} == {
        found.outcomes[0].evaluation[0][1]
    }
    for seed in SEEDS:
        assert len({result.tokens for result in found.outcomes if result.cell.seed == seed}) == 1
        first = [result.train[0][1] for result in found.outcomes if result.cell.seed == seed]
        assert max(first) == pytest.approx(min(first), rel=1e-6)  # the first batch, before any step
    assert all(len(result.old) == 3 for result in found.outcomes)
    numbers = json.loads((out / "compare.json").read_text())
    assert numbers["best_of_grid"].keys() == set(METHODS)
    ends = [
        cell["eval_loss"]
        for cell in numbers["cells"]
        if cell["method"] == "pissa" and cell["learning_rate"] == 1e-2
    ]
    row = next(
        row
        for row in numbers["equal_settings"]
        if row["method"] == "pissa" and row["learning_rate"] == 1e-2
    )
    assert row["loss"]["mean"] == pytest.approx(sum(ends) / 2)
    page = (out / "compare.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert all(str(escape(line)) in page for line in supported(found))
    assert not list(out.glob("cells/*/*/*/checkpoints"))

    # More seeds: nothing is trained again. Other settings: refused.
    stamps = {run: run.stat().st_mtime_ns for run in out.glob("cells/*/*/*/run.json")}
    said: list[tuple[int, int]] = []
    more = compare(
        common(),
        ["lora", "pissa"],
        RATES,
        [0, 1, 2],
        say=lambda cell, done, total: said.append((done, total)),
    )
    assert said == [(index, 12) for index in range(9, 13)]
    assert all(run.stat().st_mtime_ns == stamp for run, stamp in stamps.items())
    assert more.seeds == [0, 1]  # which all have
    assert more.best == found.best
    assert len(more.left_out) == 4
    with pytest.raises(ConfigError, match="rank: got 2, expected 4 as in the cells that are there"):
        compare(common(rank=2), ["lora"], RATES, SEEDS)

    # A cell on other rows does not pass for one of these.
    record = out / "cells/lora/lr-0.01/seed-0/run.json"
    record.write_text(record.read_text().replace('"tokens_sha256": "', '"tokens_sha256": "0'))
    with pytest.raises(InputError, match="the data of two cells differ"):
        report(out)


def test_no_jobs_are_refused_before_anything_is_written(common, tmp_path):
    with pytest.raises(InputError, match="jobs is 0"):
        compare(common("none"), ["lora"], [1e-2], [0], jobs=0)
    assert not (tmp_path / "none").exists()


def test_jobs_side_by_side_give_the_cells_of_one_after_the_other(common, tmp_path):
    torch.set_num_threads(1)
    compare(common("one"), ["lora", "pissa"], [1e-2], [0])
    compare(common("two"), ["lora", "pissa"], [1e-2], [0], jobs=2)
    one, two = outcomes(tmp_path / "one"), outcomes(tmp_path / "two")
    assert [result.evaluation for result in one] == [result.evaluation for result in two]


def test_a_killed_comparison_goes_on(common, tmp_path):
    settings = common("killed")
    file = tmp_path / "killed.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    program = "import sys; from pissa.cli.main import main; main()"
    words = [
        "compare",
        str(file),
        "--methods",
        "lora,pissa",
        "--lr",
        "1e-2",
        "--seeds",
        "1",
        "--json",
    ]
    process = subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.DEVNULL)
    first = tmp_path / "killed/cells/lora/lr-0.01/seed-0/run.json"
    deadline = time.monotonic() + 120
    while (
        not (first.exists() and '"finished"' in first.read_text()) and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stamp = first.stat().st_mtime_ns
    done = compare(settings, ["lora", "pissa"], [1e-2], [0])
    assert first.stat().st_mtime_ns == stamp
    whole = compare(common("whole"), ["lora", "pissa"], [1e-2], [0])
    assert [result.evaluation for result in done.outcomes] == [
        result.evaluation for result in whole.outcomes
    ]


@pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/children").exists(),
    reason="children are read from Linux's /proc",
)
def test_no_run_outlives_a_killed_comparison(common, tmp_path):
    file = tmp_path / "long.yaml"
    file.write_text(yaml.safe_dump({**common("long").model_dump(mode="json"), "max_steps": 10**6}))
    words = [
        "compare",
        str(file),
        "--methods",
        "lora,pissa",
        "--lr",
        "1e-2",
        "--seeds",
        "1",
        "--jobs",
        "2",
    ]
    process = subprocess.Popen([sys.executable, "-m", "pissa", *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (
        len(list(tmp_path.glob("long/cells/*/*/*/metrics.jsonl"))) < 2
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    left = children
    while left and time.monotonic() < deadline:
        left = [child for child in children if "python" in _command(child)]
        time.sleep(0.05)
    for child in left:
        os.kill(int(child), signal.SIGKILL)
    assert len(children) >= 2 and not left


def _command(process: str) -> str:
    """Empty for a process that is gone, or dead and not yet waited for."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def test_a_run_that_diverges_is_an_outcome(common, tmp_path):
    found = compare(common(max_grad_norm=0), ["full", "lora"], [1e-2, 1e8], [0])
    lost = [result for result in found.outcomes if not result.finished]
    assert {result.cell.learning_rate for result in lost} <= {1e8}
    assert lost
    assert found.best["full"] == 1e-2
    again = compare(common(max_grad_norm=0), ["full", "lora"], [1e-2, 1e8], [0])
    assert [result.cell for result in again.outcomes] == [result.cell for result in found.outcomes]
    line = read_metrics(lost[0].cell.folder(tmp_path / "compare") / "metrics.jsonl")
    assert line  # what was logged until then is kept


@pytest.mark.parametrize(
    ("changes", "methods", "message"),
    [
        (
            {"eval_data": None, "eval_steps": 0, "old_data": None},
            ["lora"],
            "eval_data: got nothing",
        ),
        ({"force": True}, ["lora"], "force: got true"),
        ({"eval_steps": 0, "max_steps": 0}, ["lora"], "to see the course"),
        ({"early_stopping": 2}, ["lora"], "same budget"),
        ({}, ["lora", "pisa"], "unknown method 'pisa'"),
        ({}, ["lora", "lora"], "each once"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(common, tmp_path, changes, methods, message):
    with pytest.raises(PissaError, match=message):
        compare(common().model_copy(update=changes), methods, RATES, SEEDS)
    assert not (tmp_path / "compare").exists()


@pytest.mark.parametrize(
    ("rates", "seeds"), [([1e-3, -1.0], [0]), ([1e-3, math.nan], [0]), ([1e-3], [0, -1])]
)
def test_every_rate_and_seed_is_checked_before_the_first_run(common, tmp_path, rates, seeds):
    with pytest.raises(ConfigError, match=r"learning_rate|seed"):
        compare(common(), ["lora"], rates, seeds)
    assert not (tmp_path / "compare").exists()


def test_a_cell_that_another_process_trains_is_left_to_it(common, tmp_path):
    settings = common()
    taken = Cell("lora", 1e-2, 0).folder(tmp_path / "compare")
    taken.parent.mkdir(parents=True)
    (tmp_path / "compare/settings.yaml").write_text(
        yaml.safe_dump(settings.model_dump(mode="json"))
    )
    with held(taken):
        found = compare(settings, ["lora", "pissa"], [1e-2], [0])
        with pytest.raises(BusyError, match="another process is training"):
            train(Cell("lora", 1e-2, 0).settings(settings, tmp_path / "compare"))
    assert [result.cell.method for result in found.outcomes] == ["pissa"]
    assert len(compare(settings, ["lora", "pissa"], [1e-2], [0]).outcomes) == 2


def test_a_folder_that_is_none_of_ours_is_left_alone(common, tmp_path):
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare/thesis.txt").touch()
    with pytest.raises(OutputError, match="holds no comparison"):
        compare(common(), ["lora"], RATES, SEEDS)
    shutil.rmtree(tmp_path / "compare")
    (tmp_path / "compare").mkdir()
    with pytest.raises(OutputError, match="no finished run"):
        report(tmp_path / "compare")
