"""Claims about evaluating a model: it is the right one, asked as the paper asks, and never twice."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pissa
from eval_helpers import QUESTIONS, answers, ask, gsm8k, moved_run, samples, speaker
from pissa.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    MissingExtraError,
    OutputError,
    WrongBaseError,
)
from pissa.evaluation.asking import Asking
from pissa.evaluation.benchmark import _trained_prompt
from pissa.evaluation.evaluate import _subjects
from pissa.evaluation.log import AnswerLog
from pissa.evaluation.model import harness_model, subject
from pissa.evaluation.questions import questions
from pissa.evaluation.tracks import protocol
from pissa.scoring.verdict import Share
from pissa.training import train
from pissa.training.templates import ALPACA

PROMPT = ALPACA.format(instruction=QUESTIONS[0]["question"]) + " Let's think step by step."


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, another one, a run of the first, and questions."""
    place = tmp_path_factory.mktemp("place")
    speaker(place / "base")
    speaker(place / "other", seed=1)
    moved_run(place / "base", place / "run")
    gsm8k(place / "data")
    return place


@pytest.fixture(scope="module")
def out(place: Path) -> Path:
    """The run and its base, evaluated."""
    ask([place / "run"], place / "out", place / "data", base_row=True)
    return place / "out"


def continuation(model: torch.nn.Module, tokenizer: object, prompt: str) -> str:
    """Greedy, by transformers alone, as far as the model's positions go."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]  # type: ignore[operator]
    written = model.generate(input_ids=ids, do_sample=False, max_length=320, pad_token_id=0)  # type: ignore[operator]
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)  # type: ignore[attr-defined]


def test_a_run_answers_as_its_merged_model_does_and_not_as_its_base(place: Path, out: Path) -> None:
    pissa.merge(place / "base", place / "run", place / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(place / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    said = [one["output"] for one in samples(out, "run")]
    assert said[0] == continuation(merged, tokenizer, PROMPT)
    assert said != [one["output"] for one in samples(out, "base")]


def test_the_prompt_is_the_one_of_the_training_and_of_the_paper(out: Path) -> None:
    assert samples(out)[0]["prompt"] == PROMPT
    assert _trained_prompt(PROMPT) == ALPACA.format(instruction=QUESTIONS[0]["question"])


def test_a_run_on_another_base_is_an_error_before_anything_is_written(
    place: Path, tmp_path: Path
) -> None:
    with pytest.raises(WrongBaseError, match="has digest"):
        ask([place / "run"], tmp_path / "out", place / "data", base=str(place / "other"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["run", "mixed-8m", "stories260K"])
def test_gsm8k_log_likelihoods_are_those_of_transformers(
    kind: str, place: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    shared = request.getfixturevalue("shared")
    folder = place / "run" if kind == "run" else shared / "models" / kind
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        place / "base" if kind == "run" else folder
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        place / "base" if kind == "run" else folder
    )
    model = pissa.load(model, folder, trainable=False) if kind == "run" else model
    pairs = [
        (ALPACA.format(instruction=row["question"]), row["answer"])
        for row in (QUESTIONS if kind == "run" else questions("gsm8k", shared / "data", 5).rows)
    ]
    size = 1 if kind == "mixed-8m" else 4  # in 16 bits padding alone moves a log-likelihood by 3e-4
    inner = harness_model(subject(str(folder), device="cpu"), "hf", size)
    found = Asking(inner, AnswerLog(tmp_path / "log", {}), size).gold(pairs)
    for one, (asked, answered) in zip(found, pairs, strict=True):
        prompt, answer = (
            tokenizer(asked)["input_ids"],
            tokenizer(answered, add_special_tokens=False)["input_ids"],
        )
        ids = (prompt + answer)[-(inner.max_length + 1) :]
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0].float()
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        direct = -float(losses[-len(answer) :].double().sum())
        assert (one.tokens, one.cut) == (len(answer), len(prompt + answer) > len(ids))
        assert one.loglikelihood == pytest.approx(direct, rel=1e-4)


@pytest.mark.parametrize("name", ["mixed-8m", "stories260K"])
def test_logits_through_the_harness_are_those_of_transformers(name: str, shared: Path) -> None:
    folder = shared / "models" / name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")[
        "input_ids"
    ]
    inner = harness_model(subject(str(folder), device="cpu"), "hf", 1)
    with torch.no_grad():
        direct = model(ids).logits
    assert torch.equal(torch.tensor(inner.tok_encode(PROMPT)), ids[0])
    assert (inner._model_call(ids) - direct).abs().max() < 1e-4


def test_gold_perplexity_is_the_loss_of_training(place: Path, out: Path) -> None:
    """Training counts the end token too, so its mean is taken apart from it here."""
    from pissa.training.data import Row
    from pissa.training.language import MASKED, tokens
    from pissa.training.templates import scripts

    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    written = scripts([Row(row, "here") for row in QUESTIONS], "alpaca", tokenizer)
    total, count = 0.0, 0
    for ids, labels in tokens(written, tokenizer):
        ids, labels = ids[:-1], labels[:-1]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        kept = torch.tensor(labels[1:])
        losses = torch.nn.functional.cross_entropy(
            logits, kept, ignore_index=MASKED, reduction="sum"
        )
        total, count = total + float(losses), count + int((kept != MASKED).sum())
    told = json.loads((out / "base" / "gsm8k.json").read_text())["gold"]
    assert (told["tokens"], math.log(told["value"])) == (
        count,
        pytest.approx(total / count, abs=1e-5),
    )


def test_a_run_gets_its_base_as_a_row_and_the_result_says_how_to_repeat_it(
    place: Path, out: Path
) -> None:
    told = json.loads((out / "results.json").read_text())["results"]
    assert [one["model"] for one in told] == ["base", "run"]
    run = told[1]
    assert run["identity"]["base"] == told[0]["identity"]["path"] == str(place / "base")
    assert run["identity"]["dtype"] == told[0]["identity"]["dtype"] == "float32"
    assert run["data"]["sha256"]
    assert run["data"]["rows"] == len(QUESTIONS)
    assert {"pissa", "torch", "transformers", "lm_eval", "math_verify"} <= run["versions"].keys()
    assert run["settings"]["batch_size"] == 2
    assert "Alpaca" in run["protocol"]
    assert run["identity"]["sha256"] != told[0]["identity"]["sha256"]
    assert run["scores"].keys() == {"ours", "authors"}
    assert run["scores"]["ours"]["interval"][1] > 0


def test_each_answer_is_there_with_prompt_verdict_and_reason(out: Path) -> None:
    for one in samples(out, "run"):
        assert one.keys() == {
            "id",
            "correct",
            "extracted",
            "reason",
            "authors",
            "prompt",
            "output",
            "gold",
        }
        assert one["correct"] or one["reason"]


def test_what_is_there_is_not_asked_again(
    place: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (out / "run" / "gsm8k.answers.jsonl").read_bytes()

    def never(*_: object) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("pissa.evaluation.model.open_model", never)
    ask([place / "run"], out, place / "data", base_row=True)
    assert (out / "run" / "gsm8k.answers.jsonl").read_bytes() == before


PROGRAM = """
import sys
from pathlib import Path
from eval_helpers import ask
ask([Path(sys.argv[1])], Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_killed_halfway_it_goes_on_to_the_same_result_and_answers_nothing_twice(
    place: Path, tmp_path: Path
) -> None:
    ask([place / "run"], tmp_path / "whole", place / "data")
    log = tmp_path / "killed" / "run" / "gsm8k.answers.jsonl"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        ),
    }
    words = [
        sys.executable,
        "-c",
        PROGRAM,
        str(place / "run"),
        str(tmp_path / "killed"),
        str(place / "data"),
    ]
    process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and log.read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = log.read_bytes()
    assert 3 <= kept.count(b"\n") < 1 + 2 * len(QUESTIONS)
    with log.open("ab") as file:
        file.write(b'{"key": "torn')
    ask([place / "run"], tmp_path / "killed", place / "data")
    assert log.read_bytes().startswith(kept)
    keys = [one["key"] for one in answers(tmp_path / "killed", "run")]
    assert len(keys) == len(set(keys)) == 2 * len(QUESTIONS)
    assert answers(tmp_path / "killed", "run") == answers(tmp_path / "whole", "run")
    assert samples(tmp_path / "killed", "run") == samples(tmp_path / "whole", "run")
    first, second = (
        json.loads((tmp_path / name / "run/gsm8k.json").read_text()) for name in ("whole", "killed")
    )
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_answers_to_another_evaluation_are_not_gone_on_with(place: Path, tmp_path: Path) -> None:
    ask([place / "base"], tmp_path / "out", place / "data", limit=1)
    with pytest.raises(OutputError, match="limit was 1 and is 2"):
        ask([place / "base"], tmp_path / "out", place / "data", limit=2)
    assert len(ask([place / "base"], tmp_path / "out", place / "data", limit=2, force=True)) == 1
    assert len(samples(tmp_path / "out")) == 2


def test_a_damaged_log_is_an_error_and_not_a_fresh_start(place: Path, tmp_path: Path) -> None:
    ask([place / "base"], tmp_path / "out", place / "data", limit=2)
    log = tmp_path / "out" / "base" / "gsm8k.answers.jsonl"
    (tmp_path / "out" / "base" / "gsm8k.json").unlink()
    log.write_text(log.read_text().replace('"key"', '"key', 1))
    with pytest.raises(CheckpointError, match="damaged"):
        ask([place / "base"], tmp_path / "out", place / "data", limit=2)


def test_prompts_that_do_not_fit_are_counted(place: Path, tmp_path: Path) -> None:
    long = [{"question": "How many? " * 60, "answer": "#### 3"}, QUESTIONS[0]]
    data = gsm8k(tmp_path / "data", long)
    (result,) = ask([place / "base"], tmp_path / "out", data)
    # One batch: both have its room
    assert "1 of 2 prompts are longer than the model takes" in result.notes[0]
    assert (
        "2 of 2 answers had less room than asked for: the model has 320 positions"
        in result.notes[1]
    )


def test_the_standard_track_is_the_harness_s_own_task(place: Path, tmp_path: Path) -> None:
    (result,) = ask([place / "base"], tmp_path / "out", place / "data", limit=2, track="standard")
    assert result.headline == "exact_match,flexible-extract"
    assert set(result.scores) == {"exact_match,flexible-extract", "exact_match,strict-match"}
    assert result.scores[result.headline].count == 2
    assert result.scores[result.headline].interval == Share(0, 2).interval
    assert result.gold is None
    assert samples(tmp_path / "out", task="gsm8k.standard")[0]["prompt"].count("Question:") == 6


def test_both_tracks_may_lie_in_one_folder(place: Path, tmp_path: Path) -> None:
    ask([place / "base"], tmp_path / "out", place / "data", limit=1)
    found = ask([place / "base"], tmp_path / "out", place / "data", limit=1, track="standard")
    assert [(one.task, one.track) for one in found] == [("gsm8k", "paper"), ("gsm8k", "standard")]
    pages = {file.name for file in (tmp_path / "out").glob("*/*.html")}
    assert pages == {"gsm8k.html", "gsm8k.standard.html"}
    assert all(f"base/{page}" in (tmp_path / "out/results.html").read_text() for page in pages)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"tasks": ["gsm8"]}, ConfigError, "Did you mean 'gsm8k'"),
        ({"tasks": ["gsm8k", "gsm8k"]}, ConfigError, "each once"),
        ({"tasks": []}, ConfigError, "one or more"),
        ({"track": "papers"}, ConfigError, "paper, standard"),
        ({"tasks": ["mt_bench"], "track": "standard"}, ConfigError, "harness does not have"),
        ({"tasks": ["humaneval"]}, ConfigError, "--allow-code-execution"),
        ({"data": "nowhere"}, DataError, "gsm8k/test"),
        ({"backend": "jax"}, ConfigError, "hf, vllm"),
        ({"tasks": ["../../escaped"], "track": "standard"}, ConfigError, "expected a name"),
        ({"dtype": "float8"}, ConfigError, "float32, bfloat16, float16"),
        ({"device": "abacus"}, InputError, "expected cpu, cuda"),
        ({"base": "other"}, InputError, "whole model and needs none"),
        pytest.param(
            {"tasks": ["no_such_task"], "track": "standard"},
            ConfigError,
            "no_such_task",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_wrong_input_is_refused_with_what_to_do(
    settings: dict[str, object], error: type[Exception], says: str, place: Path, tmp_path: Path
) -> None:
    asked = {"data": str(place / "data"), **settings}
    data = Path(str(asked.pop("data")))
    with pytest.raises(error, match=says):
        ask([place / "base"], tmp_path / "out", data, **asked)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_programs_run_behind_our_walls_or_not_at_all() -> None:
    from pissa.evaluation.harness import _refuse

    class Unsafe:
        UNSAFE_CODE = True

        def get_config(self, key: str) -> object:
            return None

    class Several(Unsafe):
        UNSAFE_CODE = False

        def get_config(self, key: str) -> object:
            return 10

    for name, task, says in (
        ("x", Unsafe(), "walls"),
        ("cruxeval_input", Several(), "walls"),
        ("y", Several(), "once"),
    ):
        with pytest.raises(ConfigError, match=says):
            _refuse(name, task)


def test_a_folder_that_is_a_model_is_no_place_for_results(place: Path) -> None:
    for out in (place / "base", place / "base" / "results", place):
        with pytest.raises(OutputError, match="another folder"):
            ask([place / "base"], out, place / "data")
    assert not list((place / "base").glob("gsm8k*"))


def test_a_file_is_no_place_for_results(place: Path) -> None:
    with pytest.raises(OutputError, match="is a file"):
        ask([place / "base"], place / "base/config.json", place / "data")


def test_without_vllm_the_exact_command_is_shown(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(MissingExtraError) as told:
        ask([place / "run"], tmp_path / "out", place / "data", backend="vllm")
    said = str(told.value)
    assert (
        f"pretrained={place / 'base'},lora_local_path={place / 'run' / 'adapter'},max_lora_rank=8"
        in said
    )
    assert "--tasks pissa_gsm8k --include_path" in said


def test_vllm_is_not_given_a_run_on_another_base(place: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongBaseError, match="has digest"):
        ask(
            [place / "run"],
            tmp_path / "out",
            place / "data",
            backend="vllm",
            base=str(place / "other"),
        )


def test_the_stock_harness_takes_our_task_files() -> None:
    from lm_eval.tasks import TaskManager

    from pissa.evaluation.harness import TASKS

    names = TaskManager(include_path=str(TASKS), include_defaults=False).all_tasks
    assert set(names) >= {
        "pissa_gsm8k",
        "pissa_math",
        "pissa_humaneval",
        "pissa_mbpp",
        "pissa_standard_humaneval",
    }
    assert all(
        protocol(task, "paper").harness in names for task in ("gsm8k", "math", "humaneval", "mbpp")
    )


@pytest.mark.parametrize(
    ("task", "count"),
    [("gsm8k", 1319), ("math", 500), ("humaneval", 164), ("mbpp", 500), ("mt_bench", 80)],
)
def test_the_questions_are_all_there(task: str, count: int, shared: Path) -> None:
    found = questions(task, shared / "data")
    assert (len(found.rows), found.source["rows"]) == (count, count)
    assert len(questions(task, shared / "data", 3).rows) == 3
    assert len(questions("mbpp", shared / "data", whole=True).rows) == 974


def test_the_mbpp_questions_are_the_test_ones(shared: Path) -> None:
    numbers = [int(row["task_id"]) for row in questions("mbpp", shared / "data").rows]
    assert (min(numbers), max(numbers)) == (11, 510)


def test_a_path_that_is_not_there_is_no_hub_id(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        ask([tmp_path / "none"], tmp_path / "out", place / "data")


def test_a_hub_id_goes_to_the_hub(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"owner/model is neither a folder nor a model that the Hub gives"
    ):
        ask([Path("owner/model")], tmp_path / "out", place / "data")


def test_a_run_that_cannot_be_evaluated_is_refused_before_others_are(
    place: Path, tmp_path: Path
) -> None:
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "run.json").write_text('{"status": "running"}')
    with pytest.raises(CheckpointError, match="not finished"):
        ask([place / "base", tmp_path / "unfinished"], tmp_path / "out", place / "data")
    assert not (tmp_path / "out").exists()


def test_moved_files_and_models_are_the_same_evaluation(place: Path, tmp_path: Path) -> None:
    ask([place / "base"], tmp_path / "out", place / "data", limit=1)
    before = (tmp_path / "out/base/gsm8k.json").read_text()
    shutil.copytree(place / "data", tmp_path / "moved")
    shutil.copytree(place / "base", tmp_path / "elsewhere" / "base")
    ask([tmp_path / "elsewhere/base"], tmp_path / "out", tmp_path / "moved", limit=1)
    assert (tmp_path / "out/base/gsm8k.json").read_text() == before


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_a_model_with_another_file_is_another_model(name: str, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base", tmp_path / "base")
    first = subject(str(tmp_path / "base")).identity
    (tmp_path / "base" / "README.md").write_text("words")
    assert subject(str(tmp_path / "base")).identity == first
    (tmp_path / "base" / name).write_bytes(b"{}")
    assert subject(str(tmp_path / "base")).identity != first


def test_scores_of_another_version_are_made_anew_from_the_same_answers(
    place: Path, tmp_path: Path
) -> None:
    ask([place / "base"], tmp_path / "out", place / "data", limit=1)
    file, log = tmp_path / "out/base/gsm8k.json", tmp_path / "out/base/gsm8k.answers.jsonl"
    told, kept = json.loads(file.read_text()), log.read_bytes()
    told["versions"]["math_verify"] = "0.1"
    told["scores"]["ours"]["value"] = 0.5
    file.write_text(json.dumps(told))
    (result,) = ask([place / "base"], tmp_path / "out", place / "data", limit=1)
    assert (result.scores["ours"].value, log.read_bytes()) == (0.0, kept)


def test_runs_of_one_name_get_names_of_their_own(place: Path, tmp_path: Path) -> None:
    for index, side in enumerate(("a", "b")):
        (tmp_path / side).mkdir()
        moved_run(place / "base", tmp_path / side / "run", rank=2 + index)
    found = ask(
        [tmp_path / "a/run", tmp_path / "b/run", tmp_path / "a/run"],
        tmp_path / "out",
        place / "data",
        limit=1,
    )
    assert len({one.model for one in found}) == 2
    assert all(one.model.startswith("run-") for one in found)


def test_a_base_is_evaluated_in_the_dtype_of_its_run(settings: Callable[..., Any]) -> None:
    run = settings("run", dtype="bfloat16", max_steps=1)
    train(run)
    one = subject(run.output)
    origin = _subjects([run.output], None, True, {})[1]
    assert (one.dtype, origin.dtype, origin.path) == ("bfloat16", "bfloat16", run.model)
