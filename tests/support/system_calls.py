# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Let the kernel stop a traced process at selected system calls: their numbers, and a seccomp filter."""

from __future__ import annotations

import ctypes
import os
import struct
import typing as t

_X86_64 = {
    "write": 1, "open": 2, "stat": 4, "lstat": 6, "ioctl": 16, "pwrite64": 18, "writev": 20, "access": 21,
    "sendfile": 40, "execve": 59, "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "chdir": 80,
    "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "readlink": 89,
    "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "utime": 132, "mknod": 133, "statfs": 137,
    "pivot_root": 155, "chroot": 161, "sync": 162, "mount": 165, "umount2": 166, "setxattr": 188, "lsetxattr": 189,
    "fsetxattr": 190, "getxattr": 191, "lgetxattr": 192, "listxattr": 194, "llistxattr": 195, "removexattr": 197,
    "lremovexattr": 198, "fremovexattr": 199, "utimes": 235, "inotify_add_watch": 254, "openat": 257, "mkdirat": 258,
    "mknodat": 259, "fchownat": 260, "futimesat": 261, "newfstatat": 262, "unlinkat": 263, "renameat": 264,
    "linkat": 265, "symlinkat": 266, "readlinkat": 267, "fchmodat": 268, "faccessat": 269, "splice": 275,
    "utimensat": 280, "fallocate": 285, "pwritev": 296, "fanotify_mark": 301, "name_to_handle_at": 303, "syncfs": 306,
    "renameat2": 316, "execveat": 322, "copy_file_range": 326, "pwritev2": 328, "statx": 332, "open_tree": 428,
    "move_mount": 429, "openat2": 437, "faccessat2": 439, "mount_setattr": 442, "fchmodat2": 452,
}  # fmt: skip
_AARCH64 = {
    "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "getxattr": 8, "lgetxattr": 9, "listxattr": 11, "llistxattr": 12,
    "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16, "inotify_add_watch": 27, "ioctl": 29, "mknodat": 33,
    "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37, "renameat": 38, "umount2": 39, "mount": 40,
    "pivot_root": 41, "statfs": 43, "truncate": 45, "ftruncate": 46, "fallocate": 47, "faccessat": 48, "chdir": 49,
    "chroot": 51, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55, "openat": 56, "write": 64, "writev": 66,
    "pwrite64": 68, "pwritev": 70, "sendfile": 71, "splice": 76, "readlinkat": 78, "newfstatat": 79, "sync": 81,
    "fsync": 82, "fdatasync": 83, "utimensat": 88, "execve": 221, "fanotify_mark": 263, "name_to_handle_at": 264,
    "syncfs": 267, "renameat2": 276, "execveat": 281, "copy_file_range": 285, "pwritev2": 287, "statx": 291,
    "open_tree": 428, "move_mount": 429, "openat2": 437, "faccessat2": 439, "mount_setattr": 442, "fchmodat2": 452,
}  # fmt: skip
_NUMBERS = _AARCH64 if os.uname().machine == "aarch64" else _X86_64

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_LIBC = ctypes.CDLL(None, use_errno=True)


def names_by_number(names: t.Collection[str]) -> t.Dict[int, str]:
    """The system calls of this architecture with these names.

    :raises ValueError: a name is unknown on all architectures
    """
    unknown = {*names} - {*_X86_64, *_AARCH64}
    if unknown:
        raise ValueError(f"unknown system calls: {sorted(unknown)}")
    return {_NUMBERS[name]: name for name in names if name in _NUMBERS}


def install_filter(numbers: t.Iterable[int]) -> None:
    """Install a seccomp filter that stops this process and its descendants at each of these calls."""
    ordered = sorted(numbers)
    code = [(0x20, 0, 0, 0)]
    code += [(0x15, len(ordered) - position, 0, number) for position, number in enumerate(ordered)]
    code += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x7FF00000)]
    body = b"".join(struct.pack("<HBBI", *item) for item in code)
    buffer = ctypes.create_string_buffer(body, len(body))
    program = struct.pack("@HxxxxxxP", len(code), ctypes.addressof(buffer))
    mode = ctypes.c_ulong(_SECCOMP_MODE_FILTER)
    if _LIBC.prctl(_PR_SET_SECCOMP, mode, ctypes.c_char_p(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")
