"""A language model that grades answers from 1 to 10, behind any endpoint that speaks OpenAI's chat
protocol.

The way of grading is MT-Bench's single-answer grading (Zheng et al. 2023, arXiv 2306.05685, section
3.1), the wording is ours: ratings compare models that one judge saw with these words, and not with
those of a leaderboard.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from pissa.errors import ConfigError
from pissa.untyped import Json

KEY_ENV = "OPENAI_API_KEY"
LEAST, MOST = 1.0, 10.0
Message = dict[str, str]

_GRADING = (
    "You grade what an assistant answered. Weigh how helpful, relevant, accurate and deep the answer is, how creative "
    "where that is asked for, and whether its detail suits the question. Length alone earns nothing, and no name or "
    "style is to be favoured. First explain your judgement in a few sentences, then end with a line that holds only "
    "the rating, a number from 1 (useless) to 10 (could not be better) in double square brackets, for example [[5]]."
)
_COMPARE = " A reference answer is given and is correct: compare with it, look for mistakes, and mark them down."
_LAST = " You see a conversation of two turns: grade the second answer only, in the light of all that came before."
_AGAIN = (
    "I find no rating in your reply. Give it now: a number from 1 to 10 in double square brackets, such as [[5]].",
    "Reply with nothing but the rating of that answer, a number from 1 to 10 written like this: [[5]]",
)
"""What is said to a judge whose reply holds no rating, one sentence a time."""
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)


def prompts_digest() -> str:
    """SHA-256 of all words of ours that a judge sees."""
    shown = [
        conversation(["Q1", "Q2"][:n], ["A1", "A2"][:n], ["R1", "R2"][:r])
        for n in (1, 2)
        for r in (0, n)
    ]
    return hashlib.sha256(json.dumps([shown, _AGAIN]).encode()).hexdigest()


def conversation(
    questions: Sequence[str], answers: Sequence[str], references: Sequence[str] = ()
) -> list[Message]:
    """What a judge is asked about the last of one or two answers.

    Args:
        questions: of the turns so far.
        answers: as many.
        references: of the turns, where there are any. Empty ones and those of later turns are left
            out.
    """
    compares = any(references[: len(questions)])
    told = _GRADING + (_COMPARE if compares else "") + (_LAST if len(questions) > 1 else "")
    parts = []
    for turn, (question, answer) in enumerate(zip(questions, answers, strict=True), 1):
        parts.append(_block(f"question {turn}", question))
        if turn <= len(references) and references[turn - 1]:
            parts.append(_block(f"reference answer {turn}", references[turn - 1]))
        parts.append(_block(f"answer {turn}", answer))
    return [{"role": "system", "content": told}, {"role": "user", "content": "\n\n".join(parts)}]


def _block(title: str, text: str) -> str:
    return f"<<< {title} >>>\n{text}\n<<< end of {title} >>>"


def rating_of(reply: str) -> float | None:
    """The last rating of a reply that is from 1 to 10: an answer that is quoted may hold another one before."""
    found = [float(number) for number in _RATING.findall(reply)]
    return next((value for value in reversed(found) if LEAST <= value <= MOST), None)


@dataclass(frozen=True)
class Judge:
    """Where a judge is and what it is called. Its key stays in the environment.

    Attributes:
        url: of the API, without `/chat/completions`: https://api.openai.com/v1,
            http://localhost:8000/v1.
        model: the judge's name there.
        key_env: the environment variable that holds the key. The default may be unset: local
            servers ask for none.
        timeout: seconds to wait for a reply.
        tries: of one request where the server is busy, broken or away.
        wait: seconds before the second try; twice as long before each further one.
        jobs: requests at a time, 1 or more.
    """

    url: str
    model: str
    key_env: str = KEY_ENV
    timeout: float = 180.0
    tries: int = 6
    wait: float = 1.0
    jobs: int = 4

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                "--judge expects an address such as https://api.openai.com/v1 or http://localhost:8000/v1"
            )
        if parts.username or parts.password or parts.query:
            raise ConfigError(
                "--judge holds more than an address: keep the key in an environment variable"
            )
        if not self.model:
            raise ConfigError("--judge-model is empty, expected the judge's name at that address")
        if not self.key_env.isidentifier():  # perhaps the key itself, so it is not shown
            raise ConfigError(
                "--judge-key-env expects the name of an environment variable, and got something else"
            )
        if self.key_env != KEY_ENV and not os.environ.get(self.key_env):
            raise ConfigError(
                f"--judge-key-env is {self.key_env}, which is not set: export it, or leave it out"
            )
        if not self._key.isascii() or not self._key.isprintable():
            raise ConfigError(f"{self.key_env} holds characters that no key has: set it again")

    @property
    def facts(self) -> dict[str, str]:
        """What results and logs say of the judge."""
        return {"model": self.model, "url": self.url, "prompts": prompts_digest()}

    @property
    def _key(self) -> str:
        return os.environ.get(self.key_env, "").strip()

    def grade(self, messages: Sequence[Message]) -> tuple[float | None, list[str]]:
        """Ask for a rating, again where a reply has none.

        Args:
            messages: from `conversation`.

        Returns:
            The rating, None where no reply had one; and all replies.

        Raises:
            ConfigError: no judge there, a key that is refused, or no such model.
        """
        said, replies = list(messages), list[str]()
        for more in (None, *_AGAIN):
            if more is not None:
                said += [
                    {"role": "assistant", "content": replies[-1]},
                    {"role": "user", "content": more},
                ]
            replies.append(self.reply(said))
            rating = rating_of(replies[-1])
            if rating is not None:
                return rating, replies
        return None, replies

    def reply(self, messages: Sequence[Message]) -> str:
        """One reply at temperature 0.

        Raises:
            ConfigError: see `grade`.
        """
        body = json.dumps(
            {"model": self.model, "messages": list(messages), "temperature": 0}
        ).encode()
        text = self._post(body)
        try:
            content = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"the judge at {self.url} replied with {text[:200]!r}, expected OpenAI's chat completion: is the "
                "address right, as in https://api.openai.com/v1 ?"
            ) from error
        return content if isinstance(content, str) else ""

    def _post(self, body: bytes) -> str:
        address = f"{self.url.rstrip('/')}/chat/completions"
        for tried in range(1, self.tries + 1):
            request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
            if self._key:
                # To this host only
                request.add_unredirected_header("Authorization", f"Bearer {self._key}")
            asked_to_wait = 0.0
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return self._readable(response.read())
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {self._readable(error.read())[:300]!r}"
                if error.code not in _RETRIED:
                    raise ConfigError(
                        f"the judge at {address} says {problem}: {self._advice(error.code)}"
                    ) from None
                asked_to_wait = _seconds(error.headers.get("Retry-After"))
            # Refused, reset, timed out, cut off
            except (
                OSError,
                http.client.HTTPException,
            ) as error:
                problem = str(error) or type(error).__name__
            if tried < self.tries:
                time.sleep(max(asked_to_wait, self.wait * 2 ** (tried - 1)))
        raise ConfigError(
            f"the judge at {address} failed {self.tries} times, the last time with {problem}: what it judged so far is "
            "kept, so run the same command again when it is back"
        )

    def _readable(self, data: bytes) -> str:
        """Some servers repeat the key in what they say."""
        text = data.decode("utf-8", "replace")
        return text.replace(self._key, "***") if self._key else text

    def _advice(self, code: int) -> str:
        if code in (401, 403):
            return f"the key in {self.key_env} is absent or not accepted"
        if code == 404:
            return f"check the address, and that it serves a model {self.model!r}"
        return "check the address and the model's name"


def _seconds(header: str | None) -> float:
    """Of a Retry-After header, which may hold a date: then our own wait counts. At most a minute."""
    return min(float(header), 60.0) if header and header.strip().isdecimal() else 0.0


Judgement = Json
"""What a log keeps: id, turn, rating or None, replies."""
