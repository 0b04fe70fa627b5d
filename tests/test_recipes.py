"""Claims about the recipes: one a task and method, the paper's values, nothing said twice, copies that stand alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import pissa
from conftest import PACKABLE
from pissa import recipes
from pissa.config import KEYS, TrainSettings, load_settings
from pissa.config.files import RECIPES, read_chain
from pissa.config.reading import merged_values
from pissa.errors import ConfigError, OutputError
from test_cli import run
from training_runs import save_tokenizer

METHODS = ("full", "lora", "qlora", "loftq", "pissa", "qpissa")
GLUE = {  # arXiv 2404.02948v4, table 10: epochs, batch size, learning rate, alpha
    "mnli": (5, 16, 5e-4, 8), "sst2": (20, 16, 3e-5, 8), "mrpc": (20, 32, 2e-4, 8), "cola": (20, 16, 1e-4, 8),
    "qnli": (10, 32, 1e-4, 16), "qqp": (10, 16, 1e-4, 8), "rte": (50, 16, 1e-4, 8), "stsb": (20, 8, 3e-4, 8),
}  # fmt: skip
FLAGS = {"model": "base", "data": "rows.jsonl", "output": "out"}
"""What a small twin leaves to flags."""


def resolved(name: str | Path) -> TrainSettings:
    return load_settings(Path(name), FLAGS if "-small" in str(name) else {})


def test_there_is_one_recipe_for_each_task_and_method() -> None:
    full = {
        f"{task}-{method}"
        for task, method in itertools.product(("math", "code", "conversation"), METHODS)
    }
    small = {f"math-{method}-small" for method in METHODS}
    glue = {
        f"glue-{task}-{method}"
        for task, method in itertools.product(GLUE, ("full", "lora", "pissa"))
    }
    assert set(recipes.names()) == full | small | glue
    assert {
        (recipe.task, recipe.method) for recipe in recipes.recipes() if "-small" not in recipe.name
    } == {tuple(name.rsplit("-", 1)) for name in full | glue}


@pytest.mark.parametrize("task", ["math", "code", "conversation"])
@pytest.mark.parametrize("method", METHODS)
def test_language_recipes_have_the_papers_values(task: str, method: str) -> None:
    # arXiv 2404.02948v4, section 5 and appendix; github.com/MuLabPKU/PiSSA, scripts/
    s = resolved(f"{task}-{method}")
    assert (s.model, s.method, s.output) == ("meta-llama/Llama-2-7b-hf", method, f"{task}-{method}")
    assert (s.rank, s.alpha, s.dropout, s.targets) == (128, 128, 0, "all-linear")
    assert (s.learning_rate, s.lr_scheduler, s.warmup_ratio, s.weight_decay) == (
        2e-5,
        "cosine",
        0.03,
        0,
    )
    assert (s.batch_size, s.epochs, s.max_length, s.template) == (128, 1, 512, "alpaca")
    assert s.data_limit == (0 if task == "code" else 100_000)
    assert (s.dtype, s.bf16) == ("float32", method not in ("lora", "pissa"))


@pytest.mark.parametrize("task", GLUE)
def test_glue_recipes_have_the_values_of_table_10(task: str) -> None:
    for method in ("lora", "pissa"):
        s = resolved(f"glue-{task}-{method}")
        assert (s.epochs, s.batch_size, s.learning_rate, s.alpha) == GLUE[task]
        learns = "regression" if task == "stsb" else "classification"
        assert (s.model, s.task, s.rank) == ("microsoft/deberta-v3-base", learns, 8)
        assert s.targets == ["query_proj", "key_proj", "value_proj"]
        assert s.eval_data == s.data == f"nyu-mll/glue:{task}"
    assert resolved(f"glue-{task}-full").learning_rate == 2e-5


def test_no_file_repeats_what_it_extends() -> None:
    for file in RECIPES.glob("*.yaml"):
        *below, own = read_chain(file)
        said = {key: value for base in below for key, value in base.values.items()}
        assert not [
            key for key, value in own.values.items() if key in said and said[key] == value
        ], file.name
        assert set(own.values) <= set(KEYS), file.name


def test_the_shown_text_says_what_the_files_say() -> None:
    for name in recipes.names():
        text = recipes.text(name)
        assert yaml.safe_load(text) == merged_values(RECIPES / f"{name}.yaml"), name
        assert all(f"# {key}:" in text for key in ("model", "data", "output")) == ("-small" in name)


@pytest.mark.parametrize("name", ["math-qpissa", "glue-qnli-full", "math-lora-small"])
def test_a_copy_stands_alone(name: str, tmp_path: Path) -> None:
    copied = recipes.copy(name, tmp_path)
    assert copied == tmp_path / f"{name}.yaml"
    assert "extends" not in copied.read_text()
    assert resolved(copied) == resolved(name)


def test_a_copy_never_takes_a_files_place_unasked(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        recipes.copy("math-lora", mine)
    assert mine.read_text() == "mine"
    recipes.copy("math-lora", mine, force=True)
    assert mine.read_text() == recipes.text("math-lora")
    with pytest.raises(OutputError, match="cannot be written"):
        recipes.copy("math-lora", tmp_path / "absent" / "mine.yaml")
    assert sorted(tmp_path.iterdir()) == [mine]


def test_a_wrong_name_gets_the_nearest() -> None:
    for call in (recipes.text, recipes.copy, lambda name: load_settings(Path(name), {})):
        with pytest.raises(ConfigError, match="Did you mean 'math-pissa'"):
            call("math-pisa")
    with pytest.raises(ConfigError, match="no recipe"):
        recipes.text("base-math")


def test_the_command_lists_shows_and_copies(tmp_path: Path) -> None:
    listed = json.loads(run("recipes", "--json").stdout)
    assert [recipe["name"] for recipe in listed] == recipes.names()
    assert all(recipe["what"] and recipe["task"] for recipe in listed)
    shown = run("recipes", "show", "math-pissa")
    assert (shown.stdout, "pissa train math-pissa" in shown.stderr) == (
        recipes.text("math-pissa"),
        True,
    )
    done = run("recipes", "copy", "math-pissa-small", tmp_path / "mine.yaml")
    assert (done.returncode, done.stdout) == (0, "")
    assert f"pissa train {tmp_path / 'mine.yaml'} --model MODEL" in done.stderr
    again = run("recipes", "copy", "math-pissa-small", tmp_path / "mine.yaml")
    assert (again.returncode, "--force" in again.stderr) == (2, True)


def test_every_small_twin_trains_a_model_of_ones_own(
    pico_folder: Callable[..., Path], words: Path, tmp_path: Path
) -> None:
    base = pico_folder(vocab_size=260, **PACKABLE)
    save_tokenizer(base)
    for method in METHODS:
        flags = {
            "model": str(base),
            "data": str(words),
            "output": str(tmp_path / method),
            "max_steps": 2,
        }
        record = pissa.train(
            load_settings(
                Path(f"math-{method}-small"), {**flags, "max_length": 32, "device": "cpu"}
            )
        )
        assert (record["status"], record["steps"], record["settings"]["method"]) == (
            "finished",
            2,
            method,
        )


def test_a_subset_may_be_a_folder_of_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As fxmeng/pissa-dataset is laid out: no named configurations, a folder for each task.
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for task in ("metamath", "python"):
        (tmp_path / "set" / task).mkdir(parents=True)
        (tmp_path / "set" / task / "train.json").write_text(
            json.dumps([{"instruction": "?", "output": task}])
        )
    from pissa.training.data import _load_hub

    assert _load_hub(datasets, str(tmp_path / "set"), "python", "train")[:]["output"] == ["python"]
    with pytest.raises(Exception, match="absent"):
        _load_hub(datasets, str(tmp_path / "set"), "absent", "train")
