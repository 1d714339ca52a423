"""Where a webhook may go. A tenant names the address, and the service must not be its way into our network.

The host is looked up once; what is found is checked, and the connection goes to exactly that, so that a
name whose answer changes between the check and the connection (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import anyio
import httpx

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Finds the addresses of a host; the port is that of the connection."""

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_HOST: Final = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", re.ASCII | re.IGNORECASE)

# IANA's registries of special-purpose addresses, with what is multicast or reserved; written out, because
# what Python takes for global differs between its releases.
_REFUSED_IPV4: Final = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network, unspecified
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared between a provider's customers; some clouds' metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's metadata, in public space
        "169.254.0.0/16",  # link-local; most clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
]
# Only this is handed out as global unicast: no loopback, unique local, link-local, multicast.
_GLOBAL_IPV6: Final = ipaddress.IPv6Network("2000::/3")
_REFUSED_IPV6: Final = [
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments; Teredo, which carries IPv4
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which carries IPv4
        "3fff::/20",  # documentation
    )
]
# IPv6 that stands for the IPv4 address in its last 32 bits: mapped, and NAT64 with the well-known prefix.
_CARRIES_IPV4: Final = [ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96")]


class AddressRefusedError(Exception):
    """This address is not one that a webhook may go to. The message is for the tenant."""


def is_public(address: Address) -> bool:
    """Whether anybody on the internet could reach the address."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _REFUSED_IPV4)
    if any(address in network for network in _CARRIES_IPV4):
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
    return address in _GLOBAL_IPV6 and not any(address in network for network in _REFUSED_IPV6)


async def look_up(host: str, port: int) -> list[str]:
    """The addresses that the system's resolver finds."""
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


@dataclass(frozen=True)
class AddressPolicy:
    """What the operator allows."""

    allow_private: bool
    ports: frozenset[int] | None
    """None: every port."""

    def parse(self, url: str) -> httpx.URL:
        """Check all that can be seen without asking the resolver.

        Raises:
            AddressRefusedError: scheme, port or host are not allowed, or this is not a URL.
        """
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise AddressRefusedError("This is not a URL.") from error
        if parsed.scheme not in _DEFAULT_PORTS:
            raise AddressRefusedError("The URL's scheme is not http or https.")
        if parsed.userinfo:
            raise AddressRefusedError("The URL has a user name or password; use the webhook's secret.")
        port = port_of(parsed)
        if not 0 < port < 1 << 16 or (self.ports is not None and port not in self.ports):
            raise AddressRefusedError("The URL's port is not one that this service sends to.")
        host = parsed.raw_host.decode()
        literal = _literal(host)
        if literal is None and not _HOST.fullmatch(host):
            raise AddressRefusedError("The URL's host is neither a name nor an address.")
        is_local = host.rstrip(".").lower().rpartition(".")[2] == "localhost"
        if not self.allow_private and (is_local or (literal is not None and not is_public(literal))):
            raise AddressRefusedError(_NOT_PUBLIC)
        return parsed

    async def resolve(self, url: httpx.URL, resolve: Resolve = look_up) -> list[str]:
        """The addresses to connect to, in the resolver's order.

        Raises:
            AddressRefusedError: there is none, or one of them is not public.
        """
        try:
            found = await resolve(url.raw_host.decode(), port_of(url))
        except OSError as error:
            raise AddressRefusedError("The host's name cannot be resolved.") from error
        if not found:
            raise AddressRefusedError("The host's name cannot be resolved.")
        if not self.allow_private and not all(is_public(ipaddress.ip_address(each)) for each in found):
            raise AddressRefusedError(_NOT_PUBLIC)
        return list(dict.fromkeys(found))


_NOT_PUBLIC: Final = "The URL's host is not a public address."


def port_of(url: httpx.URL) -> int:
    """The port that the URL names or its scheme implies."""
    return url.port if url.port is not None else _DEFAULT_PORTS[url.scheme]


def _literal(host: str) -> Address | None:
    """The address that a host is in itself, in any form that the resolver takes for one."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        # Also decimal, octal, hexadecimal and shortened forms.
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None
