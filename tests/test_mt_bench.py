"""Claims about MT-Bench: what is asked, what a judge sees and costs, and that neither is ever paid
twice.

The judge is an HTTP server here that speaks OpenAI's protocol and grades by a rule of its own.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import re
import signal
import statistics
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import transformers

from conftest import build_pico
from pissa.errors import ConfigError, OutputError
from pissa.evaluation.evaluate import evaluate
from pissa.evaluation.harness import Asked
from pissa.evaluation.judge import Judge, conversation, rating_of
from pissa.evaluation.model import subject
from pissa.evaluation.mt_bench import mt_bench, settings_of
from pissa.evaluation.mt_bench_turns import RUNS_ON
from pissa.evaluation.questions import Questions, questions
from pissa.evaluation.result import TaskResult
from pissa.evaluation.tracks import protocol
from pissa.training.templates import ALPACA
from training_runs import save_tokenizer

pytest.importorskip("lm_eval", reason="the eval extra is not installed")
KEY = "sk-never-to-be-written"
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {
        "question_id": 101,
        "category": "reasoning",
        "turns": ["Why?", "How?"],
        "reference": ["old", "old"],
    },
    {"question_id": 112, "category": "math", "turns": ["1+1?", "2+2?"], "reference": ["two", ""]},
]
GPT4 = [{"question_id": 101, "choices": [{"index": 0, "turns": ["Because.", "Thus."]}]}]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Endpoint(ThreadingHTTPServer):
    """Grades by `rule`, told the messages; what it returns is a reply, or a status with a body."""

    def __init__(self, rule: Callable[[list[dict[str, str]]], Any]) -> None:
        self.rule = rule
        self.asked: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def judge(self) -> Judge:
        """Asked one thing at a time, so that the order is known."""
        return Judge(
            f"http://127.0.0.1:{self.server_port}/v1",
            "grader",
            wait=0.001,
            tries=3,
            timeout=20,
            jobs=1,
        )


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(
            {**body, "path": self.path, "key": self.headers.get("Authorization")}
        )
        said = self.server.rule(body["messages"])
        status, text = (
            said
            if isinstance(said, tuple)
            else (200, json.dumps({"choices": [{"message": {"content": said}}]}))
        )
        self.send_response(status)
        if status == 302:
            self.send_header("Location", text)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        self.server.asked.append({"path": self.path, "key": self.headers.get("Authorization")})
        self.send_response(404)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Not on stderr."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Endpoint]]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(rule: Callable[[list[dict[str, str]]], Any]) -> Endpoint:
        servers.append(Endpoint(rule))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico model with room for two turns and a few tokens of answer."""
    folder = tmp_path_factory.mktemp("models") / "model"
    build_pico(vocab_size=260, max_position_embeddings=400).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def found(tmp_path: Path) -> Questions:
    place = tmp_path / "data" / "mt_bench"
    place.mkdir(parents=True)
    for name, rows in (("question.jsonl", QUESTIONS), ("reference_answer_gpt-4.jsonl", GPT4)):
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return questions("mt_bench", tmp_path / "data")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of 12 tokens."""
    monkeypatch.setattr("pissa.evaluation.mt_bench_turns.TOKENS", 12)


ASKED = Asked(None, 2, "hf", None, False)


def run(
    model: Path,
    found: Questions,
    out: Path,
    judge: Judge | None = None,
    template: str | None = None,
) -> TaskResult:
    one = subject(str(model), device="cpu")
    one.template = template
    return mt_bench(
        one, protocol("mt_bench", "paper"), found, ASKED, out, judge, lambda what, done, total: None
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_question(messages: list[dict[str, str]]) -> str:
    """A rating that tells questions and turns apart: 2 and 4, 3 and 6, 5 and 10."""
    text = messages[1]["content"]
    turn = 2 if "answer 2" in text else 1
    number = next(n for n, mark in ((2, "Write."), (3, "Why?"), (5, "1+1?")) if mark in text)
    return f"A quoted [[1]] says nothing.\nRating: [[{number * turn}]]"


def test_without_a_judge_there_are_answers_and_no_number(
    model: Path, found: Questions, tmp_path: Path
) -> None:
    result = run(model, found, tmp_path / "out")
    assert (result.scores, result.headline, result.settings["judge"]) == ({}, "", None)
    assert any("no judge, no number" in note and "--judge" in note for note in result.notes)
    assert result.gold is not None and result.gold.answers == 2  # "Because." and "two"
    assert result.gold.tokens == len("Because.") + len("two")
    told = lines(tmp_path / "out" / "mt_bench.fastchat.jsonl")
    assert [line["question_id"] for line in told] == [81, 101, 112]
    assert all(
        len(line["choices"][0]["turns"]) == 2 and line["model_id"] == "model" for line in told
    )
    assert len({line["answer_id"] for line in told}) == 3
    samples = lines(tmp_path / "out" / "mt_bench.samples.jsonl")
    assert [(s["id"], s["correct"], s["extracted"], s["gold"]) for s in samples] == [
        ("81, turn 1", None, None, ""), ("81, turn 2", None, None, ""),
        ("101, turn 1", None, None, "Because."), ("101, turn 2", None, None, "Thus."),
        ("112, turn 1", None, None, "two"), ("112, turn 2", None, None, ""),
    ]  # fmt: skip
    assert [sample["output"] for sample in samples] == [
        t for line in told for t in line["choices"][0]["turns"]
    ]
    stored = json.loads((tmp_path / "out" / "mt_bench.json").read_text())
    assert TaskResult.from_json(stored, "here").to_json() == json.loads(
        json.dumps(result.to_json())
    )


def test_the_second_prompt_holds_the_first_answer_in_alpacas_blocks(
    model: Path, found: Questions, tmp_path: Path
) -> None:
    run(model, found, tmp_path / "out", template="plain")
    first, second = lines(tmp_path / "out" / "mt_bench.samples.jsonl")[:2]
    assert first["prompt"] == ALPACA.format(instruction="Write.")
    assert (
        second["prompt"]
        == f"{first['prompt']}{first['output']}\n\n### Instruction:\nAgain.\n\n### Response:"
    )
    assert first["output"]
    assert "trained in the template 'plain'" in " ".join(
        json.loads((tmp_path / "out" / "mt_bench.json").read_text())["notes"]
    )


def test_a_chat_template_is_used_unless_the_training_used_another(
    found: Questions, tmp_path: Path
) -> None:
    folder = tmp_path / "chatty"
    build_pico(vocab_size=262, max_position_embeddings=400).save_pretrained(folder)
    save_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    run(folder, found, tmp_path / "chat")
    run(folder, found, tmp_path / "alpaca", template="alpaca")
    first, second = lines(tmp_path / "chat" / "mt_bench.samples.jsonl")[:2]
    head = "<|im_start|>user\nWrite.<|im_end|>\n<|im_start|>assistant\n"
    assert first["prompt"] == head
    assert second["prompt"] == (
        f"{head}{first['output']}<|im_end|>\n<|im_start|>user\nAgain.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert lines(tmp_path / "alpaca" / "mt_bench.samples.jsonl")[0]["prompt"] == ALPACA.format(
        instruction="Write."
    )


def test_an_answer_that_runs_on_is_cut_and_said(
    model: Path, found: Questions, tmp_path: Path
) -> None:
    run(model, found, tmp_path / "out")
    log = tmp_path / "out" / "mt_bench.answers.jsonl"
    kept = lines(log)
    # Only first turns and their gold stay, and each answer goes on to a question of its own.
    kept[1:] = [{**line, "answer": f"fine\n\n{RUNS_ON}\nmore"} for line in kept[1:4]]
    log.write_text("".join(json.dumps(line) + "\n" for line in kept))
    result = run(model, found, tmp_path / "out")
    assert any("3 of 6 answers ran on" in note for note in result.notes)
    first, second = lines(tmp_path / "out" / "mt_bench.samples.jsonl")[:2]
    assert first["output"] == "fine"
    assert "### Response:fine\n\n### Instruction:\nAgain." in second["prompt"]


def test_scores_are_means_of_ratings_by_turn_and_category(
    model: Path, found: Questions, serve: Callable[..., Endpoint], tmp_path: Path
) -> None:
    endpoint = serve(by_question)
    result = run(model, found, tmp_path / "out", endpoint.judge)
    value = {name: score.value for name, score in result.scores.items()}
    assert value == {
        "judge": 5.0, "judge, turn 1": pytest.approx(10 / 3), "judge, turn 2": pytest.approx(20 / 3),
        "judge, writing": 3.0, "judge, reasoning": 4.5, "judge, math": 7.5,
    }  # fmt: skip
    whole = result.scores["judge"]
    error = statistics.stdev([3.0, 4.5, 7.5]) / 3**0.5  # over questions, not over six ratings
    assert (result.headline, whole.count) == ("judge", 6)
    assert whole.stderr == pytest.approx(error)
    assert whole.interval == pytest.approx((5 - 1.96 * error, 5 + 1.96 * error), rel=1e-3)
    assert result.scores["judge, math"].stderr is None
    assert (
        result.settings["judge"]["url"] == endpoint.judge.url
        and result.settings["judge"]["model"] == "grader"
    )
    assert [s["extracted"] for s in lines(tmp_path / "out" / "mt_bench.samples.jsonl")] == [
        "2",
        "4",
        "3",
        "6",
        "5",
        "10",
    ]
    assert {
        (one["path"], one["model"], one["temperature"], one["key"]) for one in endpoint.asked
    } == {("/v1/chat/completions", "grader", 0, f"Bearer {KEY}")}


def test_a_judge_sees_the_conversation_and_the_reference_where_there_is_one(
    model: Path, found: Questions, serve: Callable[..., Endpoint], tmp_path: Path
) -> None:
    endpoint = serve(by_question)
    run(model, found, tmp_path / "out", endpoint.judge)
    samples = lines(tmp_path / "out" / "mt_bench.samples.jsonl")
    seen = [one["messages"][1]["content"] for one in endpoint.asked]
    assert [text.count("reference answer") // 2 for text in seen] == [0, 0, 1, 2, 1, 1]
    assert (
        "Because." in seen[2]
        and "Thus." not in seen[2]
        and "Thus." in seen[3]
        and "old" not in seen[3]
    )
    assert all(samples[n]["output"] in text for n, text in enumerate(seen))
    assert "Why?" in seen[3] and samples[2]["output"] in seen[3]
    told = [one["messages"][0]["content"] for one in endpoint.asked]
    assert len(set(told)) == 4  # with and without a reference, first and second turn


def test_a_reference_of_a_later_turn_is_none_yet() -> None:
    assert conversation(["Q"], ["A"], ["", "later"]) == conversation(["Q"], ["A"])
    assert conversation(["Q"], ["A"], ["now", "later"]) == conversation(["Q"], ["A"], ["now"])


def test_what_is_answered_or_judged_stays_so(
    model: Path, found: Questions, serve: Callable[..., Endpoint], tmp_path: Path
) -> None:
    def stops_after_three(messages: list[dict[str, str]]) -> Any:
        return by_question(messages) if len(endpoint.asked) <= 3 else (401, "no more")

    endpoint = serve(stops_after_three)
    with pytest.raises(ConfigError, match="not accepted"):
        run(model, found, tmp_path / "out", endpoint.judge)
    answers = (tmp_path / "out" / "mt_bench.answers.jsonl").read_text()
    endpoint.rule, endpoint.asked = by_question, []
    result = run(model, found, tmp_path / "out", endpoint.judge)
    assert len(endpoint.asked) == 3
    assert result.scores["judge"].value == 5
    assert (tmp_path / "out" / "mt_bench.answers.jsonl").read_text() == answers
    again = run(model, found, tmp_path / "out", endpoint.judge)
    assert len(endpoint.asked) == 3
    assert again.scores == result.scores
    other = Judge(endpoint.judge.url, "another")
    with pytest.raises(OutputError, match="grader"):
        run(model, found, tmp_path / "out", other)
    one = subject(str(model), device="cpu")
    arguments = (one, protocol("mt_bench", "paper"), found, ASKED)
    assert settings_of(*arguments, endpoint.judge) == result.settings
    assert (
        len({json.dumps(settings_of(*arguments, judge)) for judge in (None, other, endpoint.judge)})
        == 3
    )


def test_several_are_judged_at_a_time_and_those_under_way_are_kept_when_one_fails(
    model: Path, found: Questions, serve: Callable[..., Endpoint], tmp_path: Path
) -> None:
    together = threading.Barrier(3, timeout=20)

    def one_of_three_fails(messages: list[dict[str, str]]) -> Any:
        return (401, "no more") if together.wait() == 0 else by_question(messages)

    endpoint = serve(one_of_three_fails)
    judge = dataclasses.replace(endpoint.judge, jobs=3)
    with pytest.raises(ConfigError, match="not accepted"):
        run(model, found, tmp_path / "out", judge)
    assert len(endpoint.asked) == 3
    endpoint.rule, endpoint.asked = by_question, []
    result = run(model, found, tmp_path / "out", judge)
    assert len(endpoint.asked) == 4
    assert result.scores == run(model, found, tmp_path / "alone", endpoint.judge).scores


def test_a_kill_between_judgements_loses_none(
    model: Path, found: Questions, serve: Callable[..., Endpoint], tmp_path: Path
) -> None:
    def kills(messages: list[dict[str, str]]) -> str:
        if len(endpoint.asked) == 4:
            process.kill()
            dead.wait(60)  # no answer reaches it any more
        return by_question(messages)

    dead = threading.Event()
    endpoint = serve(kills)
    words = (model, found, tmp_path / "out", endpoint.judge)
    process = multiprocessing.get_context("fork").Process(target=run, args=words)
    process.start()
    process.join(120)
    dead.set()
    assert process.exitcode == -signal.SIGKILL
    assert len(lines(tmp_path / "out" / "mt_bench.judge.jsonl")) == 1 + 3
    assert not (tmp_path / "out" / "mt_bench.json").exists()
    endpoint.rule, endpoint.asked = by_question, []
    assert run(model, found, tmp_path / "out", endpoint.judge).scores["judge"].value == 5
    assert len(endpoint.asked) == 3


def test_a_reply_without_a_rating_is_asked_for_again_and_then_missing(
    model: Path, found: Questions, serve: Callable[..., Endpoint], tmp_path: Path
) -> None:
    def forgetful(messages: list[dict[str, str]]) -> str:
        if "Write." in messages[1]["content"]:
            return "I would rather not. [[0]] [[11]]"
        return by_question(messages) if len(messages) == 6 else "Nice."

    endpoint = serve(forgetful)
    result = run(model, found, tmp_path / "out", endpoint.judge)
    assert len(endpoint.asked) == 18
    again = [one["messages"][-1]["content"] for one in endpoint.asked[:3]]
    assert len(set(again)) == 3
    assert any("2 of 6 answers got no rating" in note for note in result.notes)
    assert (result.scores["judge"].value, result.scores["judge"].count) == (6, 4)  # of 3, 6, 5, 10
    assert "judge, writing" not in result.scores
    log = lines(tmp_path / "out" / "mt_bench.judge.jsonl")[1]["answer"]
    assert (log["rating"], len(log["replies"])) == (None, 3)
    run(model, found, tmp_path / "out", endpoint.judge)
    assert len(endpoint.asked) == 18


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_or_broken_judge_is_asked_again(status: int, serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(lambda messages: (status, "busy") if len(endpoint.asked) < 3 else "[[7]]")
    assert endpoint.judge.grade(conversation(["Q"], ["A"])) == (7, ["[[7]]"])
    endpoint.asked = []
    endpoint.rule = lambda messages: (status, "busy")
    with pytest.raises(ConfigError, match=f"failed 3 times.*HTTP {status} 'busy'"):
        endpoint.judge.grade(conversation(["Q"], ["A"]))
    assert len(endpoint.asked) == 3


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ((401, f"wrong key {KEY}"), r"OPENAI_API_KEY is absent or not accepted"),
        ((404, "no such model"), r"check the address, and that it serves a model 'grader'"),
        ((200, "<html>"), r"'<html>', expected OpenAI's chat completion"),
        ((200, '{"choices": []}'), r"expected OpenAI's chat completion"),
    ],
)
def test_a_judge_that_cannot_work_is_asked_once(
    said: tuple[int, str], message: str, serve: Callable[..., Endpoint]
) -> None:
    endpoint = serve(lambda messages: said)
    with pytest.raises(ConfigError, match=message) as error:
        endpoint.judge.grade(conversation(["Q"], ["A"]))
    assert len(endpoint.asked) == 1
    assert KEY not in str(error.value)


def test_nobody_at_home_is_an_error_that_says_so(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(by_question)
    judge = endpoint.judge
    endpoint.shutdown()
    endpoint.server_close()
    with pytest.raises(ConfigError, match="failed 3 times.*refused"):
        judge.grade(conversation(["Q"], ["A"]))


def test_the_key_is_in_no_file_and_goes_to_no_other_host(
    model: Path, found: Questions, serve: Callable[..., Endpoint], tmp_path: Path
) -> None:
    endpoint = serve(lambda messages: f"You sent {KEY}. [[4]]")
    run(model, found, tmp_path / "out", endpoint.judge)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 7
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in repr(endpoint.judge)
    other = serve(by_question)
    endpoint.rule = lambda messages: (302, f"http://127.0.0.1:{other.server_port}/v1")
    with pytest.raises(ConfigError):
        endpoint.judge.grade(conversation(["Q"], ["A"]))
    assert [one["key"] for one in other.asked] == [None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"url": "api.openai.com/v1"}, "expects an address"),
        ({"url": "file:///etc/passwd"}, "expects an address"),
        ({"url": "https://me:secret@host/v1"}, "more than an address"),
        ({"url": "https://host/v1?key=secret"}, "more than an address"),
        ({"model": ""}, "--judge-model is empty"),
        ({"key_env": "sk-secret"}, "the name of an environment variable"),
        ({"key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE, which is not set"),
    ],
)
def test_a_judge_that_cannot_be_meant_is_refused(words: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        Judge(**{"url": "http://localhost/v1", "model": "grader", **words})
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("[[7]]", 7),
        ("[[ 8.5 ]]", 8.5),
        ("not [[3]] but [[9]]", 9),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[5] 5/10", None),
    ],
)
def test_a_rating_is_the_last_number_in_brackets_from_1_to_10(
    reply: str, rating: float | None
) -> None:
    assert rating_of(reply) == rating


def test_the_real_questions_have_thirty_references(shared: Path) -> None:
    from pissa.evaluation.mt_bench import _references

    real = questions("mt_bench", shared / "data")
    references, source = _references(real)
    assert (len(real.rows), len(references)) == (80, 30)
    assert source is not None and re.fullmatch("[0-9a-f]{64}", source["sha256"])
    assert references[101][0].startswith("If you have just overtaken the second person")


def test_marks_stay_where_no_judge_is_named_the_next_time(
    model: Path, serve: Callable[..., Endpoint], tmp_path: Path, shared: Path
) -> None:
    endpoint = serve(lambda messages: "[[7]]")
    settings = {"data": str(shared / "data"), "limit": 1, "batch_size": 2, "device": "cpu"}
    first = evaluate([str(model)], ["mt_bench"], tmp_path / "out", judge=endpoint.judge, **settings)
    again = evaluate([str(model)], ["mt_bench"], tmp_path / "out", **settings)
    assert first[0].scores["judge"] == again[0].scores["judge"]
