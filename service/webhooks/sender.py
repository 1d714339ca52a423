"""Sends what the outbox holds: each delivery until its receiver takes it, at least once."""

from __future__ import annotations

import ssl
import threading
import time
from collections import Counter
from functools import partial
from typing import Final

import anyio
import anyio.to_thread
import httpx
import structlog

from service.unavailable import UNAVAILABLE
from service.webhooks.addresses import AddressPolicy, AddressRefusedError, Resolve, look_up
from service.webhooks.service import Sending, WebhookService
from service.webhooks.signing import signed_headers

log = structlog.get_logger()

_POLL_SECONDS: Final = 0.5
_RETRY_SECONDS: Final = 2.0
_AT_ONCE: Final = 16
# A tenant whose receivers are slow does not keep those of others waiting.
_AT_ONCE_PER_TENANT: Final = 8
_USER_AGENT: Final = "onnx-qat-webhooks"


class UndeliveredError(Exception):
    """The receiver did not take the message."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


class WebhookSender:
    """A thread that sends due deliveries until it is stopped. Several processes may have one each."""

    def __init__(self, webhooks: WebhookService, timeout_seconds: float) -> None:
        self._webhooks = webhooks
        self._timeout = timeout_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=anyio.run, args=(self._main,), name="webhooks")
        self._tls = ssl.create_default_context()
        self._under_way: Counter[str] = Counter()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What is being sent now is sent again by whoever comes next."""
        self._stopping.set()
        self._thread.join()

    async def _main(self) -> None:
        async with anyio.create_task_group() as tasks:
            while not self._stopping.is_set():
                try:
                    claimed = await anyio.to_thread.run_sync(self._claim)
                except Exception as error:
                    if isinstance(error, UNAVAILABLE):
                        log.warning("webhooks cannot be read, going on", error=str(error))
                    else:
                        log.exception("webhooks cannot be read, going on")
                    await anyio.sleep(_RETRY_SECONDS)
                    continue
                for sending in claimed:
                    self._under_way[sending.tenant] += 1
                    tasks.start_soon(self._deliver, sending)
                if not claimed:
                    await anyio.sleep(_POLL_SECONDS)
            tasks.cancel_scope.cancel()

    def _claim(self) -> list[Sending]:
        free = _AT_ONCE - self._under_way.total()
        busy = [tenant for tenant, count in self._under_way.items() if count >= _AT_ONCE_PER_TENANT]
        return self._webhooks.claim(min(free, _AT_ONCE_PER_TENANT), busy) if free > 0 else []

    async def _deliver(self, sending: Sending) -> None:
        try:
            try:
                status = await send(sending, self._webhooks.addresses, self._tls, self._timeout)
            except UndeliveredError as error:
                record = partial(self._webhooks.failed, sending, error.reason, error.status)
            else:
                record = partial(self._webhooks.delivered, sending, status)
            await anyio.to_thread.run_sync(record)
        except UNAVAILABLE as error:
            # It is due again when its time is over.
            log.warning("what became of a webhook cannot be written", delivery=sending.id, error=str(error))
        except Exception:
            log.exception("webhook delivery failed", job=sending.job, delivery=sending.id)
        finally:
            self._under_way[sending.tenant] -= 1


async def send(
    sending: Sending,
    addresses: AddressPolicy,
    tls: ssl.SSLContext,
    timeout_seconds: float,
    resolve: Resolve = look_up,
) -> int:
    """Post the message to a checked address of its host; the status of the answer, which is 2xx.

    Raises:
        UndeliveredError: it was not taken.
    """
    try:
        with anyio.fail_after(timeout_seconds):
            url = addresses.parse(sending.url)
            found = await addresses.resolve(url, resolve)
            # A client for each message: a connection that another host's certificate vouched for is not
            # used again for this one, though both have the same address.
            async with httpx.AsyncClient(
                verify=tls, trust_env=False, follow_redirects=False, timeout=timeout_seconds
            ) as client:
                status = await _post(client, url, found, sending)
    except AddressRefusedError as error:
        raise UndeliveredError(str(error)) from error
    except TimeoutError as error:
        raise UndeliveredError(f"No answer within {timeout_seconds:g} seconds.") from error
    except httpx.HTTPError as error:
        raise UndeliveredError(f"The connection failed: {type(error).__name__}.") from error
    if not 200 <= status < 300:
        is_redirect = 300 <= status < 400
        raise UndeliveredError(
            f"The receiver answered {status}{', which is not followed' if is_redirect else ''}.", status
        )
    return status


async def _post(client: httpx.AsyncClient, url: httpx.URL, addresses: list[str], sending: Sending) -> int:
    """Try the addresses in turn until one lets us connect."""
    for address in addresses:
        request = client.build_request(
            "POST",
            url.copy_with(host=address),
            content=sending.body,
            headers={
                # The name: for the receiver, and for its certificate.
                "Host": url.netloc.decode(),
                "Content-Type": "application/json",
                "User-Agent": _USER_AGENT,
                **signed_headers(sending.secrets, sending.id, int(time.time()), sending.body),
            },
            extensions={"sni_hostname": url.raw_host.decode()},
        )
        try:
            response = await client.send(request, stream=True)
        except httpx.ConnectError:
            if address == addresses[-1]:
                raise
            continue
        # The body is of no interest: it is not read, however long.
        await response.aclose()
        return response.status_code
    raise AssertionError("there is an address")
