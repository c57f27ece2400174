# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Functions of the C library that Python lacks. Only this package uses ctypes."""

from __future__ import annotations

import ctypes
import errno
import os
import typing as t

_LIBC = ctypes.CDLL(None, use_errno=True)

_STRING = ctypes.c_char_p
_INT = ctypes.c_int
_ULONG = ctypes.c_ulong

# Prototypes as in the manual pages of section 2; each returns -1 and sets errno on failure.
_PROTOTYPES: t.Dict[str, t.Tuple[t.Any, ...]] = {
    "mount": (_STRING, _STRING, _STRING, _ULONG, _STRING),
    "umount2": (_STRING, _INT),
    "unshare": (_INT,),
    "setns": (_INT, _INT),
    "syncfs": (_INT,),
    "sync_file_range": (_INT, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint),
    "prctl": (_INT, _ULONG, _ULONG, _ULONG, _ULONG),
}

# linux/prctl.h
PR_SET_PDEATHSIG = 1

# The number that is never a user or a group.
_NO_ID = 0xFFFFFFFF

# Calls that glibc 2.31 does not wrap; the numbers are the same on every architecture since 5.0.
SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_MOUNT_SETATTR = 442

for _name, _types in _PROTOTYPES.items():
    _function = getattr(_LIBC, _name)
    _function.argtypes = _types
    _function.restype = _INT
_LIBC.syscall.restype = ctypes.c_long


def call(name: str, *arguments: t.Any, path: t.Optional[str] = None) -> int:
    """Call a C library function of the table above.

    :param path: the path for the error's ``filename``
    :returns: the call's result, never negative
    :raises OSError: with the call's errno
    """
    result: int = getattr(_LIBC, name)(*arguments)
    if result < 0:
        _fail(path)
    return result


def syscall(number: int, *arguments: t.Any, path: t.Optional[str] = None) -> int:
    """Make a system call by number; arguments are ints, bytes, None or ctypes objects.

    :raises OSError: with the call's errno
    """
    converted = [
        ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments
    ]
    result: int = _LIBC.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        _fail(path)
    return result


def set_fsid(name: str, number: int) -> int:
    """Call ``setfsuid`` or ``setfsgid``, which report no errors, and return the current ID."""
    function = getattr(_LIBC, name)
    function(ctypes.c_uint32(number))
    now: int = function(ctypes.c_uint32(_NO_ID))
    return now & _NO_ID


def _fail(path: t.Optional[str]) -> t.NoReturn:
    number = ctypes.get_errno() or errno.EIO
    if path is None:
        raise OSError(number, os.strerror(number))
    raise OSError(number, os.strerror(number), path)
