"""Answers that are one number (GSM8K), and where in a text an answer stands."""

from __future__ import annotations

import re
from fractions import Fraction

from pissa.errors import DataError
from pissa.scoring.verdict import Verdict

NOT_FOUND, DIFFERS = "no answer found", "differs"
AUTHORS_MARK = "The answer is: "
"""What the PiSSA authors' script looks for, to the letter."""
_LONGEST = 200
"""Characters in which an answer stands; keeps integers and patterns small."""

_NEXT_QUESTION = re.compile(r"(?:\A|\n)[ \t]*### Instruction|\nQuestion:|\n\nQ:")
_MARK = re.compile(
    r"\banswer\b[^\n\d.:=$\\]{0,30}?(?:\bis\b|:|=)[\s:*_]*|####\s*(?=[-−+$£€(\\]*\.?\d)",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:(?P<brace>\{)|(?P<bare>[^\s{}$.,;]+))")
_OPENING = re.compile(r"\A(?:[\s$]|\\[\[(])+")
"""Of mathematics that may begin on a line of its own."""

_SPELLINGS = (
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"[\u00a0\u2009\u202f]"), " "),
    (re.compile(r"\\[,!;: ]"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\\$"), "$"),
    (re.compile(r"(?<!\d)\*\*|\*\*(?!\d)"), ""),
    (re.compile(r"\bnot\s+[-$£€]*\.?\d[\d.,/]*", re.IGNORECASE), ""),  # what is denied is no answer
    (re.compile(r"\b(?:minus|negative)\s+(?=[$£€]?\.?\d)", re.IGNORECASE), "-"),
    (re.compile(r"\\(?:times|cdot)\b"), "×"),
    (re.compile(r"\\div\b"), "÷"),
    (re.compile(r"\s*[×x*]\s*10\s*(?:\^|\*\*)\s*\{?([-+]?\d+)\}?"), r"e\1"),
    (re.compile(r"(?<=\d)\s*(?=\\[dt]?frac)"), " "),
    (re.compile(r"\\[dt]?frac\s*(?:\{([\d.]+)\}|(\d))\s*(?:\{([\d.]+)\}|(\d))"), r"\1\2/\3\4"),
    (re.compile(r"(?<=\d)(?=[½⅓⅔¼¾])"), " "),
    *(
        (re.compile(sign), text)
        for sign, text in zip("½⅓⅔¼¾", ("1/2", "1/3", "2/3", "1/4", "3/4"), strict=True)
    ),
)
_GROUPED = r"\d{1,3}(?:(?P<separator>[,'’_ ])\d{3}(?:(?P=separator)\d{3})*)(?!\d)"
_INDIAN = r"\d{1,2}(?:,\d{2})+,\d{3}(?!\d)"
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)])[-+])?  (?:[$£€¥₹]\ ?)?  (?<![A-Za-z\d])
    (?:(?P<whole>\d+)(?:\ +and)?\ +(?=\d+\s*/\s*\d))?
    (?P<top>(?:{_INDIAN}|{_GROUPED}|\d+)(?:\.\d+|,\d{{1,2}}(?!\d))?|(?<!\w)\.\d+)
    (?:[eE](?P<exponent>[-+]?\d+)(?![A-Za-z\d]))?
    (?:\s*/\s*(?P<bottom>\d+(?:\.\d+)?))?
    (?:\s*(?P<scale>hundred|thousand|million|billion|trillion)\b|(?P<kilo>[kK])\b)?
    """,
    re.VERBOSE,
)
_SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "k": 10**3,
}
_OPERATOR = r"(?:[-+/×÷·^&]|\*\*?|(?:x|of|plus|minus|times|(?:divided|multiplied)\s+by)\b|x(?=\d))"
# Nothing is given back: 50 terms without "=" must not be tried in all ways that their blanks can be
# shared out.
_OPERAND = rf"(?>[$£€( ]*[-+]?[\d.,]+\s*%?\s*(?:(?!{_OPERATOR})[A-Za-z]+\s*)?\)*\s*)"
_LEFT_SIDE = re.compile(rf"\s*(?:(?:{_OPERAND}{_OPERATOR}\s*)*+{_OPERAND}|[A-Za-z]\w*\s*)=\s*")
_ANOTHER = re.compile(
    rf"\s*%?\s*(?:[A-Za-z]+\s*)?(?:{_OPERATOR}|(?:to|or|and)\b)[\s$£€(]*\d|[,;]\s*\d|[:.]\d|\s*(?:squared|cubed)\b"
)
"""What follows a number that is not the whole answer: `5 * 4`, `10-20`, `3 eggs or 4`, `3, 4`, `3:30`, `3 squared`."""
_AUTHORS_NUMBER = re.compile(r"[\-+]?\d*[\.,/]?\d+")


def ours(output: str, gold: str) -> Verdict:
    """The corrected scorer: equal as exact numbers, 18 and 18.00 but not 18.4.

    The answer is the first number in the last box or, without boxes, after the last mark that has
    something behind it: `the answer is`, `answer:` or `####`. Left sides of equations are passed
    over. A text without any mark is worth its last number, as in lm-evaluation-harness's flexible
    extraction; a wrong one says so in `reason`. A range, a list or a sum that is not worked out is
    no answer. `50%` is 50, `12,5` is 12.5, `2 million` is 2,000,000, `5k` is 5,000, `minus 5` is
    -5, and `5 dozen` is 5, because questions ask for dozens.

    Args:
        output: what the model wrote after the prompt. Where it goes on to a next question ("###
            Instruction" or "Question:" on a line of its own, "Q:" after an empty one), only what
            stands before counts.
        gold: the worked answer that ends in "#### 18", or "18".

    Returns:
        The verdict; `extracted` is the number as it stands in the text.

    Raises:
        DataError: gold without a number.
    """
    wanted = gold_value(gold)
    text = before_next_question(output)
    answer = marked(text)
    if answer is None:
        return _verdict(_last(text), wanted, f"{DIFFERS}: no mark, the last number was taken")
    line = _OPENING.sub("", _spelled(answer[:_LONGEST])).split("\n")[0]
    while left := _LEFT_SIDE.match(line):
        line = line[left.end() :]
    found = _NUMBER.search(line)
    if found and (more := _ANOTHER.match(line, found.end())):
        return Verdict(False, line[found.start() : more.end()], "more than one number")
    return _verdict(found, wanted, DIFFERS)


def authors(output: str, gold: str) -> Verdict:
    """What `test_acc.py` of GraphPKU/PiSSA says, faults and all.

    The mark is "The answer is: " to the letter, and the last one counts however far the model ran
    on. A number has one separator (`1,234,567` is 1234, `12,5` is 125) and is rounded, halves to
    even: 18.4 passes for 18.

    Args:
        output: what the model wrote after the prompt.
        gold: as for `ours`.

    Raises:
        DataError: gold without a number.
    """
    wanted = gold_value(gold)
    _, mark, text = output.rpartition(AUTHORS_MARK)
    found = _AUTHORS_NUMBER.search(text) if mark else None
    if found is None:
        return Verdict(False, None, NOT_FOUND)
    taken = found.group()
    try:
        value = _authors_value(taken)
    except (ArithmeticError, ValueError):
        return Verdict(False, taken, "their script stops here")
    correct = value is not None and float(value) == float(wanted)
    return Verdict(correct, taken, "" if correct else DIFFERS)


def before_next_question(output: str) -> str:
    """The first answer of an output, without the questions that a model went on to ask itself."""
    return _NEXT_QUESTION.split(output, maxsplit=1)[0]


def marked(text: str) -> str | None:
    """What stands in the last box, or else behind the last mark; None where neither holds anything."""
    if boxed := last_box(text):
        return boxed
    behind = (text[mark.end() :].strip() for mark in reversed(list(_MARK.finditer(text))))
    return next(filter(None, behind), None)


def last_box(text: str) -> str | None:
    r"""What stands in the last \boxed or \fbox that is not empty and whose braces are balanced.

    Takes time linear in the text, however many braces stay open.
    """
    partner, opened = {}, []
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if brace.group() == "{":
            opened.append(brace.start())
        elif brace.group() == "}" and opened:
            partner[opened.pop()] = brace.start()
    for box in reversed(list(_BOX.finditer(text))):
        start = box.start("brace")
        content = box["bare"] or text[start + 1 : partner.get(start, 0)]
        if content.strip():
            return content.strip()
    return None


def gold_value(gold: str) -> Fraction:
    """The number that a worked answer ends in.

    Args:
        gold: as for `ours`.

    Raises:
        DataError: there is none.
    """
    text = str(gold)
    found = _last(text.rpartition("####")[2])
    value = _value(found) if found else None
    if value is None:
        raise DataError(
            f"gold answer is {text[-80:]!r}, expected a number, or a text that ends in '#### number'"
        )
    return value


def _last(text: str) -> re.Match[str] | None:
    return max(_NUMBER.finditer(_spelled(text[-10 * _LONGEST :])), key=re.Match.start, default=None)


def _spelled(text: str) -> str:
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


def _verdict(found: re.Match[str] | None, wanted: Fraction, wrong: str) -> Verdict:
    value = _value(found) if found else None
    if found is None or value is None:
        return Verdict(False, None, NOT_FOUND)
    return Verdict(value == wanted, found.group().strip(), "" if value == wanted else wrong)


def _value(found: re.Match[str]) -> Fraction | None:
    """None for what is written as a number and has no value of sane size."""
    top, bottom, exponent = (
        found["top"],
        Fraction(found["bottom"] or 1),
        int(found["exponent"] or 0),
    )
    if bottom == 0 or abs(exponent) > _LONGEST or len(top) > _LONGEST:
        return None
    if re.fullmatch(r"\d+,\d{1,2}|.*[ '’_]\d{3},\d{1,2}", top):
        top = top.replace(",", ".")
    value = Fraction(re.sub(r"[,'’_ ]", "", top)) * Fraction(10) ** exponent / bottom
    value = (value + int(found["whole"] or 0)) * _SCALES.get(
        found["scale"] or (found["kilo"] or "").lower(), 1
    )
    return -value if found["sign"] == "-" else value


def _authors_value(taken: str) -> int | None:
    top, slash, bottom = taken.replace(",", "").partition("/")
    if not slash:
        return None if float(top) == float("inf") else round(float(top))
    if top in ("", "-", "+"):
        return None
    if bottom == "0":
        return round(float(top))
    ratio = Fraction(f"{top}/{bottom}")
    return round(float(ratio.numerator / ratio.denominator))
