"""Claims about `pissa score`: answers from anywhere, without a model, item by item and as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pissa.cli.main import app
from pissa.errors import ConfigError, DataError, InputError
from pissa.scoring.verdict import Share

FUNCTION = {
    "task_id": "T/0",
    "prompt": 'def twice(x):\n    """Two times x."""\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
}


def file_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def score(*words: object) -> Result:
    return CliRunner().invoke(app, ["score", *map(str, words)])


def told(*words: object) -> dict[str, Any]:
    result = score(*words, "--json")
    assert result.exception is None, result.output
    return json.loads(result.stdout)


def test_both_scorers_and_their_intervals_are_told(tmp_path: Path) -> None:
    rows = [
        {"output": "The answer is: 18", "answer": "9 * 2\n#### 18"},
        {"output": "The answer is: 18.4", "answer": "18"},
        {"output": "so \\boxed{1,234,567}", "answer": 1234567},
        {"output": "no idea", "answer": "3"},
    ]
    said = told("gsm8k", file_of(tmp_path / "a.jsonl", rows))
    assert [item["correct"] for item in said["items"]] == [True, False, True, False]
    assert [item["authors"]["correct"] for item in said["items"]] == [True, True, False, False]
    assert said["items"][1]["extracted"] == "18.4"
    assert [item["id"] for item in said["items"]] == ["0", "1", "2", "3"]
    assert said["summary"]["ours"] == Share(2, 4).to_json()
    assert said["answers"]["rows"] == 4
    assert said["answers"]["sha256"]


def test_mathematics_is_compared_as_mathematics(tmp_path: Path) -> None:
    rows = [{"output": "The answer is: $\\frac14$.", "answer": "0.25"}]
    said = told("math", file_of(tmp_path / "a.jsonl", rows))
    assert (said["items"][0]["correct"], said["items"][0]["authors"]["correct"]) == (True, False)


def test_code_runs_only_where_it_is_allowed(tmp_path: Path) -> None:
    file_of(
        tmp_path / "data/humaneval/HumanEval.jsonl",
        [FUNCTION, FUNCTION | {"task_id": "T/1"}, FUNCTION | {"task_id": "T/2"}],
    )
    answers = file_of(
        tmp_path / "a.jsonl",
        [
            {"output": "    return x + x", "task_id": "T/0"},
            {"output": "    return x", "task_id": "T/1"},
        ],
    )
    refused = score("humaneval", answers, "--data", tmp_path / "data")
    assert isinstance(refused.exception, ConfigError)
    assert "--allow-code-execution" in str(refused.exception)
    said = told("humaneval", answers, "--data", tmp_path / "data", "--allow-code-execution")
    assert [item["correct"] for item in said["items"]] == [True, False]
    assert said["items"][1]["reason"].startswith("AssertionError")
    assert said["coverage"] == {"answered": 2, "questions": 3}


@pytest.mark.parametrize(
    ("task", "rows", "error", "says"),
    [
        ("gsm", [{"output": "1", "answer": "1"}], InputError, "Did you mean 'gsm8k'"),
        ("gsm8k", [{"answer": "1"}], DataError, "line 1.*expected a text in `output`"),
        (
            "gsm8k",
            [{"output": "1", "answer": "1"}, {"output": "1"}],
            DataError,
            "line 2.*gold answer",
        ),
        ("gsm8k", [{"output": "1", "answer": "none"}], DataError, "expected a number"),
        ("humaneval", [{"output": "1", "task_id": "T/1"}], DataError, "line 1.*'T/1'.*'T/0'"),
    ],
)
def test_wrong_rows_are_named(
    task: str, rows: list[dict[str, Any]], error: type[Exception], says: str, tmp_path: Path
) -> None:
    file_of(tmp_path / "data/humaneval/HumanEval.jsonl", [FUNCTION])
    answers = file_of(tmp_path / "a.jsonl", rows)
    result = score(task, answers, "--data", tmp_path / "data", "--allow-code-execution")
    assert isinstance(result.exception, error)
    with pytest.raises(error, match=says):
        raise result.exception


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = score("gsm8k", tmp_path / "none.jsonl")
    assert isinstance(result.exception, DataError)
    assert "none.jsonl" in str(result.exception)


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634)],
)
def test_the_interval_is_wilson_s(correct: int, count: int, low: float, high: float) -> None:
    """At 0 of n its upper end is z^2 / (n + z^2), at half of n its half width is z / 2 / sqrt(n + z^2)."""
    assert Share(correct, count).interval == pytest.approx((low, high), abs=1e-4)
    assert (low == 0) == (Share(correct, count).interval[0] == 0) and Share(0, 500).interval[0] == 0


def test_the_error_is_the_harness_s() -> None:
    from lm_eval.api.metrics import mean_stderr

    assert Share(3, 8).error == pytest.approx(mean_stderr([1, 1, 1, 0, 0, 0, 0, 0]))
