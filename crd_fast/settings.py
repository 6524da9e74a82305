"""Frozen dataclasses from YAML and from `key=value` text: unknown keys, wrong types and wrong values are errors."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from crd_fast.errors import ConfigError, did_you_mean, nearest

# a type hint -> what makes a value of it, given the YAML value and where it stands
Converters = Mapping[Any, Callable[[Any, str], Any]]

# command -> sections that its recipes alone have
_SECTIONS = {"train": {"rewards", "snapshots", "rollout"}, "didr": {"reward", "generator", "decode"}}


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of a YAML recipe with overrides like `train.lr=1e-4` applied.

    Raises ConfigError: no such file, YAML that does not parse, no sections, an override that is not key=value.
    """
    path = Path(path)
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"recipe {path} does not exist{nearest(path.stem, known)}")
    tree = _read(path, f"recipe {path}")
    for override in overrides:
        _apply(tree, override)
    return tree


def read_sections(file: Path | None, what: str) -> dict[str, dict[str, Any]]:
    """A YAML file of named sections; none for None. what: it is, for messages. Raises ConfigError for anything else."""
    if file is None:
        return {}
    tree = _read(file, f"{what} {file}")
    if not all(isinstance(section or {}, dict) for section in tree.values()):
        raise ConfigError(f"{what} {file}: expected named sections of options")
    return {str(name): dict(section or {}) for name, section in tree.items()}


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{what} holds a {type(tree).__name__}: expected sections such as model and train")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: expected key=value, such as train.lr=1e-4")
    *parents, leaf = key.split(".")
    for parent in parents:
        section = tree.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
        tree = section
    try:
        tree[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    if parents == ["rewards"] and tree[leaf] is None:
        del tree[leaf]  # null takes a reward out; without options it is {}


def build(cls: type, tree: Any, where: str = "", converters: Converters | None = None) -> Any:
    """An instance of a dataclass from a mapping, checked field by field.

    where: the dotted place of the mapping, for messages. converters: for hints of the caller's own.

    Raises ConfigError for an unknown key (naming the nearest), one that is missing, or a value of the wrong type.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where or 'the recipe'} is {tree!r}: expected a section with {_names(cls)}")
    known = {f.name: f for f in fields(cls)}
    for key in tree:
        if key not in known:
            raise ConfigError(f"unknown key {_dotted(where, key)}{nearest(str(key), set(known) - {'name'})}")
    hints = typing.get_type_hints(cls)
    values = {key: _convert(hints[key], value, _dotted(where, key), converters or {}) for key, value in tree.items()}
    missing = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    for name in missing:
        if name not in values:
            raise ConfigError(f"{_dotted(where, name)} is missing: the recipe must set it")
    return cls(**values)


def _names(cls: type) -> str:
    return ", ".join(f.name for f in fields(cls))


def _dotted(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _convert(hint: Any, value: Any, where: str, converters: Converters) -> Any:
    if hint in converters:
        return converters[hint](value, where)
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, where, converters)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where, converters)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {value!r}: expected a list")
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) != len(value):
            raise ConfigError(f"{where} is {value!r}: expected {len(inner)} values")
        return tuple(_convert(a, v, where, converters) for a, v in zip(inner, value, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{where} is {value!r}: expected a section of names and values")
        return dict(value)
    if hint is float:
        return _number(value, where)
    if hint is bool and isinstance(value, bool) or hint is str and isinstance(value, str):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if hint is str and isinstance(value, bool):
        words = "off, no or false" if not value else "on, yes or true"
        raise ConfigError(f"{where} is {value!r}: expected text; YAML reads {words} so, put the word into quotes")
    names = {int: "a whole number", str: "text", bool: "true or false"}
    raise ConfigError(f"{where} is {value!r}: expected {names.get(hint, hint)}")


def _number(value: Any, where: str) -> float:
    """A float; also from text such as 1e-4, which YAML 1.1 reads as a string, and inf."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise ConfigError(f"{where} is {value!r}: expected a number")
    return number


def require_at_least(least: int, section: str, settings: Any, *names: str) -> None:
    """Raises ConfigError, naming `section.name`, for the first of these fields that is below `least`."""
    for name in names:
        value = getattr(settings, name)
        if not least <= value < math.inf:
            expected = f"at least {least}, and finite" if least else "0 or more, and finite"
            raise ConfigError(f"{section}.{name} is {value}: expected {expected}")


def require_positive(section: str, settings: Any, *names: str, finite: bool = True) -> None:
    """Raises ConfigError for the first of these fields that is not above 0, or infinite; None is a field unset."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (0 < value < math.inf or value == math.inf and not finite):
            raise ConfigError(f"{section}.{name} is {value}: expected more than 0{', and finite' if finite else ''}")


def require_finite(section: str, settings: Any, *names: str) -> None:
    """Raises ConfigError for the first of these fields that is infinite; None is a field unset."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"{section}.{name} is {value}: expected a finite number")


def require_known(section: str, settings: Any, name: str, known: Sequence[str]) -> None:
    """Raises ConfigError, with the known values and the nearest of them, for a field that is none of them."""
    value = getattr(settings, name)
    if value not in known:
        expected = ", ".join(map(repr, known))
        raise ConfigError(f"{section}.{name} is {value!r}: expected one of {expected}{did_you_mean(value, known)}")


def require_command(command: str, recipe: str, tree: Mapping[str, Any]) -> None:
    """Raises ConfigError for a recipe that another command runs: it has sections of that one's own alone."""
    (other,) = _SECTIONS.keys() - {command}
    foreign = sorted(_SECTIONS[other] & tree.keys())
    if foreign and not _SECTIONS[command] & tree.keys():
        raise ConfigError(f"recipe {recipe} has {' and '.join(foreign)}, it is one of `crd-fast {other}`: use that")


def without_defaults(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    return {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}


def plain(value: Any) -> Any:
    """Mappings and lists of whatever was mappings, lists and tuples, as YAML and JSON give them back."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
