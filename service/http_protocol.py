"""The server's side of HTTP/1.1: with times that uvicorn has not, and bodies without h11's copies."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import h11
from h11._readers import ContentLengthReader
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import H11Protocol


class PunctualH11Protocol(H11Protocol):
    """Closes a connection on which a request's header, or a body that is answered, does not end in time.

    Otherwise a client could hold any number of them with a byte now and then (slowloris). A request that is
    not answered yet is not disturbed: how slowly a body may come is up to service/uploads. Of a body that is
    answered the rest is read and dropped meanwhile: to close at once would be a reset, with which clients
    that are still sending may lose the answer.
    """

    header_seconds: ClassVar[float] = 20
    """From the connection, or from the end of the answer before, to the end of the next header."""

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_header()

    def data_received(self, data: bytes) -> None:
        if not self._pass_on(data):
            super().data_received(data)

    def _pass_on(self, data: bytes) -> bool:
        """Give the application what is a part of a body and nothing else; false where it may be more.

        h11 and uvicorn copy a piece of a body four times: 2.4 s of CPU time for each GiB that is uploaded,
        1.6 so. A body's first piece and its last byte, where states change, are theirs, and chunked bodies.
        """
        reader = self.conn._reader
        if (
            not isinstance(reader, ContentLengthReader)
            or self.conn.their_state is not h11.SEND_BODY
            or reader._remaining == reader._length
            or reader._remaining <= len(data)
            or self.conn._receive_buffer
        ):
            return False
        self._unset_keepalive_if_required()
        reader._remaining -= len(data)
        if self.conn.our_state is h11.DONE:  # answered: nobody reads the rest
            return True
        # Its own type is bytearray, of which `receive` makes bytes: of bytes, without a copy.
        self.cycle.body = self.cycle.body + data if self.cycle.body else data  # type: ignore[assignment]
        if len(self.cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self.cycle.message_event.set()
        return True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
        super().connection_lost(exc)

    def _expect_header(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
        self._header_timer = self.loop.call_later(self.header_seconds, self._give_up)

    def _give_up(self) -> None:
        is_answered = self.conn.our_state is h11.DONE  # and their body has not ended: else it would be IDLE
        if is_answered or self.conn.their_state is h11.IDLE:
            self.transport.close()
