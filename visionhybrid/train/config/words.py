"""Changing a config by words of a command line, and giving any value the type of its field."""

# What a person or a file gave is unknown until it is checked here.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from visionhybrid.train.config.common import Config, ConfigError

C = TypeVar("C", bound=Config)


def override(config: C, words: Iterable[str]) -> C:
    """`config` with `["optim.lr=3e-4", ...]` applied, left to right.

    Raises: ConfigError: a word without "=", an unknown field (names the nearest one), or a value of the wrong type.
    """
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"expected field=value, got {word!r}")
        config = _replace(config, key, key.split("."), text, config)
    return config


def _replace(node: Any, key: str, path: list[str], text: str, root: Config) -> Any:
    head, rest = path[0], path[1:]
    if isinstance(node, Mapping):  # free keywords of a model or optimiser
        if rest:
            return {**node, head: _replace(node.get(head, {}), key, rest, text, root)}
        return {**node, head: _guess(text)}
    if not dataclasses.is_dataclass(node) or head not in {f.name for f in dataclasses.fields(node)}:
        raise ConfigError(_unknown(key, root))
    if rest:
        value = _replace(getattr(node, head), key, rest, text, root)
    else:
        value = _parse(text, get_type_hints(type(node))[head], key)
    return dataclasses.replace(cast(Any, node), **{head: value})


def _guess(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _unknown(key: str, root: Config) -> str:
    known = sorted(flat(root))
    near = difflib.get_close_matches(key, known, 1, 0.0)
    leaf = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return f"no field {key!r} in recipe {root.name!r}; the nearest is {(leaf or near)[0]!r}"


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_BOOLS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _describe(a) for a in args)
    if origin is tuple:
        return f"a list of values, each {_describe(args[0])}"
    if origin is dict:
        return "a JSON object"
    return _NAMES.get(hint, f"the fields of {getattr(hint, '__name__', hint)} (set them one by one)")


def _parse(text: str, hint: Any, key: str) -> Any:
    """The value that `text`, as typed on a command line, stands for in a field of type `hint`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", "null"):
            return None
        inner = next(a for a in args if a is not type(None))
        return _parse_plain(text, inner, key, _describe(hint))
    return _parse_plain(text, hint, key, _describe(hint))


def _parse_plain(text: str, hint: Any, key: str, expected: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple:
        parts = [part.strip() for part in text.strip("[]()").split(",")]
        return tuple(_parse(part, args[0], key) for part in parts if part)
    if origin is dict:
        return _typed(_guess(text), hint, key)
    choices = (
        _BOOLS if hint is bool else {str(choice): choice for choice in args} if origin is Literal else None
    )
    if choices is not None:
        if (value := choices.get(text.lower() if hint is bool else text, ...)) is not ...:
            return value
        near = difflib.get_close_matches(text, choices, 1)
        raise ConfigError(
            f"{key}: expected {expected}, got {text!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    try:
        if hint in (int, float, str):
            return hint(text)
    except ValueError:
        pass
    raise ConfigError(f"{key}: expected {expected}, got {text!r}")


def _typed(value: Any, hint: Any, key: str, expected: str = "") -> Any:
    """`value`, read from JSON or given by a recipe, as the type `hint`."""
    origin, args = get_origin(hint), get_args(hint)
    wrong = ConfigError(f"{key}: expected {expected or _describe(hint)}, got {value!r}")
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _typed(value, next(a for a in args if a is not type(None)), key, _describe(hint))
    if origin is Literal:
        if value not in args:
            raise wrong
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong
        return tuple(_typed(v, args[0], f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong
        return dict(value)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, key)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise wrong
    return value


def build(cls: Any, value: Any, key: str) -> Any:
    """An instance of the dataclass `cls` of the fields in `value`; `key` is its path, for errors.

    Raises: ConfigError: a field that there is not, one that is missing, or one of another type.
    """
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key or 'config'}: expected fields, got {value!r}")
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for name in value:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0.0)[0]
            wrong, right = (f"{key}.{n}".lstrip(".") for n in (name, near))
            raise ConfigError(f"no field {wrong!r}; the nearest is {right!r}")
    required = [
        f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in value]:
        raise ConfigError(f"{key or 'config'}: field {missing[0]!r} is missing")
    return cls(**{name: _typed(v, hints[name], f"{key}.{name}".lstrip(".")) for name, v in value.items()})


def flat(config: Config) -> dict[str, Any]:
    """Dotted field -> value, free keywords included."""
    found: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if dataclasses.is_dataclass(node):
            for f in dataclasses.fields(node):
                walk(getattr(node, f.name), f"{prefix}.{f.name}".lstrip("."))
        elif isinstance(node, Mapping) and node:
            for name, value in node.items():
                walk(value, f"{prefix}.{name}")
        else:
            found[prefix] = node

    walk(config, "")
    return found
