"""Pictures by URL: whatever the URL, the name server or a redirect says, nothing but the public network is reached."""

import asyncio
import ipaddress
import socket
import struct
import time
from contextlib import asynccontextmanager

import httpcore
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway_kit import CHAT, ScriptedBackend, gateway
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.gateway.errors import ApiError
from wicore_backend.gateway.picture_urls import (
    PictureFetcher,
    PictureUrlError,
    PictureUrlSettings,
    SystemResolver,
    is_picture,
    is_public,
)

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
PUBLIC = "93.184.215.14"

PRIVATE = [
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.1"),
    *("203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd12:3456::1", "ff02::1"),
    *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1"),
    *("2002:7f00:1::", "2002:808:808::1", "2001::1", "2001:0:7f00:1::", "2001:10::1", "2001:20::1", "2001:db8::1"),
    *("100::1", "3fff::1", "5f00::1", "::ffff:0:127.0.0.1"),
]


class Network(httpcore.AnyIOBackend):
    """Leads every address to a server of the test's on this machine, and remembers the addresses."""

    def __init__(self) -> None:
        self.port = 0
        self.connected: list[tuple[str, int]] = []

    async def connect_tcp(self, host, port, timeout=None, *_options):
        self.connected.append((host, port))
        return await super().connect_tcp("127.0.0.1", self.port, timeout)


class Names:
    """A name server whose answers are laid down; of a list of lists the next one each time."""

    def __init__(self, **answers) -> None:
        self.answers = {name.replace("_", "."): list(found) for name, found in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host, _port):
        self.asked.append(host)
        found = self.answers.get(host)
        if found is None:
            raise socket.gaierror("no such host")
        return found.pop(0) if isinstance(found[0], list) else found


@asynccontextmanager
async def picture_server(network, respond):
    """Answers each request with what `respond(host, path)` says: the bytes of a response."""
    seen = []

    async def serve(reader, writer):
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.split("\r\n")
            headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}
            path = lines[0].split(" ")[1]
            seen.append((headers["host"], path))
            answer = respond(headers["host"], path)
            for part in [answer] if isinstance(answer, bytes) else answer:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.02)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    network.port = server.sockets[0].getsockname()[1]
    async with server:
        yield seen


def ok(body=PNG, more=""):
    return f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n{more}\r\n".encode() + body


def redirect(location, status=302):
    return f"HTTP/1.1 {status} Found\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n".encode()


def fetched(url, respond, names=None, **settings):
    """The picture, and what happened on the way; or the error."""
    network = Network()
    names = names or Names(pics_example=[PUBLIC])

    async def body():
        async with picture_server(network, respond) as seen:
            fetcher = PictureFetcher(
                PictureUrlSettings(**{"hosts": ("*",), "timeout_s": 2.0, **settings}), names, network
            )
            return await fetcher.fetch(url), network.connected, seen

    return asyncio.run(body())


def refused(url, respond=lambda *_: ok(), names=None, **settings):
    """The error, and the addresses that were connected to."""
    network = Network()
    names = names or Names(pics_example=[PUBLIC])

    async def body():
        async with picture_server(network, respond):
            fetcher = PictureFetcher(
                PictureUrlSettings(**{"hosts": ("*",), "timeout_s": 2.0, **settings}), names, network
            )
            with pytest.raises(PictureUrlError) as caught:
                await fetcher.fetch(url)
            return caught.value

    error = asyncio.run(body())
    assert isinstance(error, ApiError)
    assert error.status == 400
    return error, network.connected


def test_a_picture_of_an_allowed_host_is_fetched_from_the_address_that_was_checked():
    picture, connected, seen = fetched("http://pics.example/a.png?b=c", lambda *_: ok(), hosts=("pics.example",))
    assert picture == PNG
    assert connected == [(PUBLIC, 80)]
    assert seen == [("pics.example", "/a.png?b=c")]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public_are_refused_after_resolution(address):
    error, connected = refused("http://pics.example/", names=Names(pics_example=[address]))
    assert not connected
    assert "not public" in str(error)
    assert address not in str(error)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", PUBLIC, "2606:4700:4700::1111", "2a00:1450:4001::200e"])
def test_public_addresses_are_public(address):
    assert is_public(address)


@given(st.ip_addresses())
def test_whatever_the_standard_library_calls_special_is_not_public(address):
    if is_public(str(address)):
        assert address.is_global
        assert not address.is_multicast
        assert not (address.version == 6 and (address.ipv4_mapped or address.sixtofour or address.teredo))


@given(st.ip_addresses(v=4), st.sampled_from(["::ffff:0:0/96", "64:ff9b::/96", "2002::/16", "::/96", "2001::/32"]))
def test_no_ipv6_form_of_an_ipv4_address_is_public(address, prefix):
    network = ipaddress.IPv6Network(prefix)
    shift = 80 if prefix == "2002::/16" else 0
    assert not is_public(str(ipaddress.IPv6Address(int(network.network_address) | int(address) << shift)))


def test_one_private_address_among_public_ones_condemns_the_host():
    for addresses in ([PUBLIC, "127.0.0.1"], ["10.0.0.1", PUBLIC]):
        _, connected = refused("http://pics.example/", names=Names(pics_example=addresses))
        assert not connected


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1/", "http://127.1/", "http://2130706433/", "http://0x7f000001/", "http://0x7f.0.0.1/"),
        *("http://0177.0.0.1/", "http://017700000001/", "http://127.0.0.1./", "http://0/", "http://127.0.1/"),
        *("http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://[0:0:0:0:0:ffff:7f00:1]/", "http://[fe80::1%25lo]/"),
        *("http://[64:ff9b::127.0.0.1]/", "http://[2002:7f00:1::]/", "http://localhost/", "http://LOCALHOST./"),
        *("http://①②⑦.⓪.⓪.①/", "http://127。0。0。1/", "http://%31%32%37.0.0.1/", "http://127.0.0.1%2f@pics.example/"),
        *("http://pics.example@127.0.0.1/", "http://127.0.0.1\\@pics.example/", "http://127.0.0.1#@pics.example/"),
        *("http://[::1", "http://:80/", "http:///", "http://pics.example:99999/", "http://pics.example:x/"),
        *("file:///etc/passwd", "ftp://pics.example/", "gopher://127.0.0.1/", "javascript:1", "//pics.example/", ""),
        *("http://pics.example/\r\nX: 1", "http://pics.example /", "http://pics.example\t/", "http://169.254.169.254/"),
        *("http://0251.0376.0251.0376/", "http://2852039166/", "http://metadata.google.internal/"),
    ],
)
def test_disguises_lead_nowhere(url):
    """With the system's own resolver, which reads 0x7f.1 as an address."""
    _, connected = refused(url, names=SystemResolver())
    assert not connected


def test_only_allowed_hosts_and_ports():
    hosts = ("pics.example", "*.cdn.example", "odd.example:8080")
    names = Names(pics_example=[PUBLIC], a_cdn_example=[PUBLIC], odd_example=[PUBLIC])
    for url in ("http://pics.example/", "http://PICS.example./", "http://a.cdn.example/", "http://odd.example:8080/"):
        assert fetched(url, lambda *_: ok(), names, hosts=hosts)[0] == PNG
    for url in (
        *("http://evil.example/", "http://pics.example.evil/", "http://evilpics.example/", "http://cdn.example/"),
        *("http://notcdn.example/", "http://pics.example:8080/", "http://odd.example/", "http://pics.example:22/"),
        f"http://{PUBLIC}/",
    ):
        _, connected = refused(url, names=names, hosts=hosts)
        assert not connected, url


def test_a_name_that_changes_its_answer_is_asked_once_for_each_connection():
    names = Names(pics_example=[[PUBLIC], ["127.0.0.1"]])
    picture, connected, _ = fetched("http://pics.example/", lambda *_: ok(), names)
    assert picture == PNG
    assert names.asked == ["pics.example"], "what was checked is what is connected to"
    assert connected == [(PUBLIC, 80)]


def test_a_redirect_is_checked_like_the_first_url():
    names = Names(pics_example=[PUBLIC], inner_example=["10.0.0.7"], other_example=["8.8.8.8"])
    for location in (
        *("http://127.0.0.1/", "http://[::1]/", "http://inner.example/", "http://2130706433/", "//127.0.0.1/"),
        *("file:///etc/passwd", "http://user@other.example/", "http://other.example:22/", ""),
    ):
        _, connected = refused("http://pics.example/", lambda *_, to=location: redirect(to), names)
        assert {address for address, _ in connected} == {PUBLIC}, location
    _, connected = refused(
        "http://pics.example/", lambda *_: redirect("http://other.example/"), names, hosts=("pics.example",)
    )
    assert connected == [(PUBLIC, 80)]


def test_a_name_that_changes_its_answer_between_redirects_is_checked_again():
    names = Names(pics_example=[[PUBLIC], ["192.168.0.1"]])
    _, connected = refused("http://pics.example/", lambda *_: redirect("/again"), names)
    assert connected == [(PUBLIC, 80)]


def test_redirects_are_followed_up_to_a_number():
    def respond(_host, path):
        left = int(path[1:])
        return redirect(f"/{left - 1}") if left else ok()

    names = Names(pics_example=[PUBLIC])
    assert fetched("http://pics.example/3", respond, names)[0] == PNG
    error, connected = refused("http://pics.example/4", respond, names)
    assert "redirects" in str(error)
    assert len(connected) == 4


def test_https_only_holds_for_redirects():
    error, _ = refused("http://pics.example/", https_only=True)
    assert "https" in str(error)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (ok(b"<html>" + bytes(50)), "invalid_image_url"),
        (ok(b"<html>" + bytes(50), "content-type: image/png\r\n"), "invalid_image_url"),
        (ok(b""), "invalid_image_url"),
        (ok(PNG, "content-encoding: gzip\r\n"), "invalid_image_url"),
        (ok(PNG + bytes(2000)), "image_too_large"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + PNG + bytes(2000), "image_too_large"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n", "image_too_large"),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", "image_unavailable"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n" + PNG, "image_unavailable"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "image_unavailable"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 100_000, "image_unavailable"),
        (b"", "image_unavailable"),
    ],
)
def test_what_is_no_picture_or_too_large_is_refused(answer, code):
    error, _ = refused("http://pics.example/", lambda *_: answer, max_bytes=1000)
    assert error.code == code


def test_a_server_that_dribbles_is_left():
    drops = [b"HTTP/1.1 200 OK\r\n\r\n" + PNG] + [b"x"] * 500
    error, _ = refused("http://pics.example/", lambda *_: drops, timeout_s=0.5)
    assert error.code == "image_timeout"


def test_signatures_of_pictures():
    webp = b"RIFF" + struct.pack("<I", 20) + b"WEBPVP8 "
    for good in (PNG, b"\xff\xd8\xff\xe0", b"GIF89a..", webp):
        assert is_picture(good)
    for bad in (b"", b"RIFF1234WAVE", b"<svg", b"BM", b"\x89PN"):
        assert not is_picture(bad)


@pytest.mark.parametrize("host", ["http://a.example", "a*.example", "*.", ""])
def test_wrong_entries_of_allowed_hosts_are_named(host):
    with pytest.raises(InvalidArgumentError, match="hosts"):
        PictureUrlSettings(hosts=(host,))


def ask_for(client, url):
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    return client.post("/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": parts}]})


def test_urls_are_refused_by_name_unless_hosts_are_allowed():
    backend = ScriptedBackend()
    with gateway(backend) as client:
        answer = ask_for(client, "http://pics.example/a.png")
        assert answer.status_code == 400
    with gateway(backend, picture_urls={"hosts": ["pics.example"]}) as client:
        for url in ("http://127.0.0.1/a.png", "http://other.example/"):
            answer = ask_for(client, url)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"]
    assert not backend.requests


def test_the_pictures_of_one_request_together_are_bounded():
    class Fetcher(PictureFetcher):
        async def fetch(self, url):
            assert url.startswith("https://pics.example/")
            return PNG

    backend = ScriptedBackend()
    with gateway(backend, picture_urls={"hosts": ["pics.example"], "max_request_bytes": 2 * len(PNG)}) as client:
        client.app.state.picture_fetcher = Fetcher(client.app.state.settings.picture_urls)
        for count, status in ((2, 200), (3, 400), (2, 200)):
            parts = [{"type": "image_url", "image_url": {"url": f"https://pics.example/{i}.png"}} for i in range(count)]
            answer = client.post(
                "/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": parts}]}
            )
            assert answer.status_code == status
    assert answer.status_code == 200
    assert len(backend.requests) == 2


def ask_for_many(fetch, count, **settings):
    """The answer to a request with so many pictures, each fetched by `fetch`, and the requests that the model had."""

    class Fetcher(PictureFetcher):
        async def fetch(self, url):
            return await fetch(url)

    backend = ScriptedBackend()
    with gateway(backend, picture_urls={"hosts": ["pics.example"], **settings}) as client:
        client.app.state.picture_fetcher = Fetcher(client.app.state.settings.picture_urls)
        parts = [{"type": "image_url", "image_url": {"url": f"https://pics.example/{i}"}} for i in range(count)]
        asked = {**CHAT, "messages": [{"role": "user", "content": parts}]}
        return client.post("/v1/chat/completions", json=asked), backend.requests


def test_pictures_of_one_request_are_fetched_at_the_same_time_though_not_all_and_keep_their_order():
    under_way, most = 0, 0

    async def fetch(url):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        number = int(url.rsplit("/", 1)[1])
        await asyncio.sleep(0.05 if number % 2 else 0.01)
        under_way -= 1
        return PNG + bytes([number])

    answer, (request,) = ask_for_many(fetch, 20)
    assert answer.status_code == 200
    assert request.images == tuple(PNG + bytes([number]) for number in range(20))
    assert most == 8


def test_pictures_of_one_request_have_one_time_together():
    async def fetch(_url):
        await asyncio.sleep(0.2)
        return PNG

    began = time.monotonic()
    answer, requests = ask_for_many(fetch, 40, request_timeout_s=0.5)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "image_timeout"
    assert "did not arrive within 0.5 s" in answer.json()["error"]["message"]
    assert time.monotonic() - began < 5
    assert not requests


def test_one_picture_that_cannot_be_had_ends_the_fetching_of_the_others():
    ended = []

    async def fetch(url):
        if url.endswith("/2"):
            raise PictureUrlError("there is none")
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(url)

    answer, requests = ask_for_many(fetch, 4)
    assert answer.status_code == 400
    assert "there is none" in answer.json()["error"]["message"]
    assert len(ended) == 3
    assert not requests
