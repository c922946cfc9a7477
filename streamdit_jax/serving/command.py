"""`streamdit serve`: checks the address, starts the engine, says where the page is, and serves until Ctrl-C."""

import ipaddress
import socket
import sys
from urllib.parse import urlsplit

from streamdit_jax.errors import ConfigError
from streamdit_jax.live import Engine
from streamdit_jax.pipeline import load
from streamdit_jax.programs import Programs
from streamdit_jax.serving.app import Service, create_app, server
from streamdit_jax.serving.protocol import Limits

MIN_TOKEN = 8  # letters
EXAMPLES = (  # in the words of the roadtrip world
    "a red car drives past green hills on a sunny day",
    "a red car drives past green hills on a starry night",
    "a yellow bus rolls gently through the desert at sunset",
    "a white truck races along city streets in the rain",
    "a blue car drives to the left through a pine forest in the snow",
)


def check_address(host: str, token: str | None, origins=()) -> bool:
    """Whether `host` is this machine alone. ConfigError where it is not and no token guards it, where the token is too
    short, or where an origin is none.
    """
    for origin in origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ConfigError(f"--origin: {origin!r} is not scheme and host, such as https://example.org")
    if token is not None and (len(token) < MIN_TOKEN or not token.isascii()):
        raise ConfigError(f"--token: at least {MIN_TOKEN} letters, all of ASCII; such as $(openssl rand -hex 16)")
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host or None, 0, flags=socket.AI_PASSIVE)}
    except OSError as mistake:
        raise ConfigError(f"--host: {host!r} is no address of this machine ({mistake.strerror})") from None
    alone = all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)
    if not alone and token is None:
        raise ConfigError(
            f"--host: {host or 'every address'} can be reached from other machines, so --token (or STREAMDIT_TOKEN) "
            "is required; such as $(openssl rand -hex 16)"
        )
    return alone


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. ConfigError where the address cannot be had."""
    if not 0 <= port < 65536:
        raise ConfigError(f"--port: from 0 (any free one) to 65535, not {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=64)
    except OSError as mistake:
        raise ConfigError(f"--port: {host or '*'}:{port} cannot be bound ({mistake.strerror or mistake})") from None


def address_of(bound: socket.socket, token: str | None = None) -> str:
    """The URL to open. The token stands behind #, which browsers send to nobody."""
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/" + (f"#token={token}" if token else "")


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    origins=(),
    sessions: int = 4,
    idle_seconds: float = 600.0,
    scheme: str | None = None,
    filling: str | None = None,
    refill: str | None = None,
    programs: Programs | None = None,
    say=print,
) -> None:
    """Serves a model's live streams and the page until Ctrl-C, which raises KeyboardInterrupt here. programs: as
    `pipeline.load`.

    Bad arguments are a ConfigError before anything is loaded; RuntimeError where a thread of the engine fails.
    """
    if not 1 <= sessions <= 1024:
        raise ConfigError(f"--max-sessions: from 1 to 1024, not {sessions}")
    if not 0 < idle_seconds < float("inf"):
        raise ConfigError(f"--idle-seconds: a positive number, not {idle_seconds:g}")
    alone = check_address(host, token, origins)
    bound = bind(host, port)
    with bound:
        pipeline = load(model, programs=programs)
        print(f"streamdit: compiling {model} for {sessions} sessions …", file=sys.stderr, flush=True)
        # One chunk that is ready and no more: what lies in a queue is what a new prompt waits for.
        with Engine(pipeline, sessions, scheme=scheme, filling=filling, refill=refill, queue_chunks=1) as engine:
            data = pipeline.config.data
            service = Service(
                engine,
                height=data.height,
                width=data.width,
                model=pipeline.config.name,
                guidance=pipeline.config.sampling.guidance,
                examples=EXAMPLES if data.source == "roadtrip" else (),
                limits=Limits(sessions=sessions, idle_seconds=idle_seconds),
                token=token,
            )
            app = create_app(service, hosts={"localhost", "127.0.0.1", "::1", host} if alone else None, origins=origins)
            say(f"{address_of(bound, token)}  (Ctrl-C stops)", flush=True)
            try:
                server(app, service).run(sockets=[bound])
            finally:
                service.threads.shutdown(wait=False, cancel_futures=True)
            if engine.failed:
                raise RuntimeError("a thread of the engine failed; the log above says how")
