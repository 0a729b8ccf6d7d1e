"""Pictures by http(s) URL, fetched without becoming anybody's way into the network behind the server.

Off unless hosts are allowed by name. Of an allowed host every address is checked after it has been resolved, and the
connection goes to the address that was checked: a name that resolves to something else the next moment is of no use.
Redirects go through all of it again. Size and time are bounded; proxies, cookies and compression are not used; what
arrives must begin as a picture does.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated
from urllib.parse import urljoin, urlsplit

import httpcore
from pydantic import Field, field_validator

from wicore_backend.gateway.errors import InvalidRequestError
from wicore_backend.settings import Settings

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Addresses of a host name, for a port. Raises OSError."""

_PORTS = {"http": 80, "https": 443}
_ENTRY = re.compile(r"(\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?)(:\d{1,5})?")

_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
"""All that has been given out for the public. What lies outside is loopback, link-local, unique-local, multicast,
IPv4-mapped (::ffff:0:0/96), NAT64 (64:ff9b::/96, 64:ff9b:1::/48), or nothing."""

_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        # IANA's special-purpose registry of IPv4.
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        # Within 2000::/3: protocol assignments (Teredo and ORCHID among them), documentation, 6to4.
        *("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"),
    )
)

_OF_ONE_REQUEST = 8
"""Pictures of a request that are fetched at the same time, so that one request does not take everybody's places."""

_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")


class PictureUrlSettings(Settings):
    """Whether and from where pictures are fetched for clients."""

    hosts: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=253)], ...], Field(strict=False)] = ()
    """Names from which they may come: `images.example.com`, `*.example.com` for all names below it, `*` for all there
    are. With a port, that one instead of 80 and 443. None: pictures are not fetched."""

    max_bytes: Annotated[int, Field(ge=1)] = 20 * 2**20
    """Of one picture."""

    max_request_bytes: Annotated[int, Field(ge=1)] = 64 * 2**20
    """Of all pictures that are fetched for one request."""

    timeout_s: Annotated[float, Field(gt=0, le=600)] = 10.0
    """For one picture, redirects included."""

    request_timeout_s: Annotated[float, Field(gt=0, le=600)] = 20.0
    """For all pictures of one request, of which several are fetched at the same time."""

    max_redirects: Annotated[int, Field(ge=0, le=20)] = 3

    https_only: bool = False

    max_fetches: Annotated[int, Field(ge=1)] = 32
    """At a time; others wait, within their time."""

    @field_validator("hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not _ENTRY.fullmatch(host):
                raise ValueError(f"{host!r} is not a host name, '*.' and a host name, or '*', with or without a port")
        return tuple(host.lower().rstrip(".") for host in hosts)


class PictureUrlError(InvalidRequestError):
    """400: the URL is refused, or there is no picture behind it."""

    def __init__(self, message: str, *, code: str = "invalid_image_url") -> None:
        super().__init__(message, param="image_url", code=code)


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that has been found good, as far as its text goes."""

    url: str
    scheme: str
    host: str
    port: int
    path: bytes
    """With its query."""

    @property
    def host_header(self) -> str:
        """With the port where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(slots=True)
class PictureFetcher:
    """Fetches pictures by URL.

    Parameters
    ----------
    resolve
        Another resolver than the system's, for tests.
    network
        Makes the connections, to addresses that have been checked.
    tls
        Another trust than the system's.
    """

    settings: PictureUrlSettings
    resolve: Resolve = field(default_factory=lambda: SystemResolver())
    network: httpcore.AsyncNetworkBackend = field(default_factory=httpcore.AnyIOBackend)
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)
    _places: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._places = asyncio.Semaphore(self.settings.max_fetches)

    def for_request(self) -> Callable[[str], Awaitable[bytes]]:
        """`fetch` for the pictures of one request, to be called for as many as there are at once.

        Together they may exceed neither `max_request_bytes` nor, from now on, `request_timeout_s`.
        """
        left = self.settings.max_request_bytes
        places = asyncio.Semaphore(_OF_ONE_REQUEST)
        end = asyncio.get_running_loop().time() + self.settings.request_timeout_s

        async def fetch_another(url: str) -> bytes:
            nonlocal left
            try:
                async with asyncio.timeout_at(end), places:
                    picture = await self.fetch(url)
            except TimeoutError:
                raise PictureUrlError(
                    f"the pictures up to {_shown(url)} did not arrive within {self.settings.request_timeout_s:g} s",
                    code="image_timeout",
                ) from None
            left -= len(picture)
            if left < 0:
                raise PictureUrlError(
                    f"the pictures up to {_shown(url)} have more than {self.settings.max_request_bytes} bytes together",
                    code="image_too_large",
                )
            return picture

        return fetch_another

    async def fetch(self, url: str) -> bytes:
        """The encoded picture behind `url`.

        Raises
        ------
        PictureUrlError
            If the URL is refused, or what is behind it is no picture, too large or too slow. It does not say what an
            address that was refused is, or answered.
        """
        try:
            async with asyncio.timeout(self.settings.timeout_s), self._places:
                return await self._follow(url)
        except TimeoutError:
            raise PictureUrlError(
                f"the picture at {_shown(url)} did not arrive within {self.settings.timeout_s:g} s",
                code="image_timeout",
            ) from None

    async def _follow(self, url: str) -> bytes:
        for _ in range(self.settings.max_redirects + 1):
            found = await self._request(parse_target(url, self.settings))
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found.location)
        raise PictureUrlError(f"{_shown(url)}: more than {self.settings.max_redirects} redirects")

    async def _request(self, target: Target) -> bytes | _Redirect:
        """What one URL has: a picture, or another URL."""
        backend = _CheckedNetwork(self.network, self.resolve)
        headers = [
            ("Host", target.host_header),
            ("Accept", "image/png, image/jpeg, image/webp, image/gif"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", "wicore"),
            ("Connection", "close"),
        ]
        url = httpcore.URL(
            scheme=target.scheme.encode(), host=target.host.encode(), port=target.port, target=target.path
        )
        try:
            async with (
                httpcore.AsyncConnectionPool(ssl_context=self.tls, network_backend=backend, http2=False) as pool,
                pool.stream("GET", url, headers=headers) as response,
            ):
                return await self._read(target, response)
        except _AddressRefusedError as refused:
            raise PictureUrlError(f"{_shown(target.url)}: {refused}") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError, ValueError):
            raise PictureUrlError(f"{_shown(target.url)} could not be fetched", code="image_unavailable") from None

    async def _read(self, target: Target, response: httpcore.Response) -> bytes | _Redirect:
        headers = {name.lower(): value for name, value in response.headers}
        if response.status in (301, 302, 303, 307, 308):
            return _Redirect(headers.get(b"location", b"").decode("latin-1"))
        if response.status != 200:
            raise PictureUrlError(f"{_shown(target.url)} answered {response.status}", code="image_unavailable")
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise PictureUrlError(f"{_shown(target.url)} sent a compressed answer though it was not to")
        too_large = PictureUrlError(
            f"the picture at {_shown(target.url)} is larger than {self.settings.max_bytes} bytes",
            code="image_too_large",
        )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.settings.max_bytes:
            raise too_large
        body = bytearray()
        async for chunk in response.aiter_stream():
            body += chunk
            if len(body) > self.settings.max_bytes:
                raise too_large
            if len(body) >= 16 and not is_picture(body):
                break
        if not is_picture(body):
            raise PictureUrlError(f"{_shown(target.url)} is not a PNG, JPEG, WebP or GIF file")
        return bytes(body)


@dataclass(frozen=True, slots=True)
class _Redirect:
    location: str


class _AddressRefusedError(Exception):
    """A host with an address that is not public."""


@dataclass(frozen=True, slots=True)
class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Resolves and checks a host, and connects to the very address that it has checked. TLS still asks for the host's
    certificate, since it goes by the URL."""

    network: httpcore.AsyncNetworkBackend
    resolve: Resolve

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self.resolve(host, port)
        if not addresses:
            raise OSError(f"{host} has no address")
        # One that is not public condemns all: whoever mixes them is trying, or has made a mistake.
        if not all(is_public(address) for address in addresses):
            raise _AddressRefusedError("the host has an address that is not public")
        for address in addresses[:-1]:
            try:
                return await self.network.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.NetworkError, OSError):
                continue
        return await self.network.connect_tcp(addresses[-1], port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def parse_target(url: str, settings: PictureUrlSettings) -> Target:
    """What `url` points to, if its text is harmless and its host allowed.

    Raises
    ------
    PictureUrlError
        If not.
    """
    shown = _shown(url)
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise PictureUrlError(f"{shown} is not a URL; encode what is not ASCII")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:
        raise PictureUrlError(f"{shown} is not a URL: {error}") from None
    if parts.scheme not in _PORTS or (settings.https_only and parts.scheme != "https"):
        allowed = "https" if settings.https_only else "http or https"
        raise PictureUrlError(f"{shown} must begin with {allowed}")
    if "@" in parts.netloc:
        raise PictureUrlError(f"{shown} has a user name in it; leave it out")
    if not host or "%" in host or _is_disguised_number(host):
        raise PictureUrlError(f"{shown} has no proper host name")
    if not any(_allows(entry, host, port or _PORTS[parts.scheme]) for entry in settings.hosts):
        raise PictureUrlError(f"pictures of {host[:100]!r} are not fetched here; send it as a data URL")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(url, parts.scheme, host, port or _PORTS[parts.scheme], path.encode())


def is_public(address: str) -> bool:
    """Whether an address is one of the public network's. An IPv6 address that carries an IPv4 address is not, whatever
    that is: the translation is made in somebody's own network."""
    try:
        ip: IpAddress = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if ip.version == 6 and ip not in _PUBLIC_IPV6:
        return False
    return not any(ip in network for network in _NOT_PUBLIC if network.version == ip.version)


def is_picture(data: bytes | bytearray) -> bool:
    """Whether a file begins as a PNG, JPEG, GIF or WebP does, whatever it was said to be."""
    return data.startswith(_SIGNATURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def _is_disguised_number(host: str) -> bool:
    """2130706433, 0x7f.1, 0177.0.0.1: resolvers read them as addresses; only the plain forms are taken."""
    if ":" in host:
        return False
    last = host.rsplit(".", 1)[-1]
    if not (last.isdigit() or last.lower().startswith("0x")):
        return False
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return True
    return False


def _allows(entry: str, host: str, port: int) -> bool:
    name, colon, entry_port = entry.rpartition(":") if entry.rpartition(":")[2].isdigit() else (entry, "", "")
    if port not in ((int(entry_port),) if colon else _PORTS.values()):
        return False
    host = host.lower()
    return name == "*" or (host.endswith(name[1:]) if name.startswith("*.") else host == name)


@dataclass(frozen=True, slots=True)
class SystemResolver:
    """The system's resolver, on threads of its own: a name server that does not answer holds up nobody else's work."""

    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, thread_name_prefix="resolver"))

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Addresses of `host`. Raises OSError."""
        resolving = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self.threads, resolving)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _shown(url: str) -> str:
    return ascii(url if len(url) <= 120 else f"{url[:117]}...")
