"""Claims about the pages of an evaluation: every number has its count and its doubts, every answer can be looked at."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pissa.cli.eval import print_results
from pissa.evaluation import answers_page
from pissa.evaluation.answers_page import write_answers
from pissa.evaluation.page import results_table, visible, write_results
from pissa.evaluation.paired import Paired, against_base, paired
from pissa.evaluation.result import Perplexity, Score, TaskResult
from pissa.evaluation.tracks import file_stem, protocol
from pissa.scoring.answers import score
from pissa.scoring.verdict import Item, Verdict, summary

CHROMIUM = shutil.which("chromium")
OPEN: dict[str, Any] = {"scores": {}, "headline": ""}
"""Of a result whose answers nobody has scored."""
PROMPT = (
    "Below is an instruction.\n\n### Instruction:\n{}\n\n### Response: Let's think step by step."
)
Sample = dict[str, Any]


class Page(html.parser.HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.answers: list[set[str]] = []
        self.tables: list[list[list[str]]] = []
        self.in_cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        if tag == "a":
            self.links.append(named["href"] or "")
        self.loaded += [
            value or "" for name, value in attrs if name == "src" or name.startswith("on")
        ]
        if tag == "details":
            self.answers.append(set((named["class"] or "").split()))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.in_cell = tag in ("td", "th") or self.in_cell

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.in_cell:
            row = self.tables[-1][-1]
            row[-1] = " ".join(f"{row[-1]} {data}".split())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def answered(shared: Path, wrong: int, count: int | None = None) -> list[Sample]:
    """Answers to GSM8K made of its own worked solutions and scored for real: every `wrong`th ends
    in another number, every seventh in one that the authors' script rounds, every eleventh goes on
    and on without a mark."""
    lines = (shared / "data/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    return [_answer(number, json.loads(line), wrong) for number, line in enumerate(lines[:count])]


def _answer(number: int, row: dict[str, str], wrong: int) -> Sample:
    worked, _, gold = row["answer"].partition("\n#### ")
    text = re.sub("<<.*?>>", "", worked)
    said = f"{gold}.4" if number % 7 == 3 else f"{gold}1" if number % wrong == 1 else gold
    output = " ".join([text] * 8) if number % 11 == 5 else f" {text}\nThe answer is: {said}"
    item = score("gsm8k", output, {"id": str(number), **row})
    return {
        **item.to_json(),
        "prompt": PROMPT.format(row["question"]),
        "output": output,
        "gold": row["answer"],
    }


def result(
    samples: list[Sample], model: str = "pissa-r32", kind: str = "run", **changes: Any
) -> TaskResult:
    """What these samples come to; `base` is the name of another result."""
    said = protocol(changes.pop("task", "gsm8k"), changes.pop("track", "paper"))
    items = [
        Item(one["id"], Verdict(one["correct"], None), Verdict(one["authors"]["correct"], None))
        for one in samples
    ]
    scores = {
        name: Score(found["value"], found["stderr"], tuple(found["interval"]), found["count"])
        for name, found in (summary(items) if items else {}).items()
    }
    fields: dict[str, Any] = {
        "headline": "ours",
        "scores": scores,
        "gold": Perplexity(1.8456, 170_000, len(samples), 0),
        "data": {
            "name": "gsm8k/test.jsonl",
            "sha256": "3b" * 32,
            "rows": len(samples),
            "of": 1319 if samples else 0,
        },
        "settings": {
            "model": {},
            "task": "gsm8k",
            "batch_size": 16,
            "backend": "hf",
            "limit": None,
            "seed": 1234,
        },
        "versions": {"pissa": "0.1.0", "lm_eval": "0.4.12"},
        "seconds": 93.2,
    }
    base = changes.pop("base", None)
    identity = {
        "path": f"runs/{model}",
        "kind": kind,
        "sha256": "5c" * 32,
        "base": base and f"runs/{base}",
    }
    return TaskResult(model, identity, said.task, said.track, said.says, **{**fields, **changes})


def keep(out: Path, found: TaskResult, samples: list[Sample]) -> TaskResult:
    """Put samples where the page of results looks for them."""
    folder = out / found.model
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(sample) for sample in samples]
    (folder / f"{file_stem(found.task, found.track)}.samples.jsonl").write_text(
        "\n".join(lines), encoding="utf-8"
    )
    return found


def sample(correct: bool | None = True, **changes: Any) -> Sample:
    """One answer of no interest."""
    made = {
        "id": "0",
        "correct": correct,
        "extracted": "4",
        "reason": "" if correct else "differs",
        "authors": None,
    }
    return {**made, "prompt": "2 + 2?", "output": "4", "gold": "4", **changes}


@pytest.fixture(scope="module")
def place(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of GSM8K by a base, and the first 200 questions by a run of it."""
    out = tmp_path_factory.mktemp("evaluation")
    base, run = answered(shared, wrong=2), answered(shared, wrong=3, count=200)
    # By name the run comes first, as a listing of folders has it.
    found = [
        keep(
            out,
            result(run, "a-run", base="z-base", notes=["12 of 200 prompts lost their beginning"]),
            run,
        ),
        keep(out, result(base, "z-base", "model"), base),
    ]
    write_results(found, out)
    write_answers(found[1], base, out / "z-base/gsm8k.html")
    return out


def test_the_base_stands_above_runs_whatever_their_names(place: Path) -> None:
    first, *others = Page(place / "results.html").tables
    assert [row[0] for row in first[2:]] == ["z-base base", "a-run"]
    assert [row[0] for table in others[:2] for row in table[1:]] == ["z-base", "a-run"] * 2


def test_a_cell_has_share_error_interval_and_how_many_answers_changed(
    place: Path, shared: Path
) -> None:
    base, run = answered(shared, 2, 200), answered(shared, 3, 200)
    right = sum(one["correct"] for one in run)
    won = sum(new["correct"] and not old["correct"] for new, old in zip(run, base, strict=True))
    lost = sum(old["correct"] and not new["correct"] for new, old in zip(run, base, strict=True))
    assert min(won, lost) > 5
    cells = Page(place / "results.html").tables[0][-1]
    # Wald's error with n - 1, and Wilson's interval, from their formulas.
    share, error = right / 200, (right / 200 * (1 - right / 200) / 199) ** 0.5
    middle = (share + 1.96**2 / 400) / (1 + 1.96**2 / 200)
    half = 1.96 / (1 + 1.96**2 / 200) * (share * (1 - share) / 200 + 1.96**2 / 160000) ** 0.5
    assert cells[1].startswith(
        f"{100 * share:.1f} ± {100 * error:.1f} % {100 * (middle - half):.1f}–"
    )
    assert f"–{100 * (middle + half):.1f} {(won - lost) / 2:+.1f} points to the base" in cells[1]
    assert f"{won} won, {lost} lost of 200, p = " in cells[1]
    authors = sum(one["authors"]["correct"] for one in run)
    assert cells[2].startswith(f"{authors / 2:.1f} ± ") and cells[3] == "1.846"


def test_mcnemars_test_is_the_binomial_one() -> None:
    binomial = pytest.importorskip("scipy.stats").binomtest
    for won, lost in [(0, 0), (1, 0), (3, 9), (12, 12), (40, 11), (700, 500)]:
        wanted = binomial(won, won + lost, 0.5).pvalue if won + lost else 1.0
        assert Paired(won, lost, 2000).p == pytest.approx(wanted, rel=1e-9)


def test_only_questions_in_the_same_words_are_paired() -> None:
    base = [sample(False, id="0"), sample(True, id="1"), sample(True, id="2"), sample(True, id="3")]
    run = [
        sample(True, id="0"),
        sample(False, id="1", prompt="another"),
        sample(None, id="2"),
        sample(False, id="3"),
        sample(False, id="9"),
    ]
    assert paired(run, base) == Paired(won=1, lost=1, count=2)
    assert paired(run, []) is None


def test_a_model_that_no_run_names_is_no_base(tmp_path: Path) -> None:
    other = keep(tmp_path, result([], "other", "model", **OPEN), [sample()])
    run = keep(tmp_path, result([], **OPEN), [sample(False)])
    seen = Page(write_results([run, other], tmp_path))
    assert "lost of" not in seen.text and "points to the base" not in seen.text
    assert [row[0] for row in seen.tables[0][2:]] == ["pissa-r32", "other"]
    seen = Page(write_results([result([], base="elsewhere", **OPEN), other], tmp_path))
    assert "lost of" not in seen.text and "other base" not in [row[0] for row in seen.tables[0]]


def test_each_track_has_its_own_comparison_with_the_base(tmp_path: Path) -> None:
    found = []
    # On one track 3 answers are better than the base's, on the other 2 are worse.
    for track, answers, base in (("paper", [True] * 3, False), ("standard", [False] * 2, True)):
        name, common = "ours" if track == "paper" else "exact_match", {"track": track, "gold": None}
        scores = {"scores": {name: Score(0.5, 0.1, None, len(answers))}, "headline": name}
        own = [sample(answer, id=str(n)) for n, answer in enumerate(answers)]
        others = [{**one, "correct": base} for one in own]
        found += [keep(tmp_path, result([], "run", base="root", **common, **scores), own)]
        found += [keep(tmp_path, result([], "root", "model", **common, **scores), others)]
    paper, standard = Page(write_results(found, tmp_path)).tables[:2]
    assert [row[0] for row in paper[2:]] == [row[0] for row in standard[2:]] == ["root base", "run"]
    assert "+100.0 points to the base 3 won, 0 lost of 3" in paper[3][1]
    assert "-100.0 points to the base 0 won, 2 lost of 2" in standard[3][1]


def test_a_base_in_two_dtypes_is_compared_in_the_runs_own(tmp_path: Path) -> None:
    def of(name: str, dtype: str, correct: bool, **more: Any) -> TaskResult:
        return keep(
            tmp_path, result([], name, settings={"dtype": dtype}, **OPEN, **more), [sample(correct)]
        )

    run = of("run", "bfloat16", False, base="root")
    roots = [of("root-1", "float32", False), of("root-2", "bfloat16", True)]
    for root in roots:
        root.identity["path"] = "runs/root"
    assert against_base(run, [run, *roots], tmp_path) == Paired(0, 1, 1)
    run.settings["dtype"] = "float16"
    assert against_base(run, [run, *roots], tmp_path) is None


def test_a_run_is_compared_with_the_base_that_it_names_wherever_it_lies(tmp_path: Path) -> None:
    found = [
        keep(tmp_path, result([], name, "model", **OPEN), [sample()]) for name in ("one", "two")
    ]
    run = keep(tmp_path, result([], **OPEN), [sample(False)])
    (tmp_path / "two/gsm8k.samples.jsonl").write_text(json.dumps(sample(False)), encoding="utf-8")
    for base, lost in {
        "runs/one": "0 won, 1 lost of 1",
        os.path.abspath("runs/two"): "0 won, 0 lost of 1",
    }.items():
        run.identity["base"] = base
        write_results([*found, run], tmp_path)
        assert lost in Page(tmp_path / "results.html").text


def test_a_limited_run_says_so_at_the_top_in_its_cell_and_on_its_answers(
    place: Path, shared: Path
) -> None:
    text = (place / "results.html").read_text(encoding="utf-8")
    loud = (
        "<strong>gsm8k: not all questions were asked, only 200 of 1,319 questions (a-run).</strong>"
    )
    assert loud in text and text.index(loud) < text.index("<table")
    assert "not all models were asked the same questions" in text
    cells = {row[0]: row[1] for row in Page(place / "results.html").tables[0]}
    assert "only 200 of 1,319 questions" in cells["a-run"] and "only" not in cells["z-base base"]
    few = answered(shared, 3, 20)
    answers = write_answers(result(few), few, place / "few.html").read_text(encoding="utf-8")
    assert "<strong>Not all questions were asked, only 20 of 1,319 questions.</strong>" in answers
    assert "Not all questions" not in (place / "z-base/gsm8k.html").read_text(encoding="utf-8")


def test_notes_of_a_result_are_warnings_on_both_pages(place: Path, shared: Path) -> None:
    said = '<p class="warn">{}</p>'
    whole = (place / "results.html").read_text(encoding="utf-8")
    noted = whole.index("gsm8k: 12 of 200 prompts lost their beginning (a-run).")
    # Not before the numbers
    assert whole.rindex('<p class="warn">', 0, noted) > whole.rindex("</table>", 0, noted)
    few = answered(shared, 3, 2)
    one = result(few, notes=["one was cut"], gold=Perplexity(2.0, 10, 2, 1))
    assert said.format("one was cut") in write_answers(one, few, place / "few.html").read_text(
        encoding="utf-8"
    )
    assert (
        "1 of 2 right answers do not fit the model"
        in write_results([one], place / "other").read_text()
    )


def test_results_say_what_was_run(place: Path) -> None:
    text = Page(place / "results.html").text
    for said in (protocol("gsm8k", "paper").says, "1,319 questions", "gsm8k/test.jsonl", "3b" * 8, "5c" * 8,
                 "batch size 16, backend hf, seed 1234", "lm_eval 0.4.12", "1 min 33 s", "runs/z-base"):  # fmt: skip
        assert said in text, said
    for fault in (
        "1,234,567 is 1234",
        "3.7 passes for 4",
        "cut at the first assert",
        "never share a column",
    ):
        assert fault in text, fault


def test_different_versions_are_a_warning(tmp_path: Path, shared: Path) -> None:
    few = answered(shared, 3, 5)
    found = [result(few), result(few, "later", versions={"pissa": "0.2.0"})]
    text = Page(write_results(found, tmp_path)).text
    assert "different versions of the packages" in text
    assert "pissa 0.1.0, 0.2.0" in text and "lm_eval 0.4.12, none" in text
    assert "different versions" not in Page(write_results(found[:1], tmp_path)).text


def test_tracks_never_share_a_table(tmp_path: Path, shared: Path) -> None:
    few = answered(shared, 3, 10)
    scores = {
        "exact_match,strict-match": Score(0.25, 0.01, None, 10),
        "exact_match,flexible-extract": Score(0.5, 0.02, None, 10),
        "word_perplexity,none": Score(0.75, None, None, 10),
    }
    standard = result(
        few, "other", "model", track="standard", scores=scores, gold=None, headline=[*scores][1]
    )
    found = [standard, result(few)]
    text = write_results(found, tmp_path).read_text(encoding="utf-8")
    paper, other = text.index("<h2>Paper track"), text.index("<h2>Standard track")
    assert paper < other
    assert "pissa-r32" in text[paper:other] and "50.0 ± 2.0 %" not in text[paper:other]
    assert (
        "50.0 ± 2.0 %" in text[other:]
        and "authors&#39; scorer" not in text[other : text.index("<h2>How")]
    )
    # A score that is no share of right answers keeps its unit; those that are not the headline are
    # below.
    rows = [row for table in Page(tmp_path / "results.html").tables for row in table]
    assert ["", "word_perplexity", "0.75"] in rows and [
        "",
        "exact_match, strict-match",
        "25.0 ± 1.0 %",
    ] in rows
    lines = results_table(found)
    assert [line for line in lines if line.endswith("track:")] == [
        "Paper track:",
        "Standard track:",
    ]


def test_without_a_judge_there_is_no_number_and_the_answers_are_there(tmp_path: Path) -> None:
    silent = {"task": "mt_bench", "scores": {}, "gold": None, "headline": ""}
    found = [result([], "base", "model", **silent), result([], base="base", **silent)]
    seen = Page(write_results(found, tmp_path))
    assert seen.tables[0][1:] == [
        ["no judge"],
        ["base base", "no number"],
        ["pissa-r32", "no number"],
    ]
    assert "base/mt_bench.html" in seen.links
    answers = Page(
        write_answers(found[0], [sample(None, prompt=["One?", "Two?"])], tmp_path / "answers.html")
    )
    assert (
        "No judge has scored these answers" in answers.text and '["One?", "Two?"]' in answers.text
    )
    assert answers.answers == [{"answer", "open"}] and "no verdict (1)" in answers.text


def test_a_judged_model_beside_one_that_is_not_keeps_its_number(tmp_path: Path) -> None:
    common: dict[str, Any] = {"task": "mt_bench", "gold": None}
    judged = {"scores": {"judge": Score(1.0, 0.21, None, 80)}, "headline": "judge"}
    found = [
        result([], "base", "model", scores={}, headline="", **common),
        result([], **common, **judged),
    ]
    assert results_table(found)[2:] == [
        "| model | mt_bench, judge, 1 to 10 |",
        "| --- | ---: |",
        "| base | no number |",
        "| pissa-r32 | 1 ± 0.21 |",
    ]


def test_markdown_has_the_numbers_of_the_page(place: Path, shared: Path) -> None:
    run, base = answered(shared, 3, 200), answered(shared, 2)
    other = result(run, "pipe|d", task="math")
    lines = results_table(
        [result(run, "a-run", base="z-base"), result(base, "z-base", "model"), other]
    )
    assert lines[:2] == ["Paper track:", ""]
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| z-base", "| a-run", "| pipe\\|d"]
    assert lines[4].endswith("| – | – | – |") and lines[6].startswith("| pipe\\|d | – | – | – | ")
    page_cells = Page(place / "results.html").tables[0][2]
    assert [text.replace("; ", " ") for text in lines[4].split(" | ")[1:4]] == page_cells[1:]
    assert "only 200 of 1,319 questions" in lines[5]


def test_the_command_prints_the_figures_of_the_page(
    place: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = answered(shared, 3, 200)
    words = Score(21.3, None, None, 10)
    marks = Score(6.25, 0.21, None, 80)
    print_results(
        [
            result(run, "a-run"),
            result([], "words", task="wikitext", track="standard", scores={"word_perplexity,none": words},
                   gold=None, headline="word_perplexity,none"),
            result([], "marks", task="mt_bench", scores={"judge": marks}, gold=None, headline="judge"),
            result([], "silent", task="mt_bench", gold=None, **OPEN),
        ]
    )  # fmt: skip
    lines = {cells[2]: [cell.strip() for cell in cells] for line in capsys.readouterr().out.splitlines()
             if len(cells := [cell.strip() for cell in line.split("│")]) > 4}  # fmt: skip
    shown = Page(place / "results.html").tables[0][-1]
    assert (
        shown[1].startswith(f"{lines['a-run'][3]} {lines['a-run'][4]}") and "%" in lines["a-run"][3]
    )
    assert shown[2].startswith(lines["a-run"][5])
    assert lines["words"][3:5] == ["21.3", "-"]
    assert lines["marks"][3:5] == ["6.25 ± 0.21", "-"]
    assert lines["silent"][3] == "no judge"


def test_filters_count_what_they_show(place: Path, shared: Path) -> None:
    base = answered(shared, wrong=2)
    seen = Page(place / "z-base/gsm8k.html")
    right = sum(one["correct"] for one in base)
    apart = sum(one["correct"] != one["authors"]["correct"] for one in base)
    assert 100 < right < 1219 and apart > 100
    for name, count in {"right": right, "wrong": 1319 - right, "disagree": apart}.items():
        assert sum(name in classes for classes in seen.answers) == count
        assert f"{name.replace('disagree', 'scorers disagree')} ({count:,})" in seen.text
    assert "all (1,319)" in seen.text and "no verdict" not in seen.text
    reasons = [(row[0], int(row[1])) for row in seen.tables[0]]
    assert sum(count for _, count in reasons) == 1319 - right
    assert dict(reasons) == {
        name: sum(one["reason"] == name for one in base) for name, _ in reasons
    }
    assert [count for _, count in reasons] == sorted((count for _, count in reasons), reverse=True)


def test_answers_say_which_scorer_is_alone_in_calling_them_right(tmp_path: Path) -> None:
    theirs = {"correct": True, "extracted": "18.4", "reason": ""}
    samples = [
        sample(False, authors=theirs),
        sample(False, authors=theirs),
        sample(True, authors={"correct": False, "extracted": None, "reason": "no answer found"}),
        sample(True, authors=theirs),
        sample(None, authors=theirs),
    ]
    seen = Page(write_answers(result([]), samples, tmp_path / "a.html"))
    assert "right for us only 1" in seen.text and "right for the authors only 2" in seen.text
    assert "scorers disagree (3)" in seen.text
    assert "The authors' scorer: wrong, no answer found." in seen.text
    assert "The authors' scorer: right, took 18.4" in seen.text
    plain = Page(write_answers(result([]), [sample()], tmp_path / "b.html"))
    assert "disagree" not in plain.text and "for us only" not in plain.text


HOSTILE = "</pre></details><script>alert(1)</script><img src=x onerror=alert(2)> & \x00 \ud800 \u202e gnp \x1b[31m\r\n"


def test_a_hostile_answer_stays_text_and_its_control_characters_are_seen(tmp_path: Path) -> None:
    fields = ("id", "extracted", "reason", "prompt", "output", "gold")
    theirs = {"correct": True, "extracted": HOSTILE, "reason": HOSTILE}
    bad = sample(False, **dict.fromkeys(fields, HOSTILE), authors=theirs)
    one = result([], notes=[HOSTILE], data={"name": HOSTILE, "rows": 0})
    good = sample(False, authors={"correct": True, "extracted": "4", "reason": "x"})
    tame = write_answers(result([], notes=["x"]), [good], tmp_path / "tame.html")
    seen = Page(write_answers(one, [bad], tmp_path / "bad.html"))
    assert "script" not in seen.tags and "img" not in seen.tags and seen.loaded == []
    assert seen.tags == Page(tame).tags
    assert "<script>alert(1)</script>" in seen.text
    for code in ("⟨U+0000⟩", "⟨U+D800⟩", "⟨U+202E⟩ gnp ⟨U+001B⟩[31m⟨U+000D⟩"):
        assert code in seen.text
    raw = (tmp_path / "bad.html").read_bytes().decode("utf-8")
    assert not set(raw) & {"\x00", "\u202e", "\x1b", "\r"}
    assert "script" not in Page(write_results([one], tmp_path)).tags


def test_what_a_person_can_read_stays_as_it_is() -> None:
    text = "naïve Ελλάδα 漢字 \u3000 é \N{SNOWMAN} 1\u00a0000 tab\tline\n"
    assert visible(text) == text
    assert visible("a\u200bb\u2028\x85\ufeff") == "a⟨U+200B⟩b⟨U+2028⟩⟨U+0085⟩⟨U+FEFF⟩"


def test_an_output_keeps_its_first_empty_line(tmp_path: Path) -> None:
    path = write_answers(result([]), [sample(output="\n\nfour")], tmp_path / "a.html")
    # A parser drops one line break behind <pre>.
    assert "<pre>\n\n\nfour</pre>" in path.read_text(encoding="utf-8")


def test_a_name_is_a_link_whatever_is_in_it(tmp_path: Path) -> None:
    write_results([result([], "50% #1?", scores={}, headline="")], tmp_path)
    assert set(Page(tmp_path / "results.html").links) == {"50%25%20%231%3F/gsm8k.html"}


def test_all_of_gsm8k_is_a_page_of_a_few_megabytes_without_script_or_network(place: Path) -> None:
    path = place / "z-base/gsm8k.html"
    seen = Page(path)
    assert len(seen.answers) == 1319
    assert 1e6 < path.stat().st_size < 20e6
    assert "script" not in seen.tags and seen.loaded == [] and seen.links == ["../results.html"]


def test_past_the_limit_of_a_page_it_says_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_page, "MOST", 3)
    seen = Page(
        write_answers(result([]), [sample(bool(n % 2)) for n in range(8)], tmp_path / "a.html")
    )
    assert len(seen.answers) == 3
    assert "the first 3 of 8; all are in gsm8k.samples.jsonl" in seen.text
    other = result([], track="standard")
    assert (
        "gsm8k.standard.samples.jsonl"
        in Page(write_answers(other, [sample()] * 4, tmp_path / "b.html")).text
    )
    assert "right 4" in seen.text and "right (1)" in seen.text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_in_a_browser_a_filter_hides_what_it_does_not_show(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib.image")
    one = result([], scores={"ours": Score(0.8, None, None, 10)})
    source = write_answers(
        one, [sample(True)] * 8 + [sample(False)] * 2, tmp_path / "a.html"
    ).read_text()
    # The edge of an answer has its colour: green where it is right, red where it is wrong.
    edges = {"right": (0x00, 0x9E, 0x73), "wrong": (0xD5, 0x5E, 0x00)}
    heights = {}
    for chosen in ("all", "right", "wrong"):
        shown = source.replace(' id="all" checked>', ' id="all">')
        shown = shown.replace(f' id="{chosen}">', f' id="{chosen}" checked>')
        assert shown.count("checked>") == 1
        (tmp_path / "shown.html").write_text(shown, encoding="utf-8")
        pixels = matplotlib.imread(screenshot(tmp_path / "shown.html", tmp_path / f"{chosen}.png"))[
            ..., :3
        ]
        heights[chosen] = [
            int((abs(pixels - [part / 255 for part in edge]).max(axis=-1) < 0.02).any(axis=1).sum())
            for edge in edges.values()
        ]
    assert heights["right"] == [heights["all"][0], 0] and heights["wrong"] == [0, heights["all"][1]]
    assert (
        heights["all"][0] == pytest.approx(4 * heights["all"][1], abs=8) and heights["all"][1] > 20
    )


def screenshot(source: Path, image: Path) -> Path:
    assert CHROMIUM
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=800,1600",
    ]
    places = [f"--user-data-dir={image.parent / 'profile'}", f"--screenshot={image}"]
    subprocess.run(
        [CHROMIUM, *flags, *places, source.as_uri()], check=True, capture_output=True, timeout=120
    )
    return image
