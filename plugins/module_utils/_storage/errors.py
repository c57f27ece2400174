# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""The one exception family: every message names the object, the cause and the way out."""

from __future__ import annotations

import typing as t

# An image decides how much there is to tell; a task's result stays readable.
_MOST_ENTRIES = 1000


class StorageError(Exception):
    """What a user is told when something cannot be done.

    :param subject: the object it is about: an image name, a path, a map
    :param cause: what is wrong with it, a clause without a full stop
    :param way_out: what to do next, a sentence or a command; may be empty
    :param facts: JSON-able details, returned to the caller beside the message; lists are cut off after
        1,000 entries
    """

    def __init__(self, subject: str, cause: str, way_out: str = "", **facts: t.Any) -> None:
        self.subject = subject
        self.cause = cause
        self.way_out = way_out
        self.facts = {
            name: value[:_MOST_ENTRIES] if isinstance(value, (list, tuple)) else value
            for name, value in facts.items()
        }
        super().__init__(str(self))

    def __str__(self) -> str:
        message = f"{self.subject}: {self.cause.rstrip('.')}."
        return f"{message} {self.way_out}" if self.way_out else message

    def __reduce__(self) -> t.Tuple[t.Any, ...]:
        return (_rebuild, (type(self), self.subject, self.cause, self.way_out, self.facts))


def _rebuild(
    kind: t.Type[StorageError], subject: str, cause: str, way_out: str, facts: t.Dict[str, t.Any]
) -> StorageError:
    return kind(subject, cause, way_out, **facts)


class ConfigError(StorageError):
    """storage.conf, the environment or an option says something that cannot be."""


class StoreError(StorageError):
    """The store is absent, belongs to another driver, or contradicts itself."""


class StoreUnwritten(StoreError):
    """No runtime has written the store yet; the facts say where and of which driver it will be."""


class RecordError(StoreError):
    """A JSON record is unreadable, half-written or of a wrong type."""


class LockTimeout(StoreError):
    """A lock of the store stayed taken for longer than allowed."""


class PermissionDenied(StoreError):
    """The caller may not read or write what the work needs."""


class NoSpace(StoreError):
    """The filesystem has no room, in bytes or in inodes."""


class ReadOnlyStore(StoreError):
    """The image lives in an additional store that is never written."""


class StoreChanged(StoreError):
    """Image or template changed, again and again, while the layer was being built."""


class ImageUnknown(StorageError):
    """No image of the store answers to that reference."""


class ImageAmbiguous(StorageError):
    """More than one image answers to that reference."""


class LayerInUse(StorageError):
    """Containers or layers rest on the layer; the facts name them."""


class MapError(StorageError):
    """An ID map is malformed, overlaps itself or cannot be used here."""


class UnmappedIDs(MapError):
    """The image holds IDs that the map does not cover; the facts name them."""


class NamespaceError(StorageError):
    """The user's namespace cannot be entered: no subordinate IDs, or the host forbids it."""


class UnsupportedDriver(StorageError):
    """The store uses a driver, or a feature of one, that is not handled here."""


class TreeError(StorageError):
    """A layer's tree cannot be read or cloned faithfully."""


class InternalError(StorageError):
    """A fault of this collection itself; the facts carry the trace for the bug report."""
