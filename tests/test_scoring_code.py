"""Programs that models write: what is taken for the code, and what their tests say."""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path
from typing import Any

import pytest

from pissa.errors import DataError, InputError
from pissa.scoring import code, code_extraction
from pissa.scoring.isolation.probe import find_isolation
from pissa.scoring.isolation.run import Isolation, Limits

pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in MBPP's own solutions

ADD = {
    "task_id": "Tiny/0",
    "prompt": """import math


def twice(x):
    return 2 * x


def add(a, b):
    '''The sum.
    >>> add(1, 2)
    3
    '''
""",
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, -1) == -1\n",
}
AREA = {
    "task_id": 7,
    "text": "Write a function to find the area of a square.",
    "test_setup_code": "side = 3",
    "test_list": ["assert abs(area(side) - 9) < 1e-9", "assert area(2) == 4"],
}
BODY = "    return a + b\n"
ADD_CODE = f"def add(a, b):\n{BODY}"
AREA_CODE = "def area(x):\n    return x * x\n"
FENCED = f"```python\n{ADD_CODE}```"
RIGHT, WRONG = (True, True), (False, False)
OURS, THEIRS = (True, False), (False, True)
"""(by our scorer, by the authors')."""

HUMANEVAL = {
    # as base models go on
    "body": (BODY, RIGHT),
    "body without an end of line": ("    return a + b", RIGHT),
    "body after empty lines": ("\n\n" + BODY, RIGHT),
    "body in tabs": ("\tc = a + b\n\treturn c\n", WRONG),  # the prompt's own docstring stands behind spaces
    "body with the line ends of Windows": ("    c = a + b\r\n    return c\r\n", RIGHT),
    "body that lost its first indentation": ("c = a + b\n    return c\n", OURS),
    "body that lost all indentation": ("c = a + b\nreturn c\n", OURS),
    "body of one line that lost its indentation": ("return a + b", OURS),
    "body with a comment at the margin": ("    c = a + b\n# done\n    return c\n", RIGHT),
    "body that uses a helper of the prompt": ("    return twice(a) + b - a\n", RIGHT),
    "body that uses an import of the prompt": ("    return math.floor(a + b)\n", RIGHT),
    "body with a docstring of its own": ('    """Adds."""\n    return a + b\n', RIGHT),
    "body, then its helper": ("    return helper(a) + b\n\n\ndef helper(x):\n    return x\n", RIGHT),
    "body, then a constant it uses": ("    return a + b + ZERO\n\n\nZERO = 0\n", RIGHT),
    "body, then another function": (BODY + "\n\ndef main():\n    print(add(1, 2))\n\n\nmain()\n", RIGHT),
    "body, then a function with a mistake": (BODY + "\n\ndef sub(a, b):\n    return a -\n", OURS),
    "body, then a function cut off": (BODY + "\n\ndef sub(a, b):\n    '''The diff", OURS),
    "body, then the function again, empty": (BODY + "\n\ndef add(a, b):\n    pass\n", OURS),
    "body, then prints": (BODY + "\nprint(add(1, 2))\n", RIGHT),
    "body, then a read": (BODY + "\nprint(add(int(input()), 2))\n", OURS),
    "body, then a read into its own name": (BODY + "\na = int(input())\n", OURS),
    "body, then failing tests": (BODY + "\nassert add(1, 1) == 3\n", OURS),
    "body, then an instruction": (BODY + "\n### Instruction:\nNow don't add.\n", OURS),
    "body, then a title": (BODY + "\n# Example usage\nprint(add(1, 2)\n", OURS),
    "body, then prose": (BODY + "\nThis function doesn't do more.\n", OURS),
    "body, then prose that could be code": (BODY + "\nDone\nNote: this\n", OURS),
    "body, then a fence": (BODY + "```\n\nIt adds.\n", OURS),
    "body, then a fence and an example": (BODY + "```\nSo:\n```python\nprint(add(1, 2))\n```\n", OURS),
    "body, then a token of the end": (BODY + "<|endoftext|>def sub(): pass", OURS),
    "body, then a package that is not there": (BODY + "\nimport numpy_of_mine\n", OURS),
    "body, then the main guard": (BODY + '\nif __name__ == "__main__":\n    print(add(input(), 1))\n', OURS),
    "body, then the main guard in other quotes": (BODY + "\nif __name__ == '__main__':\n    input()\n", RIGHT),
    "body with an assertion": ("    assert a > -9\n    return a + b\n", OURS),
    "body with an assertion in a name": ("    asserted = a + b\n    return asserted\n", OURS),
    "fenced body": (f"```python\n{BODY}```", OURS),
    "fenced body without indentation": ("```python\nreturn a + b\n```", OURS),
    "body after a comment, as a function": ("    # add them\n\n" + ADD_CODE, RIGHT),
    "body that imports": ("    import math\n    return math.floor(a + b)\n", RIGHT),
    "body after a space of the tokenizer, as a function": (" " + ADD_CODE, OURS),
    # whole functions
    "function": (ADD_CODE, RIGHT),
    "function below the prompt again": (ADD["prompt"] + BODY, RIGHT),
    "function with annotations and imports": (f"from typing import Any\n\n{ADD_CODE.replace('a,', 'a: Any,')}", RIGHT),
    "function after prose": (f"Here is the function:\n\n{ADD_CODE}", OURS),
    "function after prose that could be code": (f"from the task it's clear:\n\nx = y\n{ADD_CODE}", WRONG),
    "function between prose": (f"Sure.\n\n{ADD_CODE}\nIt's done.", OURS),
    "function and its helper below": ("def add(a, b):\n    return plus(a, b)\n\ndef plus(a, b):\n" + BODY, RIGHT),
    "function by lambda": ("add = lambda a, b: a + b\n", RIGHT),
    "function that uses the prompt's helper": ("def add(a, b):\n    return twice(a) + b - a\n", RIGHT),
    "function with a decorator": ("import functools\n\n@functools.cache\n" + ADD_CODE, RIGHT),
    "recursive function": ("def add(a, b):\n    return b if a == 0 else add(a - 1, b) + 1\n", RIGHT),
    "later definition counts": ("def add(a, b):\n    return 0\n\n" + ADD_CODE, RIGHT),
    "class with the function": ("class Solution:\n    def add(self, a, b):\n        return a + b\n", WRONG),
    # fences
    "fence": (FENCED, RIGHT),
    "fence between prose": (f"Sure! It's this:\n\n{FENCED}\n\nThat's it.", RIGHT),
    "fence in capitals": (FENCED.replace("python", "Python"), OURS),
    "fence of python3": (FENCED.replace("python", "python3"), RIGHT),
    "fence without a language": (FENCED.replace("python", ""), OURS),
    "fence in a list": ("1. So:\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n", OURS),
    "fence that is not closed": (f"```python\n{ADD_CODE}", RIGHT),
    "fence closed on the last line of code": (FENCED.replace("\n```", "```"), OURS),
    "fence on the line of prose": (f"### Response: {FENCED}", RIGHT),
    "fence with tests after the function": (f"```python\n{ADD_CODE}\nassert add(1, 1) == 3\n```", RIGHT),
    "fence with a test function before": (FENCED.replace("def", "def test():\n    assert 0\n\ndef", 1), OURS),
    "fence with an example": (f"```python\n{ADD_CODE}\n# Example usage\nx = input()\n```", RIGHT),
    "second fence has the function": (f"```python\nprint(1 / 0)\n```\nBetter:\n{FENCED}", OURS),
    "second fence has an example": (f"{FENCED}\nSo:\n```python\nprint(1 / 0)\n```", RIGHT),
    "second fence has a mistake": (f"{FENCED}\nOr:\n```python\ndef add(a, b) return\n```", RIGHT),
    "first fence has a mistake": (f"```python\ndef add(a, b) return\n```\nOr:\n{FENCED}", OURS),
    "first of two wins": (f"```python\ndef add(a, b):\n    return 0\n```\nOr:\n{FENCED}", WRONG),
    "fence of a shell first": (f"```bash\npip install x\n```\n{FENCED}", RIGHT),
    "fence with an assertion in the function": (FENCED.replace("return", "assert a > -9; return"), OURS),
    # not right
    "nothing": ("", WRONG),
    "white space": (" \n\t\n", WRONG),
    "prose": ("I can't do that.", WRONG),
    "empty fence": ("```python\n```", WRONG),
    "pass": ("    pass\n", WRONG),
    "another value": ("    return a - b\n", WRONG),
    "another function": ("def sub(a, b):\n    return a + b\n", WRONG),
    "a mistake in the function": ("    c = a +\n    return a + b\n", WRONG),
    "a mistake below the answer, in the function": (BODY + "    else:\n", WRONG),
    "leaving": ("    import os\n    os._exit(0)\n", WRONG),
    "leaving by an exception": ("    raise SystemExit(0)\n", WRONG),
    "letters of half a character": ("    return '\ud800'\n", WRONG),
    "null bytes": ("    return a + b\0\n", WRONG),
    "too deep": ("    return " + "(" * 5000 + "a" + ")" * 5000, WRONG),
}  # fmt: skip
MBPP = {
    "function": (AREA_CODE, RIGHT),
    "function with the line ends of Windows": (AREA_CODE.replace("\n", "\r\n"), RIGHT),
    "fence": (f"```python\n{AREA_CODE}```", RIGHT),
    "fence that is not closed": (f"```python\n{AREA_CODE}", RIGHT),
    "prose around a fence": (f"It's easy:\n```python\n{AREA_CODE}```\nDone.", RIGHT),
    "prose around a function": (f"It's easy:\n{AREA_CODE}\nIt's done.", OURS),
    "few-shot marks": (f"[BEGIN]\n{AREA_CODE}[DONE]\n\nYou are an expert", OURS),
    "helper and constant": ("N = 2\n\ndef area(x):\n    return power(x)\n\ndef power(x):\n    return x ** N\n", RIGHT),
    "needs the setup": ("def area(x):\n    return x * side if x == 3 else x + x\n", RIGHT),
    "main guard": (AREA_CODE + 'if __name__ == "__main__":\n    print(area(int(input())))\n', RIGHT),
    "its own wrong assertion": (AREA_CODE + "assert area(1) == 2\n", RIGHT),
    "an assertion inside": ("def area(x):\n    assert x > 0\n    return x * x\n", OURS),
    "second question": (AREA_CODE + "\nQ: Write a function to add.\ndef add(a): return", OURS),
    "other name": (AREA_CODE.replace("area", "square"), WRONG),
    "body alone": ("    return x * x\n", WRONG),
    "wrong": (AREA_CODE.replace("x * x", "x + x"), WRONG),
    "nothing": ("", WRONG),
    "prose": ("The area is x * x.", WRONG),
}  # fmt: skip


@pytest.fixture(scope="session")
def isolation() -> Isolation:
    try:
        return find_isolation(Limits(seconds=30))  # MBPP/123 is slow by itself
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", HUMANEVAL)
def test_an_answer_that_goes_on_from_a_function_head_gets_this_verdict(
    name: str, isolation: Isolation
) -> None:
    output, expected = HUMANEVAL[name]
    item = code.score("humaneval", output, ADD, isolation)
    assert item.authors is not None
    assert (item.ours.correct, item.authors.correct) == expected, item
    assert all(verdict.correct == (verdict.reason == "") for verdict in (item.ours, item.authors))


@pytest.mark.parametrize("name", MBPP)
def test_an_answer_to_a_question_gets_this_verdict(name: str, isolation: Isolation) -> None:
    output, expected = MBPP[name]
    item = code.score("mbpp", output, AREA, isolation)
    assert item.authors is not None
    assert (item.ours.correct, item.authors.correct) == expected, item
    assert item.id == "7"


GOLD = {"humaneval": "humaneval/HumanEval.jsonl", "mbpp": "mbpp/mbpp.jsonl"}


def read(shared: Path, task: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (shared / "data" / GOLD[task]).read_text(encoding="utf-8").splitlines()
    ]


def gold(doc: dict[str, Any]) -> str:
    """A whole program."""
    return (
        doc["prompt"] + doc["canonical_solution"]
        if "prompt" in doc
        else doc["code"].replace("\r\n", "\n")
    )


def fenced(doc: dict[str, Any]) -> str:
    return f"Sure! It's easy, don't worry:\n\n```python\n{gold(doc)}\n```\nIt's right.\n\n```python\nprint(1 / 0)\n```"


def bare(doc: dict[str, Any]) -> str:
    return doc["canonical_solution"] if "prompt" in doc else doc["code"]


class Spoil(ast.NodeTransformer):
    """Other values come back."""

    def visit_Return(self, node: ast.Return) -> ast.Return:
        return ast.Return(ast.Constant("spoiled"))


def spoiled(doc: dict[str, Any]) -> str:
    tree = ast.parse(gold(doc))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == code.entry_point(doc):
            Spoil().visit(node)
    return ast.unparse(ast.fix_missing_locations(tree))


def emptied(doc: dict[str, Any]) -> str:
    tree = ast.parse(gold(doc))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == code.entry_point(doc):
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def passing(task: str, docs: list[dict[str, Any]], isolation: Isolation, make: Any) -> list[str]:
    items = [code.score(task, make(doc), doc, isolation) for doc in docs]
    return [item.id for item in items if item.ours.correct]


@pytest.mark.parametrize("task", GOLD)
def test_of_a_sample_solutions_pass_and_spoiled_ones_fail(
    task: str, shared: Path, isolation: Isolation
) -> None:
    docs = random.Random(7).sample(read(shared, task), 20)
    names = [str(doc["task_id"]) for doc in docs]
    half = len(docs) // 2
    assert passing(task, docs[:half], isolation, fenced) == names[:half]
    assert passing(task, docs[half:], isolation, bare) == names[half:]
    assert passing(task, docs[:half], isolation, spoiled) == []


@pytest.mark.slow
@pytest.mark.parametrize("make", [bare, fenced])
@pytest.mark.parametrize("task", GOLD)
def test_all_solutions_pass(task: str, make: Any, shared: Path, isolation: Isolation) -> None:
    docs = read(shared, task)
    assert len(docs) == {"humaneval": 164, "mbpp": 974}[task]
    assert passing(task, docs, isolation, make) == [str(doc["task_id"]) for doc in docs]


@pytest.mark.slow
@pytest.mark.parametrize("make", [spoiled, emptied])
@pytest.mark.parametrize("task", GOLD)
def test_no_spoiled_solution_passes(
    task: str, make: Any, shared: Path, isolation: Isolation
) -> None:
    assert passing(task, read(shared, task), isolation, make) == []


@pytest.mark.slow
@pytest.mark.parametrize("task", GOLD)
def test_no_solution_passes_for_another_question(
    task: str, shared: Path, isolation: Isolation
) -> None:
    docs = read(shared, task)
    following = {
        str(doc["task_id"]): bare(other)
        for doc, other in zip(docs, docs[1:] + docs[:1], strict=True)
    }
    assert passing(task, docs, isolation, lambda doc: following[str(doc["task_id"])]) == []


@pytest.mark.parametrize("task", GOLD)
def test_all_solutions_are_found_in_prose_as_they_are(task: str, shared: Path) -> None:
    for doc in read(shared, task):
        name, prompt, whole = code.entry_point(doc), doc.get("prompt", ""), gold(doc)
        assert _same(code_extraction.extract(fenced(doc), name, prompt), whole), doc["task_id"]
        body = code_extraction.extract(bare(doc) + "\n# Example usage\nDon't read on", name, prompt)
        assert _same(code_extraction.whole(body or "", name, prompt), whole), doc["task_id"]


def _same(code: str | None, other: str) -> bool:
    return ast.dump(ast.parse(code or "")) == ast.dump(ast.parse(other))


def test_the_authors_cut_at_assert_costs_one_solution_of_humaneval(shared: Path) -> None:
    cut = [doc["task_id"] for doc in read(shared, "humaneval") if "assert" in gold(doc)]
    # The word stands in its docstring, which a model that repeats the head repeats
    assert cut == ["HumanEval/149"]


def test_equal_programs_run_once(isolation: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    programs: list[str] = []
    run = code.run
    monkeypatch.setattr(
        code, "run", lambda *arguments: programs.append(arguments[0]) or run(*arguments)
    )
    assert code.score("humaneval", BODY.rstrip("\n"), ADD, isolation).ours.correct
    assert len(programs) == 1
    assert code.score("humaneval", BODY + "x = 1", ADD, isolation).ours.correct
    assert len(programs) == 3


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("    while True: pass\n", "timeout"),
        ("    return 7\n", "AssertionError"),
        ("    return c\n", "NameError: name 'c' is not defined"),
        ("def add(a, b) return", "SyntaxError"),
        ("    return 'x' * 10**12", "memory"),
        ("It is a sum.", code.NOTHING),
        ("", code.NOTHING),
    ],
)
def test_the_reason_says_what_went_wrong(output: str, reason: str, isolation: Isolation) -> None:
    item = code.score("humaneval", output, ADD, Isolation(isolation.walls, Limits(seconds=0.25)))
    assert not item.ours.correct and item.ours.reason.startswith(reason)
    assert (item.ours.extracted is None) == (reason == code.NOTHING)


def test_what_is_extracted_is_the_code_alone() -> None:
    assert (
        code_extraction.extract(f"Sure.\n{FENCED}\nDone.", "add", ADD["prompt"])
        == ADD_CODE.rstrip()
    )
    assert code_extraction.extract(
        BODY + "\nprint(add(1, 2))\nDone", "add", ADD["prompt"]
    ) == BODY.rstrip("\n")
    assert (
        code_extraction.extract(f"x = 1\n{AREA_CODE}\ny = 2\nprint(y)", "area")
        == f"x = 1\n{AREA_CODE.rstrip()}"
    )


@pytest.mark.parametrize(
    "lines",
    [
        [f"x{n} = {n}" for n in range(3000)] + ["!"],
        [f"from a import b{n}" for n in range(2000)],
        ["from a word it's"] * 2000,
        ["def area(x):\n    return x0", *(f"x{n} = x{n + 1}" for n in range(3000))],
        ["def area(x):\n    return x0", *(f"x{n + 1} = x{n}" for n in range(3000)), "!"],
        ["```python\nx = 1\n```"] * 2000,
        ["```python\n```"] * 3000,
        ["x = ("] * 3000,
        ['x = """'] * 2999,
        ["if x:"] * 3000,
        ["x = 1\nreturn"] * 3000,
        ["```" + " " * 40_000] + ["x = 1"] * 10,
        ["x" + " " * 40_000],
        ["x = 1"] * 10**6,
    ],
    ids=lambda lines: f"{lines[0][:20]!r} x {len(lines)}",
)
@pytest.mark.parametrize(
    "prompt", ["", ADD["prompt"].replace("add", "area")], ids=["asked", "begun"]
)
def test_of_a_long_answer_a_bounded_amount_is_read(
    lines: list[str], prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, parse = [], code_extraction._parse
    monkeypatch.setattr(
        code_extraction, "_parse", lambda text: read.append(len(text)) or parse(text)
    )
    code_extraction.extract("\n".join(lines), "area", prompt)
    assert len(read) <= 20 * code_extraction.MOST_PLACES
    assert max(read, default=0) <= 3 * code_extraction.LONGEST + len(prompt)  # with indentation
    # And need not be read again from each of its lines
    readable = lines[0] in (
        "x0 = 0",
        "from a import b0",
    )
    assert (
        sum(read) <= (20 if readable else 2 * code_extraction.MOST_PLACES) * code_extraction.LONGEST
    )


def test_code_is_found_after_much_that_only_looks_like_code() -> None:
    prose = "from the task it's clear\nx = y z\n" * 40
    assert code_extraction.extract(prose + AREA_CODE, "area") == AREA_CODE.rstrip()
    constants = "".join(f"x{n} = {n}\n" for n in range(500))
    assert (
        code_extraction.extract(constants + AREA_CODE, "area") == (constants + AREA_CODE).rstrip()
    )


def test_a_question_of_another_data_set_is_an_error() -> None:
    with pytest.raises(DataError, match="expected also test_list"):
        code.score("mbpp", "", ADD, Isolation("none"))
    with pytest.raises(DataError, match="expected also prompt, entry_point, test"):
        code.score("humaneval", "", AREA, Isolation("none"))
