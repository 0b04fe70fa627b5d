"""Equality of strings as hendrycks/math has it, faults and all; only to say what the PiSSA authors'
script says.

Source of the rules: Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH
Dataset" (2021), and their repository's math_equivalence, in the form that GraphPKU/PiSSA uses.
"""

from __future__ import annotations

_GONE_FIRST = (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""),
               ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""))  # fmt: skip


def equivalent(answer: str, gold: str) -> bool:
    """Whether two answers normalise to the same string; where a rule fails on one, whether they are the same."""
    try:
        return normalised(answer) == normalised(gold)
    except (ValueError, IndexError):
        return answer == gold


def normalised(text: str) -> str:
    r"""An answer as the comparison sees it.

    Raises:
        ValueError: `a/b` that is not of integers, or more than one `\text{ `.
        IndexError: \sqrt or \frac at the very end.
    """
    for old, new in _GONE_FIRST:
        text = text.replace(old, new)
    text = _without_units(text)
    for old, new in (("\\%", ""), (" .", " 0."), ("{.", "{0.")):
        text = text.replace(old, new)
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        text = value
    text = _fractions(_roots(text).replace(" ", ""))
    return _slash("\\frac{1}{2}" if text == "0.5" else text)


def _without_units(text: str) -> str:
    value, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise ValueError("more than one unit")
    return value


def _roots(text: str) -> str:
    r"""`\sqrt3` with braces."""
    head, *pieces = text.split("\\sqrt")
    for piece in pieces:
        head += "\\sqrt" + (piece if piece[0] == "{" else f"{{{piece[0]}}}{piece[1:]}")
    return head


def _fractions(text: str) -> str:
    r"""`\frac12` and `\frac1{72}` with braces, but not `\frac{72}1`."""
    head, *pieces = text.split("\\frac")
    for piece in pieces:
        if piece[0] != "{":
            if len(piece) < 2:
                return text
            bottom = piece[1] if piece[1] == "{" else f"{{{piece[1]}}}"
            piece = f"{{{piece[0]}}}{bottom}{piece[2:]}"
        head += "\\frac" + piece
    return head


def _slash(text: str) -> str:
    """`1/2` as a fraction."""
    if text.count("/") != 1:
        return text
    top, bottom = map(int, text.split("/"))
    return f"\\frac{{{top}}}{{{bottom}}}" if text == f"{top}/{bottom}" else text
