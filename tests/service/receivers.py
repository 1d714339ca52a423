"""A server that webhooks go to, and that behaves as well or as badly as a test wants."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import standardwebhooks
import trustme
from service_helpers import wait_until


@dataclass(frozen=True)
class Request:
    """What came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.body)
        return event

    def is_signed_with(self, secret: str) -> bool:
        """Checked by the specification's own library."""
        try:
            standardwebhooks.Webhook(secret).verify(self.body, self.headers)
        except standardwebhooks.WebhookVerificationError:
            return False
        return True


class Receiver:
    """Listens on a port of 127.0.0.1 within its `with` block.

    Args:
        statuses: of the first answers; those after them are 204.
        port: 0 for a free one.
        certificate: makes it an HTTPS server.
        location: sent as the Location header.
        endless, drips: the body has no end; the answer comes a byte at a time.
        silent: takes requests and never answers.
    """

    def __init__(
        self,
        *statuses: int,
        port: int = 0,
        certificate: trustme.LeafCert | None = None,
        location: str | None = None,
        endless: bool = False,
        drips: bool = False,
        silent: bool = False,
    ) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.closing = threading.Event()
        left = list(statuses)
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                receiver.connections += 1
                super().setup()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.requests.append(Request(self.path, headers, body))
                if silent:
                    receiver.closing.wait()
                elif drips:
                    self._write_until_closed(b"X", 0.05)
                elif endless:
                    self.send_response(200)
                    self.end_headers()
                    self._write_until_closed(b"x" * 65536, 0)
                else:
                    self.send_response(left.pop(0) if left else 204)
                    if location is not None:
                        self.send_header("Location", location)
                    self.end_headers()

            def _write_until_closed(self, content: bytes, pause: float) -> None:
                with contextlib.suppress(OSError):
                    while not receiver.closing.is_set():
                        self.wfile.write(content)
                        self.wfile.flush()
                        time.sleep(pause)

            def log_message(self, *arguments: object) -> None:
                """Nothing."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, *arguments: object) -> None:
                """A client that hangs up, or does not like the certificate, is what some tests want."""

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        if certificate is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(tls)
            # The handshake happens in the handler's thread, at its first read.
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def wait(self, number: int) -> list[Request]:
        """The requests, once there are so many of them."""
        wait_until(lambda: len(self.requests) >= number)
        return list(self.requests)
