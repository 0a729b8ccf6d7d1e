"""Serves the files of the pages from memory.

The pages show what models and strangers write, so they are confined from both sides: their code never parses HTML (it
builds nodes, and the policy below forbids the rest), and whatever slipped through could load, send and frame nothing.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Nothing may turn text into HTML or script: no policy for it can be made.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # A copy is kept, and asked about each time: a new version of the gateway is never mixed with old files.
    "Cache-Control": "no-cache",
    "Vary": "Accept-Encoding",
}

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""By suffix. Files of other kinds, such as licences, are not served."""

_HEAD = "head.html"
"""What the heads of all pages have in common, ..."""
_HEAD_GOES_HERE = b"  <!-- head -->\n"
"""... and where it stands in them."""

_FILES = Path(__file__).parent / "static"


@dataclass(frozen=True, slots=True)
class Asset:
    """A file, ready to be sent."""

    body: bytes
    zipped: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> Asset:
        """Read it, put a page's head together, and compress it once."""
        body = path.read_bytes()
        if path.suffix == ".html":
            body = body.replace(_HEAD_GOES_HERE, (path.parent / _HEAD).read_bytes())
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        return cls(body, gzip.compress(body, mtime=0), _MEDIA_TYPES[path.suffix], etag)

    def response(self, request: Request) -> Response:
        """The file, or that the browser's copy is still right."""
        headers = _HEADERS | {"ETag": self.etag}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if self.etag in known:
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
            return Response(self.zipped, headers=headers, media_type=self.media_type)
        return Response(self.body, headers=headers, media_type=self.media_type)


def read_assets(folder: Path = _FILES) -> Mapping[str, Asset]:
    """All files of the pages, by their path below the folder."""
    return {
        path.relative_to(folder).as_posix(): Asset.read(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix in _MEDIA_TYPES and path.name != _HEAD
    }


def add_pages(app: Starlette) -> None:
    """Add `/`, `/dashboard` and the files behind them under `/web/` to an application, outside its API's schema.

    They hold nothing secret, so they need no key; what they call does.
    """
    assets = read_assets()

    async def chat(request: Request) -> Response:
        return assets["chat.html"].response(request)

    async def dashboard(request: Request) -> Response:
        return assets["dashboard.html"].response(request)

    async def file(request: Request) -> Response:
        asset = assets.get(request.path_params["path"])
        if asset is None:
            return PlainTextResponse("There is no such file.", 404, headers=_HEADERS | {"Cache-Control": "no-store"})
        return asset.response(request)

    for path, endpoint in (("/", chat), ("/dashboard", dashboard), ("/web/{path:path}", file)):
        app.add_route(path, endpoint, methods=["GET", "HEAD"], include_in_schema=False)
