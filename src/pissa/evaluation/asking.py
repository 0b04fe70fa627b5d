"""A language model of lm-evaluation-harness that keeps what it answers, batch by batch, and never
answers twice.

Which requests share a batch is settled before the first one runs, and depends on nothing that a
kill could change: padding moves the last bits of a logit, so an answer from another batch could be
another answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from pissa.evaluation.log import AnswerLog, request_key
from pissa.untyped import Json

LEAST_ROOM = 4
"""Where a prompt is too long, one in so many of the model's positions is left for the answer, and
the prompt loses its beginning."""


@dataclass(frozen=True)
class Gold:
    """What a model thinks of an answer that is right.

    Attributes:
        loglikelihood: natural, of all its tokens together.
        tokens: how many were counted.
        cut: the answer, or its prompt, was longer than the model's positions and lost a part.
    """

    loglikelihood: float
    tokens: int
    cut: bool


class Asking(LM):  # type: ignore[misc]  # the harness has no types
    """Batches of a fixed make-up, longest first, through the harness's own model, into a log."""

    def __init__(
        self,
        inner: Any,
        log: AnswerLog,
        batch_size: int,
        say: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Wrap a model of the harness.

        Args:
            inner: an `HFLM` or `VLLM`, with the same batch size.
            log: of one task.
            batch_size: requests, 1 or more.
            say: told how many requests of how many are answered.

        `asked`, `cut` and `shortened` count prompts, those that lost their beginning, and those
        with less room than asked for.
        """
        super().__init__()
        self.inner, self.log, self.batch_size, self.say = inner, log, batch_size, say
        self.tokenizer = inner.tokenizer
        self.asked = self.cut = self.shortened = 0

    @property
    def tokenizer_name(self) -> str:
        """For the harness's records."""
        return str(self.inner.tokenizer_name)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """As the inner model has it."""
        return str(self.inner.apply_chat_template(chat_history, add_generation_prompt))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests.

        A batch gets `max_gen_toks`, or what its longest prompt leaves of the model's positions.
        """
        asked = [request.args for request in requests]
        lengths = {context: len(self.inner.tok_encode(context)) for context, _ in asked}

        def run(batch: Sequence[tuple[str, Json]]) -> list[str]:
            settings = {**batch[0][1], "max_gen_toks": room(batch)}
            work = [_request(context, settings) for context, _ in batch]
            return list(self.inner.generate_until(work, disable_tqdm=True))

        def room(batch: Sequence[tuple[str, Json]]) -> int:
            most, limit = self._most(batch[0][1]), int(self.inner.max_length)
            return min(most, max(limit - lengths[batch[0][0]], min(most, limit // LEAST_ROOM)))

        def count(batch: Sequence[tuple[str, Json]]) -> None:
            self.asked += len(batch)
            self.cut += sum(
                lengths[context] + room(batch) > self.inner.max_length for context, _ in batch
            )
            self.shortened += len(batch) * (room(batch) < self._most(batch[0][1]))

        return self._answers("generate", asked, lambda request: lengths[request[0]], run, count)

    def notes(self) -> list[str]:
        """What a reader must know of prompts and answers that did not fit."""
        notes = []
        if self.cut:
            notes.append(
                f"{self.cut} of {self.asked} prompts are longer than the model takes and lost their beginning"
            )
        if self.shortened:
            room = f"the model has {self.inner.max_length} positions"
            notes.append(
                f"{self.shortened} of {self.asked} answers had less room than asked for: {room}"
            )
        return notes

    def _most(self, settings: Json) -> int:
        return int(settings.get("max_gen_toks", self.inner.max_gen_toks))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """As the harness splits context and continuation; for its own tasks."""

        def run(batch: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
            return list(
                self.inner.loglikelihood(
                    [_request(*request) for request in batch], disable_tqdm=True
                )
            )

        asked = [request.args for request in requests]
        found = self._answers(
            "loglikelihood", asked, lambda request: len(request[0]) + len(request[1]), run
        )
        return [(float(value), bool(greedy)) for value, greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of whole texts."""

        def run(batch: Sequence[tuple[str]]) -> list[float]:
            return list(
                self.inner.loglikelihood_rolling(
                    [_request(*request) for request in batch], disable_tqdm=True
                )
            )

        asked = [request.args for request in requests]
        return self._answers("rolling", asked, lambda request: len(request[0]), run)

    def gold(self, pairs: Sequence[tuple[str, str]]) -> list[Gold]:
        """Log-likelihoods of right answers, tokenised as training does: prompt and answer each by
        itself.

        Args:
            pairs: prompt and answer, neither empty.
        """
        limit = int(self.inner.max_length)
        ids = {
            pair: (
                self.inner.tok_encode(pair[0]),
                self.inner.tok_encode(pair[1], add_special_tokens=False),
            )
            for pair in pairs
        }

        def run(batch: Sequence[tuple[str, str]]) -> list[list[Any]]:
            work = [(pair, ids[pair][0], ids[pair][1][: limit - 1]) for pair in batch]
            found = self.inner._loglikelihood_tokens(work, disable_tqdm=True)
            # The harness sees limit + 1 tokens: the last one is only predicted.
            return [
                [float(value), len(answer), len(prompt) + len(ids[pair][1]) > limit + 1]
                for (value, _), (pair, prompt, answer) in zip(found, work, strict=True)
            ]

        return [
            Gold(*found)
            for found in self._answers(
                "gold", list(pairs), lambda pair: sum(map(len, ids[pair])), run
            )
        ]

    def _answers(
        self,
        kind: str,
        asked: list[Any],
        length: Callable[[Any], int],
        run: Callable[[Sequence[Any]], list[Any]],
        count: Callable[[Sequence[Any]], None] = lambda batch: None,
    ) -> list[Any]:
        """What the log has, and what `run` makes of the batches that it lacks."""
        keys = [request_key(kind, *request) for request in asked]
        once = dict(zip(keys, asked, strict=True))
        done = 0
        for batch in self._batches(once, length):
            requests = [once[key] for key in batch]
            count(requests)
            if not all(key in self.log.answers for key in batch):
                found = run(requests)
                self.log.add(list(zip(batch, found, strict=True)))
            done += len(batch)
            self.say(done, len(once))
        return [self.log.answers[key] for key in keys]

    def _batches(self, once: Json, length: Callable[[Any], int]) -> list[list[str]]:
        """Keys by kind of request, longest first."""
        kinds: dict[str, list[str]] = {}
        for key, request in once.items():
            settings = request[1] if len(request) > 1 and isinstance(request[1], dict) else None
            kinds.setdefault(json.dumps(settings, sort_keys=True), []).append(key)
        ordered = [
            sorted(keys, key=lambda key: (-length(once[key]), key))
            for _, keys in sorted(kinds.items())
        ]
        return [
            keys[at : at + self.batch_size]
            for keys in ordered
            for at in range(0, len(keys), self.batch_size)
        ]


def _request(*args: Any) -> Instance:
    return Instance("generate_until", {}, args, 0)
