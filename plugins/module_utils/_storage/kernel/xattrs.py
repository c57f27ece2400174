# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Extended attributes of open files and of files that cannot be opened, see xattr(7).

Every function takes a descriptor that is open for reading, or a directory's descriptor and the name
of an entry in it; the empty name stands for a descriptor's own file, opened with O_PATH. A symbolic
link is never followed.
"""

from __future__ import annotations

import os
import typing as t


def names(fd: int, entry: t.Optional[str] = None) -> t.List[str]:
    """The names of all visible attributes.

    :raises OSError: ENOTSUP: the filesystem has no attributes
    """
    if entry is None:
        return os.listxattr(fd)
    return os.listxattr(_path(fd, entry), follow_symlinks=not entry)


def get(fd: int, attribute: str, entry: t.Optional[str] = None) -> bytes:
    """The value of one attribute.

    :raises OSError: ENODATA: there is no such attribute
    """
    if entry is None:
        return os.getxattr(fd, attribute)
    return os.getxattr(_path(fd, entry), attribute, follow_symlinks=not entry)


def put(fd: int, attribute: str, value: bytes, entry: t.Optional[str] = None) -> None:
    """Set an attribute.

    :raises OSError: ENOTSUP, EPERM, ENOSPC ...
    """
    if entry is None:
        os.setxattr(fd, attribute, value)
    else:
        os.setxattr(_path(fd, entry), attribute, value, follow_symlinks=not entry)


def remove(fd: int, attribute: str, entry: t.Optional[str] = None) -> None:
    """Remove one attribute.

    :raises OSError: ENODATA: there is no such attribute
    """
    if entry is None:
        os.removexattr(fd, attribute)
    else:
        os.removexattr(_path(fd, entry), attribute, follow_symlinks=not entry)


def _path(fd: int, entry: str) -> str:
    # No call takes a directory and a name, or an O_PATH descriptor. The link in /proc leads to the
    # file at any depth; no other link is followed.
    return f"/proc/self/fd/{fd}/{entry}" if entry else f"/proc/self/fd/{fd}"
