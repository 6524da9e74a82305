"""The messages between a reward client and a reward server: JSON, version 1.

    POST /v1/score  {version, request_id, rewards: [name], items: [{prompt, metadata, image_b64}]}
                 -> {version, request_id, scores: {name: [number or null]}, errors: {name: {"3": reason}}}
    GET /health  -> {version, package, rewards: {name: {requires, range}}, load, limits}

A reward's diagnostics are further entries of `scores`, "name/diagnostic". Where an item has null there is a reason
under its position in `errors`; NaN and infinity are no JSON and never travel. Every other answer than 200 is
{version, error}.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from crd_fast.errors import CrdFastError

VERSION = 1
SCORE_PATH = "/v1/score"
HEALTH_PATH = "/health"
MAX_ITEMS = 256  # of one request
BROKEN_STATUS = 424  # a reward's own code failed: the same would happen again

Column = list[float | None]  # a score for each item

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 80


class ProtocolError(CrdFastError, ValueError):
    """A message does not follow the protocol."""


@dataclass(frozen=True)
class Item:
    """One image to score; `image_b64` is an 8-bit RGB PNG in base64."""

    prompt: str
    metadata: Mapping[str, Any]
    image_b64: str

    def png(self) -> bytes:
        """Raises ProtocolError where `image_b64` is no base64."""
        try:
            return base64.b64decode(self.image_b64, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ProtocolError(f"image_b64 is not base64: {error}") from error


@dataclass(frozen=True)
class ScoreRequest:
    """What a client asks; `request_id` comes back in the answer."""

    request_id: str
    rewards: tuple[str, ...]
    items: tuple[Item, ...]

    def encode(self) -> bytes:
        """Raises ProtocolError where an item's metadata has no JSON."""
        for index, item in enumerate(self.items):
            try:
                json.dumps(item.metadata, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ProtocolError(
                    f"the metadata of item {index}, prompt {item.prompt!r}, is no JSON: {error}"
                ) from error
        items = [{"prompt": i.prompt, "metadata": i.metadata, "image_b64": i.image_b64} for i in self.items]
        return _encode({"request_id": self.request_id, "rewards": list(self.rewards), "items": items})

    @classmethod
    def decode(cls, body: bytes) -> ScoreRequest:
        """Raises ProtocolError for anything that is not one."""
        tree = _decode(body)
        request_id, rewards, items = tree.get("request_id"), tree.get("rewards"), tree.get("items")
        if not isinstance(request_id, str) or not 0 < len(request_id) <= 128:
            raise ProtocolError(f"request_id is {_shown(request_id)}: expected a text of 1 to 128 characters")
        if not isinstance(rewards, list) or not rewards or not all(isinstance(name, str) for name in rewards):
            raise ProtocolError(f"rewards is {_shown(rewards)}: expected a list of names")
        if len(set(rewards)) != len(rewards):
            raise ProtocolError(f"rewards is {_shown(rewards)}: expected every name once")
        if not isinstance(items, list) or not 0 < len(items) <= MAX_ITEMS:
            count = len(items) if isinstance(items, list) else _shown(items)
            raise ProtocolError(f"items is {count}: expected a list of 1 to {MAX_ITEMS}")
        return cls(request_id, tuple(rewards), tuple(_item(entry, index) for index, entry in enumerate(items)))


@dataclass(frozen=True)
class ScoreAnswer:
    """Scores by reward name, or "name/diagnostic", None where `errors` has a reason: name -> item -> reason."""

    request_id: str
    scores: Mapping[str, Sequence[float | None]]
    errors: Mapping[str, Mapping[int, str]]

    def encode(self) -> bytes:
        errors = {name: {str(i): why for i, why in sorted(reasons.items())} for name, reasons in self.errors.items()}
        return _encode({"request_id": self.request_id, "scores": self.scores, "errors": errors})

    @classmethod
    def decode(cls, body: bytes, count: int) -> ScoreAnswer:
        """Raises ProtocolError unless every list has `count` entries, each of them finite, or None with a reason."""
        tree = _decode(body)
        request_id, scores, errors = tree.get("request_id"), tree.get("scores"), tree.get("errors")
        if not isinstance(request_id, str):
            raise ProtocolError(f"request_id is {_shown(request_id)}: expected a text")
        if not isinstance(scores, dict) or not isinstance(errors, dict):
            raise ProtocolError("expected 'scores' and 'errors', both objects")
        reasons = {name: _reasons(name, entry, count) for name, entry in errors.items()}
        columns = {
            name: _column(name, values, count, reasons.get(name.partition("/")[0], {}))
            for name, values in scores.items()
        }
        return cls(request_id, columns, reasons)


@dataclass(frozen=True)
class ServedReward:
    """What a server tells of a reward: see `rewards.base.Reward`."""

    requires: tuple[str, ...]
    range: tuple[float, float] | None


def encode_health(rewards: Mapping[str, ServedReward], **facts: Any) -> bytes:
    """`facts` are the further entries of the answer."""
    served = {name: {"requires": list(entry.requires), "range": entry.range} for name, entry in rewards.items()}
    return _encode({"rewards": served, **facts})


def decode_health(body: bytes) -> dict[str, ServedReward]:
    """The rewards a server has. Raises ProtocolError for anything that is no such answer."""
    rewards = _decode(body).get("rewards")
    if not isinstance(rewards, dict):
        raise ProtocolError(f"rewards is {_shown(rewards)}: expected an object")
    return {name: _served(name, entry) for name, entry in rewards.items()}


def encode_error(message: str) -> bytes:
    return _encode({"error": message})


def decode_error(body: bytes) -> str:
    """What an answer other than 200 says, in one line that fits a message; any body will do."""
    try:
        text = json.loads(body)["error"]
    except (ValueError, RecursionError, KeyError, TypeError):
        text = body.decode("utf-8", "replace")
    return " ".join(str(text).split())[:500] or "(empty)"


def _encode(tree: Mapping[str, Any]) -> bytes:
    return json.dumps({"version": VERSION, **tree}, allow_nan=False, separators=(",", ":")).encode()


def _decode(body: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(body, parse_constant=_no_constant)
    except RecursionError as error:
        raise ProtocolError("the message is nested too deeply") from error
    except ValueError as error:
        raise ProtocolError(f"the message is no JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ProtocolError(f"the message is {_shown(tree)}: expected an object")
    version = tree.get("version")
    if version != VERSION or isinstance(version, bool):
        raise ProtocolError(
            f"the message has version {_shown(version)}, expected {VERSION}: "
            "client and server need the same release of crd-fast"
        )
    return tree


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _item(entry: Any, index: int) -> Item:
    if not isinstance(entry, dict):
        raise ProtocolError(f"items[{index}] is {_shown(entry)}: expected an object")
    for key, expected in (("prompt", str), ("metadata", dict), ("image_b64", str)):
        if not isinstance(entry.get(key), expected):
            kind = "a text" if expected is str else "an object"
            raise ProtocolError(f"items[{index}].{key} is {_shown(entry.get(key))}: expected {kind}")
    return Item(entry["prompt"], entry["metadata"], entry["image_b64"])


def _reasons(name: str, entry: Any, count: int) -> dict[int, str]:
    if not isinstance(entry, dict) or not all(isinstance(why, str) for why in entry.values()):
        raise ProtocolError(f"errors.{name} is {_shown(entry)}: expected reasons by position")
    positions = {str(i): i for i in range(count)}
    stray = set(entry) - set(positions)
    if stray:
        raise ProtocolError(f"errors.{name} has {sorted(stray)[:3]}: expected positions below {count}")
    return {positions[key]: why for key, why in entry.items()}


def _column(name: str, values: Any, count: int, reasons: Mapping[int, str]) -> Column:
    if not isinstance(values, list):
        raise ProtocolError(f"scores.{name} is {_shown(values)}: expected a list")
    if len(values) != count:
        raise ProtocolError(f"scores.{name} has {len(values)} entries for {count} items: expected one for each")
    column: Column = []
    for index, value in enumerate(values):
        if index in reasons:
            column.append(None)
        elif value is None:
            raise ProtocolError(f"scores.{name}[{index}] is null without a reason in errors")
        else:
            column.append(finite(value, f"scores.{name}[{index}]"))
    return column


def finite(value: Any, where: str) -> float:
    """A number that stays finite in float32. Raises ProtocolError naming `where`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2.0**128 - 2.0**103:
        raise ProtocolError(f"{where} is {_shown(value)}: expected a finite number")
    return float(value)


def _served(name: str, entry: Any) -> ServedReward:
    where = f"rewards.{name}"
    if not isinstance(entry, dict) or not isinstance(entry.get("requires"), list):
        raise ProtocolError(f"{where} is {_shown(entry)}: expected {{requires, range}}")
    if not all(isinstance(key, str) for key in entry["requires"]):
        raise ProtocolError(f"{where}.requires is {_shown(entry['requires'])}: expected names")
    bounds = entry.get("range")
    if bounds is None:
        return ServedReward(tuple(entry["requires"]), None)
    if not isinstance(bounds, list) or len(bounds) != 2:
        raise ProtocolError(f"{where}.range is {_shown(bounds)}: expected two numbers or null")
    low, high = (finite(bound, f"{where}.range") for bound in bounds)
    if math.isclose(low, high) or low > high:
        raise ProtocolError(f"{where}.range is {_shown(bounds)}: expected low < high")
    return ServedReward(tuple(entry["requires"]), (low, high))


def _shown(value: Any) -> str:
    # of lists that share parts, as a pickle can hold them, the whole text would grow without end
    text = _REPR.repr(value) if isinstance(value, str | int | float | list | type(None)) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
