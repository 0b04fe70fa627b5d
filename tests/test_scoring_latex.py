r"""Answers that are mathematics: what counts for us, and what counted for the PiSSA authors' script."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from pissa.errors import DataError
from pissa.scoring import hendrycks, latex

YES, NO = True, False
# Answer after "The answer is: ", gold, ours, the authors'. Where the last two differ the authors'
# script is at fault.
ANSWERS = [
    # fractions and decimals
    (r"\frac12", r"\frac{1}{2}", YES, YES),
    (r"\dfrac{1}{2}", r"\frac{1}{2}", YES, YES),
    ("1/2", r"\frac{1}{2}", YES, YES),
    ("0.5", r"\frac{1}{2}", YES, YES),
    (".5", r"\frac{1}{2}", YES, YES),
    ("0.50", r"\frac{1}{2}", YES, NO),
    ("0.25", r"\frac{1}{4}", YES, NO),  # 0.5 is the only decimal that they know
    (r"\frac{2}{4}", r"\frac{1}{2}", YES, NO),
    ("0.3333333", r"\frac{1}{3}", NO, NO),
    ("2.9999999999", "3", NO, NO),
    ("0.33333333333333333", r"\frac{1}{3}", NO, NO),
    ("5.0", "5", YES, NO),
    ("9/5", r"1\frac{4}{5}", YES, NO),
    ("1 4/5", r"\frac{14}{5}", NO, YES),  # blanks are dropped
    ("1 1/2", "11/2", NO, YES),
    ("137.5", r"137 \frac{1}{2}", YES, NO),
    (r"\frac{270}{7}", r"\frac{270}7\text{ degrees}", YES, NO),
    (r"6.72 \times 10^{-5}", ".0000672", YES, NO),
    (r"\frac{-\pi}{6}", r"-\frac{\pi}{6}", YES, NO),
    # units, money, percent, separators
    ("90", r"90^\circ", YES, YES),
    ("90 degrees", r"90^\circ", YES, NO),
    ("90°", r"90^\circ", YES, NO),
    ("50", r"50\%", YES, YES),
    ("50%", r"50\%", YES, NO),
    ("0.5", r"50\%", NO, NO),
    (r"50\%", "0.5", YES, NO),
    ("5.4", r"5.4 \text{ cents}", YES, YES),
    (r"5.4\text{cents}", r"5.4 \text{ cents}", YES, NO),
    ("864", r"864 \mbox{ inches}^2", YES, NO),
    ("864 square inches", r"864 \mbox{ inches}^2", YES, NO),
    (r"18 \text{ and } 5", "18", NO, YES),  # what follows "\text{ " is dropped
    (r"18\text{and}5", "18", NO, NO),
    (r"\$18.90", r"\$18.90", YES, YES),
    ("$18.90", r"\$18.90", YES, NO),
    ("32348", r"\$32,\!348", YES, NO),
    ("58500", "58,500", YES, NO),
    ("58{,}500", "58,500", YES, NO),
    ("11 111 111 100", r"11,\! 111,\! 111,\! 100", YES, NO),
    (r"20,000/\pi", r"\frac{20000}{\pi}", YES, NO),
    ("(100,200)", "(100200)", NO, NO),
    ("5 million", "5", NO, NO),
    ("$5$ million", "5", NO, NO),
    (r"5 \text{ million}", "5", NO, YES),
    (r"5 \text{ million dollars}", "5000000", YES, NO),
    ("5 million dollars", "5000000", YES, NO),
    ("2.5 million", "2500000", YES, NO),
    ("2 thousand", "2000", YES, NO),
    ("2 thousand", "2", NO, NO),
    ("3 hundredths", "3", NO, NO),
    ("3 hundredths", "0.03", YES, NO),
    ("5 times pi", "5", NO, NO),
    ("12 divided by 4", "12", NO, NO),
    ("5 squared", "5", NO, NO),
    ("5 inches cubed", "5", YES, NO),
    (r"5\text{ squared}", "5", NO, YES),
    ("5 inches minus pi", "5", NO, NO),
    ("5 minus x", "5", NO, NO),
    ("not 7", "7", NO, NO),
    # words, bases, names
    ("Tuesday", r"\text{Tuesday}", YES, NO),
    (r"\textbf{tuesday}", r"\text{Tuesday}", YES, NO),
    ("seat", r"\text{east}", NO, NO),  # the product of the same letters
    ("C", r"\text{(C)}", YES, NO),
    (r"\text{(B)}", r"\text{(C)}", NO, NO),
    (r"\text{ north}", r"\text{ south}", NO, YES),
    ("52", "52_8", YES, NO),
    ("52_{8}", "52_8", YES, NO),
    ("52_9", "52_8", NO, NO),
    ("42", "52_8", NO, NO),
    ("1010_2", "1010", NO, NO),
    ("42_{10}", "42", YES, NO),
    ("5", "x=5", YES, YES),
    ("x = 5", "5", YES, YES),
    ("y=5", "x=5", NO, YES),
    ("abc = 5", "5", YES, NO),
    ("5t", "5", NO, NO),
    ("5m", "5", NO, NO),
    # order counts in pairs and matrices, not in sets
    ("(1, 2)", "(1,2)", YES, YES),
    (r"\left(1,\frac{4}{2}\right)", "(1,2)", YES, NO),
    ("(2,1)", "(1,2)", NO, NO),
    ("-2,1", "1,-2", YES, NO),
    ("-2 and 1", "1,-2", YES, NO),
    ("x=1 or x=-2", "1,-2", YES, NO),
    ("1,2", "1,-2", NO, NO),
    ("3,5", "3, 5, 7", NO, NO),
    (r"\{2,1\}", r"\{1,2\}", YES, NO),
    ("(2,1)", r"\{1,2\}", NO, NO),
    (r"\{1,2\}", "(1,2)", NO, NO),
    ("2,1", r"\{1,2\}", YES, NO),
    ("[3,4]", "(3,4]", NO, NO),
    (r"x \le 0", r"(-\infty, 0]", YES, NO),
    (r"-2 \le x \le 7", r"x \in [-2,7]", YES, NO),
    (r"(3,\infty)\cup(-\infty,2)", r"(-\infty, 2) \cup (3, \infty)", YES, NO),
    (
        r"\begin{bmatrix} -\frac13 \\ \frac23 \end{bmatrix}",
        r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
        YES,
        NO,
    ),
    (r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", NO, NO),
    (r"1-\sqrt{19}, 1+\sqrt{19}", r"1 \pm \sqrt{19}", YES, NO),
    (r"1 \mp \sqrt{19}", r"1 \pm \sqrt{19}", YES, NO),
    (r"1+\sqrt{19}", r"1 \pm \sqrt{19}", NO, NO),
    (r"-2, 1+\sqrt5, 1-\sqrt5", r"\{1\pm\sqrt{5},-2\}", YES, NO),
    # expressions
    ("2(k+1)", "2k+2", YES, NO),
    ("-5i+6", "6 - 5i", YES, NO),
    ("6+5i", "6 - 5i", NO, NO),
    ("ab+2a+5b+10", "(a+5)(b+2)", YES, NO),
    ("q-p", "p - q", NO, NO),
    ("2x+3", "y = 2x + 3", YES, YES),
    ("5x-7y+11z=-4", "5x - 7y + 11z + 4 = 0", YES, NO),
    (r"\sqrt{242}", r"11\sqrt2", YES, NO),
    ("2(3)", "6", YES, NO),
    ("2(3)", "5", NO, NO),
    ("(2)(3)", "6", YES, NO),
    (r"\log_2(8)", "3", YES, NO),
    (r"2\frac{\pi}{3}", r"\frac{2\pi}{3}", YES, NO),
    (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}", YES, NO),
    ("0.577", r"\frac{\sqrt{3}}{3}", NO, NO),
    ("3.14159", r"\pi", NO, NO),
    ("288π", r"288 \pi", YES, NO),
    (r"\frac{\cos x}{\sin x}", r"\cot x", YES, NO),
    ("∅", r"\emptyset", YES, NO),
    ("a/b", r"\frac{a}{b}", YES, NO),  # int("a") takes their comparison back to the raw strings
    ("a / b", "a/b", YES, NO),
    # what stands around it
    ("5.", "5", YES, YES),
    ("$5$.", "5", YES, NO),
    (r"$\frac{1}{2}.$", r"\frac{1}{2}", YES, NO),
    ("$x=3.$ Then 4 is too large.", "3", YES, NO),
    ("$5$, which is odd.", "5", YES, NO),
    ("$5$ or $6$", "5", NO, NO),
    ("3.5. It is not 4.", "3.5", YES, NO),
    ("5.\nThat is all.", "5", YES, YES),
    ("5\nThat is all.", "5", YES, NO),
    (r"\[\frac{1}{2}\]", r"\frac12", YES, NO),
    ("\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", YES, YES),
    (r"\boxed{5}", "5", YES, NO),
    (r"$\boxed{\{1,2\}}$", r"\{2,1\}", YES, NO),
    ("5\n\n### Instruction:\nNext.\n\n### Response:\nThe answer is: 7", "5", YES, NO),
    ("5\n\n### Instruction:\nNext.\n\n### Response:\nThe answer is: 7", "7", NO, YES),
    ("", "5", NO, NO),
]


@pytest.mark.parametrize(("answer", "gold", "ours", "authors"), ANSWERS)
def test_what_counts_for_us_and_for_the_authors(
    answer: str, gold: str, ours: bool, authors: bool
) -> None:
    output = f"We see it. The answer is: {answer}"
    assert (latex.ours(output, gold).correct, latex.authors(output, gold).correct) == (
        ours,
        authors,
    )


# Whole outputs: what is taken for the answer by us and by the authors.
OUTPUTS = [
    (r"So $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}", None),
    (r"\boxed{3} and then \fbox{$4$} or so", "$4$", None),
    (r"\boxed 7.", "7", None),
    (r"\boxed{5}. The answer is prime", "5", None),
    (r"\boxed{5}. The answer is: 6", "5", "6"),
    (r"\boxed{8} but \boxed{\frac{1}{2", "8", None),
    (r"\boxed{\{1,2\}}", r"\{1,2\}", None),
    ("Final Answer: The final answer is $5$. I hope it is correct.", "5", None),
    ("the ANSWER is 5 meters.", "5 meters", None),
    ("**Answer:** $5$", "5", None),
    ("It is $3$, then $4$.", "4", None),
    (r"It is \(3\), then \[4\]", "4", None),
    ("I do not know.", None, None),
    ("The answer is: 5\n\nThe answer is: ", "5", ""),
]


@pytest.mark.parametrize(("output", "ours", "authors"), OUTPUTS)
def test_where_the_answer_is_looked_for(output: str, ours: str | None, authors: str | None) -> None:
    assert (latex.ours(output, "0").extracted, latex.authors(output, "0").extracted) == (
        ours,
        authors,
    )


def test_an_empty_gold_answer_is_an_error() -> None:
    for scorer in (latex.ours, latex.authors):
        with pytest.raises(DataError, match="gold answer is empty"):
            scorer("The answer is: 5", " ")


def test_a_wrong_answer_says_why() -> None:
    for scorer in (latex.ours, latex.authors):
        assert scorer("nothing", "5").reason == "no answer found"
        assert scorer("The answer is: 6", "5").reason == "differs"
        assert scorer("The answer is: 5", "5").reason == ""


@pytest.fixture(scope="module")
def rows(shared: Path) -> list[dict[str, str]]:
    with (shared / "data/math500/test.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture
def golds(rows: list[dict[str, str]]) -> list[str]:
    return [row["answer"] for row in rows]


def test_every_gold_answer_counts(rows: list[dict[str, str]]) -> None:
    assert len(rows) == 500
    for row in rows:
        for answer in (
            row["answer"],
            f"${row['answer']}$",
            f"${row['answer']}.$",
            f"{row['answer']}.\nIndeed.",
        ):
            output = f"So.\nThe answer is: {answer}"
            assert (
                latex.ours(output, row["answer"]).correct
                and latex.ours(output, row["solution"]).correct
            ), output
        assert latex.ours(row["solution"], row["answer"]).correct, row["solution"]


def test_every_gold_answer_counts_for_the_authors_too(rows: list[dict[str, str]]) -> None:
    for row in rows:
        for output in (
            f"The answer is: {row['answer']}",
            f"The answer is: {row['answer']}.\nIndeed.",
        ):
            assert (
                latex.authors(output, row["answer"]).correct
                and latex.authors(output, row["solution"]).correct
            )
        assert not latex.authors(row["solution"], row["answer"]).correct, "a box is not their mark"


def is_formula(answer: str) -> bool:
    """Whether `answer + 1` and `-(answer)` mean something."""
    return not re.search(r"[,=_%!]|\\(text|mbox|begin|pm|cup|in|infty|circ)\b|\\\$", answer)


def check_rewritten(answers: list[str]) -> None:
    for answer in filter(is_formula, answers):
        output = f"The answer is: $2({answer}) - ({answer})$"
        assert latex.ours(output, answer).correct and not latex.authors(output, answer).correct, (
            output
        )


def check_spoiled(answers: list[str], indices: Sequence[int]) -> None:
    for index in indices:
        gold = answers[index]
        # Golds are in lowest terms: an integer of other digits has another value.
        integers = (a for a in answers[index:] + answers if re.fullmatch(r"-?\d+", a))
        wrong = ["", next(a for a in integers if re.sub(r"\D", "", a) != re.sub(r"\D", "", gold))]
        if is_formula(gold):
            wrong += [f"{gold} + 1"] + (
                [f"-({gold})", f"-{gold}".removeprefix("--")] if gold != "0" else []
            )
        for answer in wrong:
            output = f"The answer is: {answer}"
            assert (
                not latex.ours(output, gold).correct and not latex.authors(output, gold).correct
            ), (output, gold)
        asked = f"\n\n### Instruction:\nIs it $\\boxed{{{gold}}}$? The answer is: {gold}"
        for output in ("", asked):
            assert not latex.ours(output, gold).correct, "an answer that only the prompt has"


def test_gold_answers_count_in_another_form_and_spoiled_ones_do_not(golds: list[str]) -> None:
    chosen = random.Random(0).sample(range(len(golds)), 50)
    check_rewritten([golds[index] for index in chosen])
    check_spoiled(golds, chosen)


@pytest.mark.slow
def test_all_gold_answers_count_in_another_form_and_spoiled_ones_do_not(golds: list[str]) -> None:
    check_rewritten(golds)
    check_spoiled(golds, range(len(golds)))


def test_a_thread_without_alarms_compares_too() -> None:
    said: list[bool] = []
    outputs = (
        "The answer is: 2(k+1)",
        "The answer is: 2k+1",
        "The answer is: " + "(" * 100 + "k" + ")" * 100,
    )
    thread = threading.Thread(
        target=lambda: said.extend(latex.ours(output, "2k+2").correct for output in outputs)
    )
    thread.start()
    thread.join()
    assert said == [True, False, False]


HOSTILE = [
    "9^{9^{9^9}}", "9^9^9^9", "9**9**9**9", "9^{99999999}", "(9^{999})^{999}", "((9^{99})^{99})^{99}", "x^{99999999}",
    "(x+y+z)^{9999}", r"\frac{1}{9^{-99999999}}", "99999999!", "(9!)!", "9!!!!", r"\binom{99999999}{4444444}",
    r"\binom{9^{99}}{9^{98}}", r"\sum_{k=1}^{10^9} k^k", r"\prod_{k=1}^{9999999} k", r"e^{e^{e^{9}}}", "1e999999999",
    "(" * 290, "(" * 100 + "1" + ")" * 100, r"\sin(" * 40 + "x" + ")" * 40, "|x|" * 60, "9" * 290, "9" * 100_000,
    "{" * 100_000, r"\boxed{" * 20_000, r"\boxed{" * 20_000 + "x" + "}" * 20_000, "$" * 100_000, "answer is " * 20_000,
    "\n" * 100_000, " " * 100_000, "1 + " * 75,
]  # fmt: skip
CHILD = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
from pissa.scoring import latex
outputs = json.load(sys.stdin)
print([latex.ours(output, r"\\frac{x+2}{3}").correct for output in outputs])
"""


def test_hostile_answers_neither_hang_nor_eat_memory() -> None:
    outputs = [text for hostile in HOSTILE for text in (f"The answer is: {hostile}", hostile)]
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(outputs),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (child.returncode, json.loads(child.stdout.lower())) == (0, [False] * len(outputs)), (
        child.stderr[-2000:]
    )


def test_what_is_too_long_to_work_out_still_counts_where_it_reads_the_same() -> None:
    for answer in (
        "+".join(f"x_{{{n}}}" for n in range(80)),
        "9^{9^{9^9}}",
        r"\sum_{k=1}^{10^9} k^k",
    ):
        assert latex.ours(f"The answer is: ${answer}$", answer).correct


NORMALISED = [
    (r"\frac12", r"\frac{1}{2}"),
    (r"\frac1{72}", r"\frac{1}{72}"),
    (r"\frac{72}1", r"\frac{72}1"),
    (r"\frac1", r"\frac1"),
    (r"\tfrac 12", r"\frac{1}{2}"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"\sqrt 3", r"\sqrt{}3"),
    (r"\sqrt51", r"\sqrt{5}1"),
    ("1/2", r"\frac{1}{2}"),
    ("01/2", "01/2"),
    ("1/2/3", "1/2/3"),
    ("0.5", r"\frac{1}{2}"),
    (".5", r"\frac{1}{2}"),
    ("{.5}", "{0.5}"),
    ("k = 5", "5"),
    ("k  = 5", "k=5"),
    ("kk=5", "5"),
    ("abc=5", "abc=5"),
    ("x=y=1", "x=y=1"),
    (r"5\text{ cm}", "5"),
    (r"5\text{cm}", r"5\text{cm}"),
    (r"5\%", "5"),
    (r"\$5", "5"),
    (r"90^{\circ}", "90"),
    (r"\left(1\right)", "(1)"),
    ("a\\\\b", "a\\b"),
    ("1\n2", "12"),
    (r"1,\!000", "1,000"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "normal"), NORMALISED)
def test_strings_are_normalised_as_in_hendrycks_math(text: str, normal: str) -> None:
    assert hendrycks.normalised(text) == normal


@pytest.mark.parametrize("text", [r"2\sqrt", r"\frac", "a/b", r"1\text{ a}\text{ b}"])
def test_where_a_rule_fails_the_authors_compare_raw_strings(text: str) -> None:
    assert hendrycks.equivalent(text, text) and not hendrycks.equivalent(f"{text} ", text)
