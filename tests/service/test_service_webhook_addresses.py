"""A webhook goes to public addresses only, whatever way the other ones are written or resolved."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Sequence

import anyio
import pytest
import trustme
from receivers import Receiver

from service.webhooks.addresses import AddressPolicy, AddressRefusedError, is_public
from service.webhooks.sender import UndeliveredError, send
from service.webhooks.service import Sending
from service.webhooks.signing import new_secret

PUBLIC_ONLY = AddressPolicy(allow_private=False, ports=frozenset({80, 443}))
ANYWHERE = AddressPolicy(allow_private=True, ports=None)
TLS = ssl.create_default_context()


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "100.100.100.200",
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::10.0.0.1",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "3fff::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
    ],
)
def test_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1",
        "8.8.8.8",
        "172.32.0.1",
        "100.128.0.1",
        "2606:4700::1111",
        "64:ff9b::8.8.8.8",
        "::ffff:8.8.8.8",
    ],
)
def test_others_are(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://127.1/",
        "http://2130706433/",
        "http://0177.0.0.1/",
        "http://017700000001/",
        "http://0x7f.1/",
        "http://0x7f000001/",
        "http://0/",
        "http://[::1]/",
        "http://[::ffff:7f00:1]/",
        "http://[fe80::1%25eth0]/",
        "http://localhost/",
        "http://LOCALHOST./",
        "http://a.localhost/",
        "http://169.254.169.254/latest/meta-data",
        "http://user:password@example.com/",
        "http://example.com:22/",
        "http://example.com:0/",
        "http://example.com:65616/",
        "https://exa mple.com/",
        "https://example.com%2f.evil.com/",
        "https://a_b..com/",
        "https:///path",
        "https://",
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "//example.com/",
        "example.com",
        "",
        "http://example.com/\r\nX: y",
        "http://example.com/\0",
        "http://１２７.0.0.1/",
        "http://①.com/",
    ],
)
def test_a_url_that_may_not_be_is_refused_when_it_is_given(url: str) -> None:
    with pytest.raises(AddressRefusedError):
        PUBLIC_ONLY.parse(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/hook?x=1",
        "http://example.com:443/",
        "https://münchen.example/",
        "https://8.8.8.8/",
    ],
)
def test_others_are_taken(url: str) -> None:
    assert PUBLIC_ONLY.parse(url).host


def test_the_operator_may_allow_private_addresses_and_all_ports() -> None:
    for url in ("http://127.0.0.1:1234/", "http://localhost:1/", "http://[::1]:9/"):
        ANYWHERE.parse(url)


class Resolver:
    """Answers with one list after the other."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        answer = self.answers.pop(0)
        if not answer:
            raise OSError("no such host")
        return answer


@pytest.mark.parametrize(
    "answer",
    [
        ["127.0.0.1"],
        ["8.8.8.8", "10.0.0.1"],
        ["::ffff:10.0.0.1"],
        ["64:ff9b::a9fe:a9fe"],
        ["fe80::1%2"],
        [],
    ],
)
def test_a_name_that_resolves_to_anything_else_is_refused(answer: list[str]) -> None:
    async def resolve() -> None:
        await PUBLIC_ONLY.resolve(PUBLIC_ONLY.parse("https://example.com/"), Resolver(answer))

    with pytest.raises(AddressRefusedError):
        anyio.run(resolve)


def sending(url: str) -> Sending:
    return Sending("d", "default", "j", "job.succeeded", 1, url, b"{}", (new_secret(),))


def deliver(
    url: str, resolver: Resolver, *, policy: AddressPolicy = ANYWHERE, tls: ssl.SSLContext = TLS
) -> int:
    async def deliver() -> int:
        return await send(sending(url), policy, tls, 20, resolver)

    return anyio.run(deliver)


def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    """A second answer of the resolver, which would lead elsewhere, is never asked for."""
    with Receiver() as receiver:
        resolver = Resolver(["127.0.0.1"], ["192.0.2.1"])
        assert deliver(f"http://rebinding.example:{receiver.port}/x?y=z", resolver) == 204
    assert resolver.asked == [("rebinding.example", receiver.port)]
    (request,) = receiver.requests
    assert request.headers["host"] == f"rebinding.example:{receiver.port}"
    assert request.path == "/x?y=z"


def test_a_refused_address_is_not_connected_to() -> None:
    with Receiver() as receiver:
        policy = AddressPolicy(allow_private=False, ports=None)
        with pytest.raises(UndeliveredError, match="not a public address"):
            deliver(f"http://rebinding.example:{receiver.port}/", Resolver(["127.0.0.1"]), policy=policy)
    assert receiver.requests == []
    assert receiver.connections == 0


def test_the_next_address_is_tried_when_one_does_not_answer() -> None:
    with Receiver() as receiver:
        # Nobody listens there: the receiver has the port on 127.0.0.1 alone.
        answer = ["127.0.0.2", "127.0.0.1"]
        assert deliver(f"http://two.example:{receiver.port}/", Resolver(answer)) == 204


def test_the_certificate_is_that_of_the_name_and_not_of_the_address() -> None:
    authority = trustme.CA()
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with Receiver(certificate=authority.issue_cert("named.example")) as receiver:
        resolver = Resolver(["127.0.0.1"], ["127.0.0.1"], ["127.0.0.1"])
        assert deliver(f"https://named.example:{receiver.port}/", resolver, tls=trusting) == 204
        for url, tls in (
            (f"https://other.example:{receiver.port}/", trusting),
            (f"https://named.example:{receiver.port}/", TLS),
        ):
            with pytest.raises(UndeliveredError, match="connection failed"):
                deliver(url, resolver, tls=tls)
    assert len(receiver.requests) == 1


def test_redirects_are_not_followed() -> None:
    with (
        Receiver() as inner,
        Receiver(307, location=f"http://127.0.0.1:{inner.port}/") as receiver,
        pytest.raises(UndeliveredError, match="307, which is not followed"),
    ):
        deliver(f"http://r.example:{receiver.port}/", Resolver(["127.0.0.1"]))
    assert inner.connections == 0


def test_an_endless_answer_is_not_read() -> None:
    with Receiver(endless=True) as receiver:
        assert deliver(f"http://r.example:{receiver.port}/", Resolver(["127.0.0.1"])) == 200


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would look up the name on its own."""
    with Receiver() as proxy, Receiver() as receiver:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert deliver(f"http://r.example:{receiver.port}/", Resolver(["127.0.0.1"])) == 204
    assert proxy.connections == 0


def test_a_receiver_that_drips_its_answer_is_given_up_in_time() -> None:
    """The limit is for the whole attempt, not for each byte."""
    with Receiver(drips=True) as receiver:

        async def deliver() -> int:
            return await send(
                sending(f"http://r.example:{receiver.port}/"), ANYWHERE, TLS, 0.5, Resolver(["127.0.0.1"])
            )

        with pytest.raises(UndeliveredError, match="No answer within"):
            anyio.run(deliver)
