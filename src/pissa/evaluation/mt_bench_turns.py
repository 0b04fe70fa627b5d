"""MT-Bench's two turns: asked in the model's chat template or in Alpaca's prompt, and answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pissa.evaluation.benchmark import Say
from pissa.evaluation.model import Subject
from pissa.training.chat import Chat
from pissa.training.templates import ALPACA
from pissa.untyped import Json

TOKENS = 1024
"""Of an answer at most."""
BLOCK = "\n\n### Instruction:\n{question}\n\n### Response:"
RUNS_ON = "### Instruction:"
"""Where an answer goes on to questions of its own."""


@dataclass(frozen=True)
class Turn:
    """One answer: its question's row, 1 or 2, the prompt, what was made of the output, and whether that was cut."""

    row: Json
    number: int
    prompt: str
    answer: str
    cut: bool


def answer_turns(
    subject: Subject, lm: Any, rows: Sequence[Json], in_chat: bool, backend: str, say: Say
) -> tuple[list[Turn], list[str]]:
    """Ask all first turns, then all second turns.

    Args:
        subject: the model.
        lm: the same as the harness asks it.
        rows: the questions.
        in_chat: in the tokenizer's chat template; otherwise in Alpaca's prompt.
        backend: of the harness.
        say: told (what, done, in all).

    Returns:
        The turns, both of a question side by side, in the order of the questions; and notes.
    """
    from lm_eval.api.instance import Instance

    settings: Json = {"until": [], "do_sample": False, "max_gen_toks": TOKENS}
    if in_chat and backend == "hf":
        # A base's own end mark need not be the one that the template writes after an answer.
        settings["eos_token_id"] = Chat(subject.open().model, lm.tokenizer, "chat").end_tokens()
    done: list[list[Turn]] = [[] for _ in rows]
    for number in (1, 2):
        lm.say = lambda count, total, number=number: say(f"answers, turn {number}", count, total)
        prompts = [
            _prompt(lm, row["turns"][:number], [turn.answer for turn in before], in_chat)
            for row, before in zip(rows, done, strict=True)
        ]
        outputs = lm.generate_until(
            [Instance("generate_until", {}, (prompt, settings), 0) for prompt in prompts]
        )
        for row, before, prompt, output in zip(rows, done, prompts, outputs, strict=True):
            answer, mark, _ = (output, "", "") if in_chat else output.partition(RUNS_ON)
            before.append(Turn(row, number, prompt, answer.strip(), bool(mark)))
    turns = [turn for both in done for turn in both]
    return turns, _notes(subject, lm, turns, in_chat)


def _prompt(lm: Any, questions: Sequence[str], answers: Sequence[str], in_chat: bool) -> str:
    """The conversation up to where the next answer begins."""
    if in_chat:
        messages = []
        for question, answer in zip(questions, [*answers, None], strict=True):
            messages.append({"role": "user", "content": question})
            messages += [] if answer is None else [{"role": "assistant", "content": answer}]
        return str(lm.apply_chat_template(messages))
    prompt = ALPACA.format(instruction=questions[0])
    for question, answer in zip(questions[1:], answers, strict=True):
        prompt += answer + BLOCK.format(question=question)
    return prompt


def _notes(subject: Subject, lm: Any, turns: Sequence[Turn], in_chat: bool) -> list[str]:
    notes = ["asked in the tokenizer's chat template"] if in_chat else []
    ran_on = sum(turn.cut for turn in turns)
    if ran_on:
        notes.append(
            f"{ran_on} of {len(turns)} answers ran on into an instruction of their own and were cut there"
        )
    notes += lm.notes()
    if not in_chat and subject.template not in (None, "alpaca"):
        notes.append(f"trained in the template {subject.template!r}, asked in Alpaca's")
    return notes
