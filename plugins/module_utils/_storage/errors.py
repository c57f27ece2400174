# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The exceptions of the library. Each message names the object, the cause and a hint."""

from __future__ import annotations

import typing as t

from .printable import printable

# The content of an image determines the length of lists; the limit keeps results readable.
_MOST_ENTRIES = 1000
# Characters: no message is longer than all three together.
_LONGEST_SUBJECT, _LONGEST_CAUSE, _LONGEST_HINT = 1000, 4000, 8000


def size_text(number: float) -> str:
    """Format bytes: 512 B, 1.4 KiB, 23 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 1024 or unit == "TiB":
            break
        number /= 1024
    digits = 0 if unit == "B" or abs(number) >= 99.5 else 1
    return f"{number:.{digits}f} {unit}"


class StorageError(Exception):
    """An error for users: what failed, why, and what to do.

    :param subject: the object it is about: an image name, a path, a map
    :param cause: the cause, a clause without a full stop
    :param hint: what to do next, a sentence or a command; may be empty
    :param facts: details as plain data, returned to the caller with the message; lists are cut off after
        1,000 entries
    """

    def __init__(self, subject: str, cause: str, hint: str = "", **facts: t.Any) -> None:
        self.subject = subject
        self.cause = cause
        self.hint = hint
        self.facts = {
            name: value[:_MOST_ENTRIES] if isinstance(value, (list, tuple)) else value
            for name, value in facts.items()
        }
        super().__init__(str(self))

    def __str__(self) -> str:
        subject = printable(self.subject, _LONGEST_SUBJECT)
        message = f"{subject}: {printable(self.cause, _LONGEST_CAUSE).rstrip('.')}."
        hint = printable(self.hint, _LONGEST_HINT)
        return f"{message} {hint}" if hint else message

    def __reduce__(self) -> t.Tuple[t.Any, ...]:
        return (_rebuild, (type(self), self.subject, self.cause, self.hint, self.facts))


def _rebuild(
    kind: t.Type[StorageError], subject: str, cause: str, hint: str, facts: t.Dict[str, t.Any]
) -> StorageError:
    return kind(subject, cause, hint, **facts)


class ConfigError(StorageError):
    """A value in storage.conf, in the environment or of an option is invalid."""


class StoreError(StorageError):
    """The store is absent, belongs to another driver, or is inconsistent."""


class StoreUnwritten(StoreError):
    """No runtime has written the store yet; the facts contain its future path and driver."""


class RecordError(StoreError):
    """A JSON record is unreadable, half-written or of a wrong type."""


class StoreContradictory(StoreError):
    """The store's records contradict each other or the files on disk, so that nothing may be removed.

    The fact ``contradictions`` lists them.
    """


class LockTimeout(StoreError):
    """Another process held a lock of the store for longer than allowed."""


class PermissionDenied(StoreError):
    """The caller lacks the permission to read or write."""


class NoSpace(StoreError):
    """The filesystem has no free bytes or inodes."""


class ReadOnlyStore(StoreError):
    """The image is in an additional store, which is never written."""


class UntestedRuntime(StoreError):
    """A program of the host has a newer containers/storage than this collection was tested with."""


class StoreChanged(StoreError):
    """The image or template changed repeatedly while the layer was being built."""


class ImageUnknown(StorageError):
    """No image of the store matches the reference."""


class ImageAmbiguous(StorageError):
    """Several images match the reference."""


class LayerInUse(StorageError):
    """Containers or layers use the layer. The facts list them."""


class MapError(StorageError):
    """An ID map is malformed, overlaps itself or cannot be used here."""


class UnmappedIDs(MapError):
    """The image contains IDs that the map does not cover. The facts list them."""


class NamespaceError(StorageError):
    """The user's namespace cannot be entered: no subordinate IDs, or the host forbids it."""


class UnsupportedDriver(StorageError):
    """The store uses a driver, or a feature of a driver, that is not supported."""


class TreeError(StorageError):
    """A layer's tree cannot be read or copied exactly."""


class WorkerError(StorageError):
    """The process that works in a store ended, did not respond, or sent other than the documented data."""


class InternalError(StorageError):
    """A bug in this collection; the facts contain the traceback for the bug report."""
