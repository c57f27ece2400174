# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare a mapped tree with its template, entry by entry. File contents are not read."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import typing as t

from ..idmap.mapping import OVERFLOW_ID, Shift
from ..kernel import files, xattrs
from ..printable import printable
from . import owners
from .merged import attribute_names

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_MOST_SHOWN = 20
_LONGEST_PATH = 200
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}

_Inode = t.Tuple[int, int]


class Difference(t.NamedTuple):
    """An entry that differs.

    :ivar path: relative to the tree's root, which is "/"; printable
    :ivar problems: the differences, each a clause
    """

    path: str
    problems: t.Tuple[str, ...]


class Comparison(t.NamedTuple):
    """The result of a comparison.

    :ivar entries: the number of entries of the template
    :ivar different: the number of entries that differ in more than their modification time, or exist in only one tree
    :ivar times: the number of entries that differ only in their modification time
    :ivar shown: the first few of the entries that differ
    """

    entries: int
    different: int
    times: int
    shown: t.Tuple[Difference, ...]


def compare(template: int, mapped: int, shift: Shift) -> Comparison:
    """Compare two whole trees: kinds, owners, modes, sizes, devices, link texts, hard links and attributes.

    :param template: the root directory of the template, open
    :param mapped: the root directory of the mapped tree, open
    :param shift: from the template's mapping to that of the mapped tree
    :raises OSError: a tree cannot be read
    """
    return _Comparing(template, mapped, shift).run()


class _Comparing:
    def __init__(self, template: int, mapped: int, shift: Shift) -> None:
        self.roots = template, mapped
        self.shift = shift
        self.entries = self.different = self.times = 0
        self.shown: t.List[Difference] = []
        # Inodes with several names, each with its counterpart.
        self.forth: t.Dict[_Inode, _Inode] = {}
        self.back: t.Dict[_Inode, _Inode] = {}

    def run(self) -> Comparison:
        self._entry("", *self.roots, None)
        folders = [""]
        while folders:
            path = folders.pop()
            with contextlib.ExitStack() as undo:
                opened = []
                for root in self.roots:
                    opening = functools.partial(files.open_beneath, root, path)
                    descriptor = files.open_unnoticed(opening, _DIRECTORY)
                    undo.callback(os.close, descriptor)
                    opened.append(descriptor)
                theirs, ours = (set(os.listdir(item)) for item in opened)
                for name in sorted(theirs | ours):
                    below = f"{path}/{name}" if path else name
                    if name not in ours:
                        self.entries += 1
                        self._differs(below, ["is missing"])
                    elif name not in theirs:
                        self._differs(below, ["is not in the image"])
                    elif self._entry(below, opened[0], opened[1], name):
                        folders.append(below)
        return Comparison(self.entries, self.different, self.times, tuple(self.shown))

    def _differs(self, path: str, problems: t.Sequence[str]) -> None:
        self.different += 1
        if len(self.shown) < _MOST_SHOWN:
            self.shown.append(Difference(printable(f"/{path}", _LONGEST_PATH), tuple(problems)))

    def _entry(self, path: str, template: int, mapped: int, name: t.Optional[str]) -> bool:
        """Compare an entry of two open directories, or the directories themselves; returns whether both are such."""
        self.entries += 1
        expected, found = (
            os.fstat(fd) if name is None else os.stat(name, dir_fd=fd, follow_symlinks=False)
            for fd in (template, mapped)
        )
        kind = stat.S_IFMT(expected.st_mode)
        if stat.S_IFMT(found.st_mode) != kind:
            self._differs(path, [f"is {_kind(found)}, not {_kind(expected)}"])
            return False
        problems = list(self._problems(expected, found, template, mapped, name))
        if problems:
            self._differs(path, problems)
        elif expected.st_mtime_ns != found.st_mtime_ns:
            self.times += 1
        return kind == stat.S_IFDIR

    def _problems(
        self,
        expected: os.stat_result,
        found: os.stat_result,
        template: int,
        mapped: int,
        name: t.Optional[str],
    ) -> t.Iterator[str]:
        owner = _mapped(self.shift.uid(expected.st_uid)), _mapped(self.shift.gid(expected.st_gid))
        if (found.st_uid, found.st_gid) != owner:
            yield f"belongs to {found.st_uid}:{found.st_gid}, not to {owner[0]}:{owner[1]}"
        kind = stat.S_IFMT(expected.st_mode)
        if kind != stat.S_IFLNK and stat.S_IMODE(found.st_mode) != stat.S_IMODE(expected.st_mode):
            modes = stat.S_IMODE(found.st_mode), stat.S_IMODE(expected.st_mode)
            yield f"has mode {modes[0]:04o}, not {modes[1]:04o}"
        if kind == stat.S_IFREG and found.st_size != expected.st_size:
            yield f"has {found.st_size} bytes, not {expected.st_size}"
        if kind in (stat.S_IFCHR, stat.S_IFBLK) and found.st_rdev != expected.st_rdev:
            yield "is another device"
        if (
            kind == stat.S_IFLNK
            and name is not None
            and os.readlink(name, dir_fd=mapped) != os.readlink(name, dir_fd=template)
        ):
            yield "leads elsewhere"
        if kind != stat.S_IFDIR:
            yield from self._links(expected, found)
        yield from self._attributes(template, mapped, name)

    def _links(self, expected: os.stat_result, found: os.stat_result) -> t.Iterator[str]:
        if expected.st_nlink == 1 and found.st_nlink == 1:
            return
        pair = (expected.st_dev, expected.st_ino), (found.st_dev, found.st_ino)
        if self.forth.setdefault(*pair) != pair[1] or self.back.setdefault(*pair[::-1]) != pair[0]:
            yield "is hard-linked otherwise"

    def _attributes(self, template: int, mapped: int, name: t.Optional[str]) -> t.Iterator[str]:
        expected = {
            key: owners.translate(key, value, self.shift)
            for key, value in _attributes(template, name).items()
        }
        found = _attributes(mapped, name)
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                what = "lacks" if key not in found else "has another" if key in expected else "has"
                yield f"{what} {printable(key, _LONGEST_PATH)}"


def _mapped(number: int) -> int:
    return OVERFLOW_ID if number < 0 else number


def _kind(status: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(status.st_mode), "of another kind")


def _attributes(fd: int, entry: t.Optional[str]) -> t.Dict[str, bytes]:
    """The attributes that are content, without labels of the host and attributes of the filesystem."""
    found = {}
    for name in attribute_names(fd, entry):
        if not owners.is_copied(name) or name == owners.SELINUX:
            continue
        try:
            found[name] = xattrs.get(fd, name, entry)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOVERFLOW):
                raise
    return found
