"""From a row to its text: which parts the model is given and which it must learn to write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pissa.errors import DataError
from pissa.training.data import Row, check_rows
from pissa.untyped import Tokenizer

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""The prompt of the PiSSA paper's experiments: Alpaca's, the form without input."""

SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "question": ("question", "answer"),
    "text": ("text",),
}
"""Shape of a row to its columns; the first shape whose columns are all there is taken."""


@dataclass(frozen=True)
class Script:
    """The text of one row.

    Attributes:
        parts: text and whether it carries loss, in order.
        ready: the text has its special tokens already (a chat template wrote them).
    """

    parts: list[tuple[str, bool]]
    ready: bool = False


def shape_of(row: Row) -> str:
    """The shape of a data set, from its first row."""
    for shape, columns in SHAPES.items():
        if all(column in row.fields for column in columns):
            return shape
    known = "; ".join(" + ".join(columns) for columns in SHAPES.values())
    raise DataError(
        f"{row.where}: got fields {', '.join(row.fields) or 'none'}, expected one of: {known}. "
        "Name yours with `fields`, as in {instruction: your_column}"
    )


def chosen(template: str, shape: str) -> str:
    """The template that auto stands for; rows of prompt or text are used raw, as they are."""
    if shape in ("prompt", "text"):
        return "raw"
    return template if template != "auto" else "chat" if shape == "messages" else "alpaca"


def scripts(rows: list[Row], template: str, tokenizer: Tokenizer) -> list[Script]:
    """The texts of all rows, after all rows have been checked.

    Args:
        rows: not empty; the first one's shape is that of all.
        template: auto, alpaca, chat, plain or none, see `TrainSettings.template`.
        tokenizer: asked for its chat template where one is needed.

    Raises:
        DataError: naming file and line.
    """
    shape = shape_of(rows[0])
    check_rows(rows, lambda row: _problem(row, shape))
    if shape in ("prompt", "text") and template not in ("auto", "none"):
        raise DataError(
            f"{rows[0].where}: rows of {shape} are used as they are, without template {template!r}: use auto"
        )
    template = chosen(template, shape)
    if template == "chat" and not tokenizer.chat_template and shape not in ("prompt", "text"):
        raise DataError(
            f"{rows[0].where}: the rows need a chat template and the model's tokenizer has none: "
            "use `template: plain` (lines User: and Assistant:)"
        )
    return [_script(row, shape, template, tokenizer) for row in rows]


def _problem(row: Row, shape: str) -> str | None:
    """What is wrong with a row, or None."""
    columns = SHAPES[shape]
    missing = [column for column in columns if row.fields.get(column) is None]
    if missing:
        return f"got fields {', '.join(row.fields) or 'none'}, expected {' and '.join(missing)} with a value"
    if shape == "messages":
        return _messages_problem(row.fields["messages"])
    optional = ("input",) if shape == "instruction" and row.fields.get("input") is not None else ()
    for column in (*columns, *optional):
        if not isinstance(row.fields[column], str):
            return f"{column}: got {type(row.fields[column]).__name__}, expected a text"
    return None


def _messages_problem(messages: Any) -> str | None:
    expected = 'expected a list such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(messages, list) or not messages:
        return f"messages: got {type(messages).__name__}, {expected}"
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            return f"messages: got {message!r}, {expected}"
    if not any(message["role"] == "assistant" for message in messages):
        return "messages: got no message with role assistant, so there is nothing to learn"
    return None


def _script(row: Row, shape: str, template: str, tokenizer: Tokenizer) -> Script:
    fields = row.fields
    if shape == "text":
        return Script([(fields["text"], True)])
    if shape == "prompt":
        return Script([(fields["prompt"], False), (fields["completion"], True)])
    if shape == "messages":
        messages = [
            {"role": message["role"], "content": message["content"]}
            for message in fields["messages"]
        ]
    else:
        asked, answered = SHAPES[shape]
        instruction = "\n".join(
            part
            for part in (fields[asked], fields.get("input") if shape == "instruction" else "")
            if part
        )
        messages = [
            {"role": "user", "content": instruction},
            {"role": "assistant", "content": fields[answered]},
        ]
    if template == "chat":
        return Script(_chat_parts(messages, tokenizer, row.where), ready=True)
    if template == "alpaca":
        return Script(_alpaca_parts(messages, row.where))
    return Script(_plain_parts(messages, names=template == "plain"))


def _alpaca_parts(messages: list[dict[str, str]], where: str) -> list[tuple[str, bool]]:
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise DataError(
            f"{where}: the alpaca template takes one user and one assistant message: use chat or plain"
        )
    return [
        (ALPACA.format(instruction=messages[0]["content"]), False),
        (messages[1]["content"], True),
    ]


def _plain_parts(messages: list[dict[str, str]], names: bool) -> list[tuple[str, bool]]:
    """Each message under a line with its role, or alone; a blank line, or a new line, between them."""
    parts: list[tuple[str, bool]] = []
    for index, message in enumerate(messages):
        gap = ("\n\n" if names else "\n") if index else ""
        parts.append((gap + (f"{message['role'].capitalize()}:\n" if names else ""), False))
        parts.append((message["content"], message["role"] == "assistant"))
    return parts


def _chat_parts(
    messages: list[dict[str, str]], tokenizer: Tokenizer, where: str
) -> list[tuple[str, bool]]:
    """What the tokenizer's template adds for each assistant message carries loss, its end mark too."""

    def render(count: int, ask: bool) -> str:
        said = messages[:count]
        text: str = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=ask)
        return text

    parts: list[tuple[str, bool]] = []
    done = ""
    try:
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                for text, learn in (
                    (render(index, ask=True), False),
                    (render(index + 1, ask=False), True),
                ):
                    if not text.startswith(done):
                        raise DataError(
                            f"{where}: the tokenizer's chat template rewrites earlier messages, so what the response "
                            "is cannot be told: use one user and one assistant message per row, or `template: plain`"
                        )
                    parts.append((text[len(done) :], learn))
                    done = text
    except DataError:
        raise
    except Exception as error:  # Jinja's errors, and what templates raise themselves
        raise DataError(
            f"{where}: the tokenizer's chat template refuses these messages: {error}"
        ) from error
    return parts
