"""`pissa chat RUN`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from pissa.cli import options, show

if TYPE_CHECKING:
    from pissa.training.chat import Chat


def chat(
    path: Annotated[
        Path, Argument(help="A finished run, a plain LoRA made here, or a model folder.")
    ],
    prompt: Annotated[
        str | None, Option(help="Answer this on stdout, and stop. Default: a conversation.")
    ] = None,
    base: Annotated[str | None, Option(help="The base, if it lies elsewhere by now.")] = None,
    template: Annotated[
        str | None,
        Option(help="alpaca, chat, plain, none or raw. Default: as the run was trained."),
    ] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[
        float, Option(min=0, help="0: always the likeliest token; 1: as the model says.")
    ] = 0.0,
    trust_remote_code: options.RemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Talk to a run: on its own base, which is checked, in the template it was trained with."""
    from transformers import TextStreamer

    from pissa.errors import InputError
    from pissa.training.chat import open_chat
    from pissa.training.quiet import quiet

    if as_json and prompt is None:
        raise InputError("--json prints one answer: give --prompt beside it")
    with quiet():
        talk = open_chat(path, base=base, template=template, trust_remote_code=trust_remote_code)
        if not as_json:
            show.say(f"template: {talk.template}")
        streamer = (
            None
            if as_json
            else TextStreamer(talk.tokenizer, skip_prompt=True, skip_special_tokens=True)
        )
        how: dict[str, Any] = {
            "most": max_new_tokens,
            "temperature": temperature,
            "streamer": streamer,
        }
        if prompt is None:
            _converse(talk, how)
            return
        answer = talk.answer([prompt], **how)
    if as_json:
        show.print_json({"prompt": prompt, "answer": answer, "template": talk.template})


def _converse(talk: Chat, how: dict[str, Any]) -> None:
    """Question and answer until Ctrl-C, Ctrl-D or the end of the input."""
    person = sys.stdin.isatty()
    show.say(
        "end with Ctrl-D"
        + ("; prompts are used as they are, \\n is a new line" if talk.template == "raw" else "")
    )
    prompts: list[str] = []
    answers: list[str] = []
    try:
        while True:
            line = input("> " if person else "")
            if line.strip():
                prompts.append(line.replace("\\n", "\n") if talk.template == "raw" else line)
                answers.append(talk.answer(prompts, answers, **how))
    except (EOFError, KeyboardInterrupt):
        show.say("")
