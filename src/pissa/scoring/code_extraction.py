"""Code out of an answer: the function that was asked for, without the text around it."""

from __future__ import annotations

import ast
import itertools
import re
import textwrap
import warnings

PYTHON = ("", "py", "python", "python3")
LONGEST = 50_000
"""Characters of an answer that are read; of both data sets' solutions the longest has 1,993."""
MOST_PLACES = 100
"""Fences, and lines without fences, where code is looked for."""
MOST_CUTS = 10
"""Statements that are taken away until the rest can be read; one with a mistake takes one or two."""
BLOCK = re.compile(
    r"```[ \t]*+([\w+#.-]*+)[ \t]*+\n(.*?)(?:^[ \t]*```(?!\w)|```[ \t]*$|\Z)", re.S | re.M
)
"""Language and text between fences, the second of which may have been cut off."""
CODE_LINE = re.compile(r"^(?:import |from |def |async def |class |@|[A-Za-z_]\w* *=(?!=))", re.M)
"""Where code may begin in a text without fences."""


def extract(output: str, name: str, prompt: str = "") -> str | None:
    """The code of an answer: the first that defines the function, or the body of the prompt's
    function.

    Text around it goes, fenced or not, also where it runs on after the answer: what follows the
    function stays only where the function uses it. Code with a mistake stays as it is, to fail by
    it.

    Args:
        output: what the model wrote.
        name: of the function asked for.
        prompt: with the head of that function, where the model was to go on from it; may be empty.

    Returns:
        Code for `whole`; None where there is none.
    """
    text = output[:LONGEST].replace("\r\n", "\n")
    blocks = [block for language, block in BLOCK.findall(text) if language.lower() in PYTHON][
        :MOST_PLACES
    ]
    plain = text.split("```", 1)[0]
    goes_on = _indented(plain)
    if prompt and goes_on and (found := _body(plain, name, prompt)):
        return found
    plain = plain.lstrip()
    # Dedent alters empty lines
    margin = [textwrap.dedent(block) if _indented(block) else block for block in blocks]
    for block in margin:
        if found := _trim(block, name):
            return found
    starts = [match.start() for match in itertools.islice(CODE_LINE.finditer(plain), MOST_PLACES)]
    read = 0
    for start in starts:
        if start < read:  # with what stands above, and the function is not defined there
            continue
        tree, lines = _readable(plain[start:])
        if found := _needed(tree, lines, name):
            return found
        read = start + len("\n".join(lines))
    pieces = [*margin, *(plain[start:] for start in starts)]
    for piece in pieces:
        if _head(name).search(piece):
            return piece
    if prompt:
        bodies = (_body(piece, name, prompt) for piece in [*blocks, plain])
        return next((body for body in bodies if body), text if goes_on else None)
    return next((piece for piece in pieces if piece.strip()), None)


def whole(code: str, name: str, prompt: str) -> str:
    """The program: imports and helpers of the prompt above the function, or the whole prompt above its body."""
    head = _head(name).search(prompt)
    tree = _parse(code)
    defines = _defines(tree, name) if isinstance(tree, ast.Module) else _head(name).search(code)
    return (prompt[: head.start()] if head and defines else prompt) + code


def authors_code(output: str) -> str:
    """What the PiSSA authors' script keeps of an answer, faults and all (GraphPKU/PiSSA,
    utils/code_process.py).

    It cuts at the first `assert`, in a name or in the function itself too, and takes the
    indentation of the first line away wherever it cuts. What is left goes after the prompt of
    HumanEval, as evalplus does it for `completion`; for MBPP evalplus' prompt is a docstring, left
    out here. A main guard in other words than theirs stops their script, and stays here.
    """
    code = output.replace("\r", "")
    if "```python" in code:
        code = code[code.index("```python") :].strip().replace("```python", "")
        if "\n```" in code:
            code = code[: code.index("\n```")].strip()
    for mark in ('if __name__ == "__main__":', "# Example usage", "assert"):
        if mark in code:
            code = code[: code.index(mark)].strip()
    return code


def _head(name: str) -> re.Pattern[str]:
    return re.compile(rf"^(?:async )?def {re.escape(name)}\b", re.M)


def _defines(tree: ast.Module, name: str) -> bool:
    return any(name in _bound(node) for node in tree.body)


def _body(text: str, name: str, prompt: str) -> str | None:
    """What goes on from the prompt; None where that adds nothing to its function."""
    body = text.strip("\n")
    shapes = [body]
    # A chat template took the first line's indentation, or a fence all of it
    if not _indented(body):
        shapes = ["    " + body, textwrap.indent(body, "    ")]
    found = [_trim(prompt + shape, name, first=True) or "" for shape in shapes]
    longest = max(found, key=len)
    return longest[len(prompt) :] if _size(longest, name) > _size(prompt, name) else None


def _indented(text: str) -> bool:
    return text.strip("\n")[:1] in (" ", "\t")


def _size(code: str, name: str) -> int:
    tree = _parse(code)
    nodes = tree.body if isinstance(tree, ast.Module) else []
    return next((sum(1 for _ in ast.walk(node)) for node in nodes if name in _bound(node)), 0)


def _trim(code: str, name: str, *, first: bool = False) -> str | None:
    """Code up to what cannot be read, and of what follows the function only what the function uses.

    Args:
        code: it may run on into anything.
        name: of the function.
        first: its first definition counts, and not, as Python has it, its last.

    Returns:
        None where the function is not defined.
    """
    return _needed(*_readable(code), name, first=first)


def _readable(code: str) -> tuple[ast.Module, list[str]]:
    lines = code.split("\n")
    for _ in range(MOST_CUTS):
        if isinstance(tree := _parse("\n".join(lines)), ast.Module):
            return tree, lines
        start = min(tree, len(lines)) - 1
        # A statement goes as a whole: a mistake inside the function is the answer's own.
        while start > 0 and (not lines[start].strip() or lines[start][0] in " \t"):
            start -= 1
        lines = lines[:start]
    return ast.Module([], []), []


def _needed(tree: ast.Module, lines: list[str], name: str, *, first: bool = False) -> str | None:
    places = [place for place, node in enumerate(tree.body) if name in _bound(node)]
    if not places:
        return None
    place = places[0] if first else places[-1]
    kept, rest = (
        tree.body[: place + 1],
        [node for node in tree.body[place + 1 :] if name not in _bound(node)],
    )
    givers: dict[str, list[ast.stmt]] = {}
    for node in rest:
        for bound in _bound(node):
            givers.setdefault(bound, []).append(node)
    stay: set[int] = set()
    queue = list(kept)
    while queue:
        node = queue.pop()
        stay.update(_lines(node))
        for wanted in _free(node):
            queue += givers.pop(wanted, [])
    end = kept[place].end_lineno or 0
    return "\n".join(
        line for number, line in enumerate(lines, 1) if number <= end or number in stay
    )


def _parse(code: str) -> ast.Module | int:
    """The line that is no Python, from 1, where there is one: a `return` outside a function is none either."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in strings
            compile(code, "answer", "exec", dont_inherit=True)
            return ast.parse(code)
    except SyntaxError as error:
        return max(error.lineno or 1, 1)
    except (ValueError, RecursionError, MemoryError):
        return 1


def _lines(node: ast.stmt) -> range:
    decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
    return range(min([node.lineno, *decorators]), (node.end_lineno or node.lineno) + 1)


def _bound(node: ast.stmt) -> set[str]:
    """Names that a statement of a module gives a value."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(name.asname or name.name).split(".")[0] for name in node.names}
    if isinstance(node, ast.Assign) or (isinstance(node, ast.AnnAssign) and node.value):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {
            part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)
        }
    return set()


def _free(node: ast.stmt) -> set[str]:
    """Names that a statement reads and does not itself give a value."""
    names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
    own = {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
    own |= {part.id for part in names if isinstance(part.ctx, ast.Store)}
    return {part.id for part in names if isinstance(part.ctx, ast.Load)} - own
