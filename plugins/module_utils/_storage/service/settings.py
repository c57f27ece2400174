# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The configuration of the service: a JSON file with the layers to create and the collection rules of each store."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import typing as t

from ..errors import ConfigError, StorageError
from ..idmap.grammar import parse_request
from ..operations import gc_policy, mapping_options
from ..operations.layer_gc import GcRequest, read_policy
from ..operations.layer_template import TemplateRequest
from ..operations.mapping_options import MappingOptions
from ..operations.options import Option
from ..operations.store_opening import STORE_OPTIONS, StoreRequest, account_named, store_request
from ..operations.time_formats import age
from ..store.config import Account

_STRATEGIES = ("auto", "snapshot", "reflink", "metacopy", "copy")
_UNMAPPED = ("fail", "overflow")
Json = t.Dict[str, t.Any]


@dataclasses.dataclass(frozen=True)
class StoreSettings:
    """The layers to create in one store, and the rules for removing layers.

    :param user: the store's owner, "root" for the rootful store
    :param images: names, IDs or shell patterns of images, which may be missing
    :param ready: the request for layers, without images; None if nothing is declared
    :param policy: None if nothing may be removed
    """

    user: str
    store: StoreRequest
    images: t.Tuple[str, ...] = ()
    ready: t.Optional[TemplateRequest] = None
    policy: t.Optional[GcRequest] = None


def load(path: str) -> t.Tuple[StoreSettings, ...]:
    """Read a configuration file, or all files of a directory that end in .json.

    :raises ConfigError: it cannot be read or is invalid; the message names the file and the location in it
    """
    if os.path.isdir(path):
        return tuple(store for file in _files(path) for store in load(file))
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise ConfigError(
            path, f"cannot be read: {error.strerror}", "Create it, or use another file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            path, f"is not JSON: {error}", f"Check: python3 -m json.tool {path}"
        ) from error
    whole = _Reader(path, "", content)
    whole.known(("stores",))
    entries = whole.items("stores")
    if not entries:
        raise whole.wrong("stores", "contains no store")
    return tuple(_store(_Reader(path, f"stores[{n}].", entry)) for n, entry in enumerate(entries))


def _files(folder: str) -> t.List[str]:
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
    except OSError as error:
        raise ConfigError(
            folder, f"cannot be read: {error.strerror}", "Check its permissions."
        ) from error
    if not names:
        raise ConfigError(
            folder,
            "contains no file that ends in .json",
            "Create such a file, or use a path of a file.",
        )
    return [os.path.join(folder, name) for name in names]


class _Reader:
    """A JSON object of the file, with its location in the file."""

    def __init__(self, path: str, location: str, content: t.Any) -> None:
        self._path = path
        self.location = location
        if not isinstance(content, dict):
            raise ConfigError(
                f"{path}: {location.rstrip('.') or 'the whole'}",
                "is not a JSON object",
                "Write {...}.",
            )
        self._content: Json = content

    def known(self, names: t.Sequence[str]) -> None:
        """Refuse unknown names."""
        for name in self._content:
            if name not in names:
                raise self.wrong(name, "is unknown", f"Supported are {', '.join(names)}.")

    def wrong(self, name: str, cause: str, hint: str = "") -> ConfigError:
        location = f"{self.location}{name}".rstrip(".")
        return ConfigError(f"{self._path}: {location}", cause, hint)

    def has(self, name: str) -> bool:
        """Whether it is given; an empty text, an empty list and null do not count."""
        return self._content.get(name) not in (None, "", [])

    def text(self, name: str, default: str = "") -> str:
        value = self._content.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise self.wrong(name, "is not a text", 'Write "...".')
        return str(value)

    def choice(self, name: str, among: t.Sequence[str]) -> str:
        value = self.text(name) or among[0]
        if value not in among:
            raise self.wrong(name, f"cannot be {value}", f"Write one of {', '.join(among)}.")
        return value

    def switch(self, name: str) -> bool:
        value = self._content.get(name, False)
        if not isinstance(value, bool):
            raise self.wrong(name, "is neither true nor false")
        return value

    def number(self, name: str) -> t.Optional[float]:
        if not self.has(name):
            return None
        try:
            return float(self.text(name))
        except ValueError:
            raise self.wrong(name, f"is not a number: {self.text(name)}") from None

    def items(self, name: str) -> t.List[t.Any]:
        value = self._content.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(name, "is not a list", "Write [...].")
        return value

    def texts(self, name: str) -> t.Tuple[str, ...]:
        found = self.items(name)
        for item in found:
            if not isinstance(item, str) or not item:
                raise self.wrong(name, f"holds {json.dumps(item)}, which is not a text")
        return tuple(found)

    def whole_number(self, name: str, default: t.Optional[int] = None) -> t.Optional[int]:
        found = self.number(name)
        if found is None:
            return default
        if found != int(found):
            raise self.wrong(name, f"is not a whole number: {found:g}")
        return int(found)

    def given(self, options: t.Mapping[str, Option]) -> t.Dict[str, t.Any]:
        """The given options among these."""
        return {
            name: self._option(name, option) for name, option in options.items() if self.has(name)
        }

    def _option(self, name: str, option: Option) -> t.Any:
        if option.choices:
            return self.choice(name, option.choices)
        readers: t.Mapping[str, t.Callable[[str], t.Any]] = {
            "list": self.texts,
            "bool": self.switch,
            "int": self.whole_number,
            "float": self.number,
        }
        return readers.get(option.type, self.text)(name)

    def inside(self, name: str) -> t.Optional[_Reader]:
        """The object of that name, if there is one."""
        value = self._content.get(name)
        return None if value is None else self.below(name, value)

    def below(self, name: str, content: t.Any) -> _Reader:
        """The value of that name."""
        return _Reader(self._path, f"{self.location}{name}.", content)

    def checked(self, name: str, check: t.Callable[[], t.Any]) -> t.Any:
        """Convert a value with a function of the library; errors name the location.

        :raises ConfigError: the value is invalid
        """
        try:
            return check()
        except StorageError as error:
            raise self.wrong(name, str(error).rstrip(".")) from error


def _store(reader: _Reader) -> StoreSettings:
    declared = ("images", "mappings", "strategy", "unmapped_ids", "force", "lease")
    reader.known(("user", *STORE_OPTIONS, *declared, "policy"))
    name = reader.text("user")
    account: t.Optional[Account] = reader.checked("user", lambda: account_named(name or None))
    store = store_request(account, reader.given(STORE_OPTIONS))
    images, policy = reader.texts("images"), reader.inside("policy")
    return StoreSettings(
        user=account.name if account else "root",
        store=store,
        images=images,
        ready=_ready(reader, store) if images else None,
        policy=None if policy is None else _policy(policy, store),
    )


def _ready(reader: _Reader, store: StoreRequest) -> TemplateRequest:
    mappings = reader.items("mappings")
    if not mappings:
        raise reader.wrong(
            "mappings", "is empty, but images is set", 'Write [{"userns": "keep-id"}].'
        )
    lease = reader.text("lease")
    if lease:
        reader.checked("lease", lambda: age("lease", lease))
    return TemplateRequest(
        store=store,
        images=(),
        mappings=tuple(
            _mapping_options(reader, number, entry) for number, entry in enumerate(mappings)
        ),
        strategy=reader.choice("strategy", _STRATEGIES),
        force=reader.switch("force"),
        overflow=reader.choice("unmapped_ids", _UNMAPPED) == "overflow",
        lease=lease,
    )


def _mapping_options(parent: _Reader, number: int, content: t.Any) -> MappingOptions:
    name = f"mappings[{number}]"
    reader = parent.below(name, content)
    reader.known(tuple(mapping_options.OPTIONS))
    mapping = MappingOptions(**reader.given(mapping_options.OPTIONS))
    parent.checked(
        name,
        lambda: parse_request(
            mapping.userns, mapping.uidmap, mapping.gidmap, mapping.subuidname, mapping.subgidname
        ),
    )
    return mapping


def _policy(reader: _Reader, store: StoreRequest) -> GcRequest:
    options = {name: option for name, option in gc_policy.OPTIONS.items() if not option.of_one_run}
    reader.known(tuple(options))
    read = reader.given(options)
    for name, pair in gc_policy.pairs():
        if (name in read) != (pair in read):
            raise reader.wrong(name, f"and {pair} go together", "Give both.")
    request = GcRequest(store, read)
    reader.checked("", lambda: read_policy(request, time.time()))
    return request
