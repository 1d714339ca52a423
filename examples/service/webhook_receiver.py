"""Receives the service's webhooks and checks their signatures; needs nothing but Python.

    WEBHOOK_SECRET=whsec_... python examples/service/webhook_receiver.py 9000

prints a line for each event. The service must be allowed to reach it: on one machine it is started with
ONNX_QAT_WEBHOOK_ALLOW_PRIVATE=true and ONNX_QAT_WEBHOOK_PORTS='[9000]'.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOLERANCE_SECONDS = 300
LARGEST_BODY = 1 << 20

Event = dict[str, Any]


class BadSignatureError(Exception):
    """The message is not one that the holder of the secret has just sent."""


def verify(secret: str, headers: Mapping[str, str] | Message, body: bytes, now: float) -> Event:
    """Check a message as the Standard Webhooks specification says, and read it.

    Raises:
        BadSignatureError: it must not be believed.
    """
    try:
        identifier = headers["webhook-id"]
        timestamp = headers["webhook-timestamp"]
        signatures = headers["webhook-signature"].split()
        age = now - int(timestamp)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise BadSignatureError("the message is not signed") from error
    # An old message may have been recorded by somebody and sent again.
    if abs(age) > TOLERANCE_SECONDS:
        raise BadSignatureError("the message is too old, or the clocks differ")
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.digest(key, f"{identifier}.{timestamp}.".encode() + body, hashlib.sha256)
    expected = "v1," + base64.b64encode(digest).decode()
    # While a secret is replaced there are two signatures; one that fits is enough.
    if not any(hmac.compare_digest(expected.encode(), signature.encode()) for signature in signatures):
        raise BadSignatureError("the signature is wrong")
    event: Event = json.loads(body)
    return event


def receiver(secret: str, port: int, handle: Callable[[Event], None]) -> ThreadingHTTPServer:
    """A server that calls `handle` once for each event; start it with `serve_forever`.

    A message may come more than once; real receivers keep the ids they have seen in their database.
    """
    seen: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("content-length", "0"))
            if length > LARGEST_BODY:
                self.send_error(413)
                return
            try:
                event = verify(secret, self.headers, self.rfile.read(length), time.time())
            except BadSignatureError as error:
                self.send_error(401, str(error))
                return
            identifier = self.headers["webhook-id"]
            if identifier not in seen:
                handle(event)
                seen.add(identifier)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """The events are what is printed."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    """Print events until interrupted."""

    def show(event: Event) -> None:
        job = event["data"]
        print(event["timestamp"], event["type"], job["id"], job["failure"] or "", flush=True)

    with receiver(os.environ["WEBHOOK_SECRET"], int(sys.argv[1]), show) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
