"""Requests to the service: each sent until it is answered, or for as often as it pays to try."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from service.client.errors import ApiError, UnreachableError, failure

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

# Answers of a service, or of a proxy before it, that may be another one in a moment.
_PASSING: Final = frozenset({429, 502, 503, 504})
# An address without http://, a key that no header can hold, redirects in a circle, a body that is not
# compressed as it says: wrong however often it is tried.
_LASTING: Final = (
    httpx.UnsupportedProtocol,
    httpx.LocalProtocolError,
    httpx.TooManyRedirects,
    httpx.DecodingError,
)
_FIRST_PAUSE_SECONDS: Final = 0.5
_LONGEST_PAUSE_SECONDS: Final = 30.0


def _no_body() -> contextlib.AbstractContextManager[dict[str, Any]]:
    return contextlib.nullcontext({})


class Connection:
    """The HTTP connections of a client. Everything it sends can be sent twice without harm."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        timeout: float,
        retries: int,
        transport: httpx.BaseTransport | None,
    ) -> None:
        headers = {"User-Agent": "onnx-qat-client"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key.strip()}"
        self._retries = retries
        try:
            self._http = httpx.Client(
                base_url=base_url, headers=headers, timeout=timeout, transport=transport
            )
        except httpx.InvalidURL as error:
            raise UnreachableError(f"{base_url!r} is no address of a service: {error}.") from error

    def close(self) -> None:
        self._http.close()

    def send(
        self,
        method: str,
        path: str,
        model: type[M],
        *,
        body: Callable[[], contextlib.AbstractContextManager[dict[str, Any]]] = _no_body,
        **options: Any,
    ) -> M:
        """The answer.

        Args:
            model: what the service answers.
            body: opens the body, as arguments of httpx, anew for each attempt.

        Raises:
            ApiError: the answer is an error.
            UnreachableError: there is none, or it is not the service's.
        """

        def attempt() -> M:
            with body() as arguments:
                answer = self._http.request(method, path, **arguments, **options)
            if not answer.is_success:
                raise failure(answer)
            try:
                return model.model_validate_json(answer.content)
            except ValidationError as error:
                raise failure(answer) from error

        return self.persist(attempt)

    def delete(self, path: str) -> None:
        """Delete something; errors as for `send`.

        What is gone at a further attempt went at one whose answer was lost.
        """
        is_repeated = False

        def attempt() -> None:
            nonlocal is_repeated
            was_repeated, is_repeated = is_repeated, True
            answer = self._http.delete(path)
            is_gone = was_repeated and answer.status_code == httpx.codes.NOT_FOUND
            if answer.status_code != httpx.codes.NO_CONTENT and not is_gone:
                raise failure(answer)

        self.persist(attempt)

    @contextlib.contextmanager
    def stream(self, path: str, **options: Any) -> Iterator[httpx.Response]:
        """One attempt at a GET whose body the caller reads. A redirect is followed, without the API key
        where it leads to another host.

        Raises:
            ApiError: the answer is an error.
            UnreachableError: it is not the service's.
            httpx.RequestError: there is none, or it breaks off.
        """
        with self._http.stream("GET", path, follow_redirects=True, **options) as answer:
            if not answer.is_success:
                answer.read()
                raise failure(answer)
            yield answer

    def probe(self, path: str) -> None:
        """Ask for something and do not read it; errors as for `stream`."""
        with self.stream(path):
            pass

    def persist(self, attempt: Callable[[], T]) -> T:
        """Attempt something, again after a pause while that may help.

        Raises:
            ApiError, UnreachableError: of the last attempt.
        """
        pause = _FIRST_PAUSE_SECONDS
        for left in reversed(range(self._retries + 1)):
            try:
                return attempt()
            except (ApiError, httpx.RequestError) as error:
                if left == 0 or not is_passing(error):
                    raise as_client_error(error) from error
                time.sleep(max(asked_pause(error), pause * random.uniform(0.5, 1.0)))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        raise AssertionError("unreachable")


def is_passing(error: ApiError | httpx.RequestError) -> bool:
    """Whether the same request may be answered otherwise in a moment."""
    if isinstance(error, ApiError):
        return error.status in _PASSING
    return not isinstance(error, _LASTING)


def asked_pause(error: ApiError | httpx.RequestError) -> float:
    """The pause in seconds that the service asks for: Retry-After, RFC 9110 section 10.2.3, within reason."""
    given = error.retry_after if isinstance(error, ApiError) else None
    if given is None:
        return 0.0
    if given.isascii() and given.isdigit():
        seconds = float(given)
    else:
        try:
            until = email.utils.parsedate_to_datetime(given)
        except ValueError:
            return 0.0
        if until.tzinfo is None:  # "-0000"
            until = until.replace(tzinfo=datetime.UTC)
        seconds = (until - datetime.datetime.now(datetime.UTC)).total_seconds()
    return min(max(seconds, 0.0), _LONGEST_PAUSE_SECONDS)


def as_client_error(error: ApiError | httpx.RequestError) -> ApiError | UnreachableError:
    if isinstance(error, ApiError):
        return error
    return UnreachableError(f"The service at {error.request.url} does not answer: {error}.")
