# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""What the service is told: a JSON file with what each store is to hold, and what may go from it."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
import typing as t

from ..errors import ConfigError, StorageError
from ..idmap.grammar import parse_request
from ..operations.asking import Wanted
from ..operations.gc import GcRequest, read_policy
from ..operations.moments import age
from ..operations.opening import StoreRequest, account_named
from ..operations.template import TemplateRequest
from ..store.config import Account

_STORE_TEXTS = ("storage_conf", "graphroot", "runroot", "driver")
_STRATEGIES = ("auto", "snapshot", "reflink", "metacopy", "copy")
_UNMAPPED = ("fail", "overflow")
Json = t.Dict[str, t.Any]


@dataclasses.dataclass(frozen=True)
class StoreSettings:
    """What one store is to hold, and what may go from it.

    :param user: the store's owner, "root" for the rootful one
    :param images: names, IDs or shell patterns of images that may come and go
    :param ready: the request that is made of it, still without images; None where nothing is declared
    :param policy: None where nothing may go
    """

    user: str
    store: StoreRequest
    images: t.Tuple[str, ...] = ()
    ready: t.Optional[TemplateRequest] = None
    policy: t.Optional[GcRequest] = None


def load(path: str) -> t.Tuple[StoreSettings, ...]:
    """Read a configuration.

    :raises ConfigError: it cannot be read, or says what cannot be; the file and the place in it are named
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise ConfigError(
            path, f"cannot be read: {error.strerror}", "Write it, or name another file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            path, f"is not JSON: {error}", f"Check: python3 -m json.tool {path}"
        ) from error
    whole = _Reader(path, "", content)
    whole.known(("stores",))
    entries = whole.items("stores")
    if not entries:
        raise whole.wrong("stores", "names no store")
    return tuple(_store(_Reader(path, f"stores[{n}].", one)) for n, one in enumerate(entries))


class _Reader:
    """One JSON object of the file, and where it stands there."""

    def __init__(self, path: str, place: str, content: t.Any) -> None:
        self._path = path
        self.place = place
        if not isinstance(content, dict):
            raise ConfigError(
                f"{path}: {place.rstrip('.') or 'the whole'}", "is no JSON object", "Write {...}."
            )
        self._content: Json = content

    def known(self, names: t.Sequence[str]) -> None:
        """Refuse all other names."""
        for name in self._content:
            if name not in names:
                raise self.wrong(name, "is not known", f"Known here: {', '.join(names)}.")

    def wrong(self, name: str, cause: str, way_out: str = "") -> ConfigError:
        place = f"{self.place}{name}".rstrip(".")
        return ConfigError(f"{self._path}: {place}", cause, way_out)

    def has(self, name: str) -> bool:
        """Whether it is given; an empty text, an empty list and null are not."""
        return self._content.get(name) not in (None, "", [])

    def text(self, name: str, default: str = "") -> str:
        value = self._content.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise self.wrong(name, "is no text", 'Write "...".')
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
            raise self.wrong(name, f"is no number: {self.text(name)}") from None

    def items(self, name: str) -> t.List[t.Any]:
        value = self._content.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(name, "is no list", "Write [...].")
        return value

    def texts(self, name: str) -> t.Tuple[str, ...]:
        found = self.items(name)
        for one in found:
            if not isinstance(one, str) or not one:
                raise self.wrong(name, f"holds {json.dumps(one)}, which is no text")
        return tuple(found)

    def whole_number(self, name: str, default: t.Optional[int] = None) -> t.Optional[int]:
        found = self.number(name)
        if found is None:
            return default
        if found != int(found):
            raise self.wrong(name, f"is no whole number: {found:g}")
        return int(found)

    def inside(self, name: str) -> t.Optional[_Reader]:
        """The object of that name, if there is one."""
        value = self._content.get(name)
        return None if value is None else self.below(name, value)

    def below(self, name: str, content: t.Any) -> _Reader:
        """What stands under that name."""
        return _Reader(self._path, f"{self.place}{name}.", content)

    def checked(self, name: str, check: t.Callable[[], t.Any]) -> t.Any:
        """What a rule of the library makes of what was read; its complaint then names the place.

        :raises ConfigError: it has one
        """
        try:
            return check()
        except StorageError as error:
            raise self.wrong(name, str(error).rstrip(".")) from error


# The options of layer_gc that make a policy, and how each is read; see GcRequest.
_POLICY: t.Mapping[str, t.Callable[[_Reader, str], t.Any]] = {
    **dict.fromkeys(("images", "keep_images", "keep_mappings"), _Reader.texts),
    **dict.fromkeys(("min_age", "unused_for", "created_before"), _Reader.text),
    **dict.fromkeys(("duplicates", "unusable_maps"), _Reader.switch),
    "max_copies_per_image": _Reader.whole_number,
    **dict.fromkeys(("max_used_space", "reserved_space", "min_free_space"), _Reader.text),
    **dict.fromkeys(("high_threshold", "low_threshold"), _Reader.number),
    "max_freed": _Reader.text,
    "origin": functools.partial(_Reader.choice, among=("any", "ours")),
    "orphans": functools.partial(_Reader.choice, among=("report", "remove")),
    "broken": functools.partial(_Reader.choice, among=("report", "repair")),
}


def _store(reader: _Reader) -> StoreSettings:
    options = ("user", *_STORE_TEXTS, "storage_options", "lock_timeout")
    declared = ("images", "mappings", "strategy", "unmapped_ids", "force", "lease")
    reader.known((*options, *declared, "policy"))
    name = reader.text("user")
    account: t.Optional[Account] = reader.checked("user", lambda: account_named(name or None))
    store = StoreRequest(
        account=account,
        **{name: reader.text(name) for name in _STORE_TEXTS},
        storage_options=reader.texts("storage_options"),
        lock_timeout=float(reader.whole_number("lock_timeout", 60) or 0),
    )
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
            "mappings", "is empty, though images are named", 'Write [{"userns": "keep-id"}].'
        )
    lease = reader.text("lease")
    if lease:
        reader.checked("lease", lambda: age("lease", lease))
    return TemplateRequest(
        store=store,
        images=(),
        wanted=tuple(_wanted(reader, number, one) for number, one in enumerate(mappings)),
        strategy=reader.choice("strategy", _STRATEGIES),
        force=reader.switch("force"),
        overflow=reader.choice("unmapped_ids", _UNMAPPED) == "overflow",
        lease=lease,
    )


def _wanted(parent: _Reader, number: int, content: t.Any) -> Wanted:
    name = f"mappings[{number}]"
    reader = parent.below(name, content)
    reader.known(tuple(field.name for field in dataclasses.fields(Wanted)))
    wanted = Wanted(
        userns=reader.text("userns"),
        uidmap=reader.texts("uidmap"),
        gidmap=reader.texts("gidmap"),
        subuidname=reader.text("subuidname"),
        subgidname=reader.text("subgidname"),
        runtime=reader.text("runtime"),
        slots=reader.whole_number("slots", 1) or 1,
    )
    parent.checked(
        name,
        lambda: parse_request(
            wanted.userns, wanted.uidmap, wanted.gidmap, wanted.subuidname, wanted.subgidname
        ),
    )
    return wanted


def _policy(reader: _Reader, store: StoreRequest) -> GcRequest:
    reader.known(tuple(_POLICY))
    read = {name: take(reader, name) for name, take in _POLICY.items() if reader.has(name)}
    if ("high_threshold" in read) != ("low_threshold" in read):
        raise reader.wrong("high_threshold", "and low_threshold go together", "Give both.")
    request = GcRequest(store=store, **read)
    reader.checked("", lambda: read_policy(request, time.time()))
    return request
