# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The exceptions of the library. Each message names the object, the cause and a hint."""

from __future__ import annotations

import typing as t

from .printable import printable

# An image decides how much there is to tell; a task's result stays readable.
_MOST_ENTRIES = 1000
# Characters: no message is longer than all three together.
_LONGEST_SUBJECT, _LONGEST_CAUSE, _LONGEST_HINT = 1000, 4000, 8000


def size_text(number: float) -> str:
    """Bytes for people: 512 B, 1.4 KiB, 23 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 1024 or unit == "TiB":
            break
        number /= 1024
    digits = 0 if unit == "B" or abs(number) >= 99.5 else 1
    return f"{number:.{digits}f} {unit}"


class StorageError(Exception):
    """An error for users: what failed, why, and what to do.

    :param subject: the object it is about: an image name, a path, a map
    :param cause: what is wrong with it, a clause without a full stop
    :param hint: what to do next, a sentence or a command; may be empty
    :param facts: JSON-able details, returned to the caller beside the message; lists are cut off after
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
    """The store is absent, belongs to another driver, or contradicts itself."""


class StoreUnwritten(StoreError):
    """No runtime has written the store yet; the facts say where and of which driver it will be."""


class RecordError(StoreError):
    """A JSON record is unreadable, half-written or of a wrong type."""


class StoreContradictory(StoreError):
    """The store's records do not fit together or do not fit the disk, so nothing may be removed.

    The fact ``contradictions`` lists them.
    """


class LockTimeout(StoreError):
    """A lock of the store stayed taken for longer than allowed."""


class PermissionDenied(StoreError):
    """The caller may not read or write what the work needs."""


class NoSpace(StoreError):
    """The filesystem has no room, in bytes or in inodes."""


class ReadOnlyStore(StoreError):
    """The image lives in an additional store that is never written."""


class UntestedRuntime(StoreError):
    """A program of the host has a newer containers/storage than this collection was tested with."""


class StoreChanged(StoreError):
    """Image or template changed, again and again, while the layer was being built."""


class ImageUnknown(StorageError):
    """No image of the store answers to that reference."""


class ImageAmbiguous(StorageError):
    """More than one image answers to that reference."""


class LayerInUse(StorageError):
    """Containers or layers use the layer. The facts list them."""


class MapError(StorageError):
    """An ID map is malformed, overlaps itself or cannot be used here."""


class UnmappedIDs(MapError):
    """The image contains IDs that the map does not cover. The facts list them."""


class NamespaceError(StorageError):
    """The user's namespace cannot be entered: no subordinate IDs, or the host forbids it."""


class UnsupportedDriver(StorageError):
    """The store uses a driver, or a feature of one, that is not handled here."""


class TreeError(StorageError):
    """A layer's tree cannot be read or cloned faithfully."""


class WorkerError(StorageError):
    """The process that works in a store ended, fell silent, or sent something other than the documented data."""


class InternalError(StorageError):
    """A fault of this collection itself; the facts carry the trace for the bug report."""
