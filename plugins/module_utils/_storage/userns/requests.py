# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Encode the arguments of a function as data, and decode them with the types that the function declares.

For the program inside ``podman unshare``, which shares no memory with its parent.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import typing as t

from ..errors import InternalError


def as_data(value: t.Any) -> t.Any:
    """Arguments as JSON values: objects for dataclasses, lists for tuples."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: as_data(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, (list, tuple)):
        return [as_data(entry) for entry in value]
    if isinstance(value, dict):
        return {key: as_data(entry) for key, entry in value.items()}
    return value


def from_data(function: t.Callable[..., t.Any], arguments: t.Any) -> t.List[t.Any]:
    """Convert data to arguments of the types that the function declares.

    :raises InternalError: the types do not match
    """
    types = t.get_type_hints(function)
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    if not isinstance(arguments, list) or len(arguments) > len(names):
        raise InternalError(function.__qualname__, "received invalid arguments")
    return [
        _value(types.get(name, t.Any), entry, f"{function.__qualname__}, {name}")
        for name, entry in zip(names, arguments)
    ]


def _value(kind: t.Any, data: t.Any, where: str) -> t.Any:
    if kind is t.Any:
        return data
    origin, inner = t.get_origin(kind), t.get_args(kind)
    if origin is t.Union:
        if data is None and type(None) in inner:
            return None
        return _either([item for item in inner if item is not type(None)], data, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, data, where)
    if origin in (tuple, collections.abc.Sequence) and isinstance(data, list):
        if origin is tuple and inner[-1:] != (Ellipsis,):
            if len(data) != len(inner):
                raise _misfit(where, kind)
            return tuple(_value(form, entry, where) for form, entry in zip(inner, data))
        return tuple(_value(inner[0], entry, where) for entry in data)
    if origin is collections.abc.Mapping and isinstance(data, dict):
        return {key: _value(inner[1], entry, f"{where}.{key}") for key, entry in data.items()}
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if kind in (str, int, float, bool) and _is_of(data, kind):
        return data
    raise _misfit(where, kind)


def _either(kinds: t.Sequence[t.Any], data: t.Any, where: str) -> t.Any:
    """Convert data to the first matching type."""
    for kind in kinds[:-1]:
        with contextlib.suppress(InternalError):
            return _value(kind, data, where)
    return _value(kinds[-1], data, where)


def _is_of(data: t.Any, kind: t.Any) -> bool:
    """Whether data has a plain type; a boolean is no number."""
    return isinstance(data, kind) and isinstance(data, bool) == (kind is bool)


def _dataclass(kind: t.Any, data: t.Any, where: str) -> t.Any:
    types = t.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(data, dict) or set(data) != set(names):
        raise _misfit(where, kind)
    return kind(**{name: _value(types[name], data[name], f"{where}.{name}") for name in names})


def _misfit(where: str, kind: t.Any) -> InternalError:
    return InternalError(where, f"received something other than {kind}")
