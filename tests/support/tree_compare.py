# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare a mapped tree with its template, entry by entry, independently of the code under test."""

from __future__ import annotations

import errno
import os
import stat
import struct
import typing as t

# Container ID, host ID, count; without ranges IDs are unchanged.
Ranges = t.Sequence[t.Tuple[int, int, int]]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_PRIVATE = ("trusted.overlay.", "user.overlay.")
# The names under which xfs shows ACLs a second time.
_ALIASES = ("trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT")
_ACL = ("system.posix_acl_access", "system.posix_acl_default")
_CAPABILITY = "security.capability"
# The allocation may differ slightly at the edges of extents.
_SLACK = 128 * 1024

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


class IDs(t.NamedTuple):
    """Both ID maps of a tree."""

    uid: Ranges = ()
    gid: Ranges = ()


def to_container(ranges: Ranges, host_id: int) -> int:
    """The container ID of a host ID."""
    if not ranges:
        return host_id
    for container, host, count in ranges:
        if host <= host_id < host + count:
            return host_id - host + container
    raise LookupError(f"host ID {host_id} is not in {ranges}")


def to_host(ranges: Ranges, container_id: int) -> int:
    """The host ID of a container ID."""
    if not ranges:
        return container_id
    for container, host, count in ranges:
        if container <= container_id < container + count:
            return container_id - container + host
    raise LookupError(f"container ID {container_id} is not in {ranges}")


def differences(
    template: str,
    mapped: str,
    old: IDs,
    new: IDs,
    ignore: t.Container[str] = (),
    most: int = 50,
    own_root: t.Optional[int] = None,
) -> t.List[str]:
    """The differences, each with its path; empty for an exact copy.

    :param template: the template's tree, preferably a mount by the kernel
    :param old: the template's maps
    :param new: the mapped tree's maps
    :param ignore: aspects to ignore: "owner", "mtime", "directory mtime", "acl", "sparse" ...
    :param most: the maximum number of differences
    :param own_root: host UID of the root of the namespace that both trees belong to: capabilities of
        that root are honoured in all namespaces below, so they stay as they are
    """
    differ = _Differ(old, new, ignore, most, own_root)
    roots = [os.open(path, _DIRECTORY) for path in (template, mapped)]
    try:
        differ.walk(*roots)
    finally:
        for root in roots:
            os.close(root)
    return differ.found


class _Differ:
    def __init__(
        self,
        old: IDs,
        new: IDs,
        ignore: t.Container[str],
        most: int,
        own_root: t.Optional[int] = None,
    ) -> None:
        self.own_root = own_root
        self.old = old
        self.new = new
        self.ignore = ignore
        self.most = most
        self.found: t.List[str] = []
        self._path: t.List[bytes] = []
        # Hard links of each tree: by device and inode, the visible names.
        self._links: t.Tuple[t.Dict[t.Any, t.Set[bytes]], ...] = ({}, {})

    def walk(self, template: int, mapped: int) -> None:
        """Walk depth first with two descriptors per tree, and return through ".."."""
        fds = [os.dup(template), os.dup(mapped)]
        try:
            self._attributes(fds, b".", [os.fstat(fd) for fd in fds])
            todo = [self._directory(fds)]
            while todo:
                if len(self.found) >= self.most:
                    return
                if todo[-1]:
                    name = todo[-1].pop()
                    self._move(fds, name, _DIRECTORY)
                    self._path.append(name)
                    todo.append(self._directory(fds))
                else:
                    todo.pop()
                    if todo:
                        self._path.pop()
                        self._move(fds, b"..", _DIRECTORY)
        finally:
            for fd in fds:
                os.close(fd)
        self._compare_links()

    def _move(self, fds: t.List[int], name: bytes, flags: int) -> None:
        for side, fd in enumerate(fds):
            fds[side] = os.open(name, flags, dir_fd=fd)
            os.close(fd)

    def _directory(self, fds: t.List[int]) -> t.List[bytes]:
        """Compare all entries; returns the subdirectories in both trees."""
        listings = [_listing(fd) for fd in fds]
        for name in sorted(listings[0].keys() - listings[1].keys()):
            self._add_difference(name, "is missing")
        for name in sorted(listings[1].keys() - listings[0].keys()):
            self._add_difference(name, "is not in the template")
        below = []
        for name in sorted(listings[0].keys() & listings[1].keys()):
            both = [listing[name] for listing in listings]
            kinds = [_KINDS[stat.S_IFMT(status.st_mode)] for status in both]
            if kinds[0] != kinds[1]:
                self._add_difference(name, f"is a {kinds[1]}, not a {kinds[0]}")
                continue
            if kinds[0] == "directory":
                below.append(name)
            else:
                for side, status in enumerate(both):
                    self._links[side].setdefault((status.st_dev, status.st_ino), set()).add(
                        b"/".join((*self._path, name))
                    )
            self._attributes(fds, name, both)
        return below

    def _attributes(self, fds: t.List[int], name: bytes, both: t.List[os.stat_result]) -> None:
        was, now = both
        owner = (
            to_host(self.new.uid, to_container(self.old.uid, was.st_uid)),
            to_host(self.new.gid, to_container(self.old.gid, was.st_gid)),
        )
        self._equal("owner", name, owner, (now.st_uid, now.st_gid))
        if not stat.S_ISLNK(was.st_mode):
            self._equal("mode", name, oct(was.st_mode), oct(now.st_mode))
        if stat.S_ISDIR(was.st_mode):
            self._equal("directory mtime", name, was.st_mtime_ns, now.st_mtime_ns)
        else:
            self._equal("mtime", name, was.st_mtime_ns, now.st_mtime_ns)
            self._equal("size", name, was.st_size, now.st_size)
        if stat.S_ISCHR(was.st_mode) or stat.S_ISBLK(was.st_mode):
            self._equal("device", name, was.st_rdev, now.st_rdev)
        if stat.S_ISLNK(was.st_mode):
            self._equal("target", name, *(os.readlink(name, dir_fd=fd) for fd in fds))
        if stat.S_ISREG(was.st_mode):
            if was.st_size == now.st_size and not self._same_content(fds, name):
                self._add_difference(name, "content differs", "content")
            allocated = [status.st_blocks * 512 for status in both]
            if allocated[1] > allocated[0] + _SLACK:
                self._add_difference(
                    name, f"allocates {allocated[1]}, not {allocated[0]} bytes", "sparse"
                )
        had, has = (_xattrs(fd, name) for fd in fds)
        for attribute in sorted(had.keys() | has.keys()):
            aspect = "acl" if attribute in _ACL else attribute
            expected = had.get(attribute)
            if expected is not None:
                expected = self._translated(attribute, expected)
            self._equal(aspect, name, expected, has.get(attribute))

    def _translated(self, attribute: str, value: bytes) -> bytes:
        if attribute in _ACL:
            entries = []
            for tag, permissions, number in struct.iter_unpack("<HHI", value[4:]):
                if tag == 2:
                    number = to_host(self.new.uid, to_container(self.old.uid, number))
                elif tag == 8:
                    number = to_host(self.new.gid, to_container(self.old.gid, number))
                entries.append(struct.pack("<HHI", tag, permissions, number))
            return value[:4] + b"".join(entries)
        if attribute == _CAPABILITY and value[3] == 3:
            root = struct.unpack("<I", value[20:24])[0]
            if root == self.own_root:
                return value
            root = to_host(self.new.uid, to_container(self.old.uid, root))
            if not root:
                # The kernel shows capabilities of the calling root without the root's ID.
                return value[:3] + b"\2" + value[4:20]
            return value[:20] + struct.pack("<I", root)
        return value

    def _same_content(self, fds: t.List[int], name: bytes) -> bool:
        opened = [os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=fd) for fd in fds]
        try:
            while True:
                first, second = (os.read(fd, 1 << 20) for fd in opened)
                if first != second:
                    return False
                if not first:
                    return True
        finally:
            for fd in opened:
                os.close(fd)

    def _compare_links(self) -> None:
        sets = [
            {frozenset(names) for names in links.values() if len(names) > 1}
            for links in self._links
        ]
        self._path = []
        for names in sets[0] - sets[1]:
            self._add_difference(min(names), f"is no longer one file with {sorted(names)}", "links")
        for names in sets[1] - sets[0]:
            self._add_difference(min(names), f"became one file with {sorted(names)}", "links")

    def _equal(self, aspect: str, name: bytes, expected: t.Any, actual: t.Any) -> None:
        if expected != actual:
            self._add_difference(name, f"{aspect} is {actual!r}, not {expected!r}", aspect)

    def _add_difference(self, name: bytes, what: str, aspect: str = "existence") -> None:
        if aspect not in self.ignore:
            path = b"/".join((*self._path, name))
            self.found.append(f"{path[-200:]!r}: {what}")


def _listing(fd: int) -> t.Dict[bytes, os.stat_result]:
    """All entries that exist; overlay lists some whiteouts that do not exist."""
    found = {}
    for name in map(os.fsencode, os.listdir(fd)):
        try:
            found[name] = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
    return found


def _xattrs(fd: int, name: bytes) -> t.Dict[str, bytes]:
    path = os.fsencode(f"/proc/self/fd/{fd}/") + name
    found = {}
    for attribute in os.listxattr(path, follow_symlinks=False):
        if attribute.startswith(_PRIVATE) or attribute in _ALIASES:
            continue
        try:
            found[attribute] = os.getxattr(path, attribute, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
    return found
