"""The dashboard on its own: an application on one address, until it is interrupted."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from foregate.errors import ConfigError
from foregate.server.dashboard.routes import router
from foregate.server.dashboard.session import Session

if TYPE_CHECKING:
    from foregate.engine.engine import Engine

LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int, *, allow_remote: bool) -> socket.socket:
    """A listening socket. Raises ConfigError where ``host`` is open to others without ``allow_remote``, or is taken."""
    if not is_loopback(host) and not allow_remote:
        raise ConfigError(
            f"host {host} can be reached from other machines, and the dashboard asks nobody for a password: "
            "add --allow-remote if that is meant"
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}"
        ) from error


def application(session: Session, *, loopback: bool = True, limit: int | None = None) -> FastAPI:
    """The dashboard at ``/``. ``loopback``: refuse requests under any other host name (DNS rebinding)."""
    app = FastAPI(title="Foregate dashboard", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(router(session) if limit is None else router(session, limit=limit))
    if loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)
    return app


def server(app: FastAPI) -> uvicorn.Server:
    """Quiet, and patient for one second with open event streams when it ends."""
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1))


def serve(engine: Engine, listening: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve until interrupted; ``ready`` gets the address."""
    host, port = listening.getsockname()[:2]
    session = Session(engine)
    try:
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{port}/")
        server(application(session, loopback=is_loopback(host))).run(sockets=[listening])
    finally:
        session.close()
