# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Messages from the process inside a namespace: JSON in ASCII, with a form for each kind of message.

A message is a header (kind, length in bytes), then JSON. Bytes of a path that are not UTF-8 are encoded as U+DC80 to
U+DCFF, as by ``os.fsdecode``; the sender replaces any other surrogate, and the receiver refuses it. Received data never
selects a class or a function of this process: errors are created from the fixed table ``ERRORS``.
"""

from __future__ import annotations

import json
import os
import select
import struct
import threading
import time
import typing as t

from .. import errors
from ..errors import StorageError
from ..kernel import gc_pause
from ..store.json_numbers import PARSE_INT, refuse_constant
from .shapes import (
    ODD_SURROGATES,
    Check,
    Items,
    Maybe,
    Record,
    choice,
    flag,
    plain,
    scalar,
    small,
    text,
    whole,
    word,
)

RESULT, ERROR, PROGRESS = b"R", b"E", b"P"
# The child is in its new namespace and waits for the ID maps; or it may not create a namespace.
ENTERED, FORBIDDEN = b"U", b"F"

_HEADER = struct.Struct(">cI")
# A store with 30,000 layers needs a third of each. Together they limit the memory of any message to about
# 400 MB.
SIZE_LIMIT = 64 * 1024 * 1024
_COMMAS_LIMIT = 3_000_000
_BRACKETS_LIMIT = 600_000
_PIECE = 1 << 20

# Kinds of errors, by name.
ERRORS: t.Mapping[str, t.Type[StorageError]] = {
    kind.__name__: kind
    for kind in (
        StorageError,
        *(errors.ConfigError, errors.StoreError, errors.StoreUnwritten, errors.RecordError),
        *(errors.StoreContradictory, errors.UntestedRuntime),
        *(errors.LockTimeout, errors.PermissionDenied, errors.NoSpace, errors.ReadOnlyStore),
        *(errors.StoreChanged, errors.ImageUnknown, errors.ImageAmbiguous, errors.LayerInUse),
        *(errors.MapError, errors.UnmappedIDs, errors.NamespaceError, errors.UnsupportedDriver),
        *(errors.TreeError, errors.InternalError, errors.WorkerError),
    )
}

_USERS = Items(Record({"id": text, "name": text}, {"kind": text}))
_IDS = Items(whole)
# Details of errors. They become fields of the module's result, so each has a defined form.
FACTS: t.Mapping[str, Check] = {
    "candidates": Items(Record({"id": text, "names": Items(text)})),
    "command": Items(text),
    "containers": Items(text),
    "contradictions": Items(
        Record({"kind": text, "path": text, "problem": text, "hint": text, "ids": Items(text)})
    ),
    "driver": text,
    "drivers": Items(text),
    "errno": Maybe(whole),
    "failures": plain(2),
    "field": text,
    "file": text,
    "files": Items(text),
    "foreign_gids": _IDS,
    "foreign_uids": _IDS,
    "free": whole,
    "free_inodes": whole,
    "gids": _IDS,
    "graphroot": text,
    "image": text,
    "image_id": text,
    "images": Items(text),
    "layer": text,
    "layer_id": text,
    "layers": Items(text),
    "line": scalar,
    "missing": text,
    "needed": whole,
    "needed_inodes": whole,
    "path": text,
    "pid": Maybe(whole),
    "rc": whole,
    "record": scalar,
    "runroot": text,
    "seconds": scalar,
    "stderr": text,
    "store": text,
    "supported": Items(text),
    "trace": text,
    "uids": _IDS,
    "user": text,
    "users": _USERS,
    "variable": text,
    "wanted": whole,
}
FACTS_FORM = Record({}, FACTS)

_FORMS: t.Mapping[bytes, Check] = {
    ERROR: Record(
        {
            "kind": choice(*ERRORS),
            "subject": text,
            "cause": text,
            "hint": text,
            "facts": FACTS_FORM,
        }
    ),
    PROGRESS: Record({"moved": flag, "step": text}),
    ENTERED: Record({"pid": small}),
    FORBIDDEN: Record({"errno": small, "step": word("[a-z ]{1,60}")}),
}


class BadMessage(Exception):
    """The data is no message, or has another form than its kind requires."""


class Silence(Exception):
    """The child does not respond. The message states the reason."""


# Encoding


def encode(value: t.Any) -> bytes:
    """Encode a value as JSON.

    :raises BadMessage: it is not plain data, or larger than the receiver accepts
    """
    try:
        with gc_pause.gc_disabled():
            data = _dumps(value)
            if b"\\ud" in data:
                data = _dumps(_encodable(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadMessage(f"is not plain data: {error}") from error
    _check_limits(data)
    return data


def _dumps(value: t.Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def _encodable(value: t.Any) -> t.Any:
    if isinstance(value, str):
        return ODD_SURROGATES.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_encodable(key): _encodable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encodable(entry) for entry in value]
    return value


def error_message(error: StorageError) -> t.Dict[str, t.Any]:
    """An error as data, without facts of an unknown form."""
    kind = next(item.__name__ for item in type(error).__mro__ if item.__name__ in ERRORS)
    facts = {}
    for name, value in error.facts.items():
        check = FACTS.get(name)
        try:
            fact = decode(encode(value))
        except BadMessage:
            continue
        if check is not None and not check(fact):
            facts[name] = fact
    return {
        "kind": kind,
        "subject": error.subject,
        "cause": error.cause,
        "hint": error.hint,
        "facts": facts,
    }


# Decoding


def _object(pairs: t.List[t.Tuple[str, t.Any]]) -> t.Dict[str, t.Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a field twice")
    return result


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=PARSE_INT,
    parse_constant=refuse_constant,
)


def decode(data: bytes, check: t.Optional[Check] = None) -> t.Any:
    """Decode the JSON of a message.

    :param check: the required form
    :raises BadMessage: it is no JSON, larger than allowed, or of another form
    """
    _check_limits(data)
    try:
        with gc_pause.gc_disabled():
            value = _DECODER.decode(data.decode("ascii"))
            wrong = check(value) if check is not None else ""
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"is not JSON: {error}") from error
    if wrong:
        raise BadMessage(wrong)
    return value


def _check_limits(data: bytes) -> None:
    if len(data) > SIZE_LIMIT:
        raise BadMessage(f"is larger than {SIZE_LIMIT} bytes")
    if data.count(b",") > _COMMAS_LIMIT or data.count(b"[") + data.count(b"{") > _BRACKETS_LIMIT:
        raise BadMessage("has too many entries")


def decode_message(kind: bytes, data: bytes) -> t.Dict[str, t.Any]:
    """Decode any message except a result.

    :raises BadMessage: the kind is unknown, or the message is of another form
    """
    form = _FORMS.get(kind)
    if form is None:
        raise BadMessage(f"is of the unknown kind {kind!a}")
    value: t.Dict[str, t.Any] = decode(data, form)
    return value


def rebuilt_error(message: t.Mapping[str, t.Any]) -> StorageError:
    """The error in an error message; only bugs of this collection have a traceback."""
    kind = ERRORS[message["kind"]]
    facts = dict(message["facts"])
    if kind is not errors.InternalError:
        facts.pop("trace", None)
    return kind(message["subject"], message["cause"], message["hint"], **facts)


# The two ends of the pipe


class Sender:
    """The child's end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, kind: bytes, value: t.Any) -> None:
        """Send a message.

        :raises BadMessage: as :func:`encode`
        :raises OSError: the receiver is gone
        """
        data = encode(value)
        with self._lock:
            self._write(_HEADER.pack(kind, len(data)))
            self._write(data)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]


class Limits(t.NamedTuple):
    """The maximum times to wait for a process, in seconds; 0 for no limit.

    :param silence: without any message, because the process or the host is stopped
    :param stall: without progress, such as on a filesystem of the user that does not respond
    :param total: in total
    :param ending: after it was told to end
    """

    silence: float = 60.0
    stall: float = 600.0
    total: float = 14400.0
    ending: float = 60.0


DEFAULT_LIMITS = Limits()
UNLIMITED = Limits(0.0, 0.0, 0.0, 0.0)
# The interval at which to check whether this process was told to end.
_LOOK = 1.0


class Receiver:
    """The parent's end, which enforces the limits.

    :ivar step: the last step that the child reported
    """

    def __init__(self, descriptor: int, limits: Limits) -> None:
        self._descriptor = descriptor
        self._limits = limits
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._data = bytearray()
        # The time waited so far (seconds), and the times of events by that clock.
        self._time = self._started = self._heard = self._moved = 0.0
        self._looked = time.monotonic()
        self._end_requested: t.Optional[float] = None
        self.step = ""

    def note_end_requested(self) -> None:
        """Record that the child was told to end."""
        if self._end_requested is None:
            self._end_requested = self._time

    def messages(self) -> t.Iterator[t.Tuple[bytes, bytes]]:
        """All messages except those of progress, until the child closes its end.

        :raises BadMessage: a message is larger than allowed, or a progress message is malformed
        :raises Silence: a limit was reached
        """
        while True:
            header = self._take(_HEADER.size)
            if header is None:
                return
            kind, size = _HEADER.unpack(header)
            if size > SIZE_LIMIT:
                raise BadMessage(f"is larger than {SIZE_LIMIT} bytes")
            data = self._take(size)
            if data is None:
                return
            self._heard = self._time
            if kind != PROGRESS:
                self._moved = self._heard
                yield kind, data
                continue
            progress = decode_message(kind, data)
            self.step = progress["step"]
            if progress["moved"]:
                self._moved = self._heard

    def _take(self, size: int) -> t.Optional[bytes]:
        while len(self._data) < size:
            self._wait()
            piece = os.read(self._descriptor, max(_PIECE, 1))
            if not piece:
                return None
            self._data += piece
        taken = bytes(self._data[:size])
        del self._data[:size]
        return taken

    def _wait(self) -> None:
        ready: t.List[t.Any] = []
        while not ready:
            ready = self._poll.poll(_LOOK * 1000)
            now = time.monotonic()
            # Time in which this process was stopped, as after Ctrl-Z, does not count.
            self._time += min(now - self._looked, 2 * _LOOK)
            self._looked = now
            self._check_time(bool(ready))

    def _check_time(self, ready: bool) -> None:
        limits = self._limits
        clocks = [
            ("worked for more than", self._started, limits.total),
            ("made no progress for", self._moved, limits.stall),
        ]
        if self._end_requested is not None:
            clocks.append(
                ("did not terminate on request within", self._end_requested, limits.ending)
            )
        if not ready:
            clocks.append(("did not respond for", self._heard, limits.silence))
        for what, since, limit in clocks:
            if limit and self._time - since > limit:
                raise Silence(f"{what} {limit:g} seconds")
