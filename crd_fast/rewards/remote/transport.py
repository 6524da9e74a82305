"""HTTP with a deadline that holds: what both reward clients send their requests with.

Plain `http.client`: a redirect is an error and not followed, proxy variables and .netrc are not read, every request
has a connection of its own.
"""

from __future__ import annotations

import email.utils
import http.client
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from types import TracebackType
from urllib.parse import SplitResult, urlsplit

from crd_fast.errors import ConfigError, CrdFastError
from crd_fast.rewards.remote.protocol import decode_error

MAX_ATTEMPTS = 3
_BACKOFF_SECONDS = 0.5  # before the second attempt, then doubled
_RETRIED = {408, 429}  # and 5xx
_JITTER = random.Random()  # apart from the generator that a run seeds


class TransportError(CrdFastError, ConnectionError):
    """A request has no answer; the message says why, after how many attempts. status: of the last answer, if any."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class StoppedError(TransportError):
    """A request ended because another of the same call failed, or because nobody wants its answer any more."""


def split_url(url: str, where: str) -> SplitResult:
    """The parts of a server's address. Raises ConfigError naming the option `where`."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(f"{where} is {url!r}: expected an address such as http://127.0.0.1:8000, without a password")
    return parts


class Call:
    """The requests of one scoring call: one deadline over all of them, with every retry, wait and slow byte.

    A context manager. At the deadline, or at `stop`, connections in use are shut, so that no thread stays in a read.
    Name resolution alone is bounded by the system's resolver.
    """

    def __init__(self, url: SplitResult, seconds: float, attempts: int, headers: Mapping[str, str]) -> None:
        self._url, self._seconds, self._attempts, self._headers = url, seconds, attempts, dict(headers)
        self._deadline = time.monotonic() + seconds
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._timer = threading.Timer(seconds, self.stop)
        self._timer.daemon = True

    def __enter__(self) -> Call:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()

    def stop(self) -> None:
        """End every request now, also those waiting for their next attempt."""
        with self._lock:
            self._stopped.set()
            for open_socket in self._sockets:
                _shut(open_socket)

    def request(self, method: str, path: str, body: bytes, content_type: str, max_answer: int) -> bytes:
        """The body of the answer, at most `max_answer` bytes, to a request that may be repeated.

        Raises TransportError. Another attempt follows a lost or refused connection, 408, 429 and 5xx, after a pause
        that doubles, or as long as Retry-After asks; every other status ends the request at once.
        """
        pause, attempt = _BACKOFF_SECONDS, 0
        while True:
            attempt += 1
            self._check_stopped()
            wait = pause * _JITTER.uniform(0.5, 1.0)
            try:
                status, answer, retry_after = self._once(method, path, body, content_type, max_answer)
            except (OSError, http.client.HTTPException) as error:
                self._check_stopped()
                if isinstance(error, TransportError | ssl.SSLCertVerificationError):
                    raise TransportError(f"{error}") from error
                reason = f"{type(error).__name__}: {error}"
            else:
                self._check_stopped()
                if status == 200:
                    return answer
                reason = f"status {status}: {decode_error(answer)}"
                if status not in _RETRIED and status < 500:
                    raise TransportError(reason, status)
                wait = max(wait, retry_after)
            if attempt == self._attempts:
                raise TransportError(f"{reason} (attempt {attempt} of {self._attempts})")
            if time.monotonic() + wait > self._deadline:
                raise TransportError(
                    f"{reason} (attempt {attempt} of {self._attempts}; the next in {wait:.1f} s is past the deadline "
                    f"of {self._seconds:g} s)"
                )
            self._stopped.wait(wait)
            pause *= 2

    def _once(
        self, method: str, path: str, body: bytes, content_type: str, max_answer: int
    ) -> tuple[int, bytes, float]:
        """Status, body and seconds of Retry-After of one attempt."""
        connection = self._connect()
        opened = connection.sock  # http.client forgets it where the server closes after the answer
        try:
            headers = self._headers | {"Content-Type": content_type, "Accept-Encoding": "identity"}
            connection.request(method, self._url.path.rstrip("/") + path, body or None, headers)
            response = connection.getresponse()
            if 300 <= response.status < 400:
                target = response.getheader("Location", "nowhere")
                raise TransportError(
                    f"status {response.status}, a redirect to {target}: it is not followed, give the final address"
                )
            answer = response.read(max_answer + 1)
            if len(answer) > max_answer:
                raise TransportError(f"the answer is larger than {max_answer} bytes")
            if response.length:  # http.client takes a short body for whole when it is read with a limit
                raise http.client.IncompleteRead(answer, response.length)
            return response.status, answer, _seconds(response.getheader("Retry-After"))
        finally:
            with self._lock:
                self._sockets.discard(opened)
            connection.close()
            opened.close()

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._url.hostname or "", self._url.port
        addresses = socket.getaddrinfo(host, port or self._url.scheme, type=socket.SOCK_STREAM)
        seconds = max(self._deadline - time.monotonic(), 0.001)
        connection: http.client.HTTPConnection
        # addresses are tried one after the other, each with this timeout
        if self._url.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, port, timeout=seconds / len(addresses), context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=seconds / len(addresses))
        connection.connect()
        connection.sock.settimeout(max(self._deadline - time.monotonic(), 0.001))
        with self._lock:
            self._sockets.add(connection.sock)
            if self._stopped.is_set():
                _shut(connection.sock)
        return connection

    def _check_stopped(self) -> None:
        if time.monotonic() >= self._deadline:
            raise TransportError(f"no answer within timeout_seconds={self._seconds:g}")
        if self._stopped.is_set():
            raise StoppedError("stopped: another request failed, or the rewards were closed")


class Calls:
    """The calls of one reward, which another thread may end; made as `Call` is."""

    def __init__(self, url: SplitResult, seconds: float, attempts: int, headers: Mapping[str, str]) -> None:
        self._url, self._seconds, self._attempts, self._headers = url, seconds, attempts, dict(headers)
        self._lock = threading.Lock()
        self._open: set[Call] = set()
        self._stopped = False

    @contextmanager
    def begin(self) -> Iterator[Call]:
        with Call(self._url, self._seconds, self._attempts, self._headers) as call:
            with self._lock:
                self._open.add(call)
                if self._stopped:
                    call.stop()
            try:
                yield call
            finally:
                with self._lock:
                    self._open.discard(call)

    def stop(self) -> None:
        """End every call under way, and every later one at its first request."""
        with self._lock:
            self._stopped = True
            for call in self._open:
                call.stop()


def _shut(open_socket: socket.socket) -> None:
    try:
        # of the plain socket, also under TLS: the thread that reads it wakes up with an error
        socket.socket.shutdown(open_socket, socket.SHUT_RDWR)
    except OSError:
        pass  # the other side was faster


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header, a number of seconds or a date; 0 where there is none to read."""
    if retry_after is None:
        return 0.0
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        moment = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return max((moment - datetime.now(timezone.utc)).total_seconds(), 0.0)
