"""JSON over HTTP with a server that may be slow, broken or hostile: every wait, retry and size has a bound."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any

from alignkit.errors import RecipeError, RewardError

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


class ServerFailure(RewardError):
    """The server gave no usable answer within the bounds; says what it did instead."""


@dataclass(frozen=True)
class Bounds:
    """What asking may cost.

    Attributes:
        timeout: seconds to connect, and between two pieces of an answer.
        budget: seconds for one call with all its requests, retries and waits.
        retries: how often a request is repeated after a refusal that may pass (see `RETRIED`) or a broken connection.
        first_wait: seconds before the first retry; doubled each time, times a random factor in [0.5, 1.5). A
            `Retry-After` of the server that is longer replaces it.
        max_bytes: largest answer.
    """

    timeout: float = 60.0
    budget: float = 300.0
    retries: int = 4
    first_wait: float = 1.0
    max_bytes: int = 4 * 2**20


@dataclass(frozen=True, eq=False)
class JSONServer:
    """A server at `address`, spoken to by POST and GET of JSON. Redirects are not followed, cookies not kept.

    Attributes:
        address: "http://host:port/v1" or https; no user, password or query in it.
        key_variable: environment variable that holds the bearer token; "": none is sent. The token itself is read
            for each request and neither kept, logged, nor shown in an error.

    Raises:
        RecipeError: the address is none.
    """

    address: str
    key_variable: str = ""
    bounds: Bounds = field(default_factory=Bounds)

    def __post_init__(self) -> None:
        import httpx2

        try:
            url = httpx2.URL(self.address)
        except httpx2.InvalidURL as error:
            raise RecipeError(f"server={self.address!r} is no address: {error}") from error
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query:
            raise RecipeError(
                'a server is given as "http://host:port/v1" or https, without user, password or query; the key goes '
                "into an environment variable whose name is the option key_variable"
            )

    @cached_property
    def client(self) -> Any:
        from http.cookiejar import CookieJar, DefaultCookiePolicy

        import httpx2

        none_kept = CookieJar(DefaultCookiePolicy(allowed_domains=()))
        return httpx2.Client(timeout=self.bounds.timeout, follow_redirects=False, cookies=none_kept)

    def key(self) -> str:
        """The bearer token, or "". Raises RecipeError where the variable is not set."""
        if not self.key_variable:
            return ""
        if not os.environ.get(self.key_variable):
            raise RecipeError(f"key_variable={self.key_variable!r}: this environment variable is not set")
        return os.environ[self.key_variable]

    def deadline(self) -> float:
        """When a call that begins now has used up its budget, on the monotonic clock."""
        return time.monotonic() + self.bounds.budget

    def ask(self, path: str, body: Mapping[str, Any] | None = None, deadline: float | None = None) -> Any:
        """The JSON that the server answers to `body` (POST), or without one to GET.

        Args:
            deadline: of the call that this request belongs to; None: it is a call of its own.

        Raises:
            ServerFailure: no good answer within the bounds.
        """
        deadline = self.deadline() if deadline is None else deadline
        waits = random.Random()  # of its own: a reward leaves the global generators alone
        for attempt in range(self.bounds.retries + 1):
            answer = self._once(path, body, deadline)
            if isinstance(answer, bytes):
                return self._parsed(answer)
            wait = max(answer.retry_after, self.bounds.first_wait * 2**attempt * (0.5 + waits.random()))
            if not answer.may_pass or attempt == self.bounds.retries or time.monotonic() + wait > deadline:
                tries = f" (after {attempt + 1} tries)" if attempt else ""
                raise ServerFailure(f"the server {self.address} {answer.reason}{tries}")
            time.sleep(wait)
        raise AssertionError("unreachable")

    def _once(self, path: str, body: Mapping[str, Any] | None, deadline: float) -> bytes | _Refusal:
        import httpx2

        key = self.key()
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        url = f"{self.address.rstrip('/')}/{path}"
        patience = min(self.bounds.timeout, deadline - time.monotonic())
        if patience <= 0:
            return _Refusal(f"was not asked: the call's {self.bounds.budget} s were over", may_pass=False)
        method = "GET" if body is None else "POST"
        try:
            with self.client.stream(method, url, json=body, headers=headers, timeout=patience) as response:
                content = self._read(response, deadline)
                if response.status_code != 200:
                    reason = f"answered {response.status_code}: {self._shown(content, 200)}"
                    after = _seconds(response.headers.get("retry-after", ""))
                    return _Refusal(reason, response.status_code in RETRIED, after)
                return content
        except httpx2.TransportError as error:
            return _Refusal(f"cannot be reached: {type(error).__name__}: {error}", may_pass=True)

    def _read(self, response: Any, deadline: float) -> bytes:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ServerFailure(f"the server {self.address} answered compressed, which was not asked for")
        content = bytearray()
        for piece in response.iter_raw():
            content += piece
            if len(content) > self.bounds.max_bytes:
                raise ServerFailure(f"the server {self.address} answered more than {self.bounds.max_bytes} bytes")
            if time.monotonic() > deadline:
                raise ServerFailure(f"the server {self.address} took more than the call's {self.bounds.budget} s")
        return bytes(content)

    def _parsed(self, content: bytes) -> Any:
        try:
            return json.loads(content, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            shown = self._shown(content, 80)
            raise ServerFailure(f"the server {self.address} answered no JSON ({error}): {shown!r}") from error

    def _shown(self, content: bytes, most: int) -> str:
        """The beginning of an answer for an error, without the key, which a server may send back."""
        said, key = content.decode("utf-8", "replace"), self.key()
        return (said.replace(key, "***") if key else said)[:most]


@dataclass(frozen=True)
class _Refusal:
    reason: str
    may_pass: bool
    retry_after: float = 0.0


def _seconds(retry_after: str) -> float:
    """Seconds that a `Retry-After` header asks to wait: a number, or a date."""
    try:
        return max(float(retry_after), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return 0.0


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
