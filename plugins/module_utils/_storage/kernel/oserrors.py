# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Translate errors of the operating system to exceptions of the library, with hints."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import typing as t

from ..errors import NoSpace, PermissionDenied, StorageError, StoreError
from ..printable import command, printable

_SHOWN_PATH = 1024

# The hint for errors whose cause only the kernel knows.
LOOK_INTO_LOG = "Fix the cause, then run the task again; `dmesg` may show more details."


def shown(path: str) -> str:
    """A path for messages: printable and of limited length."""
    return printable(path, _SHOWN_PATH)


@contextlib.contextmanager
def translate_oserror(
    root: str = "",
    subject: str = "",
    kind: t.Type[StorageError] = StoreError,
    permission_hint: str = "",
) -> t.Iterator[None]:
    """Translate OSError to an exception of the library with a hint. Exceptions of the library pass unchanged.

    :param root: the folder whose owner has the permission, and whose filesystem needs the space; empty if unknown
    :param subject: the object of the message; empty for the file that the error names
    :param kind: the exception for other causes than space and permissions
    :param permission_hint: what to do if the caller lacks permissions; empty for the hint about a store and its owner
    :raises PermissionDenied: the caller lacks permissions, or the filesystem is read-only
    :raises NoSpace: filesystem or quota is full
    """
    try:
        yield
    except OSError as error:
        raise translated(error, root, subject, kind, permission_hint) from error


def translated(
    error: OSError,
    root: str = "",
    subject: str = "",
    kind: t.Type[StorageError] = StoreError,
    permission_hint: str = "",
) -> StorageError:
    """The exception for an OSError, as :func:`translate_oserror` raises it."""
    # Calls with a descriptor have its number as file name.
    named = isinstance(error.filename, (str, bytes, os.PathLike))
    name = shown(os.fsdecode(error.filename)) if named else ""
    subject = subject or name or root or "the filesystem"
    cause = (error.strerror or str(error)).lower()
    if name not in ("", subject):
        cause += f" ({name})"
    facts: t.Dict[str, t.Any] = {"path": name or subject, "errno": error.errno}
    owner = namespace_owner()
    if owner and not permission_hint and error.errno in (errno.EACCES, errno.EPERM):
        user, folder = _name_of(owner), _existing(root or subject)
        return PermissionDenied(
            subject,
            f"cannot be used by {user}: {cause}. Files that root created in the store of {user} look like this",
            f"Find them: `{command('find', folder, '-user', 'root')}`. As root, change their owner to {user}: "
            f"`{command('find', folder, '-user', 'root', '-exec', 'chown', '-h', f'{user}:', '{}', '+')}`.",
            **facts,
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDenied(
            subject,
            f"cannot be used by UID {os.geteuid()}: {cause}",
            permission_hint or f"Run with `become: true`, or set `user: {_owner(root)}`.",
            **facts,
        )
    if error.errno == errno.EROFS:
        return PermissionDenied(
            subject, f"cannot be written: {cause}", "Mount its filesystem writable.", **facts
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        shows = ""
        if root:
            folder = _existing(root)
            shows = f"; `{command('df', '-h', folder)}` and `{command('df', '-i', folder)}` show the free space"
        return NoSpace(
            subject,
            f"cannot be written: {cause}",
            "Free space, for example with userns.storage.layer_gc, or raise the quota, then run the task "
            f"again{shows}.",
            **facts,
        )
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        cause = f"holds a symbolic link or a file where a directory belongs: {cause}"
    return kind(
        subject,
        cause,
        LOOK_INTO_LOG,
        **facts,
    )


@contextlib.contextmanager
def translate_error_of_root_file(path: str) -> t.Iterator[None]:
    """Translate OSError as :func:`translate_oserror`, for a file or directory that only root may change."""
    hint = "Run the task with become: true."
    if os.geteuid() == 0:
        look = command("lsattr", "-d", os.path.dirname(path) or ".", path)
        hint = f"Check whether a file attribute or a security module protects it: `{look}`."
    with translate_oserror(os.path.dirname(path), path, permission_hint=hint):
        yield


def _existing(path: str) -> str:
    """The path, or the nearest directory above it that exists, for commands that need a directory."""
    while path.startswith("/") and path != "/" and not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def namespace_owner() -> int:
    """The host UID of the user in whose namespace this process is root, as in ``podman unshare``; 0 elsewhere."""
    try:
        with open("/proc/self/uid_map", encoding="utf-8") as table:
            inside, outside, count = map(int, table.readline().split())
    except (OSError, ValueError):
        return 0
    return outside if os.geteuid() == inside == 0 and count == 1 else 0


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _owner(path: str) -> str:
    """The owner of the store; unknown owners by number."""
    while path not in ("", "/"):
        try:
            uid = os.stat(path).st_uid
        except OSError:
            path = os.path.dirname(path)
            continue
        return _name_of(uid)
    return "OWNER"
