"""A user's own server, through the OpenAI chat API: tokens per second and time to first token, as a client sees them.

Standard library only. Tokens are the server's own count (`usage.completion_tokens`) where it gives one, else the
number of chunks, which is said. No ids come back, so texts are compared as strings and never audited.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

from outpace.bench.methods import Clock, Kind, Method
from outpace.bench.trials import Answer, Job, Trial
from outpace.errors import ConfigError, UnsupportedError

KEY_VARIABLE: Final = "OPENAI_API_KEY"
_TIMEOUT_S: Final = 300.0


class EndpointMethod(Method):
    """A chat endpoint.

    Args:
        name: what tables call it.
        url: base, such as "http://localhost:8000/v1".
        model: what to ask for; None asks the server for its first.

    Raises:
        ConfigError: if the URL is none.
    """

    kind: ClassVar[Kind] = "endpoint"

    def __init__(self, name: str, url: str, model: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"endpoint {name!r} has the URL {url!r}; expected something like http://localhost:8000/v1"
            )
        self.name = name
        self._parts = parts
        self.model = model

    def open(self) -> None:
        """Find out the model's name, which also tells whether anybody answers."""
        if self.model is None:
            found = json.loads(self._request("GET", "/models").read())
            try:
                self.model = str(found["data"][0]["id"])
            except (KeyError, IndexError, TypeError) as error:
                raise UnsupportedError(f"{self._where} lists no model; name one: --endpoint NAME=URL,MODEL") from error

    def comparable(self, temperature: float) -> bool:
        """Never: no ids come back."""
        return False

    def answer(self, jobs: Sequence[Job], clock: Clock = time.perf_counter) -> Trial:
        """See `Method.answer`; prompts of a batch are sent at once, on connections of their own."""
        self.open()
        started = clock()
        if len(jobs) == 1:
            answers = [self._one(jobs[0], clock, started)]
        else:
            with ThreadPoolExecutor(len(jobs)) as pool:
                answers = list(pool.map(lambda job: self._one(job, clock, started), jobs))
        return Trial(answers=tuple(answers), total_ms=1e3 * (clock() - started))

    def _one(self, job: Job, clock: Clock, started: float) -> Answer:
        settings = job.settings
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in job.messages],
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "seed": settings.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if settings.ignore_eos:
            body["ignore_eos"] = True  # vLLM and SGLang know it
        pieces: list[str] = []
        first: float | None = None
        usage: dict[str, Any] = {}
        reason = "length"
        for event in _events(self._request("POST", "/chat/completions", body)):
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                text = (choice.get("delta") or {}).get("content")
                if text:
                    first = clock() if first is None else first
                    pieces.append(text)
                reason = choice.get("finish_reason") or reason
        ended = clock()
        counted = usage.get("completion_tokens")
        return Answer(
            tokens=(),
            emitted=len(pieces) if counted is None else int(counted),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            text="".join(pieces),
            finish_reason=reason,
            ttft_ms=None if first is None else 1e3 * (first - started),
            total_ms=1e3 * (ended - started),
            notes=() if counted is not None else ("the server gives no usage: chunks were counted as tokens",),
        )

    @property
    def _where(self) -> str:
        return f"endpoint {self.name!r} ({self._parts.scheme}://{self._parts.netloc}{self._parts.path})"

    def _request(self, verb: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
        try:
            connection = kind(self._parts.netloc, timeout=_TIMEOUT_S)
            payload = None if body is None else json.dumps(body)
            connection.request(verb, self._parts.path.rstrip("/") + path, payload, headers)
            response = connection.getresponse()
        except OSError as error:
            raise UnsupportedError(f"{self._where} does not answer: {error}; is the server up?") from error
        if response.status != 200:
            said = response.read(400).decode("utf-8", "replace").strip()
            raise UnsupportedError(f"{self._where} answered {response.status} {response.reason} to {path}: {said}")
        return response


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of server-sent events, until "[DONE]"."""
    for raw in response:
        line = raw.decode("utf-8").strip()
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        found = json.loads(data)
        if "error" in found:
            raise UnsupportedError(f"the server broke off: {found['error']}")
        yield found


def endpoint_methods(specs: Sequence[str]) -> list[Method]:
    """From "NAME=URL" or "NAME=URL,MODEL"; the first one is the baseline.

    Raises:
        ConfigError: on anything else.
    """
    methods: list[Method] = []
    for spec in specs:
        name, equals, rest = spec.partition("=")
        if not equals or "/" in name:
            raise ConfigError(f"endpoint {spec!r}: expected NAME=URL or NAME=URL,MODEL")
        url, _, model = rest.partition(",")
        methods.append(EndpointMethod(name, url, model or None))
    return methods
