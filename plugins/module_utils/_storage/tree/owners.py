# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The owner IDs of a file in all their locations: inode, POSIX ACLs, capabilities."""

from __future__ import annotations

import errno
import os
import stat
import struct
import typing as t

from ..idmap.mapping import Shift
from ..kernel import xattrs
from .merged import attribute_names

CAPABILITY = "security.capability"
SELINUX = "security.selinux"
ACLS = frozenset(("system.posix_acl_access", "system.posix_acl_default"))
# Attributes whose values contain IDs.
WITH_IDS = ACLS | {CAPABILITY}

# linux/posix_acl_xattr.h: a version, then entries of tag, permissions and ID, little endian.
_ACL_HEADER = struct.Struct("<L")
_ACL_ENTRY = struct.Struct("<HHL")
_ACL_USER = 0x02
_ACL_GROUP = 0x08

# linux/capability.h: struct vfs_ns_cap_data, the host UID of the namespace's root at its end.
_CAPABILITY_REVISION = 0xFF000000
_CAPABILITY_REVISION_3 = 0x03000000
_CAPABILITY_ROOT_AT = 20
_ID = struct.Struct("<L")

_COPIED = ("user.", "trusted.", "security.")
# xfs also shows ACLs under these names, with untranslated IDs.
_ALIASES = frozenset(("trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT"))

# Errors for attributes that cannot be read in this namespace or were just removed.
UNREADABLE = frozenset((errno.EOVERFLOW, errno.ENODATA))


def translate(attribute: str, value: bytes, shift: Shift) -> bytes:
    """The value of an attribute under the new mapping.

    IDs that cannot be mapped are recorded in ``shift`` and not changed. A capability without a root ID
    (version 2) belongs to the host's root and is valid in every namespace, so it is not changed.
    """
    if attribute in ACLS:
        return _translate_acl(value, shift)
    if attribute == CAPABILITY:
        return _translate_capability(value, shift)
    return value


def _translate_acl(value: bytes, shift: Shift) -> bytes:
    if (len(value) - _ACL_HEADER.size) % _ACL_ENTRY.size:
        return value
    result = bytearray(value)
    for offset in range(_ACL_HEADER.size, len(value), _ACL_ENTRY.size):
        tag, permissions, number = _ACL_ENTRY.unpack_from(value, offset)
        if tag == _ACL_USER:
            number = shift.uid(number)
        elif tag == _ACL_GROUP:
            number = shift.gid(number)
        else:
            continue
        if number >= 0:
            _ACL_ENTRY.pack_into(result, offset, tag, permissions, number)
    return bytes(result)


def _translate_capability(value: bytes, shift: Shift) -> bytes:
    if len(value) < _CAPABILITY_ROOT_AT + _ID.size:
        return value
    if _ID.unpack_from(value)[0] & _CAPABILITY_REVISION != _CAPABILITY_REVISION_3:
        return value
    root = shift.uid(_ID.unpack_from(value, _CAPABILITY_ROOT_AT)[0])
    if root < 0:
        return value
    return value[:_CAPABILITY_ROOT_AT] + _ID.pack(root) + value[_CAPABILITY_ROOT_AT + _ID.size :]


def is_copied(attribute: str) -> bool:
    """Whether an attribute is content of a file, unlike virtual attributes of filesystems."""
    return attribute in ACLS or (attribute.startswith(_COPIED) and attribute not in _ALIASES)


def copy_attributes(
    dst_fd: int,
    src_fd: int,
    attributes: t.Iterable[str],
    shift: Shift,
    dst_entry: t.Optional[str] = None,
    src_entry: t.Optional[str] = None,
) -> None:
    """Copy the attributes of a file; call this after setting its owner and before setting its mode.

    :param attributes: names of attributes, without those that are private to a driver
    :param dst_entry: a name in ``dst_fd``, if the file itself cannot be opened
    :param src_entry: the same for ``src_fd``
    :raises OSError: with the attribute's name
    """
    for attribute in attributes:
        if not is_copied(attribute):
            continue
        try:
            value = xattrs.get(src_fd, attribute, src_entry)
        except OSError as error:
            # EOVERFLOW: a capability of another namespace, which has no effect in this one.
            if error.errno in UNREADABLE:
                continue
            raise
        value = translate(attribute, value, shift)
        try:
            xattrs.put(dst_fd, attribute, value, dst_entry)
        except OSError as error:
            if attribute == SELINUX and _holds_no_label(error, dst_fd, value, dst_entry):
                continue
            raise OSError(error.errno, f"{error.strerror} (attribute {attribute})") from None


def _holds_no_label(error: OSError, dst_fd: int, value: bytes, dst_entry: t.Optional[str]) -> bool:
    """Whether a label is already correct, or cannot be stored."""
    if error.errno == errno.ENOTSUP:
        return True
    try:
        return xattrs.get(dst_fd, SELINUX, dst_entry) == value
    except OSError:
        return False


def apply_owner(
    fd: int, status: os.stat_result, shift: Shift, entry: t.Optional[str] = None
) -> bool:
    """Change the owner of a file in place, and keep its ACLs, capability, setuid and setgid bits.

    :param fd: the file, open for reading; or its directory, if ``entry`` names it there
    :param status: the current result of stat for the file
    :returns: whether anything was changed; a file that needs no change is not touched
    """
    uid, gid = shift.uid(status.st_uid), shift.gid(status.st_gid)
    moved = uid not in (-1, status.st_uid) or gid not in (-1, status.st_gid)
    kept: t.List[t.Tuple[str, bytes]] = []
    if not stat.S_ISLNK(status.st_mode):
        kept = _values_with_ids(fd, shift, moved, entry)
    if not moved and not kept:
        return False
    if moved:
        if entry is None:
            os.fchown(fd, uid, gid)
        elif entry:
            os.chown(entry, uid, gid, dir_fd=fd, follow_symlinks=False)
        else:
            # For an O_PATH descriptor, the link in /proc leads to the file itself, even a symbolic link.
            os.chown(f"/proc/self/fd/{fd}", uid, gid)
    # chown(2) removes these bits, and a changed ACL would change the group's mode bits.
    for attribute, value in kept:
        xattrs.put(fd, attribute, value, entry)
    if moved and status.st_mode & (stat.S_ISUID | stat.S_ISGID):
        if entry is None:
            os.fchmod(fd, stat.S_IMODE(status.st_mode))
        elif not stat.S_ISLNK(status.st_mode):
            node = entry or f"/proc/self/fd/{fd}"
            os.chmod(node, stat.S_IMODE(status.st_mode), dir_fd=fd)
    return True


def _values_with_ids(
    fd: int, shift: Shift, moved: bool, entry: t.Optional[str]
) -> t.List[t.Tuple[str, bytes]]:
    """The ACLs and the capability that must be written after the owner has changed."""
    found = []
    for attribute in attribute_names(fd, entry):
        if attribute not in WITH_IDS:
            continue
        try:
            value = xattrs.get(fd, attribute, entry)
        except OSError as error:
            if error.errno in UNREADABLE:
                continue
            raise
        translated = translate(attribute, value, shift)
        if translated != value or (moved and attribute == CAPABILITY):
            found.append((attribute, translated))
    return found
