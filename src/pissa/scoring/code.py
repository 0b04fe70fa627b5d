"""Answers that are programs: HumanEval (Chen et al., arXiv:2107.03374) and MBPP (Austin et al.,
arXiv:2108.07732).

Both are scored by their own tests. HumanEval+ and MBPP+ add tests (Liu et al., arXiv:2305.01210),
which are not here: shares in papers that report them are lower on the same answers. Programs have
the standard library and no package more.
"""

from __future__ import annotations

import ast
import builtins
import warnings
from collections.abc import Mapping
from typing import Any

from pissa.errors import DataError
from pissa.scoring.code_extraction import authors_code, extract, whole
from pissa.scoring.isolation.run import Isolation, run
from pissa.scoring.verdict import Item, Verdict

FIELDS = {
    "humaneval": ("task_id", "prompt", "entry_point", "test"),
    "mbpp": ("task_id", "test_list"),
}
NOTHING = "no code found"


def score(task: str, output: str, doc: Mapping[str, Any], isolation: Isolation) -> Item:
    """Run what a model wrote, and the question's tests after it.

    Args:
        task: `humaneval` or `mbpp`.
        output: what the model wrote after the prompt.
        doc: the question as the data set has it: `FIELDS`.
        isolation: the walls to run behind.

    Returns:
        The verdicts. What was extracted is code; the reason is `timeout`, `NameError: ...`, `no
        code found`.

    Raises:
        DataError: a question of another data set.
    """
    missing = [field for field in FIELDS[task] if field not in doc]
    if missing:
        raise DataError(
            f"a question of {task} has {', '.join(doc) or 'no fields'}, expected also {', '.join(missing)}"
        )
    name, prompt = entry_point(doc), str(doc.get("prompt", ""))
    code = extract(output, name, prompt)
    theirs = authors_code(output)
    ran: dict[str, Verdict] = {}

    def verdict(code: str | None, program: str) -> Verdict:
        if code is None:
            return Verdict(False, None, NOTHING)
        if program not in ran:
            outcome = run(program, isolation, tests(doc))
            ran[program] = Verdict(outcome.passed, code, outcome.reason)
        return Verdict(ran[program].correct, code, ran[program].reason)

    return Item(
        str(doc["task_id"]),
        verdict(code, whole(code or "", name, prompt)),
        verdict(theirs or None, prompt + theirs),
    )


def verbatim(task: str, output: str, doc: Mapping[str, Any], isolation: Isolation) -> Item:
    """The prompt and what a model wrote, as they stand, as lm-evaluation-harness runs them: nothing
    is extracted.

    Args:
        task: `humaneval` or `mbpp`.
        output: what the model wrote after the prompt, up to the harness's stop words.
        doc: as for `score`.
        isolation: the walls to run behind.
    """
    prompt = str(doc["prompt"]) if task == "humaneval" else ""
    outcome = run(prompt + output, isolation, tests(doc))
    return Item(str(doc["task_id"]), Verdict(outcome.passed, output, outcome.reason))


def tests(doc: Mapping[str, Any]) -> str:
    """The question's tests, to be run after the answer: MBPP's setup uses classes that the answer defines."""
    if "entry_point" in doc:
        return f"{doc['test']}\ncheck({doc['entry_point']})\n"
    return "\n".join([doc.get("test_setup_code", ""), *doc["test_list"]]).replace("\r\n", "\n")


def entry_point(doc: Mapping[str, Any]) -> str:
    """The function that is asked for. MBPP does not name it: it is the first that its first test calls."""
    if "entry_point" in doc:
        return str(doc["entry_point"])
    with warnings.catch_warnings(action="ignore"):  # of escapes in strings
        test = ast.parse(doc["test_list"][0])
    calls = [node.func for node in ast.walk(test) if isinstance(node, ast.Call)]
    names = [call.id for call in calls if isinstance(call, ast.Name)]
    return next((name for name in names if not hasattr(builtins, name)), names[0] if names else "")
