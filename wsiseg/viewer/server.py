"""The page over HTTP, for one user of this machine.

Who may ask: the server listens on 127.0.0.1 only; every address begins with a secret token, which only the terminal shows; the Host must be a
name of this machine (a foreign one is how DNS rebinding looks), and a request that another site's page makes is refused. What may be asked:
the names in ``_FILES`` and the routes below, never a path. What is written: what :class:`~wsiseg.viewer.page.SlidePage` writes, in the folder of
the run. The page may load nothing from elsewhere, and run no script but those served here.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import orjson

from wsiseg.errors import SeedsError, WsisegError
from wsiseg.runtime.text import first_line
from wsiseg.viewer.tiles import GREY_TILE

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from wsiseg.viewer.page import SlidePage

logger = logging.getLogger(__name__)

HOSTS = ("127.0.0.1", "localhost")  #: any port: an SSH tunnel may end at another one
MAX_BODY = 1 << 20  #: bytes; a region of 10,000 corners has a fifth of it
CONNECTIONS = 256  #: at a time, one thread each; a browser opens six
IDLE_S = 30.0  #: a connection without a request is closed
TOO_SOON_S = 0.5  #: between two looks at whether the run was changed by another process

_KEEP, _DROP = "private, max-age=86400, immutable", "no-store"  #: for the browser's cache
_JSON, _BINARY, _JPEG = "application/json", "application/octet-stream", "image/jpeg"
MODULES = (
    "main.js",
    "server.js",
    "overlay.js",
    "pictures.js",
    "painting.js",
    "square.js",
    "slide.js",
    "panel.js",
    "review.js",
)
_FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "style.css": ("style.css", "text/css; charset=utf-8"),
    **{name: (name, "text/javascript; charset=utf-8") for name in ("openseadragon.min.js", *MODULES)},
}
_OPENSEADRAGON_STYLE = (
    "'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='"  #: of the one style element that version 6.1.1 makes
)
_HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            f"style-src 'self' {_OPENSEADRAGON_STYLE}",
            "img-src 'self' blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class PageServer(ThreadingHTTPServer):
    """Serves one page until :meth:`shutdown`.

    Parameters
    ----------
    page
        What is served; the caller closes it.
    port
        0: any that is free.
    """

    daemon_threads = True
    request_queue_size = 1024
    allow_reuse_address = True

    def __init__(self, page: SlidePage, port: int = 0) -> None:
        self.page, self.token = page, secrets.token_urlsafe(24)
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        self._looked = 0.0
        self.files = {
            name: (resources.files("wsiseg.viewer").joinpath("static", file).read_bytes(), kind)
            for name, (file, kind) in _FILES.items()
        }
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def address(self) -> str:
        """What the browser opens."""
        return f"http://127.0.0.1:{self.server_address[1]}/{self.token}/"

    def look_again(self) -> None:
        """See whether another process has changed the run, not more often than the page asks."""
        now = time.monotonic()
        if now - self._looked >= TOO_SOON_S:
            self._looked = now
            self.page.refresh(wait=False)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Start a thread, or refuse when too many are at work."""
        if not self._free.acquire(blocking=False):
            try:
                request.settimeout(1)
                request.sendall(
                    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\nRetry-After: 1\r\n\r\n"
                )
            except OSError:
                logger.debug("a refused connection was closed first")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Serve one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:  # noqa: ANN401, ARG002
        """Handle what a browser that goes away leaves: no traceback for it."""
        logger.debug("a connection ended early", exc_info=True)


class _Refused(Exception):  # noqa: N818 - an answer, not a fault
    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    wbufsize, disable_nagle_algorithm = (
        1 << 16,
        True,
    )  # head and body at once: a body sent after its head waits 40 ms for an acknowledgement
    server_version, sys_version = "wsiseg", ""

    def do_GET(self) -> None:
        """Answer a question."""
        self._answer(self._get)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks up

    def do_POST(self) -> None:
        """Carry out a change."""
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401
        """Log requests only when asked for, and never the token."""
        logger.debug(format, *(str(arg).replace(self.server.token, "TOKEN") for arg in args))

    def _answer(self, make: Callable[[str, dict[str, str]], tuple[bytes, str, str]]) -> None:
        try:
            name, query = self._checked_name()
            content, kind, cache = make(name, query)
            self._send(HTTPStatus.OK, content, kind, cache)
        except _Refused as refusal:
            self.close_connection = True  # what was not read of the request must not be taken for the next one
            self._send(refusal.status, f"{refusal.reason}\n".encode(), "text/plain; charset=utf-8")
        except LookupError as error:
            self._send(HTTPStatus.NOT_FOUND, f"not here: {str(error)[:100]}\n".encode(), "text/plain; charset=utf-8")
        except WsisegError as error:
            status = HTTPStatus.UNPROCESSABLE_ENTITY if isinstance(error, SeedsError) else HTTPStatus.CONFLICT
            self._send(status, orjson.dumps({"error": first_line(error)}), _JSON)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:  # a fault of ours: logged, and one line for the page
            logger.warning(
                "%s %s: %r", self.command, self.path.replace(self.server.token, "TOKEN"), error, exc_info=True
            )
            reason = f"internal error ({type(error).__name__}: {first_line(error)[:200]}); please report it"
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, orjson.dumps({"error": reason}), _JSON)

    def _checked_name(self) -> tuple[str, dict[str, str]]:
        """What is asked for, below the token; refused unless the request comes from the page itself."""
        host = urlsplit(f"//{self.headers.get('Host', '')}")
        if host.hostname not in HOSTS:
            raise _Refused(HTTPStatus.FORBIDDEN, "refused: this server answers to 127.0.0.1 and localhost only")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{self.headers['Host']}":
            raise _Refused(HTTPStatus.FORBIDDEN, "refused: the request comes from another site")
        followed = self.headers.get("Sec-Fetch-Dest") == "document"  # a link to the page, which its token guards
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none") and not followed:
            raise _Refused(HTTPStatus.FORBIDDEN, "refused: the request comes from another site")
        parts = urlsplit(self.path)
        token, _, name = parts.path.lstrip("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise _Refused(HTTPStatus.FORBIDDEN, "refused: open the address that `wsiseg view` printed, with its token")
        if parts.path == f"/{token}":
            raise _Refused(HTTPStatus.NOT_FOUND, "not here: the address ends in a slash")
        return name, {key: values[-1] for key, values in parse_qs(parts.query).items()}

    def _get(self, name: str, query: dict[str, str]) -> tuple[bytes, str, str]:
        """Content, type and caching of what the page asks for."""
        if name in self.server.files:
            return *self.server.files[name], "no-cache"
        page = self.server.page
        route, *rest = name.split("/")
        routes: dict[tuple[str, int], Callable[[], tuple[bytes, str, str]]] = {
            ("tile", 3): lambda: self._tile(*(int(part) for part in rest)),
            ("outlines", 3): lambda: (page.outlines(rest[0], int(rest[1]), int(rest[2])), _BINARY, _KEEP),
            ("crop", 0): lambda: (self._crop(query), _JPEG, _KEEP),
            ("types", 0): lambda: (page.types(_box(query)), _BINARY, _DROP),
            ("density", 0): lambda: (self._density(query), _BINARY, _DROP),
            ("seeds.json", 0): lambda: (page.seeds_text().encode(), _JSON, _DROP),
            ("regions.geojson", 0): lambda: (page.regions_text().encode(), _JSON, _DROP),
            ("slide", 0): lambda: (orjson.dumps(page.about()), _JSON, _DROP),
            ("state", 0): lambda: (orjson.dumps(self._state()), _JSON, _DROP),
            ("counts", 0): lambda: (orjson.dumps(page.counts()), _JSON, _DROP),
            ("review", 0): lambda: (orjson.dumps(page.review(query.get("type"))), _JSON, _DROP),
        }
        if (route, len(rest)) not in routes:
            raise LookupError(name[:60])
        try:
            return routes[route, len(rest)]()
        except WsisegError:
            raise
        except (ValueError, KeyError, OverflowError) as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"refused: not a request of the page ({str(error)[:80]})") from error

    def _tile(self, zoom: int, column: int, row: int) -> tuple[bytes, str, str]:
        tile = self.server.page.tiles.tile(zoom, column, row)
        return (GREY_TILE, _JPEG, _DROP) if tile is None else (tile, _JPEG, _KEEP)

    def _crop(self, query: dict[str, str]) -> bytes:
        side = min(max(float(query["side"]), 8.0), 4096.0)
        x, y, _, _ = _box(
            {"x0": query["x"], "y0": query["y"], "x1": float(query["x"]) + 1, "y1": float(query["y"]) + 1}
        )
        return self.server.page.tiles.crop(x, y, side, 256)

    def _density(self, query: dict[str, str]) -> bytes:
        columns, lines = (min(max(int(query[key]), 1), 512) for key in ("columns", "lines"))
        return self.server.page.density(
            _box(query), columns, lines, float(query.get("score", "0")), float(query.get("margin", "0"))
        )

    def _state(self) -> dict[str, Any]:
        self.server.look_again()
        return self.server.page.state()

    def _post(self, name: str, _: dict[str, str]) -> tuple[bytes, str, str]:
        body, page = self._body(), self.server.page
        if name == "do":
            return orjson.dumps(page.do(body)), _JSON, _DROP
        if name == "save":
            return orjson.dumps({"written": page.save()}), _JSON, _DROP
        if name == "apply":
            page.apply()
            return orjson.dumps(page.state()), _JSON, _DROP
        if name == "segment" and page.on_demand is not None:
            if body.get("all"):
                page.on_demand.finish_all()
            else:
                page.on_demand.look_at(_box(body))
            return orjson.dumps(page.state()), _JSON, _DROP
        raise LookupError(name[:60])

    def _body(self) -> dict[str, Any]:
        """The JSON object of the request."""
        if self.headers.get_content_type() != _JSON:
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "refused: a change is sent as application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "refused: the request does not say how long it is")
        if int(length) > MAX_BODY:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"refused: more than {MAX_BODY} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, "refused: the request is not JSON") from error
        if not isinstance(body, dict):
            raise _Refused(HTTPStatus.BAD_REQUEST, "refused: the request is not a JSON object")
        return body

    def _send(self, status: HTTPStatus, content: bytes, kind: str, cache: str = _DROP) -> None:
        try:
            self.send_response(status)
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", cache)
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
        except (ConnectionError, TimeoutError):
            self.close_connection = True


def _box(values: dict[str, Any]) -> tuple[float, float, float, float]:
    """The box that a request names, level-0 px."""
    try:
        x0, y0, x1, y1 = (float(values[key]) for key in ("x0", "y0", "x1", "y1"))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _Refused(HTTPStatus.BAD_REQUEST, "refused: not a box; x0, y0, x1 and y1 are needed") from error
    if not (-1e9 < x0 < x1 < 1e9 and -1e9 < y0 < y1 < 1e9):
        raise _Refused(HTTPStatus.BAD_REQUEST, "refused: not a box; x0 < x1 and y0 < y1 are needed")
    return x0, y0, x1, y1
