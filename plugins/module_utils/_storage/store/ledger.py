# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""When each mapped layer was last seen in use, as runs of this collection saw it.

Runtimes keep no such record, so "unused for a week" can only be told by somebody who has looked
for a week. The file is ours alone; a lost or broken one means that watching begins anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import typing as t
from dataclasses import dataclass

from ..idmap.mapping import Mapping
from ..kernel.refusals import explained
from .locks import LockFile
from .staging import LOCK_NAME

VERSION = 1

# Seen again within this many seconds is no news worth a write.
_NEWS_SECONDS = 600.0
_MOST_PROGRAMS = 8
_SIZE_LIMIT = 16 * 1024 * 1024


def ledger_key(image_id: str, mapping: Mapping) -> str:
    """What makes two layers the same for the ledger: image and maps, however often re-created."""
    return f"{image_id} {mapping.uid} {mapping.gid}"


@dataclass
class _Entry:
    key: str
    first_seen: float
    last_used: t.Optional[float]


class Ledger:
    """The file; times are seconds since the epoch.

    :param path: ``ledger.json`` in our folder of the store
    :param lock_timeout: seconds to wait for the lock of that folder
    """

    def __init__(self, path: str, lock_timeout: float = 60.0) -> None:
        self.path = path
        self.lock_timeout = lock_timeout
        self._entries: t.Dict[str, _Entry] = {}
        self._since: t.Optional[float] = None
        self._news = False
        # What programs said of their version, by what identifies their file; the latest last.
        self.programs: t.Dict[str, str] = {}

    def load(self) -> Ledger:
        """Read the file; one that is absent or broken is an empty ledger.

        :raises StoreError: it is there and cannot be read
        """
        self._entries, self._since, self._news, self.programs = {}, None, False, {}
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        with explained(self.path):
            try:
                descriptor = os.open(self.path, flags)
            except (FileNotFoundError, NotADirectoryError):
                return self
            with os.fdopen(descriptor, "rb") as file:
                data = file.read(_SIZE_LIMIT + 1)
        try:
            content = json.loads(data.decode("utf-8")) if len(data) <= _SIZE_LIMIT else None
            self._take(content)
        except (ValueError, RecursionError):
            self._entries, self._since, self.programs = {}, None, {}
        return self

    def _take(self, content: t.Any) -> None:
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise ValueError("no ledger of this version")
        since, layers = _moment(content.get("watched_since")), content.get("layers")
        if since is None or not isinstance(layers, dict):
            raise ValueError("no ledger")
        for layer_id, entry in layers.items():
            if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
                raise ValueError("no entry")
            first = _moment(entry.get("first_seen"))
            self._entries[layer_id] = _Entry(
                entry["key"], since if first is None else first, _moment(entry.get("last_used"))
            )
        programs = content.get("programs", {})
        if not isinstance(programs, dict) or not all(
            isinstance(one, str) for one in programs.values()
        ):
            raise ValueError("no programs")
        self.programs = programs
        self._since = since

    @property
    def watched_since(self) -> t.Optional[float]:
        """Since when somebody has been looking at this store; None for never."""
        return self._since

    def last_used(self, layer_id: str) -> t.Optional[float]:
        """When the layer was last seen in use; None for never."""
        entry = self._entries.get(layer_id)
        return entry.last_used if entry else None

    def first_seen(self, layer_id: str) -> t.Optional[float]:
        """When the layer was first seen at all; None for never."""
        entry = self._entries.get(layer_id)
        return entry.first_seen if entry else None

    def observe(self, seen: t.Iterable[str], now: float, all_layers: t.Mapping[str, str]) -> None:
        """Note what is in use at this moment.

        :param seen: IDs of mapped layers that containers are on
        :param all_layers: the ``ledger_key`` of every mapped layer of the store, by layer ID; others
            are forgotten, their times going to a new layer of the same key
        """
        if self._since is None or self._since > now:
            self._since, self._news = now, True
        gone: t.Dict[str, _Entry] = {}
        for layer_id in [one for one in self._entries if one not in all_layers]:
            entry = self._entries.pop(layer_id)
            other = gone.get(entry.key)
            if other is None or (entry.last_used or 0) > (other.last_used or 0):
                gone[entry.key] = entry
            self._news = True
        used = set(seen)
        for layer_id, key in all_layers.items():
            known = self._entries.get(layer_id)
            if known is None or known.key != key:
                heir = gone.get(key)
                known = _Entry(key, now, heir.last_used if heir else None)
                self._entries[layer_id] = known
                self._news = True
            if layer_id in used:
                # A clock that was set back must not make a used layer look old or eternal.
                if known.last_used is None or abs(now - known.last_used) > _NEWS_SECONDS:
                    self._news = True
                    known.last_used = now
                else:
                    known.last_used = max(known.last_used, now)

    def learn(self, programs: t.Mapping[str, str]) -> None:
        """Note what programs said of their version, see ``programs``."""
        news = {key: said for key, said in programs.items() if self.programs.get(key) != said}
        if news:
            known = {key: said for key, said in self.programs.items() if key not in news}
            self.programs = dict([*known.items(), *news.items()][-_MOST_PROGRAMS:])
            self._news = True

    @property
    def changed(self) -> bool:
        """Whether there is anything worth writing."""
        return self._news

    def save(self) -> bool:
        """Write the file if there is news; its folder is made if need be.

        :returns: whether it was written
        :raises LockTimeout: another run holds our folder
        :raises StoreError: it cannot be written
        """
        if not self._news:
            return False
        folder = os.path.dirname(self.path)
        with explained(folder):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            lock = LockFile(os.path.join(folder, LOCK_NAME))
            lock.create()
            with lock.exclusive(self.lock_timeout):
                self._merge(Ledger(self.path).load())
                self._write()
        self._news = False
        return True

    def _merge(self, other: Ledger) -> None:
        """Take over what another run has written since this one has read."""
        if other._since is not None and self._since is not None:
            self._since = min(self._since, other._since)
        for layer_id, entry in self._entries.items():
            theirs = other._entries.get(layer_id)
            if theirs is not None and theirs.key == entry.key:
                entry.first_seen = min(entry.first_seen, theirs.first_seen)
                moments = [one for one in (entry.last_used, theirs.last_used) if one is not None]
                entry.last_used = max(moments, default=None)

    def _write(self) -> None:
        content = {
            "version": VERSION,
            "watched_since": self._since,
            "programs": self.programs,
            "layers": {
                layer_id: {
                    "key": entry.key,
                    "first_seen": entry.first_seen,
                    "last_used": entry.last_used,
                }
                for layer_id, entry in sorted(self._entries.items())
            },
        }
        temporary = f"{self.path}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            with os.fdopen(os.open(temporary, flags, 0o600), "w", encoding="utf-8") as file:
                json.dump(content, file, separators=(",", ":"))
                file.flush()
                os.fdatasync(file.fileno())
            os.rename(temporary, self.path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def _moment(value: t.Any) -> t.Optional[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        moment = float(value)
    except OverflowError:
        return None
    return moment if 0 <= moment < 1e12 else None
