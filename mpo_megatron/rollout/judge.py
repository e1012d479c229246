"""Scores by a language model behind an endpoint that speaks the OpenAI protocol (`POST .../chat/completions`).

Each response is asked for by itself. What the judge answers must hold "score" and a number after it, the last of which
counts; an answer without one, or with one outside the range, is asked for again, as are requests that time out, find no
server, or end with status 408, 409, 425, 429 or 5xx: after as long as the server says (Retry-After), or a time that
doubles. Every good answer goes to an SQLite file at once, and is never paid for twice.
"""

import asyncio
import contextlib
import hashlib
import json
import re
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import tenacity

from mpo_megatron.errors import UserError
from mpo_megatron.rollout.records import Record, prompt_text
from mpo_megatron.rollout.work import Failure

PROMPT = """\
Rate how well the answer below serves the person who wrote the request: does it do what is asked, is it true, is it \
clear? Think about it in a few sentences, then end with a line "Score: N", where N is a number from {lowest} (useless) \
to {highest} (could not be better).

<request>
{prompt}
</request>

<answer>
{response}
</answer>"""

_FIELD = re.compile(r"\{(prompt|response|lowest|highest)\}")
# "Score (1-10): 8" is 8, and a range alone is no score.
_SCORE = re.compile(
    r"""score (?:\s*\([^()]*\))? (?:\s+(?:of|is))? \W*?
        (-?\d++(?:\.\d++)?+) (?!-\d|–\d|\s+to\s+\d)""",
    re.IGNORECASE | re.VERBOSE,
)
_AGAIN = (408, 409, 425, 429)


@dataclass(frozen=True)
class JudgeSettings:
    """What a judge is asked, and how.

    Attributes:
        url: the endpoint's, up to and without "/chat/completions".
        prompt: with {prompt} and {response}, and {lowest} and {highest} where it says the range.
        options: further fields of a request, such as temperature.
        concurrency: requests under way at a time.
        per_minute: requests begun in a minute at most; 0 for no limit.
        attempts: of each response, until it is given up.
        timeout: seconds for one request.
        first_wait: seconds before the second attempt where the server names none, and as much again at random; the
            first part doubles with each attempt, up to a minute.
        prices: US dollars for a million tokens of prompts and of answers.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    prompt: str = PROMPT
    lowest: float = 1.0
    highest: float = 10.0
    options: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})
    concurrency: int = 8
    per_minute: float = 0.0
    attempts: int = 6
    timeout: float = 120.0
    first_wait: float = 1.0
    prices: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"the judge's address {self.url!r} must begin with http:// or https://")
        if not {"prompt", "response"} <= set(_FIELD.findall(self.prompt)):
            raise UserError("the judge's prompt must hold {prompt} and {response}, for what is to be rated")
        if not self.lowest < self.highest:
            raise UserError(
                f"the judge's scores go from {self.lowest} to {self.highest}; give the lower number first"
            )
        if self.concurrency < 1 or self.attempts < 1 or not self.timeout > 0 or self.per_minute < 0:
            raise UserError(
                f"concurrency={self.concurrency} and attempts={self.attempts} must be at least 1, "
                f"timeout={self.timeout} above 0 and the rate {self.per_minute} not below 0"
            )


@dataclass
class Usage:
    """What was asked for so far."""

    answers: int = 0
    from_cache: int = 0
    tried_again: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def cost(self, prices: tuple[float, float]) -> float:
        """US dollars at `prices` a million tokens."""
        return (self.prompt_tokens * prices[0] + self.answer_tokens * prices[1]) / 1e6


class Judge:
    """Asks for a score of every response; `usage` counts what that took.

    Raises UserError from a call if the server refuses a request in a way that asking again does not mend.
    """

    def __init__(self, settings: JudgeSettings, cache: Path) -> None:
        self.settings = settings
        self.usage = Usage()
        self._cache = _Cache(cache)
        self._runner = asyncio.Runner()
        self._free_at = 0.0

    def __call__(self, groups: list[Record]) -> tuple[list[list[float] | Failure], int]:
        """The scores of each group's responses, or why it has none, and the tokens of what was asked."""
        before = self.usage.prompt_tokens + self.usage.answer_tokens
        values = self._runner.run(self._all(groups))
        return values, self.usage.prompt_tokens + self.usage.answer_tokens - before

    def close(self) -> None:
        self._runner.close()
        self._cache.close()

    async def _all(self, groups: list[Record]) -> list[list[float] | Failure]:
        at_a_time = asyncio.Semaphore(self.settings.concurrency)
        headers = {"Authorization": f"Bearer {self.settings.key}"} if self.settings.key else {}
        timeout = aiohttp.ClientTimeout(total=self.settings.timeout)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:

            async def one(prompt: str, response: str) -> float | Failure:
                async with at_a_time:
                    return await self._score(session, prompt, response)

            try:
                async with asyncio.TaskGroup() as tasks:
                    asked = [
                        [tasks.create_task(one(prompt_text(group), answer["text"])) for answer in group["responses"]]
                        for group in groups
                    ]  # fmt: skip
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return [_scores([task.result() for task in group]) for group in asked]

    async def _score(self, session: aiohttp.ClientSession, prompt: str, response: str) -> float | Failure:
        settings = self.settings
        values = {
            "prompt": prompt,
            "response": response,
            "lowest": f"{settings.lowest:g}",
            "highest": f"{settings.highest:g}",
        }
        # In one pass: what stands in a prompt or response is not filled in.
        text = _FIELD.sub(lambda match: values[match[1]], settings.prompt)
        request = {
            **settings.options,
            "model": settings.model,
            "messages": [{"role": "user", "content": text}],
        }
        answer = self._cache.get(settings.url, request)
        if answer is not None:
            # One that is outside of a range that has changed is asked for again.
            with contextlib.suppress(_TryAgain):
                score = _parsed(answer, settings)
                self.usage.from_cache += 1
                return score
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(settings.attempts),
            retry=tenacity.retry_if_exception_type(_TryAgain),
            wait=_Wait(settings.first_wait),
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    self.usage.tried_again += attempt.retry_state.attempt_number > 1
                    answer = await self._ask(session, request)
                    score = _parsed(answer, settings)
        except _TryAgain as error:
            times = f"{settings.attempts} times" if settings.attempts > 1 else "once"
            return Failure(f"the judge was asked {times}, and at last {error}")
        assert answer is not None
        self._cache.put(settings.url, request, answer)
        self.usage.answers += 1
        return score

    async def _ask(self, session: aiohttp.ClientSession, request: Mapping[str, Any]) -> str:
        """The text of the judge's answer."""
        await self._turn()
        address = self.settings.url.rstrip("/") + "/chat/completions"
        try:
            async with session.post(address, json=request) as reply:
                body = await reply.text(errors="replace")
                if reply.status in _AGAIN or reply.status >= 500:
                    raise _TryAgain(
                        f"ended with status {reply.status}: {_short(body)}",
                        _seconds(reply.headers.get("Retry-After")),
                    )
                if reply.status != 200:
                    raise UserError(
                        f"the judge at {address} refused with status {reply.status}: {_short(body)}; "
                        "check address, model and key"
                    )
        except TimeoutError:
            raise _TryAgain(f"gave no answer in {self.settings.timeout:g} s") from None
        except aiohttp.ClientError as error:
            raise _TryAgain(f"could not be reached ({type(error).__name__}: {error})") from None
        try:
            content = json.loads(body)
            answer = content["choices"][0]["message"]["content"]
            usage = content.get("usage") or {}
            tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        # The last two: of a number such as 1e999, and of lists in lists in lists.
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            raise _TryAgain(f"answered what is no chat completion: {_short(body)}") from None
        # Paid for, whatever the answer is worth.
        self.usage.prompt_tokens += tokens[0]
        self.usage.answer_tokens += tokens[1]
        if not isinstance(answer, str):
            raise _TryAgain(f"answered without a text: {_short(body)}")
        # JSON may hold halves of characters, and the cache takes none.
        return answer.encode(errors="replace").decode()

    async def _turn(self) -> None:
        """Wait until the rate allows another request."""
        if self.settings.per_minute:
            now = time.monotonic()
            begin = max(now, self._free_at)
            self._free_at = begin + 60 / self.settings.per_minute
            await asyncio.sleep(begin - now)


class _TryAgain(Exception):
    """What went wrong, in words that follow "the judge", and the seconds that the server asks to wait."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


class _Wait(tenacity.wait.wait_base):
    """What the server asks for, or else `JudgeSettings.first_wait`."""

    def __init__(self, first: float) -> None:
        self._doubling = tenacity.wait_exponential(multiplier=first, max=60) + tenacity.wait_random(0, first)

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        asked = error.wait if isinstance(error, _TryAgain) else None
        return self._doubling(retry_state) if asked is None else asked


class _Cache:
    """Answers by address and request, in an SQLite file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(path, isolation_level=None, timeout=60)
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT)"
            )
        except sqlite3.Error as error:
            raise UserError(
                f"{path} cannot hold the judge's answers ({error}); name another file with --judge-cache"
            ) from None

    def get(self, url: str, request: Mapping[str, Any]) -> str | None:
        row = self._database.execute("SELECT answer FROM answers WHERE request = ?", [_key(url, request)])
        found = row.fetchone()
        return found[0] if found else None

    def put(self, url: str, request: Mapping[str, Any], answer: str) -> None:
        self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", [_key(url, request), answer])

    def close(self) -> None:
        self._database.close()


def _key(url: str, request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([url, request], sort_keys=True).encode()).hexdigest()


def _parsed(answer: str, settings: JudgeSettings) -> float:
    found = _SCORE.findall(answer)
    if not found:
        raise _TryAgain(f'answered without a "score": {_short(answer)}')
    score = float(found[-1])
    if not settings.lowest <= score <= settings.highest:
        raise _TryAgain(
            f"scored {score:g}, which is not from {settings.lowest:g} to {settings.highest:g}: {_short(answer)}"
        )
    return score


def _scores(found: list[float | Failure]) -> list[float] | Failure:
    failed = next((score for score in found if isinstance(score, Failure)), None)
    return failed or [score for score in found if not isinstance(score, Failure)]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 200 else f"{line[:200]}...")


def _seconds(header: str | None) -> float | None:
    """Of a Retry-After; None for one that is missing or names a date."""
    try:
        return min(300.0, max(0.0, float(header or "")))
    except ValueError:
        return None
