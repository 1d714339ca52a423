"""A multipart/form-data body as a stream of events, so that files go to disk without being held in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

from service.errors import ServiceError, ServiceErrorCode

# Of all headers of a part together; a form needs some 200 bytes of them.
_LARGEST_HEADERS: Final = 16 << 10


@dataclass(frozen=True)
class PartStart:
    """A part begins; its bytes follow, then a PartEnd."""

    name: str
    filename: str | None


@dataclass(frozen=True)
class PartEnd:
    """The part is complete."""


Event = PartStart | bytes | PartEnd
_END: Final = PartEnd()


def boundary_of(content_type: str) -> bytes:
    """The part boundary named in a Content-Type header."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise _invalid("The Content-Type header names no part boundary.")
    return boundary


async def read_parts(body: AsyncIterator[bytes], boundary: bytes) -> AsyncIterator[Event]:
    """Parse a body as it arrives.

    Raises:
        ServiceError: `request_invalid` when the body is not well-formed or ends too early.
    """
    reader = _Reader()
    try:
        parser = MultipartParser(boundary, reader.callbacks())
        async for chunk in body:
            parser.write(chunk)
            for event in reader.take():
                yield event
    except FormParserError as error:
        raise _invalid(f"The multipart body is not well-formed: {error}.") from error
    if not reader.complete:
        raise _invalid("The multipart body ends before its last part does.")


class _Reader:
    """Collects the parser's callbacks as events."""

    def __init__(self) -> None:
        self.complete = False
        self._events: list[Event] = []
        self._headers: dict[bytes, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._header_bytes = 0

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": lambda data, start, end: self._events.append(data[start:end]),
            "on_part_end": lambda: self._events.append(_END),
            "on_end": self._on_end,
        }

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _on_part_begin(self) -> None:
        self._headers.clear()
        self._header_bytes = 0

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_value += data[start:end]

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > _LARGEST_HEADERS:
            raise _invalid(f"The headers of a part are larger than {_LARGEST_HEADERS} bytes.")

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition"))
        if disposition != b"form-data" or b"name" not in options:
            raise _invalid("A part of the multipart body has no name.")
        filename = options.get(b"filename")
        self._events.append(PartStart(_text(options[b"name"]), None if filename is None else _text(filename)))

    def _on_end(self) -> None:
        self.complete = True


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise _invalid("A part's name or file name is not UTF-8.") from error


def _invalid(detail: str) -> ServiceError:
    return ServiceError(ServiceErrorCode.REQUEST_INVALID, detail)
