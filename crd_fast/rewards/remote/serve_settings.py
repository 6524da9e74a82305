"""How a reward server is set up."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crd_fast.errors import ConfigError

TOKEN_VARIABLE = "CRD_FAST_REWARD_TOKEN"


@dataclass(frozen=True)
class ServeSettings:
    """What `crd-fast serve-reward` serves, where, and within which bounds.

    - rewards: name -> options, as `rewards.registry.build` takes them.
    - host, port: the address; port 0 takes a free one. Without a token the host must be this machine's loopback.
    - workers: processes that score, each with models of its own; queue: requests admitted beyond those.
    - max_body_mb: of a request, in units of 2^20 bytes; max_pixels: of an image, and decoded together in a worker.
    - body_seconds: to send a request's head in, and its body; score_seconds: to score it in; grace_seconds: for work
      under way when the server is told to end.
    """

    rewards: Mapping[str, Any]
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    queue: int = 256
    max_body_mb: float = 32.0
    max_pixels: int = 2**22
    token: str | None = None
    body_seconds: float = 30.0
    score_seconds: float = 600.0
    grace_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ConfigError("no rewards to serve: name at least one")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}: expected 0 to 65535")
        for name, least in (("workers", 1), ("queue", 0), ("max_pixels", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}: expected at least {least}")
        for name in ("max_body_mb", "body_seconds", "score_seconds", "grace_seconds"):
            if not 0 < getattr(self, name) < 1e6:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}: expected more than 0")
        if self.token is None and not _loopback(self.host):
            raise ConfigError(
                f"--host is {self.host!r}, which others can reach: give a token with --token-file or {TOKEN_VARIABLE}"
            )

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 2**20)


def read_token(file: Path | None) -> str | None:
    """The token in a file, else in CRD_FAST_REWARD_TOKEN, else None.

    Raises ConfigError for a file that cannot be read, and for a token that is empty or not printable ASCII.
    """
    if file is not None:
        try:
            token, source = file.read_text(encoding="utf-8").strip(), f"token file {file}"
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"token file {file} cannot be read: {error}") from error
    elif TOKEN_VARIABLE in os.environ:
        token, source = os.environ[TOKEN_VARIABLE].strip(), TOKEN_VARIABLE
    else:
        return None
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{source} holds no token: expected printable ASCII")
    return token


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
