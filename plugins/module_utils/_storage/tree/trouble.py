# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Failures in a tree, told as errors of our own family."""

from __future__ import annotations

import errno
import os
import typing as t

from ..errors import NoSpace, PermissionDenied, StorageError, TreeError

_SHOWN_PATH = 1024


def shown(path: str) -> str:
    """A path for messages: printable whatever its bytes, and of bounded length."""
    if len(path) > _SHOWN_PATH:
        path = f"{path[: _SHOWN_PATH // 2]}[...]{path[-_SHOWN_PATH // 2 :]}"
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def as_storage_error(error: OSError) -> StorageError:
    """The same failure as one of our own family."""
    subject = str(error.filename) if error.filename is not None else "tree"
    facts: t.Dict[str, t.Any] = {"path": subject, "errno": error.errno}
    cause = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(subject, cause, "Make room, or raise the quota, and run it again.", **facts)
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDenied(subject, cause, "Run it as the owner of the store.", **facts)
    return TreeError(subject, cause, **facts)
