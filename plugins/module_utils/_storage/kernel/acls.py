# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""POSIX access control lists as extended attributes, see acl(5) and <linux/posix_acl_xattr.h>."""

from __future__ import annotations

import os
import struct

ACCESS = "system.posix_acl_access"

_HEADER = struct.Struct("<L")
_ENTRY = struct.Struct("<HHL")
_VERSION = 2
_NO_ID = 0xFFFFFFFF

_USER_OBJ = 0x01
_USER = 0x02
_GROUP_OBJ = 0x04
_MASK = 0x10
_OTHER = 0x20

READ = 4
WRITE = 2
EXECUTE = 1


def owner_and_user(uid: int, permissions: int) -> bytes:
    """An access ACL with all permissions for the owner, some for one user, and none for others.

    :param uid: host UID of that user
    :param permissions: READ, WRITE and EXECUTE of this module, ORed
    """
    entries = (
        (_USER_OBJ, READ | WRITE | EXECUTE, _NO_ID),
        (_USER, permissions, uid),
        (_GROUP_OBJ, 0, _NO_ID),
        (_MASK, permissions, _NO_ID),
        (_OTHER, 0, _NO_ID),
    )
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in entries)


def set_access(directory: int, acl: bytes) -> bool:
    """Give an open directory an access ACL.

    :param directory: its descriptor
    :returns: whether it had another ACL before
    :raises OSError: ENOTSUP if the filesystem does not support ACLs
    """
    try:
        if os.getxattr(directory, ACCESS) == acl:
            return False
    except OSError:
        # It has no ACL, or the next call reports the error.
        pass
    os.setxattr(directory, ACCESS, acl)
    return True
