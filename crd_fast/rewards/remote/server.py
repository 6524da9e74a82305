"""`crd-fast serve-reward`: the server of the protocol. It admits, reads and bounds; worker processes score."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import signal
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib import metadata

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from crd_fast.errors import ConfigError
from crd_fast.rewards.remote.protocol import (
    HEALTH_PATH,
    MAX_ITEMS,
    SCORE_PATH,
    ServedReward,
    encode_error,
    encode_health,
)
from crd_fast.rewards.remote.serve_settings import ServeSettings
from crd_fast.rewards.remote.worker import WorkerPool


def serve(settings: ServeSettings) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was admitted, for at most `grace_seconds`.

    Raises ConfigError when the address cannot be had, RewardError when a reward cannot score, before any request.
    """
    try:
        listener = socket.create_server((settings.host, settings.port), family=_family(settings.host))
    except OSError as error:
        raise ConfigError(f"cannot listen at {settings.host} port {settings.port}: {error}") from error
    pool = WorkerPool(settings.rewards, settings.workers, settings.max_pixels, settings.score_seconds)
    try:
        with listener:
            app = _Service(settings, pool, pool.start()).app
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            print(
                f"crd-fast: serving {', '.join(settings.rewards)} at http://{host}:{listener.getsockname()[1]} "
                f"(workers {settings.workers}, queue {settings.queue}, token {'yes' if settings.token else 'no'})",
                flush=True,
            )
            _run(app, settings, listener)
    finally:
        pool.close()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _run(app: FastAPI, settings: ServeSettings, listener: socket.socket) -> None:
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=type("Protocol", (_Protocol,), {"head_seconds": settings.body_seconds}),
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=settings.grace_seconds,
        )
    )
    # uvicorn raises the signal once more after a clean end, for whoever asked before it
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Service:
    """The two routes, and what bounds them.

    A request is admitted before its body is read, while fewer than workers + queue are: else 503 and a Retry-After
    from the time that requests took so far. Bodies are read in the order of admission, as long as all that are held
    stay within (2 workers + 2) x max_body; what waits for that waits in the kernel.
    """

    def __init__(self, settings: ServeSettings, pool: WorkerPool, served: dict[str, ServedReward]) -> None:
        self._settings, self._pool, self._served = settings, pool, served
        self._places = settings.workers + settings.queue
        self._admitted = self._scoring = 0
        self._memory = _Memory((2 * settings.workers + 2) * settings.max_body_bytes)
        self._free = asyncio.Semaphore(settings.workers)
        self._threads = ThreadPoolExecutor(settings.workers, thread_name_prefix="reward-worker")
        self._seconds = 0.0  # that a request takes, a running mean
        self._digest = hashlib.sha256(settings.token.encode()).digest() if settings.token else None
        self.app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        self.app.add_api_route(HEALTH_PATH, self.health, methods=["GET"])
        self.app.add_api_route(SCORE_PATH, self.score, methods=["POST"])

    async def health(self, request: Request) -> Response:
        settings = self._settings
        if not self._authorized(request):
            return _unauthorized()
        body = encode_health(
            self._served,
            package=metadata.version("crd-fast"),
            load={
                "admitted": self._admitted,
                "scoring": self._scoring,
                "workers": settings.workers,
                "queue": settings.queue,
            },
            limits={"body_bytes": settings.max_body_bytes, "pixels": settings.max_pixels, "items": MAX_ITEMS},
        )
        return Response(body, media_type="application/json")

    async def score(self, request: Request) -> Response:
        limit = self._settings.max_body_bytes
        if not self._authorized(request):
            return _unauthorized()
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _error(415, "expected Content-Type: application/json")
        length = request.headers.get("content-length")
        if length is not None and int(length) > limit:
            return self._too_large()
        if self._admitted >= self._places:
            wait = math.ceil(min(max(self._seconds * self._admitted / self._settings.workers, 1), 60))
            return _error(503, f"all {self._places} places are taken", {"Retry-After": str(wait)})
        self._admitted += 1
        try:
            async with self._memory.reserved(limit if length is None else int(length)):
                try:
                    body = await asyncio.wait_for(self._body(request), self._settings.body_seconds)
                except asyncio.TimeoutError:
                    return _error(408, f"the body took longer than {self._settings.body_seconds:g} s")
                if body is None:
                    return self._too_large()
                return await self._scored(request, body)
        except ClientDisconnect:
            return Response(status_code=400)  # to nobody
        finally:
            self._admitted -= 1

    async def _body(self, request: Request) -> bytearray | None:
        """None when it is larger than allowed, whatever its header said."""
        body = bytearray()
        async for piece in request.stream():
            if len(body) + len(piece) > self._settings.max_body_bytes:
                return None
            body += piece
        return body

    async def _scored(self, request: Request, body: bytearray) -> Response:
        async with self._free:
            if await request.is_disconnected():
                raise ClientDisconnect
            self._scoring += 1
            began = time.monotonic()
            try:
                loop = asyncio.get_running_loop()
                status, answer = await loop.run_in_executor(self._threads, self._pool.score, body)
            finally:
                self._scoring -= 1
                self._seconds += 0.2 * (time.monotonic() - began - self._seconds)
        return Response(answer, status, media_type="application/json")

    def _too_large(self) -> Response:
        limit = self._settings.max_body_bytes
        return _error(
            413, f"the body is larger than {limit} bytes: send fewer images in one request, or raise --max-body-mb"
        )

    def _authorized(self, request: Request) -> bool:
        if self._digest is None:
            return True
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(token.strip().encode("latin-1")).digest()
        return hmac.compare_digest(given, self._digest) and kind.lower() == "bearer"


class _Memory:
    """Bytes of bodies that are held, given out in the order they are asked for."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._turn = asyncio.Lock()
        self._returned = asyncio.Condition()

    @asynccontextmanager
    async def reserved(self, size: int) -> AsyncIterator[None]:
        async with self._turn, self._returned:
            await self._returned.wait_for(lambda: self._left >= size)
            self._left -= size
        try:
            yield
        finally:
            async with self._returned:
                self._left += size
                self._returned.notify_all()


class _Protocol(H11Protocol):
    """Closes connections that bring no whole head in time, or do not end the body of a request that was refused."""

    head_seconds = 30.0
    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._head = self.loop.call_later(self.head_seconds, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self._head is not None:
            self._head.cancel()
            self._head = None
        elif not answering and self._head is None:
            self._head = self.loop.call_later(self.head_seconds, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._head is not None:
            self._head.cancel()
        super().connection_lost(exc)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return Response(encode_error(message), status, headers, media_type="application/json")


def _unauthorized() -> Response:
    return _error(401, "expected the server's bearer token", {"WWW-Authenticate": "Bearer"})
