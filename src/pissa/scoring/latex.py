"""Answers that are mathematics in LaTeX (MATH)."""

from __future__ import annotations

import re

from pissa.errors import DataError
from pissa.scoring import hendrycks
from pissa.scoring.mathematics import GOES_ON, LONGEST, equivalent
from pissa.scoring.numbers import (
    AUTHORS_MARK,
    DIFFERS,
    NOT_FOUND,
    before_next_question,
    last_box,
    marked,
)
from pissa.scoring.verdict import Verdict

_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$([^$]+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_END = re.compile(r"\.?\s*\n|\.(?=\$?\s)")


def ours(output: str, gold: str) -> Verdict:
    r"""The corrected scorer: equal as mathematics.

    The answer is the last box; without one, the sentence after the last mark (`the answer is`,
    `answer:`); without one, the last formula between dollars. Two answers are equal where they read
    the same, are the same exact number (0.3333333 is not 1/3), or are equal for Math-Verify: order
    counts in tuples and matrices, not in sets and sums. Units, degrees and money signs are passed
    over, `50\%` is 50 (and 0.5 where the gold answer has no percent), `x = 5` is 5, words are
    compared as words, a base that the answer leaves out is that of the gold answer, and `r` is `R`.
    Integrals, sums, powers of powers and what is long or huge are not worked out: they count where
    they read the same.

    Args:
        output: what the model wrote after the prompt; where it goes on to a next question, only
            what stands before.
        gold: the answer, or a solution that has it in a box.

    Returns:
        The verdict; `extracted` is the text that was compared. Outside the main thread Math-Verify
        has no time limit.

    Raises:
        DataError: gold is empty.
        MissingExtraError: without Math-Verify.
    """
    answer = _answer(before_next_question(output))
    if not answer:
        return Verdict(False, None, NOT_FOUND)
    correct = equivalent(answer, gold_answer(gold))
    return Verdict(correct, answer, "" if correct else DIFFERS)


def authors(output: str, gold: str) -> Verdict:
    """What `test_acc.py` of GraphPKU/PiSSA says, faults and all.

    The mark is "The answer is: " to the letter, the last one counts however far the model ran on,
    the answer ends at a full stop before a line break, and strings are compared after the
    normalisation of hendrycks/math.

    Args:
        output: what the model wrote after the prompt.
        gold: as for `ours`.
    """
    _, mark, text = output.rpartition(AUTHORS_MARK)
    if not mark:
        return Verdict(False, None, NOT_FOUND)
    answer = text.split(".\n")[0].strip().removesuffix(".").strip()
    correct = hendrycks.equivalent(answer, gold_answer(gold))
    return Verdict(correct, answer, "" if correct else DIFFERS)


def gold_answer(gold: str) -> str:
    """What stands in a solution's last box, or the answer itself.

    Raises:
        DataError: there is nothing.
    """
    found = last_box(gold) or gold.strip()
    if not found:
        raise DataError("gold answer is empty, expected one, or a solution that has it in a box")
    return found


def _answer(text: str) -> str | None:
    if boxed := last_box(text):
        return boxed
    if (behind := marked(text)) is not None:
        return _sentence(behind[: 10 * LONGEST])
    formulas = _FORMULA.findall(text[-10 * LONGEST :])
    return "".join(formulas[-1]).strip() if formulas else None


def _sentence(text: str) -> str:
    """The first sentence; a formula is not cut, and text after it is dropped where it holds no further number."""
    first = _FORMULA.match(text)
    ends = (end.start() for end in _END.finditer(text) if _whole(text[: end.start()]))
    sentence = text[: next(ends, len(text))]
    if first and not GOES_ON.search(sentence[first.end() :]):
        sentence = "".join(first.groups(""))
    return sentence.strip().rstrip(".").removesuffix(".$").strip()


def _whole(text: str) -> bool:
    pairs = (r"\begin{", r"\end{"), (r"\[", r"\]"), ("{", "}")
    return text.count("$$") % 2 == 0 and all(
        text.count(left) <= text.count(right) for left, right in pairs
    )
