# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""The system's errors in words that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import typing as t

from ..errors import NoSpace, PermissionDenied, StoreError


@contextlib.contextmanager
def explained(root: str) -> t.Iterator[None]:
    """Turn the system's errors into ours, each with a way out.

    :param root: what it is about where the error names no file, and whose owner may do it
    :raises PermissionDenied: the caller lacks rights, or the filesystem is read-only
    :raises NoSpace: filesystem or quota is full
    :raises StoreError: anything else that the system refuses
    """
    try:
        yield
    except OSError as error:
        path = os.fsdecode(error.filename) if error.filename else root
        cause = (error.strerror or str(error)).lower()
        if error.errno in (errno.EACCES, errno.EPERM):
            raise PermissionDenied(
                path,
                f"cannot be used by UID {os.geteuid()}: {cause}",
                f"Run with `become: true`, or set `user: {_owner(root)}`.",
                path=path,
            ) from error
        if error.errno == errno.EROFS:
            raise PermissionDenied(
                path, f"cannot be written: {cause}", "Mount its filesystem writable.", path=path
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                path,
                f"cannot be written: {cause}",
                f"Free space or raise the quota; `df -h {root}` and "
                f"`df -i {root}` tell what is left.",
                path=path,
            ) from error
        raise StoreError(
            path, cause, "`dmesg` may tell more about the filesystem.", path=path, errno=error.errno
        ) from error


def _owner(path: str) -> str:
    """The account whose store it is, as far as one can see."""
    while path != "/":
        try:
            uid = os.stat(path).st_uid
        except OSError:
            path = os.path.dirname(path)
            continue
        try:
            return pwd.getpwuid(uid).pw_name
        except KeyError:
            return str(uid)
    return "OWNER"
