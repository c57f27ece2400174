# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ledger: for how long each mapped layer has been unused, as observed by runs of this collection.

Runtimes keep no such record. Each observation records which layers are in use and, for the others, the
trace that a runtime leaves on a layer when it creates a container on it. The time between two
observations counts as watched only if they are close enough to each other. Unused time is counted in
watched seconds, not by the wall clock, so that layers do not age while a host is off or when a clock
is set.

Only this collection uses the file, but the owner of the store may write anything to it. If the file is lost or
damaged, watching starts again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import typing as t
from dataclasses import dataclass

from ..idmap.mapping import Mapping
from ..kernel import files
from ..kernel.clock import Moment
from ..kernel.oserrors import translate_oserror
from .locks import LockFile
from .staging import LOCK_NAME

VERSION = 2
_FIRST_VERSION = 1

# The time between two observations counts if it is no longer than this (seconds): one observation a day, which
# may be half a day late.
LONGEST_INTERVAL = 36 * 3600.0
# A relatime filesystem updates an access time at most this often (seconds).
COARSE_TRACE = 86400.0
# An observation this soon after the last one is not saved (seconds), unless it is the first.
_WRITE_SECONDS = 600.0

# The wall clock counts as set if it moves by more than this against the clock of the boot (seconds).
_DRIFT = 600.0
# The longest plausible time (seconds) for which a host was off, or a store unchanged before the first observation.
_LONGEST_OFF = 30 * 86400.0
_LONGEST_UNTOUCHED = 180 * 86400.0
# A clock that was set counts as reliable again after this time under observation (seconds).
_STEADY = 86400.0
# The earliest plausible date: the beginning of 2024.
_EARLIEST = 1704067200.0
# The latest date that can be formatted: the end of the year 9999.
_LATEST = 253402300800.0

_MOST_PROGRAMS = 8
_MOST_GAPS = 8
_MOST_LAYERS = 20000
_SIZE_LIMIT = 16 * 1024 * 1024
# There is no file, or it is no ledger of this collection.
_NO_LEDGER = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL, errno.EFBIG))
_LONGEST_TEXT = 256


def ledger_key(image_id: str, mapping: Mapping) -> str:
    """The identity of a layer in the ledger: image and maps. A re-created layer has the same key."""
    return _digest(f"{image_id} {mapping.uid} {mapping.gid}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Sighting:
    """A mapped layer at an observation.

    :ivar key: see :func:`ledger_key`
    :ivar used: whether a container or another layer is on it
    :ivar trace: a value that changes when a container is created on it; empty if there is none
    :ivar traced_at: the time of the last change, seconds since the epoch; None if unknown
    :ivar coarse: whether further uses within ``COARSE_TRACE`` leave no trace
    """

    key: str
    used: bool = False
    trace: str = ""
    traced_at: t.Optional[float] = None
    coarse: bool = False


@dataclass(frozen=True)
class Gap:
    """A period that was not watched. Times are seconds since the epoch.

    :ivar seconds: its length; 0 if unknown
    """

    start: float
    end: float
    seconds: float


@dataclass
class _Entry:
    key: str
    first_seen: float
    last_used: t.Optional[float] = None
    # In watched seconds: the time since which no use is known.
    idle_from: float = 0.0
    trace: str = ""
    coarse: bool = False


class Ledger:
    """The file.

    :param path: ``ledger.json`` in the collection's folder of the store
    :param lock_timeout: seconds to wait for the lock of that folder
    """

    def __init__(self, path: str, lock_timeout: float = 60.0) -> None:
        self.path = path
        self.lock_timeout = lock_timeout
        self._clear()

    def _clear(self) -> None:
        self._entries: t.Dict[str, _Entry] = {}
        self._since: t.Optional[float] = None
        self._watched = 0.0
        self._last: t.Optional[Moment] = None
        # The last reliable time of the wall clock; the doubted time, and how long it has been steady.
        self._believed: t.Optional[Moment] = None
        self._doubted: t.Optional[t.Tuple[Moment, float]] = None
        self._doubt = ""
        self._token = ""
        self._gaps: t.List[Gap] = []
        self._untraced = False
        self._news = False
        self._content = b""
        self._observed: t.Optional[
            t.Tuple[Moment, t.Mapping[str, Sighting], str, t.Optional[float]]
        ] = None
        # Versions reported by programs, by the identity of the executable; the newest last.
        self.programs: t.Dict[str, str] = {}

    def load(self) -> Ledger:
        """Read the file; an absent or damaged file is an empty ledger.

        :raises StoreError: it exists and cannot be read
        """
        self._clear()
        with translate_oserror(self.path):
            try:
                data = files.read_regular(self.path, _SIZE_LIMIT)
            except OSError as error:
                if error.errno in _NO_LEDGER:
                    return self
                raise
        try:
            self._take(json.loads(data.decode("utf-8")))
        except (ValueError, RecursionError):
            self._clear()
        self._content = data
        return self

    def _take(self, content: t.Any) -> None:
        version = content.get("version") if isinstance(content, dict) else None
        if version not in (_FIRST_VERSION, VERSION) or isinstance(version, bool):
            raise ValueError("no ledger of this version")
        since, layers = _time(content.get("watched_since")), content.get("layers")
        if since is None or not isinstance(layers, dict) or len(layers) > _MOST_LAYERS:
            raise ValueError("no ledger")
        if version == VERSION:
            watched = _time(content.get("watched"))
            self._last = _moment(content.get("last"))
            if watched is None or self._last is None:
                raise ValueError("no observation")
            self._watched = watched
            self._believed = _moment(content.get("believed"))
            doubted = content.get("doubted")
            moment = _moment(doubted)
            if moment is not None:
                self._doubted = moment, _time(doubted.get("steady")) or 0.0
            self._token = _text(content.get("token"))
            self._gaps = _gaps(content.get("gaps"))
        for layer_id, entry in layers.items():
            self._entries[layer_id] = self._entry(entry, since, version)
        programs = content.get("programs", {})
        if not isinstance(programs, dict) or not all(
            isinstance(version_text, str) for version_text in programs.values()
        ):
            raise ValueError("no programs")
        self.programs = dict(list(programs.items())[-_MOST_PROGRAMS:])
        self._since = since

    def _entry(self, entry: t.Any, since: float, version: int) -> _Entry:
        if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
            raise ValueError("no entry")
        first = _time(entry.get("first_seen"))
        found = _Entry(
            entry["key"], since if first is None else first, _time(entry.get("last_used"))
        )
        if version == _FIRST_VERSION:
            # It did not record how often observations were made, so its time does not count.
            found.key = _digest(found.key)
            return found
        idle_from = _time(entry.get("idle_from"))
        found.idle_from = self._watched if idle_from is None else min(idle_from, self._watched)
        found.trace = _text(entry.get("trace"))
        found.coarse = entry.get("coarse") is True
        return found

    @property
    def watched_since(self) -> t.Optional[float]:
        """The wall-clock time at which watching began; None if it did not."""
        return self._since

    @property
    def watched(self) -> float:
        """The time for which this store has been watched often enough, in seconds."""
        return self._watched

    @property
    def doubt(self) -> str:
        """Why the wall clock of the last observation is unreliable; empty if it is reliable."""
        return self._doubt

    @property
    def gaps(self) -> t.Tuple[Gap, ...]:
        """The latest gaps between observations, oldest first."""
        return tuple(self._gaps)

    @property
    def untraced(self) -> bool:
        """Whether time did not count for some layers, because use leaves no trace here."""
        return self._untraced

    def last_used(self, layer_id: str) -> t.Optional[float]:
        """The wall-clock time at which the layer was last seen in use; None if never."""
        entry = self._entries.get(layer_id)
        return entry.last_used if entry else None

    def first_seen(self, layer_id: str) -> t.Optional[float]:
        """The wall-clock time at which the layer was first seen; None if never."""
        entry = self._entries.get(layer_id)
        return entry.first_seen if entry else None

    def idle(self, layer_id: str) -> t.Optional[float]:
        """The watched seconds for which the layer has been unused; None if it was never seen."""
        entry = self._entries.get(layer_id)
        if entry is None:
            return None
        idle = self._watched - entry.idle_from - (COARSE_TRACE if entry.coarse else 0.0)
        return max(idle, 0.0)

    def image_of(self, layer_id: str) -> str:
        """The ID of the image that listed the layer at the last observation; empty if none."""
        entry = self._entries.get(layer_id)
        return entry.key.partition(" ")[0] if entry else ""

    def observe(
        self,
        moment: Moment,
        layers: t.Mapping[str, Sighting],
        token: str = "",
        changed_at: t.Optional[float] = None,
    ) -> None:
        """Record the layers in use.

        :param moment: the time at which ``layers`` was read
        :param layers: all mapped layers of the store by ID; others are forgotten, but a new
            layer with the same key takes over their times
        :param token: a value that changes with each container that is created or removed; empty if unknown
        :param changed_at: when a runtime last wrote the store's records, seconds since the epoch
        """
        self._observed = moment, layers, token, changed_at
        last, first = self._last, self._since is None
        if first:
            self._since = moment.wall
        elapsed = 0.0 if last is None else _elapsed(last, moment)
        self._doubt = self._judge(moment, changed_at, elapsed)
        counted = elapsed if 0 <= elapsed <= LONGEST_INTERVAL else 0.0
        if last is not None and not 0 <= elapsed <= LONGEST_INTERVAL:
            self._gaps.append(Gap(last.wall, moment.wall, max(elapsed, 0.0)))
            self._gaps = self._gaps[-_MOST_GAPS:]
        # No container was created or removed since, so the layer is unused even if there are no traces.
        quiet = bool(token and token == self._token and last is not None and last.same_boot(moment))
        self._watched += counted
        self._note(moment, layers, counted, quiet)
        if first or last is None or abs(moment.uptime - last.uptime) > _WRITE_SECONDS:
            self._news = True
        if last is not None and not last.same_boot(moment):
            self._news = True
        self._last = moment
        self._token = token

    def _note(
        self, moment: Moment, layers: t.Mapping[str, Sighting], counted: float, quiet: bool
    ) -> None:
        gone: t.Dict[str, _Entry] = {}
        for layer_id in [known for known in self._entries if known not in layers]:
            entry = self._entries.pop(layer_id)
            other = gone.get(entry.key)
            if other is None or (entry.last_used or 0) > (other.last_used or 0):
                gone[entry.key] = entry
            self._news = True
        self._untraced = False
        for layer_id, seen in layers.items():
            known = self._entries.get(layer_id)
            if known is None or known.key != seen.key:
                heir = gone.get(seen.key)
                known = _Entry(seen.key, moment.wall, heir.last_used if heir else None)
                known.idle_from = self._watched
                known.trace, known.coarse = seen.trace, seen.coarse
                self._entries[layer_id] = known
                self._news = True
            if seen.used:
                if known.last_used is None or known.idle_from < self._watched - _WRITE_SECONDS:
                    self._news = True
                known.idle_from, known.last_used = self._watched, moment.wall
            elif seen.trace and known.trace and seen.trace != known.trace:
                self._news = True
                known.idle_from = self._watched
                known.last_used = moment.wall if seen.traced_at is None else seen.traced_at
            elif not (seen.trace and known.trace) and not quiet and counted:
                known.idle_from = min(known.idle_from + counted, self._watched)
                self._untraced = True
            known.trace, known.coarse = seen.trace, seen.coarse

    def _judge(self, moment: Moment, changed_at: t.Optional[float], elapsed: float) -> str:
        """Decide whether the wall clock is reliable, or return the reason."""
        reason = _implausible(self._believed, moment, changed_at)
        if reason:
            steady = 0.0
            if self._doubted is not None and not _implausible(self._doubted[0], moment, None):
                steady = self._doubted[1]
                if 0 <= elapsed <= LONGEST_INTERVAL:
                    steady += elapsed
            if steady < _STEADY:
                if self._doubted is None:
                    self._news = True
                self._doubted = moment, steady
                return reason
        if self._doubted is not None:
            self._news = True
        self._believed, self._doubted = moment, None
        return ""

    def learn(self, programs: t.Mapping[str, str]) -> None:
        """Record the versions that programs reported, see ``programs``."""
        news = {
            key: version_text
            for key, version_text in programs.items()
            if self.programs.get(key) != version_text
        }
        if news:
            known = {
                key: version_text for key, version_text in self.programs.items() if key not in news
            }
            self.programs = dict([*known.items(), *news.items()][-_MOST_PROGRAMS:])
            self._news = True

    @property
    def changed(self) -> bool:
        """Whether there is anything to write."""
        return self._news

    def save(self) -> bool:
        """Write the file if it changed; its folder is created if necessary.

        :returns: whether it was written
        :raises LockTimeout: another run has locked the collection's folder
        :raises StoreError: it cannot be written
        """
        if not self._news:
            return False
        folder = os.path.dirname(self.path)
        with translate_oserror(folder):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            lock = LockFile(os.path.join(folder, LOCK_NAME))
            lock.create()
            with lock.exclusive(self.lock_timeout):
                self._catch_up()
                self._write()
        self._news = False
        return True

    def _catch_up(self) -> None:
        """Merge this observation with the file that another run wrote in the meantime."""
        other = Ledger(self.path).load()
        if other._content == self._content or self._observed is None:
            return
        moment, layers, token, changed_at = self._observed
        programs = self.programs
        last = other._last
        if last is not None and last.same_boot(moment) and _elapsed(last, moment) < 0:
            # The other observation was later; uses seen here still count.
            for layer_id, seen in layers.items():
                entry = other._entries.get(layer_id)
                if entry is not None and seen.used and entry.key == seen.key:
                    entry.idle_from = max(entry.idle_from, self._entries[layer_id].idle_from)
                    entry.last_used = max(entry.last_used or 0.0, moment.wall)
        else:
            other.observe(moment, layers, token, changed_at)
        other.learn(programs)
        self.__dict__.update(other.__dict__)

    def _write(self) -> None:
        content = {
            "version": VERSION,
            "watched_since": self._since,
            "watched": round(self._watched, 3),
            "last": _as_json(self._last),
            "believed": _as_json(self._believed),
            "doubted": (
                None
                if self._doubted is None
                else {**_as_json(self._doubted[0]), "steady": round(self._doubted[1], 3)}
            ),
            "token": self._token,
            "gaps": [[gap.start, gap.end, gap.seconds] for gap in self._gaps],
            "programs": self.programs,
            "layers": {
                layer_id: {
                    "key": entry.key,
                    "first_seen": entry.first_seen,
                    "last_used": entry.last_used,
                    "idle_from": round(entry.idle_from, 3),
                    "trace": entry.trace,
                    "coarse": entry.coarse,
                }
                for layer_id, entry in sorted(self._entries.items())[:_MOST_LAYERS]
            },
        }
        temporary = f"{self.path}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            with os.fdopen(os.open(temporary, flags, 0o600), "w", encoding="utf-8") as file:
                json.dump(content, file, separators=(",", ":"))
            # Not synced: a loss only makes layers look younger, and btrfs of Linux 6.18 may fail to replay a log after
            # a sync of a file in a folder from which folders were deleted.
            os.rename(temporary, self.path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def _elapsed(last: Moment, moment: Moment) -> float:
    """Seconds between two observations: by the clock of the boot, or by the wall clock across boots."""
    if last.same_boot(moment):
        return moment.uptime - last.uptime
    return moment.wall - last.wall


def _implausible(
    believed: t.Optional[Moment], moment: Moment, changed_at: t.Optional[float]
) -> str:
    """Why the wall clock cannot be right, given its last reliable time; empty if it can."""
    if moment.wall < _EARLIEST:
        return "the clock of this host shows a date before 2024"
    if believed is None:
        if changed_at is not None and changed_at - moment.wall > _DRIFT:
            return "the store's records were written later than the clock of this host shows"
        if changed_at is not None and moment.wall - changed_at > _LONGEST_UNTOUCHED:
            days = int((moment.wall - changed_at) // 86400)
            return (
                f"by the clock of this host nothing was written to the store for {days} days, "
                "and the first run cannot verify this"
            )
        return ""
    if believed.same_boot(moment):
        drift = (moment.wall - believed.wall) - (moment.uptime - believed.uptime)
        if abs(drift) > _DRIFT:
            return f"the clock of this host was set {_direction(drift)}"
        return ""
    passed = moment.wall - believed.wall
    if passed < -_DRIFT:
        return f"since the last boot the clock of this host was set {_direction(passed)}"
    if passed > _LONGEST_OFF:
        return f"the host was off for {int(passed // 86400)} days, or its clock was set forward by that time"
    return ""


def _direction(seconds: float) -> str:
    direction = "forward" if seconds > 0 else "back"
    amount = abs(seconds)
    for unit, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if amount >= 2 * unit:
            return f"{direction} by {int(amount // unit)} {name}"
    return direction


def _as_json(moment: t.Optional[Moment]) -> t.Dict[str, t.Any]:
    return {} if moment is None else moment._asdict()


def _moment(value: t.Any) -> t.Optional[Moment]:
    if not isinstance(value, dict):
        return None
    wall, uptime = _time(value.get("wall")), _time(value.get("uptime"))
    if wall is None or uptime is None:
        return None
    return Moment(wall, uptime, _text(value.get("boot")))


def _gaps(value: t.Any) -> t.List[Gap]:
    found = []
    for gap in value[-_MOST_GAPS:] if isinstance(value, list) else ():
        numbers = [_time(number) for number in gap] if isinstance(gap, list) else []
        if len(numbers) == 3 and None not in numbers:
            found.append(Gap(*t.cast(t.List[float], numbers)))
    return found


def _text(value: t.Any) -> str:
    return value if isinstance(value, str) and len(value) <= _LONGEST_TEXT else ""


def _time(value: t.Any) -> t.Optional[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and 0 <= number < _LATEST else None
