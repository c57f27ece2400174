# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""What the system refuses, told as errors of our own family that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import typing as t

from ..errors import NoSpace, PermissionDenied, StorageError, StoreError

_SHOWN_PATH = 1024


def shown(path: str) -> str:
    """A path for messages: printable whatever its bytes, and of bounded length."""
    if len(path) > _SHOWN_PATH:
        path = f"{path[: _SHOWN_PATH // 2]}[...]{path[-_SHOWN_PATH // 2 :]}"
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def explained(
    root: str = "", subject: str = "", kind: t.Type[StorageError] = StoreError
) -> t.Iterator[None]:
    """Turn the system's errors into ours, each with a way out; those of ours pass.

    :param root: the folder whose owner may do it, and whose filesystem is to have room; empty if that is not known
    :param subject: what it is about; empty for the file that the error names
    :param kind: what is raised where it is neither for want of room nor of rights
    :raises PermissionDenied: the caller lacks rights, or the filesystem is read-only
    :raises NoSpace: filesystem or quota is full
    """
    try:
        yield
    except OSError as error:
        raise _explanation(error, root, subject, kind) from error


def _explanation(
    error: OSError, root: str, subject: str, kind: t.Type[StorageError]
) -> StorageError:
    # What was called with a descriptor names that, a number.
    named = isinstance(error.filename, (str, bytes, os.PathLike))
    name = shown(os.fsdecode(error.filename)) if named else ""
    subject = subject or name or root or "the filesystem"
    cause = (error.strerror or str(error)).lower()
    if name not in ("", subject):
        cause += f" ({name})"
    facts: t.Dict[str, t.Any] = {"path": name or subject, "errno": error.errno}
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDenied(
            subject,
            f"cannot be used by UID {os.geteuid()}: {cause}",
            f"Run with `become: true`, or set `user: {_owner(root)}`.",
            **facts,
        )
    if error.errno == errno.EROFS:
        return PermissionDenied(
            subject, f"cannot be written: {cause}", "Mount its filesystem writable.", **facts
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        tells = f"; `df -h {root}` and `df -i {root}` tell what is left" if root else ""
        return NoSpace(
            subject,
            f"cannot be written: {cause}",
            f"Make room or raise the quota, and run it again{tells}.",
            **facts,
        )
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        cause = f"holds a symbolic link or a file where a directory belongs: {cause}"
    return kind(subject, cause, "Look at it, and run it again; `dmesg` may tell more.", **facts)


def _owner(path: str) -> str:
    """The account whose store it is, as far as one can see."""
    while path not in ("", "/"):
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
