"""The dashboard as a router: any FastAPI application can mount it under any prefix."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, HTTPException, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict

from foregate.config import SamplingConfig
from foregate.errors import ForegateError
from foregate.server.dashboard.channel import LIMIT, Channel
from foregate.server.dashboard.session import BusyError, Session

KEEP_ALIVE_S = 15.0
"""Seconds of silence after which a comment finds out whether the browser is still there."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PAGE = {
    "": ("index.html", "text/html"),
    "app.js": ("app.js", "text/javascript"),
    "app.css": ("app.css", "text/css"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}


class Start(BaseModel):
    """Body of ``POST start``; a field that is not listed is refused."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    paused: bool = False


class Nothing(BaseModel):
    """The body of a command without arguments: ``{}``. JSON, so that no other site's form can send it."""

    model_config = ConfigDict(extra="forbid")


def router(session: Session, *, limit: int = LIMIT) -> APIRouter:
    """Page, events and commands of ``session``; ``limit`` messages may wait for a slow browser."""
    routes = APIRouter()

    @routes.get("/events", response_class=StreamingResponse)
    async def events() -> StreamingResponse:
        return StreamingResponse(_events(session, limit), media_type="text/event-stream", headers=HEADERS)

    @routes.get("/state")
    def state() -> dict[str, Any]:
        return session.board.snapshot()

    @routes.get("/report")
    def report() -> dict[str, Any]:
        if (last := session.report) is None:
            raise HTTPException(404, "no finished run")
        return last

    @routes.post("/start", status_code=202)
    def start(body: Start) -> None:
        def command() -> None:
            sampling = SamplingConfig(body.max_new_tokens, body.temperature, seed=body.seed)
            session.start(body.prompt, sampling, paused=body.paused)

        _obey(command)

    for name in ("pause", "resume", "step", "stop"):
        routes.add_api_route(f"/{name}", _command(getattr(session, name)), methods=["POST"], status_code=202)
    for path in PAGE:
        routes.add_api_route(f"/{path}", _file(path), methods=["GET"], include_in_schema=False)
    return routes


async def _events(session: Session, limit: int) -> AsyncIterator[str]:
    channel = Channel(asyncio.get_running_loop(), limit)
    session.board.join(channel)
    try:
        yield "retry: 1000\n\n"
        while True:
            if await channel.wait(KEEP_ALIVE_S):
                for message in session.board.take(channel):
                    yield f"data: {message}\n\n"
            else:
                yield ": still here\n\n"
    finally:
        session.board.leave(channel)


def _command(method: Callable[[], None]) -> Callable[[Nothing], None]:
    def command(body: Nothing) -> None:
        _obey(method)

    return command


def _obey(command: Callable[[], None]) -> None:
    try:
        command()
    except BusyError as error:
        raise HTTPException(409, str(error)) from error
    except ForegateError as error:
        raise HTTPException(400, str(error)) from error


def _file(path: str) -> Callable[[], Response]:
    name, kind = PAGE[path]
    content = files("foregate.server.dashboard").joinpath("page", name).read_bytes()

    def file() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return file
