"""`streamdit serve`: one page, one WebSocket, one engine behind them.

Bound to loopback by default. A browser lets any page on the web talk to servers on its own machine, so the Host and
the Origin of each request are checked, too: only the page that this server gave out, or those named, may connect.
"""

import asyncio
import base64
import hashlib
import socket
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from streamdit_jax.errors import ConfigError
from streamdit_jax.live import EngineFull
from streamdit_jax.serving.protocol import HEADER, MAX_OVER, VERSION, Limits, Parser
from streamdit_jax.serving.video import codec_string
from streamdit_jax.serving.viewer import Viewer

PAGE = ("page.html", "page.css", "player.js", "page.js", "pictures.js")
AHEAD_SECONDS = 0.35  # of video that may wait at a viewer when the next chunk is fetched
SEND_BUFFER = 64 * 1024  # bytes the kernel may hold for a viewer: what lies there is late already
STOP_SECONDS = 3  # how long connections may take to end after Ctrl-C
OTHER_REQUESTS = 32  # connections beyond the viewers', for the page itself


class Service:
    """What all viewers share: the engine, its seats, threads to wait in, and the facts of the welcome.

    engine: a started live.Engine. height, width: pixels. guidance: what sessions start with. examples: prompts to try.
    sessions of `limits` is at most the engine's slots.
    """

    def __init__(
        self, engine, *, height: int, width: int, model: str, guidance=1.0, examples=(), limits=None, token=None
    ):
        self.engine, self.limits, self.token = engine, limits or Limits(sessions=engine.slots), token
        if self.limits.sessions > engine.slots:
            raise ConfigError(f"sessions: {self.limits.sessions}, but the engine has {engine.slots} slots")
        self.parser = Parser(self.limits)
        # Each viewer may wait for a chunk in one thread and be served in another.
        self.threads = ThreadPoolExecutor(2 * self.limits.sessions + 4, thread_name_prefix="viewer")
        self.connections = self._seats = 0
        rate = float(engine.frame_rate)
        self.messages_per_second = self.limits.messages_per_second + 2 * rate
        self.facts = {
            "version": VERSION,
            "model": model,
            "height": height,
            "width": width,
            "frame_rate": rate,
            "scheme": str(engine.scheme),
            "codec_string": codec_string(height, width, rate),
            "ahead": max(2, round(AHEAD_SECONDS * rate)),
            "guidance": guidance,
            "seats": self.limits.sessions,
            "examples": list(examples),
            "limits": {
                "prompt_bytes": self.limits.prompt_bytes,
                "over": MAX_OVER,
                "snapshot_bytes": self.limits.snapshot_bytes,
                "idle_seconds": self.limits.idle_seconds,
                "messages_per_second": self.messages_per_second,
                "recent_seconds": self.limits.recent_seconds,
            },
        }

    @property
    def free_seats(self) -> int:
        """How many more may watch."""
        return self.limits.sessions - self._seats

    def take_seat(self) -> None:
        """EngineFull where there is none."""
        if self.free_seats < 1:
            taken = "the only place is" if self.limits.sessions == 1 else f"all {self.limits.sessions} places are"
            raise EngineFull(f"start: {taken} taken; try again when someone has left")
        self._seats += 1

    def leave_seat(self) -> None:
        """Gives one back."""
        self._seats -= 1

    def stats(self) -> dict:
        """What viewers are told each second."""
        return {"engine": dict(self.engine.stats()), "watching": self._seats, "free": self.free_seats}


def create_app(service: Service, *, hosts=None, origins=()) -> Starlette:
    """GET / gives the page, /live is the WebSocket.

    hosts: the names under which this server may be addressed; None for any (then a token should guard it). A page of
    another name would be one that had its own name point here. origins: such as "https://example.org", whose pages may
    connect, and show ours in a frame.
    """
    origins = [origin.rstrip("/").lower() for origin in origins]
    if hosts is not None:
        hosts = {host.lower() for host in hosts} | {urlsplit(origin).hostname for origin in origins}

    def welcome(headers: Headers) -> bool:
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if hosts is not None and urlsplit(f"//{host}").hostname not in hosts:
            return False
        # Programs that are no browsers send none, and could send any.
        return origin is None or origin.lower() in origins or urlsplit(origin.lower()).netloc == host

    body, policy = _page(origins)

    async def page(request: Request) -> Response:
        if not welcome(request.headers):
            return PlainTextResponse("this server is not addressed by that name", 403)
        return HTMLResponse(body, headers=policy)

    async def live(websocket: WebSocket) -> None:
        if not welcome(websocket.headers):
            await websocket.send_denial_response(PlainTextResponse("pages of that origin may not connect", 403))
        elif service.connections >= service.limits.sessions + service.limits.waiting:
            await websocket.send_denial_response(PlainTextResponse("too many connections", 503))
        else:
            service.connections += 1
            try:
                await websocket.accept()
                await Viewer(websocket, service).run()
            except asyncio.CancelledError:
                pass  # the server stops, and this viewer took longer than it waits
            finally:
                service.connections -= 1

    return Starlette(routes=[Route("/", page), WebSocketRoute("/live", live)])


def _page(origins) -> tuple[str, dict[str, str]]:
    """The page in one piece, and headers that let it run nothing else and load nothing from elsewhere."""
    folder = resources.files(__package__) / "page"
    html, style, *scripts = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "player.js", "page.js", "pictures.js")
    )
    allowed = {}
    for tag, text in (("style", style), ("script", "\n".join(scripts))):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed[tag] = f"'sha256-{digest}'"
        html = html.replace(f"<{tag}></{tag}>", f"<{tag}>{text}</{tag}>")
    policy = {
        "default-src": "'none'",
        "script-src": allowed["script"],
        "style-src": allowed["style"],
        "connect-src": "'self'",
        "img-src": "data: blob:",
        "media-src": "blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": " ".join(["'self'", *origins]),
    }
    return html, {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "cache-control": "no-store",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }


class _Socket(WebSocketsSansIOProtocol):
    """uvicorn's, with a short send buffer, and a way for the application to hang up on a peer that reads nothing."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        bare = transport.get_extra_info("socket")
        if bare is not None:
            bare.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def handle_connect(self, event) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):
            self.scope["extensions"]["streamdit.abort"] = self.transport.abort


def server(app: Starlette, service: Service) -> uvicorn.Server:
    """A uvicorn server with this page's bounds; `.run(sockets=[bound])` returns after `should_exit`, and where a thread
    of the engine failed.
    """
    limits = service.limits

    async def look_after_the_engine() -> None:
        serving.should_exit |= service.engine.failed

    serving = uvicorn.Server(
        uvicorn.Config(
            app,
            ws=_Socket,
            ws_max_size=HEADER.size + max(limits.snapshot_bytes, limits.json_bytes),
            ws_per_message_deflate=False,  # video does not shrink, and a small message cannot unfold into a large one
            ws_ping_interval=20,
            ws_ping_timeout=20,
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=limits.sessions + limits.waiting + OTHER_REQUESTS,
            timeout_graceful_shutdown=STOP_SECONDS,
            callback_notify=look_after_the_engine,
            timeout_notify=1,
        )
    )
    return serving
