"""Equal as mathematics: two answers in LaTeX, by reading, by exact numbers, by Math-Verify."""

from __future__ import annotations

import itertools
import math
import re
import threading
from collections.abc import Callable
from fractions import Fraction

from pissa.errors import require

_SECONDS = 3
"""For reading and for comparing, each; whole seconds, as an alarm counts."""
LONGEST = 300
"""Characters of an answer that is worked out; of MATH-500's own answers the longest has 53."""
_LARGEST = 10**4
"""Digits of a power that is worked out, and exponents of a variable."""
_DEEPEST = 8
"""Brackets within brackets: the time that Math-Verify reads grows with the third power. MATH-500's own have 2."""

_COMMANDS = {
    "≤": "le",
    "≥": "ge",
    "π": "pi",
    "∞": "infty",
    "±": "pm",
    "∪": "cup",
    "∅": "emptyset",
    "√": "sqrt",
}
_SPELLINGS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"[−–]", "-"),
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\\(?:left|right|displaystyle|[bB]ig[lr]?)(?![A-Za-z])", ""),
    (r"(?<=\d)(?:,\\!|\{,\})\s*(?=\d)", ""),
    (r"\\?[$£€]|(?<!\\)\\[()\[!,;:]|(?<!\\)\\\]|\*\*", ""),
    (r"(?<!\\)\\ |~|\s+", " "),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-z])|°", ""),
    (r"\s*(?:\\?%|(?:\\text\s*\{)?\s*percent\b\s*\}?)", "%"),
    (r"\\(le|ge|ne)q(?![a-z])", r"\\\1"),
    (r"\\varnothing(?![a-z])", r"\\emptyset"),
    (r"[≤≥π∞±∪∅√]", lambda sign: f"\\{_COMMANDS[sign.group()]} "),
    (r"(?<!\\)\bsqrt", r"\\sqrt"),
    (r"\\sqrt\s*(?:\(([^()]*)\)|(\w))", r"\\sqrt{\1\2}"),
    (r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", r"\\frac{\1\2}{\3\4}"),
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12,
           "tenth": -1, "hundredth": -2, "thousandth": -3, "millionth": -6}  # fmt: skip
"""Powers of ten that are written as words."""
_OPERATORS = r"(?:times|multiplied|divided|plus|minus|over)\b"
_POWERS = r"(?:squared|cubed)\b"
_TEXT = r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|operatorname)\s*"
_SCALE = re.compile(
    rf"(?<=[\d}}])\s*(?P<text>{_TEXT}\{{\s*)?(?P<word>{'|'.join(_SCALES)})(?:(?<=th)s)?\b(?(text)[A-Za-z\s]*\}})"
)
GOES_ON = re.compile(rf"[\d$\\%]|\b(?:or|and|{_OPERATORS}|{_POWERS}|(?:{'|'.join(_SCALES)})s?)\b")
"""What, after a formula, may change what it is worth."""
_SHORT_UNITS = "mm|cm|km|ft|in|kg|mg|lbs?|oz|ml|mi|yds?|hrs?|min|sec|mph|feet"
_UNITS = re.compile(
    rf"(?<=[\d}})\w])\s*(?:{_TEXT}\{{(?!\s*(?:{_OPERATORS}|{_POWERS}))[^{{}}]*\}}"
    rf"|(?<=[\d}})])(?:\s(?!{_OPERATORS}|{_POWERS})[A-Za-z]{{4,}}(?:\s(?!{_OPERATORS})[A-Za-z]{{2,}})*|\s?(?:{_SHORT_UNITS})\b))"
    r"\.?\s*(?:\^\s*\{?\d\}?)?\s*\Z"
)
_WORDS = re.compile(
    rf"\s*(?:{_TEXT}\{{(?P<words>[^{{}}\\]*)\}}|(?P<bare>[A-Za-z][A-Za-z ]+|\(?[A-Z]\)?))\s*"
)
_NAME = re.compile(r"\s*(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?|'|\([a-z]\))?\s*(?:=|\\in(?![a-z]))\s*")
_BASED = re.compile(r"\s*(?P<digits>[\dA-F]+)\s*_\s*\{?\s*(?P<base>\d+)\s*\}?\s*")
_GROUPED = re.compile(r"(?<![\d.,])(?<!\d )\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,]| \d)")
_DECIMAL = r"\s*[-+]?\s*(?:\d+(?:\.\d*)?|\.\d+)\s*"
_NUMBER = re.compile(
    rf"\s*(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)(?:\s*(?=\\frac)|\s+(?=\d+\s*/)))?"
    rf"(?:\\frac\{{(?P<top>{_DECIMAL})\}}\{{(?P<bottom>{_DECIMAL})\}}|(?P<value>{_DECIMAL})(?:/(?P<over>{_DECIMAL}))?)"
)
_PRODUCT, _TIMES = re.compile(r"((?<![\w.])[\d.]+|\))\s*(?=\()"), r"\1\\cdot "
"""Math-Verify reads 2(3) and (2)(3) as a mixed number, 5."""
_POWER = re.compile(
    r"(?P<base>[^\s^])\s*\^\s*(?:\{(?P<group>(?:[^{}^]|\{[^{}^]*\})*)\}|(?P<bare>\\?\w))"
)
_ENDLESS = re.compile(r"\\(?:sum|prod|i*int|oint|lim)(?![a-z])|[)}!]\s*!")


def equivalent(answer: str, gold: str) -> bool:
    """Whether two answers, without the text around them, read the same or are worth the same.

    Raises:
        MissingExtraError: without Math-Verify.
    """
    if answer.strip() == gold.strip():
        return True
    if len(answer) > LONGEST or len(gold) > LONGEST:
        return False
    answer, gold = _spelled(answer), _spelled(gold)
    if _squeezed(answer) == _squeezed(gold):
        return True
    answer, gold = _ungrouped(answer), _ungrouped(gold)
    if (words := _words(gold)) is not None and (words == _words(answer) or gold.startswith("\\")):
        return words == _words(answer)
    if answer.endswith("%") and not gold.endswith("%"):
        value, wanted = _number(answer[:-1]), _number(gold)
        return equivalent(answer[:-1], gold) or (value is not None and value / 100 == wanted)
    answer, gold = answer.rstrip("%"), gold.rstrip("%")
    if (_NAME.match(answer) is None) != (_NAME.match(gold) is None):
        answer, gold = _NAME.sub("", answer, count=1), _NAME.sub("", gold, count=1)
    if _BASED.fullmatch(answer) or _BASED.fullmatch(gold):
        return _same_in_base(answer, gold)
    if {_grouping(answer), _grouping(gold)} == {"set", "tuple"}:
        return False
    value, wanted = _number(answer), _number(gold)
    if value is not None and wanted is not None:
        return value == wanted
    return _tame(answer) and _tame(gold) and _verified(answer, gold)


def _spelled(text: str) -> str:
    for pattern, replacement in _SPELLINGS:
        text = re.sub(pattern, replacement, text)
    text = _SCALE.sub(lambda scale: rf"\cdot 10^{{{_SCALES[scale['word']]}}}", text)
    return _UNITS.sub("", text.strip()).strip().rstrip(".")


def _squeezed(text: str) -> str:
    """Without blanks, except between digits: 1 1/2 is not 11/2."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def _ungrouped(text: str) -> str:
    """Without thousands separators, outside pairs and sets: `(100,200)` has two parts, `20,000` one."""
    return (
        text
        if re.search(r"[(\[]|\\\{", text)
        else _GROUPED.sub(lambda n: re.sub("[, ]", "", n.group()), text)
    )


def _words(text: str) -> str | None:
    r"""Of an answer in words, `\text{Tuesday}`, or a choice, `(C)`."""
    found = _WORDS.fullmatch(text)
    if found is None:
        return None
    return " ".join((found["words"] or found["bare"] or "").strip(" ().'\"").casefold().split())


def _grouping(text: str) -> str:
    """What the brackets around several parts make of them."""
    found = re.fullmatch(r"\s*(?:(\\\{.*,.*\\\})|(\([^()]*,[^()]*\)))\s*", text, re.DOTALL)
    return "" if found is None else "set" if found[1] else "tuple"


def _same_in_base(answer: str, gold: str) -> bool:
    ours, theirs = _BASED.fullmatch(answer), _BASED.fullmatch(gold)
    digits = ours["digits"] if ours else answer.strip()
    if theirs is None:
        return ours is not None and ours["base"] == "10" and digits == gold.strip()
    return digits == theirs["digits"] and (ours is None or ours["base"] == theirs["base"])


def _number(text: str) -> Fraction | None:
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    top, bottom = (
        Fraction((number or "1").replace(" ", ""))
        for number in (found["top"] or found["value"], found["bottom"] or found["over"])
    )
    if bottom == 0:
        return None
    value = int(found["whole"] or 0) + top / bottom
    return -value if found["sign"] == "-" else value


def _tame(text: str) -> bool:
    """Whether working it out takes little time and memory: an alarm does not interrupt a power of integers."""
    depths = itertools.accumulate((c in "([{") - (c in ")]}") for c in text)
    if max(depths, default=0) > _DEEPEST or text.count("|") > _DEEPEST:
        return False
    powers = list(_POWER.finditer(text))
    factorials = "!" in text or "\\binom" in text
    if _ENDLESS.search(text) or len(powers) != text.count("^"):
        return False
    if factorials and (powers or re.search(r"\d{4}", text)):
        return False
    exponents = [
        math.prod(max(1, int(n)) for n in re.findall(r"\d+", p["group"] or p["bare"]))
        for p in powers
    ]
    numeric = [e for e, p in zip(exponents, powers, strict=True) if not p["base"].isalpha()]
    digits = max(map(len, re.findall(r"\d+", text)), default=1)
    return max(exponents, default=1) <= _LARGEST and math.prod(numeric) * digits <= _LARGEST


def _verified(answer: str, gold: str) -> bool:
    verifier = require("math_verify", "eval")
    normalization = require("latex2sympy2_extended.latex2sympy2", "eval").NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    reading = verifier.LatexExtractionConfig(
        boxed_match_priority=-1, normalization_config=normalization
    )
    # Its alarm is SIGALRM, which only the main thread may set.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    found, wanted = (
        verifier.parse(f"${text}$", [reading], fallback_mode="no_fallback", parsing_timeout=seconds)
        for text in (_PRODUCT.sub(_TIMES, answer), _PRODUCT.sub(_TIMES, gold))
    )
    return bool(
        verifier.verify(
            wanted, found, float_rounding=12, allow_set_relation_comp=True, timeout_seconds=seconds
        )
    )
