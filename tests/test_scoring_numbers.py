"""Answers that are one number: what counts for us, and what counted for the PiSSA authors' script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pissa.errors import DataError
from pissa.scoring import numbers

YES, NO = True, False
A = "The answer is: "
NEXT = "\n\n### Instruction:\nHow many?\n\n### Response:\n2 + 3 = 5. The answer is: 5"
# What the model wrote, gold, ours, the authors'. Where the last two differ the authors' script is
# at fault.
ANSWERS = [
    # spellings of the number
    (A + "18", "18", YES, YES),
    (A + "18.", "18", YES, YES),
    (A + "18.00", "18", YES, YES),
    (A + "18.4", "18", NO, YES),  # rounded
    (A + "17.6", "18", NO, YES),
    (A + "2.5", "2", NO, YES),  # halves to even
    (A + "2.5", "2.5", YES, NO),  # rounded before it is compared
    (A + ".5", "0.5", YES, NO),
    (A + "1,234", "1234", YES, YES),
    (A + "1,234", "1,234", YES, YES),
    (A + "1,234,567", "1234567", YES, NO),  # one separator only
    (A + "1,234,567", "1234", NO, YES),
    (A + "12,5", "125", NO, YES),  # any comma is dropped
    (A + "12,5", "12.5", YES, NO),
    (A + "1 234 567", "1234567", YES, NO),
    (A + "1\u202f234\u202f567", "1234567", YES, NO),
    (A + "1_000", "1000", YES, NO),
    (A + "1'000", "1000", YES, NO),
    (A + "12,34,567", "1234567", YES, NO),
    (A + "1{,}450", "1450", YES, NO),
    (A + "1\\,450", "1450", YES, NO),
    (A + "$1,234.50", "1234.5", YES, NO),
    (A + "\\$18", "18", YES, YES),
    (A + "£18", "18", YES, YES),
    (A + "-$18", "-18", YES, NO),  # the sign is not beside the digits
    (A + "$-18", "-18", YES, YES),
    (A + "-18", "-18", YES, YES),
    (A + "-18", "18", NO, NO),
    (A + "\u221218", "-18", YES, NO),  # a minus that is not a hyphen
    (A + "\u221218", "18", NO, YES),
    (A + "+18", "18", YES, YES),
    (A + "50%", "50", YES, YES),
    (A + "50%", "0.5", NO, NO),
    (A + "1.5e3", "1500", YES, NO),
    (A + "1.5 \\times 10^3", "1500", YES, NO),
    (A + "2 million dollars", "2000000", YES, NO),
    (A + "5 hundred", "5", NO, YES),
    (A + "5 hundred", "500", YES, NO),
    (A + "5k", "5", NO, YES),
    (A + "$5k", "5000", YES, NO),
    (A + "5 km", "5", YES, YES),
    (A + "5 dozen", "5", YES, YES),  # questions ask for dozens
    (A + "minus 5", "5", NO, YES),
    (A + "Minus $5", "-5", YES, NO),
    (A + "Rs.18", "18", YES, NO),  # read as .18
    # fractions
    (A + "7/2", "3.5", YES, NO),
    (A + "7/2", "4", NO, YES),  # rounded
    (A + "36/2", "18", YES, YES),
    (A + "36 / 2", "18", YES, NO),
    (A + "18/0", "18", NO, YES),  # a denominator 0 gives the numerator
    (A + "18/00", "18", NO, NO),  # their script dies of it
    (A + "3 1/2", "3.5", YES, NO),
    (A + "3 1/2", "3", NO, YES),
    (A + "-3 1/2", "-3.5", YES, NO),
    (A + "3\\frac{1}{2}", "3.5", YES, NO),
    (A + "$\\frac{36}{2}$", "18", YES, NO),
    (A + "\\dfrac{7}{2}", "7", NO, YES),
    (A + "3½", "3.5", YES, NO),
    # what stands around it
    (A + "18 eggs", "18", YES, YES),
    (A + "**18**", "18", YES, YES),
    (A + "$18$.", "18", YES, YES),
    (A + "3.5 hours", "3.5", YES, NO),
    (A + "She makes 18 dollars.", "18", YES, YES),
    (A + "an 18-year-old", "18", YES, YES),
    (A + "18. That leaves 5 eggs.", "18", YES, YES),
    (A + "\n\\[\n18\n\\]", "18", YES, YES),
    # sums and several numbers
    (A + "5 * 4 = 20", "20", YES, NO),
    (A + "5 * 4 = 20", "5", NO, YES),  # the first number
    (A + "2+3 = 5 = 5.0", "5", YES, NO),
    (A + "x = 5 * 4 = 20", "20", YES, NO),
    (A + "5 apples * 4 = $20", "20", YES, NO),
    ("First \\boxed{5}, then \\boxed{18}.", "18", YES, NO),
    (A + "20% of 90 = 18", "18", YES, NO),
    (A + "4 x 5 = 20", "20", YES, NO),
    (A + "4x5 = 20", "20", YES, NO),
    (A + "(3 + 2) * 4 = 20", "20", YES, NO),
    (A + "4 x 5", "4", NO, YES),
    (A + "x = 18", "18", YES, YES),
    (A + "18 eggs because 3 + 4 = 7", "18", YES, YES),
    (A + "5 * 4", "5", NO, YES),
    (A + "10-20", "10", NO, YES),
    (A + "10 to 20", "10", NO, YES),
    (A + "18 or 20", "18", NO, YES),
    (A + "16, 18", "16", NO, YES),
    (A + "3:30", "3", NO, YES),
    (A + "12 divided by 4", "12", NO, YES),
    (A + "12 divided by 4 = 3", "3", YES, NO),
    (A + "20 minus 5 = 15", "15", YES, NO),
    (A + "20 minus 5", "20", NO, YES),
    (A + "5 squared", "5", NO, YES),
    (A + "5 cubed", "5", NO, YES),
    (A + "5 square feet", "5", YES, YES),
    (A + "1.2.3", "1", NO, YES),
    # marks
    ("the answer is 18", "18", YES, NO),  # to the letter
    ("The answer is:18", "18", YES, NO),
    ("The answer is: \n18", "18", YES, YES),
    ("**Answer:** 18", "18", YES, NO),
    ("The final answer is **18**.", "18", YES, NO),
    ("The answer to this problem is 18", "18", YES, NO),
    ("3 * 6 = <<3*6=18>>18\n#### 18", "18", YES, NO),
    ("So it is \\boxed{18}, of 20.", "18", YES, NO),
    (A + "\\boxed{\\text{18 eggs}}.", "18", YES, YES),
    (A + "20\nThe answer is: 18", "18", YES, YES),
    (A + "18\n\nThe answer is: ", "18", YES, NO),  # cut off while repeating itself
    ("#### Step 2\nSo " + A + "18", "18", YES, YES),
    ("The answer is not 7", "7", NO, NO),
    ("The answer is not 7.5, it is 8", "8", YES, NO),
    ("The answer is not 7 but 8", "7", NO, NO),
    (A + "20, not 18", "20", YES, YES),
    # no mark, no number, another question
    ("3 * 6 = 18 eggs", "18", YES, NO),
    ("18 - 3 = 15", "18", NO, NO),
    ("", "18", NO, NO),
    (A, "18", NO, NO),
    (A + "unknown", "18", NO, NO),
    ("I had 18. " + A + "none of these", "18", NO, NO),
    (A + "18" + NEXT, "18", YES, NO),  # the last mark, however far the model ran on
    (A + "18" + NEXT, "5", NO, YES),
    (A + "18\nQuestion: and now?\nThe answer is: 5", "18", YES, NO),
    (A + "18\n\nQ: and now?\nThe answer is: 5", "18", YES, NO),
    ("\n### Instruction:\nThe answer is: 18", "18", NO, YES),
]


@pytest.mark.parametrize(("output", "gold", "ours", "authors"), ANSWERS)
def test_what_counts_for_us_and_for_the_authors(
    output: str, gold: str, ours: bool, authors: bool
) -> None:
    assert (numbers.ours(output, gold).correct, numbers.authors(output, gold).correct) == (
        ours,
        authors,
    )


@pytest.fixture(scope="module")
def worked(shared: Path) -> list[str]:
    with (shared / "data/gsm8k/test.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["answer"] for line in lines]


def parts(answer: str) -> tuple[str, str]:
    reasoning, _, gold = answer.partition("\n#### ")
    return reasoning, gold


def test_every_gold_answer_counts_in_the_papers_form_and_its_own(worked: list[str]) -> None:
    assert len(worked) == 1319
    for answer in worked:
        reasoning, gold = parts(answer)
        for output in (
            answer,
            f"{reasoning}\nThe answer is: {gold}",
            f"{reasoning} The answer is: {gold}." + NEXT,
        ):
            assert numbers.ours(output, answer).correct and numbers.ours(output, gold).correct, (
                output
            )


def test_the_authors_script_misses_one_gold_answer_with_two_commas(worked: list[str]) -> None:
    outputs = [
        (f"{reasoning}\nThe answer is: {gold}", gold) for reasoning, gold in map(parts, worked)
    ]
    assert [gold for output, gold in outputs if not numbers.authors(output, gold).correct] == [
        "1,450,000"
    ]


def test_no_spoiled_answer_counts_for_either(worked: list[str]) -> None:
    golds = [gold for _, gold in map(parts, worked)]
    values = [int(gold.replace(",", "")) for gold in golds]
    for index, (gold, value) in enumerate(zip(golds, values, strict=True)):
        spoiled = [
            f"So.\nThe answer is: {wrong}"
            for wrong in (value + 1, -value, value * 10 + 1)
            if wrong != value
        ]
        other = next(golds[i - 1] for i in range(index, -len(golds), -1) if values[i - 1] != value)
        asked = f"\n\n### Instruction:\nIs it {gold}? The answer is: {gold}"
        for output in (*spoiled, f"The answer is: {other}", "", f"#### {value - 1}"):
            assert not numbers.ours(output, gold).correct, output
            assert not numbers.authors(output, gold).correct, output
        assert not numbers.ours(asked, gold).correct, "an answer that only the prompt has"


def test_a_wrong_answer_says_why() -> None:
    verdicts = [numbers.ours(output, "18") for output in ("", "5 eggs", A + "5", A + "5-6 eggs")]
    assert [verdict.reason for verdict in verdicts] == [
        "no answer found",
        "differs: no mark, the last number was taken",
        "differs",
        "more than one number",
    ]
    assert [verdict.extracted for verdict in verdicts] == [None, "5", "5", "5-6"]
    assert numbers.authors(A + "18/00", "18").reason == "their script stops here"
    assert numbers.ours(A + "1,234.50", "1234.5").extracted == "1,234.50"


def test_a_gold_answer_without_a_number_is_an_error() -> None:
    for scorer in (numbers.ours, numbers.authors):
        with pytest.raises(DataError, match="expected a number"):
            scorer(A + "18", "#### none")
    assert numbers.gold_value("6 * 3 = 18\n#### 1,018") == 1018


@pytest.mark.parametrize(
    "text",
    ["9" * 100_000, "1e999999999", "\\boxed{" * 20_000, "\\boxed{" * 20_000 + "5" + "}" * 20_000, "answer is " * 20_000,
     "1," * 50_000, "1 " * 50_000, "-" * 100_000, "{" * 100_000, "1/" * 50_000,
     "1 + " * 50_000, "1 x" * 50_000, "1  " * 50_000, "1 a" * 50_000, "\n" * 100_000, "\n " * 50_000, "(" * 100_000],
    ids=lambda text: f"{text[:8]}x{len(text)}",
)  # fmt: skip
def test_hostile_texts_end_and_are_wrong(text: str) -> None:
    for output in (text, A + text):
        assert not numbers.ours(output, "18").correct
        assert not numbers.authors(output, "18").correct
