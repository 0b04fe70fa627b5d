"""GLUE from its official files to a table: the right rows, the right measure, the rate that the dev score chose."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from typer.testing import CliRunner

from pissa.cli import glue as command
from pissa.comparison.analysis import Comparison
from pissa.comparison.grid import Cell
from pissa.comparison.outcome import Outcome
from pissa.errors import ConfigError, DataError, InputError, OutputError, PissaError
from pissa.evaluation import glue as running
from pissa.evaluation.glue import glue, rates_of, read_rates, report, scores_on
from pissa.evaluation.glue_comparison import TaskComparison, spread
from pissa.evaluation.glue_page import seconds
from pissa.evaluation.glue_results import FLOOR, Results
from pissa.evaluation.glue_rows import load, stage
from pissa.evaluation.glue_tasks import MISMATCHED, TASKS, named
from pissa.training.folder import read_metrics
from training_runs import save_tokenizer

SHORT = {"max_steps": 2, "batch_size": 4, "max_length": 24, "rank": 2, "device": "cpu"}
"""Runs of seconds."""
WORDS = ("good", "bad", "fine", "dull")


def official(folder: Path, count: int = 12, only: str = "") -> Path:
    """The nine tasks with made rows, in the columns, folders and odd spellings of the official files."""
    first, second = (
        lambda n: f'a {WORDS[n % 4]} "film {n}',
        lambda n: f"it was {WORDS[(n + 1) % 4]} , {n}",
    )
    yes = ("entailment", "not_entailment")
    tables: dict[str, tuple[list[str], Any]] = {
        "CoLA": ([], lambda n: ["gj04", n % 2, "" if n % 2 else "*", first(n)]),
        "sst-2": (["sentence", "label"], lambda n: [first(n), n % 2]),
        "MRPC": (["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
                 lambda n: [int(n % 3 > 0), n, n, first(n), second(n)]),
        "STS-B": (["index", "genre", "sentence1", "sentence2", "score"],
                  lambda n: [n, "main", first(n), second(n), f"{n % 6}.000"]),
        "QQP": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
                lambda n: [n, n, n, first(n), second(n), n % 2]),
        "QNLI": (["index", "question", "sentence", "label"], lambda n: [n, first(n), second(n), yes[n % 2]]),
        "RTE": (["index", "sentence1", "sentence2", "label"], lambda n: [n, first(n), second(n), yes[n % 2]]),
        "WNLI": (["index", "sentence1", "sentence2", "label"], lambda n: [n, first(n), second(n), n % 2]),
        "MNLI": (["index", "genre", "sentence1", "sentence2", "label1", "gold_label"],
                 lambda n: [n, "fiction", first(n), second(n), "neutral",
                            ("entailment", "neutral", "contradiction")[n % 3]]),
    }  # fmt: skip
    for name, (header, row) in tables.items():
        if only not in ("", name):
            continue
        (folder / name).mkdir(parents=True)
        parts = ("train", "dev_matched", "dev_mismatched") if name == "MNLI" else ("train", "dev")
        for index, part in enumerate(parts):
            lines = ([header] if header else []) + [row(n + index) for n in range(count)]
            text = "".join("\t".join(map(str, line)) + "\n" for line in lines)
            (folder / name / f"{part}.tsv").write_text(text, encoding="utf-8")
        (folder / name / "test.tsv").write_text(
            "index\tsentence\n0\tunlabelled\n", encoding="utf-8"
        )
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 16 columns."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, type_vocab_size=1,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def nine(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """LoRA on all tasks and full fine-tuning on MNLI, one rate and seed."""
    root = tmp_path_factory.mktemp("nine")
    out, data = root / "out", str(official(root / "glue"))
    for tasks, method, rate in (
        (list(TASKS.values()), "lora", 1e-2),
        (named("mnli"), "full", 1e-3),
    ):
        results = glue(
            str(encoder), tasks, [method], {"": (rate,)}, [0], out, data=data, given=SHORT
        )
    return out, results


def test_all_nine_tasks_run_from_official_files_and_give_gl_ues_measures(
    nine: tuple[Path, Results],
) -> None:
    out, results = nine
    numbers = json.loads((out / "glue.json").read_text())
    assert list(numbers["tasks"]) == [
        "cola",
        "sst2",
        "mrpc",
        "stsb",
        "qqp",
        "mnli",
        "qnli",
        "rte",
        "wnli",
    ]
    found = {
        name: list(task["methods"]["lora"]["scores"]) for name, task in numbers["tasks"].items()
    }
    assert found == {
        "cola": ["matthews"], "sst2": ["accuracy"], "mrpc": ["accuracy", "f1"], "stsb": ["pearson", "spearman"],
        "qqp": ["accuracy", "f1"], "mnli": ["accuracy", MISMATCHED], "qnli": ["accuracy"], "rte": ["accuracy"],
        "wnli": ["accuracy"],
    }  # fmt: skip
    run = json.loads((out / "mrpc/cells/lora/lr-0.01/seed-0/run.json").read_text())
    assert numbers["tasks"]["mrpc"]["methods"]["lora"]["scores"]["f1"]["median"] == run["eval_f1"]
    source = numbers["tasks"]["cola"]["data"]["sources"]["train"]
    assert source["sha256"] == hashlib.sha256(Path(source["name"]).read_bytes()).hexdigest()
    assert source["rows"] == 12
    assert numbers["tasks"]["cola"]["settings"]["max_steps"] == 2
    # GLUE's average: a task's measures first, then the tasks.
    means = [
        statistics.fmean(score["median"] for score in task["methods"]["lora"]["scores"].values())
        for task in numbers["tasks"].values()
    ]
    assert numbers["average"]["methods"]["lora"] == pytest.approx(statistics.fmean(means))
    columns, rows = results.table()
    assert [row[0] for row in rows] == ["full", "lora", FLOOR]
    assert all(len(row) == len(columns) for row in rows)
    page = (out / "glue.html").read_text()
    assert "chosen on the dev set" in page
    assert "https://" not in page


def test_texts_with_quotation_marks_and_a_byte_order_mark_arrive_as_they_are(
    tmp_path: Path,
) -> None:
    rows = load(TASKS["mrpc"], str(official(tmp_path / "glue", only="MRPC"))).rows["train"]
    assert rows[1].fields == {
        "sentence1": 'a bad "film 1',
        "sentence2": "it was fine , 1",
        "label": "1",
    }
    cola = load(TASKS["cola"], str(official(tmp_path / "cola", only="CoLA"))).rows["train"]
    assert len(cola) == 12  # no header, so the first line is a row
    assert cola[0].fields == {"sentence": 'a good "film 0', "label": "0"}


def test_real_files_are_read_whole(shared: Path) -> None:
    counts = {
        "cola": (8551, 1043),
        "sst2": (10000, 872),
        "mrpc": (3667, 408),
        "stsb": (5749, 1500),
        "wnli": (635, 71),
    }
    for name, expected in counts.items():
        loaded = load(TASKS[name], str(shared / "data/glue"))
        assert (len(loaded.rows["train"]), len(loaded.rows["dev"])) == expected
        assert not any(source["left_out"] for source in loaded.facts["sources"].values())
    with (shared / "data/glue/STS-B/dev.tsv").open(encoding="utf-8", newline="") as file:
        last = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[-1]
    stsb = load(TASKS["stsb"], str(shared / "data/glue")).rows["dev"][-1].fields
    assert stsb == {"sentence1": last[7], "sentence2": last[8], "label": float(last[9])}


def test_a_task_without_training_rows_splits_dev_and_says_so(shared: Path, tmp_path: Path) -> None:
    loaded = load(TASKS["qnli"], str(shared / "data/glue"))
    train, dev = loaded.rows["train"], loaded.rows["dev"]
    assert (len(train), len(dev)) == (4370, 1093)
    assert not {row.where for row in train} & {row.where for row in dev}
    assert "parts of dev" in loaded.facts["split"]
    assert [row.where for row in load(TASKS["qnli"], str(shared / "data/glue")).rows["dev"]] == [
        r.where for r in dev
    ]


def test_files_in_the_hubs_columns_give_the_rows_of_the_official_ones(tmp_path: Path) -> None:
    data = official(tmp_path / "glue", only="MNLI")
    hub = tmp_path / "hub/mnli"
    hub.mkdir(parents=True)
    order = TASKS["mnli"].classes
    loaded = load(TASKS["mnli"], str(data))
    names = {"train": "train-00000-of-00001", "dev_matched": "validation_matched",
             "dev_mismatched": "validation_mismatched"}  # fmt: skip
    for part, rows in loaded.rows.items():
        lines = [
            {"premise": row.fields["sentence1"], "hypothesis": row.fields["sentence2"],
             "label": order.index(row.fields["label"]), "idx": n}
            for n, row in enumerate(rows)
        ]  # fmt: skip
        (hub / f"{names[part]}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    again = load(TASKS["mnli"], str(tmp_path / "hub"))
    assert {p: [r.fields for r in rows] for p, rows in again.rows.items()} == {
        p: [r.fields for r in rows] for p, rows in loaded.rows.items()
    }


def test_one_torn_line_in_a_thousand_is_left_out_and_counted_and_more_are_an_error(
    tmp_path: Path,
) -> None:
    data = official(tmp_path / "glue", count=2000, only="QQP")
    train = data / "QQP/train.tsv"
    with train.open("a") as file:
        file.write("7\ttorn\n")
    loaded = load(TASKS["qqp"], str(data))
    assert loaded.facts["sources"]["train"] | {"name": "", "sha256": ""} == {
        "name": "", "sha256": "", "rows": 2000, "left_out": 1,
    }  # fmt: skip
    train.write_text("\n".join([*train.read_text().splitlines()[:20], "7\ttorn"]))
    with pytest.raises(DataError, match=r"train\.tsv, line 21: got 2 columns, expected 6"):
        load(TASKS["qqp"], str(data))


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("rte", lambda d: (d / "RTE/dev.tsv").unlink(), r"RTE: got no file dev\.\(tsv\|parquet\|jsonl\)"),
        ("rte", lambda d: (d / "RTE").rename(d / "RET"), "holds no folder RTE in any spelling, but CoLA"),
        ("sst2", lambda d: [(d / f"sst-2/{name}").write_bytes((d / "sst-2/train.tsv").read_bytes())
                            for name in ("train_1.tsv", "train_2.tsv")] and (d / "sst-2/train.tsv").unlink(),
         r"got train_1\.tsv, train_2\.tsv, expected one file"),
        ("rte", lambda d: (d / "RTE/dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n"),
         r"dev\.tsv, line 2: expected one of entailment, not_entailment in label, got 'maybe'"),
        ("stsb", lambda d: (d / "STS-B/dev.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t5.2\n"),
         "expected a score from 0 to 5 in score, got '5.2'"),
        ("qqp", lambda d: (d / "QQP/dev.tsv").write_text("a\tb\n1\t2\n"), "got columns a, b, expected those of QQP"),
        ("wnli", lambda d: (d / "WNLI/dev.tsv").write_bytes(b"\xff\xfe"), "cannot be read as UTF-8"),
    ],
)  # fmt: skip
def test_wrong_data_are_told_before_anything_is_written(
    tmp_path: Path, task: str, change: Any, message: str, encoder: Path
) -> None:
    data = official(tmp_path / "glue")
    change(data)
    with pytest.raises(DataError, match=message):
        glue(str(encoder), named(f"cola,{task}"), ["lora"], {"": (1e-3,)}, [0], tmp_path / "out", data=str(data),
             given=SHORT)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_rates_are_those_of_the_most_exact_name() -> None:
    tasks, methods = named("cola,SST-2"), ["full", "lora", "svft[width=4]"]
    rates = read_rates("1e-3,3e-4; full=1e-5; cola=2e-3; cola/lora=5e-3", tasks, methods)
    cola, sst2 = tasks
    assert rates_of(rates, sst2, "lora") == (3e-4, 1e-3)
    assert rates_of(rates, sst2, "full") == rates_of(rates, cola, "full") == (1e-5,)
    assert rates_of(rates, cola, "svft[width=4]") == (2e-3,)
    assert rates_of(rates, cola, "lora") == (5e-3,)
    for text, message in (
        ("1e-3;colla=1e-4", "Did you mean 'cola'"),
        ("fast", "expected numbers"),
        ("1e-3;full=", "expected numbers"),
        ("1e-3;2e-3", "given twice for all"),
    ):
        with pytest.raises(InputError, match=message):
            read_rates(text, tasks, methods)
    with pytest.raises(InputError, match="no rates for lora on sst2"):
        rates_of(read_rates("full=1e-3", tasks, methods), sst2, "lora")


def test_a_call_that_was_killed_at_its_first_task_can_be_repeated(
    tmp_path: Path, encoder: Path
) -> None:
    (tmp_path / "out/data/.rte.partial-host-1-0a").mkdir(parents=True)
    # Of the data, so past the check of the output
    with pytest.raises(DataError, match="is no folder"):
        glue(
            str(encoder),
            named("rte"),
            ["lora"],
            {"": (1e-3,)},
            [0],
            tmp_path / "out",
            data=str(tmp_path / "none"),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jobs": 0}, "jobs is 0, expected 1 or more"),
        ({"methods": []}, "1 tasks and 0 methods"),
        ({"tasks": []}, "0 tasks and 1 methods"),
        ({"model": "nowhere/at/all"}, "nowhere/at/all cannot be loaded"),
        ({"methods": ["lora", "lora"]}, "lora, lora, expected one or more, each once"),
        ({"seeds": []}, "seeds: got none"),
    ],
)
def test_a_wrong_plan_is_told_before_anything_is_written(
    tmp_path: Path, encoder: Path, change: dict[str, Any], message: str
) -> None:
    plan: dict[str, Any] = {
        "model": str(encoder),
        "tasks": named("rte"),
        "methods": ["lora"],
        "seeds": [0],
    }
    data = str(official(tmp_path / "glue", only="RTE"))
    with pytest.raises(PissaError, match=message):
        glue(
            output=tmp_path / "out",
            data=data,
            given=SHORT,
            rates={"": (1e-3,)},
            **{**plan, **change},
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("methods", "rates", "given", "message"),
    [
        (["pisa"], (1e-3,), {}, "unknown method 'pisa'"),
        (["lora"], (-1.0,), {}, "learning_rate"),
        (["lora"], (1e-3,), {"ranc": 3}, "Did you mean 'rank'"),
        (["lora"], (1e-3,), {"random_seed": 3}, "random_seed: got 3, expected nothing"),
        (["lora"], (1e-3,), {"dataset": "x"}, "dataset: got 'x', expected nothing"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_written(
    tmp_path: Path,
    encoder: Path,
    methods: list[str],
    rates: tuple[float, ...],
    given: dict[str, Any],
    message: str,
) -> None:
    data = str(official(tmp_path / "glue", only="RTE"))
    with pytest.raises(PissaError, match=message):
        glue(
            str(encoder),
            named("rte"),
            methods,
            {"": rates},
            [0],
            tmp_path / "out",
            data=data,
            given=SHORT | given,
        )
    assert not (tmp_path / "out").exists()


def test_unknown_and_repeated_tasks_are_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'mrpc'"):
        named("cola,mrcp")
    with pytest.raises(InputError, match="each once"):
        named("cola,CoLA")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, encoder: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").touch()
    (tmp_path / "strange/data/cola").mkdir(parents=True)  # data that are another program's
    with pytest.raises(OutputError, match="no results of pissa glue"):
        glue(
            str(encoder),
            named("rte"),
            ["lora"],
            {"": (1e-3,)},
            [0],
            tmp_path / "strange",
            data="x",
            given=SHORT,
        )
    with pytest.raises(OutputError, match="no results of pissa glue"):
        glue(
            str(encoder),
            named("rte"),
            ["lora"],
            {"": (1e-3,)},
            [0],
            tmp_path / "out",
            data="x",
            given=SHORT,
        )
    with pytest.raises(OutputError, match="no finished run"):
        report(tmp_path / "out")


def test_more_rates_are_added_without_training_again_and_other_rows_are_refused(
    tmp_path: Path, encoder: Path
) -> None:
    data, out = official(tmp_path / "glue", only="RTE"), tmp_path / "out"
    arguments: dict[str, Any] = {"data": str(data), "given": SHORT}
    glue(str(encoder), named("rte"), ["lora"], {"": (1e-3,)}, [0], out, **arguments)
    first = out / "rte/cells/lora/lr-0.001/seed-0/run.json"
    stamp, said = first.stat().st_mtime_ns, []
    results = glue(str(encoder), named("rte"), ["lora"], {"": (1e-3, 1e-2)}, [0], out, **arguments,
                   say=lambda name, done, total: said.append((name, done, total)))  # fmt: skip
    assert first.stat().st_mtime_ns == stamp
    assert said == [("RTE: lora, learning rate 0.01, seed 0", 2, 2)]
    assert results.tasks[0].comparison.grid_of("lora") == [1e-3, 1e-2]
    official(tmp_path / "more", only="WNLI")
    (tmp_path / "more/WNLI").rename(data / "WNLI")
    both_tasks, once = named("wnli,rte"), {"": (1e-3,)}
    with pytest.raises(ConfigError, match="rank: got 4, expected 2"):
        glue(
            str(encoder),
            both_tasks,
            ["lora"],
            once,
            [0],
            out,
            data=str(data),
            given={**SHORT, "rank": 4},
        )
    (data / "RTE/train.tsv").write_text(
        (data / "RTE/train.tsv").read_text().replace("film 3", "film 4")
    )
    with pytest.raises(OutputError, match="other rows"):
        glue(str(encoder), both_tasks, ["lora"], once, [0], out, **arguments)
    assert sorted(path.name for path in (out / "data").iterdir()) == ["rte"]


def made(
    scores: dict[tuple[str, float], list[dict[str, float] | None]], task: str = "mrpc", **data: Any
) -> TaskComparison:
    """A task's result with these scores by method and rate, one per seed; None: diverged. Loss favours the worst."""
    runs = []
    for (method, rate), found in scores.items():
        for seed, score in enumerate(found):
            loss = [(2, next(iter(score.values())))] if score else []
            runs.append(
                Outcome(
                    Cell(method, rate, seed), score is not None, evaluation=loss, scores=score or {}
                )
            )
    result = TaskComparison(
        TASKS[task], Path("nowhere"), Comparison(runs),
        {"split": None, "sources": {}, "rows": {"train": 8, "dev": 4}, "majority": "1", **data},
        {"settings": {"data_limit": 0, "eval_limit": 0}, "base": {}, "versions": {}},
    )  # fmt: skip
    result.__dict__["floor"] = (
        {"accuracy": 0.6, "f1": 0.75} if task == "mrpc" else {"matthews": 0.0}
    )
    return result


def both(accuracy: float, f1: float) -> dict[str, float]:
    return {"accuracy": accuracy, "f1": f1}


def test_the_best_rate_is_of_the_first_measures_median_and_not_of_the_loss() -> None:
    result = made(
        {
            ("lora", 1e-4): [both(0.7, 0.9), both(0.7, 0.9), both(0.7, 0.9)],
            # Of the higher median, the lower mean
            ("lora", 1e-3): [
                both(0.8, 0.5),
                both(0.81, 0.6),
                both(0.1, 0.4),
            ],
            ("lora", 1e-2): [both(0.9, 0.9), both(0.6, 0.9), both(0.6, 0.9)],
        }
    )
    assert result.best == {"lora": 1e-3}
    assert not result.at_edge("lora")
    found = result.spreads("lora")
    assert (found["accuracy"].median, found["accuracy"].low, found["accuracy"].high) == (
        0.8,
        0.1,
        0.81,
    )
    assert found["accuracy"].deviation == pytest.approx(statistics.stdev([0.8, 0.81, 0.1]))
    assert found["f1"].median == 0.5
    assert result.score("lora") == pytest.approx((0.8 + 0.5) / 2)
    assert spread([0.5]).deviation is None


def test_a_run_that_diverged_counts_as_nothing_and_is_named() -> None:
    result = made(
        {
            ("lora", 1e-3): [None, both(0.9, 0.9)],
            ("pissa", 1e-3): [None, None],
            ("full", 1e-3): [both(0.6, 0.7)] * 2,
        }
    )
    assert result.spreads("lora")["accuracy"].median == pytest.approx(0.45)
    _, rows = Results([result]).table()
    cells = {row[0]: row[1] for row in rows}
    assert cells["lora"] == "45.0 (63.6)\n45.0 (63.6)\n1 diverged"
    assert cells["pissa"] == "diverged"
    said = " ".join(result.notes())
    assert "1 of 2 runs of lora diverged" in said
    assert "full is no better than the majority class (accuracy)" in said
    assert "edge of the grid for full (0.001), lora (0.001), pissa (0.001)" in said


def test_runs_that_no_number_counts_are_told_of() -> None:
    whole = {("lora", 1e-3): [both(0.7, 0.8)] * 2, ("pissa", 1e-3): [both(0.8, 0.8)] * 2}
    assert not any("count nowhere" in line for line in made(whole).notes())
    said = made({**whole, ("pissa", 1e-4): [both(0.9, 0.9)]}).notes()
    assert "MRPC: 1 of 5 runs count nowhere" in " ".join(
        said
    ) and "over seeds 0, 1, all of them" in " ".join(said)


def test_the_wall_time_of_an_even_number_of_runs_is_the_mean_of_the_middle_two() -> None:
    result = made({("lora", 1e-3): [both(0.7, 0.8)] * 4 + [None]})
    runs = [dataclasses.replace(run, seconds=s)
            for run, s in zip(result.comparison.outcomes, (9.0, 1.0, 2.0, 4.0, 50.0), strict=True)]  # fmt: skip
    result = dataclasses.replace(result, comparison=Comparison(runs))
    assert seconds(Results([result])) == {"mrpc": {"lora": 3.0}}


def test_a_method_that_lacks_a_task_has_no_average() -> None:
    cola = made(
        {("lora", 1e-3): [{"matthews": 0.2}], ("pissa", 1e-3): [{"matthews": 0.4}]}, task="cola"
    )
    results = Results([cola, made({("lora", 1e-3): [both(0.8, 0.6)]})])
    assert results.average("lora") == pytest.approx((0.2 + 0.7) / 2)
    assert results.average("pissa") is None
    assert results.table()[1][1][-2:] == ["-", "-"]


def test_the_floor_is_what_the_majority_class_of_the_training_rows_scores(tmp_path: Path) -> None:
    data = official(tmp_path / "glue", only="MRPC")  # two thirds are of class 1
    loaded = load(TASKS["mrpc"], str(data))
    stage(loaded, tmp_path / "out/data/mrpc")
    facts = {"settings": {"eval_limit": 0}, "base": {}, "versions": {}}
    result = TaskComparison(
        TASKS["mrpc"], tmp_path / "out/mrpc", Comparison([]), loaded.facts, facts
    )
    truth = [int(row.fields["label"]) for row in loaded.rows["dev"]]
    share = sum(truth) / len(truth)
    assert 0.5 < share < 1
    assert result.floor == pytest.approx({"accuracy": share, "f1": 2 * share / (1 + share)})


@pytest.mark.parametrize("method", ["lora", "full"])
def test_scores_on_the_matched_set_after_training_are_those_of_training(
    nine: tuple[Path, Results], method: str
) -> None:
    out, results = nine
    run = next(iter((out / "mnli/cells" / method).glob("*/seed-0")))
    again = scores_on(run, out / "data/mnli/dev_matched.jsonl")
    last = [line for line in read_metrics(run / "metrics.jsonl") if "eval_loss" in line][-1]
    assert again["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert again["eval_accuracy"] == last["eval_accuracy"]
    other = scores_on(run, out / "data/mnli/dev_mismatched.jsonl")
    assert other["eval_loss"] != again["eval_loss"]
    mnli = next(task for task in results.tasks if task.task.name == "mnli")
    assert mnli.spreads(method)[MISMATCHED].median == other["eval_accuracy"]


def test_scores_on_rows_of_other_classes_are_refused(nine: tuple[Path, Results]) -> None:
    out, _ = nine
    with pytest.raises(DataError, match="got classes 0, 1, expected contradiction"):
        scores_on(out / "mnli/cells/lora/lr-0.01/seed-0", out / "data/wnli/dev.jsonl")


def test_mnli_without_its_mismatched_set_is_said_and_has_no_average(
    tmp_path: Path, encoder: Path
) -> None:
    data = official(tmp_path / "glue", only="MNLI")
    (data / "MNLI/dev_mismatched.tsv").unlink()
    results = glue(str(encoder), named("mnli"), ["lora"], {"": (1e-2,)}, [0], tmp_path / "out", data=str(data),
                   given=SHORT)  # fmt: skip
    assert "MNLI, dev_mismatched: not run" in " ".join(results.notes())
    assert results.table()[1][0][1].split("\n")[1] == "not run"
    assert results.average("lora") is None
    assert results.floor is None


def test_a_run_is_evaluated_once_an_epoch_and_given_settings_win(tmp_path: Path) -> None:
    loaded = load(TASKS["rte"], str(official(tmp_path / "glue", only="RTE")))
    usual = running.settings_of("model", loaded, tmp_path, {})
    assert (usual.batch_size, usual.epochs, usual.rank, usual.eval_steps) == (32, 3, 8, 1)
    assert running.settings_of(
        "model", loaded, tmp_path, {"batch_size": 5}
    ).eval_steps == math.ceil(12 / 5)
    other = running.settings_of(
        "model", loaded, tmp_path, {"lora_r": 4, "batch_size": 5, "data_limit": 5}
    )
    assert (other.rank, other.eval_steps) == (4, 1)


def test_the_command_trains_a_decoder_and_prints_table_or_json(base: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command(context_settings={"ignore_unknown_options": True})(command.glue)
    words = [str(base), "--data", str(official(tmp_path / "glue", only="STS-B")), "--tasks", "stsb",
             "--output", str(tmp_path / "out"), "--methods", "pissa", "--lr", "1e-3;pissa=1e-2", "--seeds", "1",
             *(word for key, value in SHORT.items() for word in (f"--{key}", str(value)))]  # fmt: skip
    runner = CliRunner()
    done = runner.invoke(app, words, catch_exceptions=False)
    assert "STS-B" in done.stdout
    assert "pissa" in done.stdout
    assert "pissa report" in done.stderr
    numbers = json.loads(runner.invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    assert numbers == json.loads((tmp_path / "out/glue.json").read_text())
    assert list(numbers["tasks"]["stsb"]["methods"]) == ["pissa"]
    assert numbers["tasks"]["stsb"]["methods"]["pissa"]["learning_rate"] == 1e-2
    with pytest.raises(ConfigError, match="got no model"):
        runner.invoke(app, ["--output", "x"], catch_exceptions=False)


@pytest.mark.slow
def test_minilm_beats_the_majority_class_on_mrpc(
    minilm: Path, shared: Path, tmp_path: Path
) -> None:
    given = {"max_steps": 150, "batch_size": 16, "max_length": 64, "device": "cpu"}
    results = glue(str(minilm), named("mrpc"), ["full"], {"": (1e-4,)}, [0], tmp_path / "out",
                   data=str(shared / "data/glue"), given=given)  # fmt: skip
    mrpc = results.tasks[0]
    assert mrpc.floor["accuracy"] == pytest.approx(279 / 408, abs=0.02)
    assert mrpc.score("full") > statistics.fmean(mrpc.floor.values())
