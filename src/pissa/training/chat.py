"""A run, or any model, to talk to: on the base it belongs to, in the template it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pissa.errors import InputError
from pissa.training.data import Row
from pissa.training.language import tokens
from pissa.training.opening import open_model
from pissa.training.templates import Script, scripts
from pissa.untyped import Json, Tokenizer

RAW = "raw"
TEMPLATES = ("alpaca", "chat", "plain", "none", RAW)
REMEMBER = ("chat", "plain", "none")
"""Templates that take more than one question and answer."""


@dataclass(frozen=True)
class Chat:
    """A model ready to answer.

    Attributes:
        model: on its device, not training.
        tokenizer: of the model.
        template: around a prompt, one of `TEMPLATES`; raw is none at all.
    """

    model: Any
    tokenizer: Tokenizer
    template: str

    def answer(
        self,
        prompts: Sequence[str],
        answers: Sequence[str] = (),
        *,
        most: int,
        temperature: float,
        streamer: Any = None,
    ) -> str:
        """What the model says to the last prompt.

        Args:
            prompts: what was asked so far, the newest last.
            answers: what was answered, one fewer. A template for one question forgets all but the
                newest prompt, and a model forgets the oldest ones where its positions end.
            most: tokens to write at most.
            temperature: 0 always takes the likeliest token.
            streamer: a streamer of transformers', told of each token.

        Raises:
            InputError: a prompt that leaves no room for an answer.
        """
        limit = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        ids = self.encode(prompts, answers)
        while len(prompts) > 1 and len(ids) > limit - min(most, limit // 4):
            prompts, answers = prompts[1:], answers[1:]  # forget the oldest
            ids = self.encode(prompts, answers)
        room = min(most, limit - len(ids))
        if room < 1 or not ids:
            raise InputError(
                f"the prompt takes {len(ids)} tokens and the model {limit} in all: say "
                + ("less, or start again" if ids else "something")
            )
        inputs = torch.tensor([ids], device=self.model.device)
        sampling: Json = {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": float(temperature)}
        written = self.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=room,
            eos_token_id=self.end_tokens() or None,
            pad_token_id=self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else 0,
            streamer=streamer,
            **sampling,
        )
        return str(self.tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True))

    def encode(self, prompts: Sequence[str], answers: Sequence[str] = ()) -> list[int]:
        """The token ids up to where the answer begins, exactly as training saw them."""
        asked = self._script(prompts, answers, "")
        return next(iter(tokens([Script(asked.parts[:-1], asked.ready)], self.tokenizer)))[0]

    def end_tokens(self) -> list[int]:
        """What ends an answer: the tokenizer's and the model's own mark, and the one that a chat template writes."""
        known = self.model.generation_config.eos_token_id
        marks = {self.tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
        if self.template == "chat":
            tail = self._script(["x"], [], "x").parts[-1][0].partition("x")[2]
            first = self.tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
            special = self.tokenizer.added_tokens_decoder
            marks |= {token for token in first if token in special and special[token].special}
        return sorted(mark for mark in marks if mark is not None)

    def _script(self, prompts: Sequence[str], answers: Sequence[str], last: str) -> Script:
        if self.template not in REMEMBER:
            prompts, answers = prompts[-1:], ()
        if self.template == RAW:
            row = Row({"prompt": prompts[0], "completion": last}, "the prompt")
            return scripts([row], "none", self.tokenizer)[0]
        messages = []
        for prompt, answer in zip(prompts, [*answers, last], strict=True):
            messages += [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ]
        return scripts([Row({"messages": messages}, "the prompt")], self.template, self.tokenizer)[
            0
        ]


def open_chat(
    path: str | Path,
    *,
    base: str | None = None,
    template: str | None = None,
    trust_remote_code: bool = False,
) -> Chat:
    """Load what is to answer, after checking that run and base belong together.

    Args:
        path: a finished run, a plain LoRA or a decomposed folder made here, a merged model, or any
            model folder.
        base: where the base lies, if not where the record says.
        template: one of `TEMPLATES`. Default: the one of the training; for a model the tokenizer's
            own, or raw.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        InputError: a classifier, or a template that is not known.
        CheckpointError: nothing to talk to, or not finished.
        WrongBaseError: another base.
    """
    if template not in (None, *TEMPLATES):
        raise InputError(f"--template is {template!r}, expected one of {', '.join(TEMPLATES)}")
    opened = open_model(path, base=base, trust_remote_code=trust_remote_code)
    chosen = template or _template(opened.record, opened.tokenizer, Path(path))
    return Chat(opened.model, opened.tokenizer, chosen)


def _template(record: Json, tokenizer: Tokenizer, run: Path) -> str:
    if not record:
        return "chat" if tokenizer.chat_template else RAW
    template = record["data"].get("template")
    if template not in TEMPLATES:  # written by an earlier version
        raise InputError(
            f"{run}/run.json does not say which template the run saw: name it with --template"
        )
    return str(template)
