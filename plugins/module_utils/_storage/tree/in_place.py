# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Change the owners of the files of several layers in place.

A plan is made in advance, without locks, so that each inode takes a single
system call while the store is locked. A plan can also be reverted.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
import stat
import time
import typing as t

from ..errors import StorageError, StoreChanged, TreeError, UnsupportedDriver
from ..idmap.mapping import Shift
from ..kernel import files, namespaces, termination, xattrs
from ..kernel.oserrors import shown, translate_oserror
from . import owners
from .merged import attribute_names
from .own_tree import OwnTree

MOST_WORKERS = 8

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID
# The number of names of a directory that a process handles at once.
_PART = 2048
# The minimum number of calls for a further process.
_FEW = 512
_LONGEST_MESSAGE = 1 << 20

# An owner and a mode that a mount program shows instead of those of the file.
_OVERRIDES = frozenset(
    (
        "user.containers.override_stat",
        "user.fuseoverlayfs.override_stat",
        "security.fuseoverlayfs.override_stat",
    )
)
_METACOPY = frozenset(("trusted.overlay.metacopy", "user.overlay.metacopy"))

Owner = t.Tuple[int, int]
Attributes = t.List[t.Tuple[str, bytes, bytes]]


class _Special(t.NamedTuple):
    """An entry that needs more than a change of its owner.

    :ivar mode: the mode bits to restore, or -1
    :ivar attributes: name, value before and value after
    """

    name: str
    regular: bool
    before: Owner
    after: Owner
    mode: int
    attributes: Attributes


class _Directory(t.NamedTuple):
    """A directory, or a part of its entries.

    :ivar changed: its ctime in nanoseconds; 0 for further parts of a directory
    :ivar names: names of entries, by owner before and after
    """

    tree: int
    path: str
    inode: int
    changed: int
    before: Owner
    after: Owner
    attributes: Attributes
    names: t.List[t.Tuple[Owner, Owner, t.List[str]]]
    specials: t.List[_Special]

    @property
    def calls(self) -> int:
        """The approximate number of system calls."""
        return 3 + sum(len(names) for _old, _new, names in self.names) + 6 * len(self.specials)


class _Links:
    """The names of a file with several names."""

    __slots__ = ("found", "path", "total", "tree")

    def __init__(self, tree: int, path: str, total: int) -> None:
        self.tree, self.path, self.total = tree, path, total
        self.found = 1


class Plan:
    """The changes of owners in the trees.

    :ivar inodes: the number of inodes in all trees
    :ivar changes: the number of inodes that get another owner, ACL or capability
    :ivar seconds: the time that it took to read the trees
    """

    def __init__(self) -> None:
        self.directories: t.List[_Directory] = []
        self.inodes = 0
        self.changes = 0
        self.seconds = 0.0

    def apply(
        self,
        trees: t.Sequence[OwnTree],
        backwards: bool = False,
        workers: t.Optional[int] = None,
    ) -> None:
        """Change the owners. After an error only some of them are changed; ``backwards`` reverts them.

        :param trees: the open trees, in the order of the plan
        :param backwards: restore the previous owners
        :param workers: number of processes; None for one per processor
        :raises StoreChanged: a directory changed after the plan was made
        :raises StorageError: an owner cannot be changed
        """
        shares = _shares(self.directories, workers or _processors())
        with translate_oserror(kind=TreeError):
            _share_out(shares, functools.partial(_apply, trees, backwards))


def _processors() -> int:
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def plan(trees: t.Sequence[OwnTree], shifts: t.Sequence[Shift]) -> Plan:
    """Read whole trees and plan the changes of owners. Changes nothing, not even access times.

    The shifts record IDs that cannot be mapped; the plan is then unusable.

    :param shifts: one for each tree
    :raises UnsupportedDriver: the owners are not stored only on the files
    :raises TreeError: a tree cannot be read, contains a mount, or shares a file with something else
    """
    planner = _Planner(trees, shifts)
    started = time.monotonic()
    with translate_oserror(kind=TreeError):
        planner.read()
    planner.plan.seconds = time.monotonic() - started
    return planner.plan


class _Planner:
    def __init__(self, trees: t.Sequence[OwnTree], shifts: t.Sequence[Shift]) -> None:
        self._trees = trees
        self._shifts = shifts
        self._links: t.Dict[t.Tuple[int, int], _Links] = {}
        self.plan = Plan()

    def read(self) -> None:
        for number, tree in enumerate(self._trees):
            device = os.fstat(tree.root).st_dev
            todo = [""]
            while todo:
                path = todo.pop()
                opening = functools.partial(files.open_beneath, tree.root, path)
                fd = files.open_unnoticed(opening, _DIRECTORY)
                try:
                    prefix = f"{path}/" if path else ""
                    todo.extend(prefix + name for name in self._directory(number, path, fd, device))
                finally:
                    os.close(fd)
        for links in self._links.values():
            if links.found != links.total:
                raise TreeError(
                    f"layer {self._trees[links.tree].layer_id[:12]}, {shown(links.path)}",
                    f"has {links.total} names (hard links), of which {links.found} are in the layers to convert: "
                    "another owner would change a file elsewhere",
                    "Remove the image and pull it again, without use_hard_links in `pull_options`.",
                )

    def _directory(self, number: int, path: str, fd: int, device: int) -> t.List[str]:
        """Plan the changes of a directory and its entries; returns its subdirectories."""
        shift, whiteouts = self._shifts[number], self._trees[number].whiteouts
        status = os.fstat(fd)
        if status.st_dev != device:
            raise TreeError(
                shown(path),
                "is another filesystem's mount point, or a subvolume of its own",
                "Unmount it.",
            )
        children: t.List[str] = []
        names: t.Dict[Owner, t.List[str]] = {}
        specials: t.List[_Special] = []
        with os.scandir(fd) as entries:
            for entry in entries:
                name = entry.name
                if entry.is_dir(follow_symlinks=False):
                    children.append(name)
                    continue
                found = entry.stat(follow_symlinks=False)
                mode = found.st_mode
                if whiteouts and stat.S_ISCHR(mode) and found.st_rdev == 0:
                    continue
                if found.st_nlink > 1 and self._met(number, path, name, found):
                    continue
                self.plan.inodes += 1
                attributes: Attributes = []
                if not stat.S_ISLNK(mode):
                    attributes = self._attributes(number, path, fd, name, shift)
                if attributes or (mode & _SPECIAL_BITS and not stat.S_ISLNK(mode)):
                    before = (found.st_uid, found.st_gid)
                    specials.append(_special(name, mode, before, shift, attributes))
                else:
                    names.setdefault((found.st_uid, found.st_gid), []).append(name)
        self.plan.inodes += 1
        before = (status.st_uid, status.st_gid)
        own = self._attributes(number, path, fd, None, shift)
        self._add(number, path, status, before, own, names, specials)
        return children

    def _add(
        self,
        number: int,
        path: str,
        status: os.stat_result,
        before: Owner,
        attributes: Attributes,
        names: t.Dict[Owner, t.List[str]],
        specials: t.List[_Special],
    ) -> None:
        shift = self._shifts[number]
        after = _moved(shift, before) if path else _moved_root(shift, before)
        changing = [
            (old, new, found)
            for old, new, found in (
                (old, _moved(shift, old), found) for old, found in names.items()
            )
            if old != new
        ]
        touched = [item for item in specials if _changes(item)]
        attributes = [item for item in attributes if item[1] != item[2]]
        self.plan.changes += sum(len(found) for _old, _new, found in changing) + len(touched)
        if after == before and not attributes and not changing and not touched:
            return
        self.plan.changes += after != before or bool(attributes)
        first: t.List[t.Tuple[Owner, Owner, t.List[str]]] = []
        more: t.List[t.Tuple[Owner, Owner, t.List[str]]] = []
        for old, new, found in changing:
            first.append((old, new, found[:_PART]))
            more.extend(
                (old, new, found[start : start + _PART])
                for start in range(_PART, len(found), _PART)
            )
        where = (number, path, status.st_ino)
        changed = status.st_ctime_ns
        self.plan.directories.append(
            _Directory(*where, changed, before, after, attributes, first, touched)
        )
        for part in more:
            self.plan.directories.append(_Directory(*where, 0, before, before, [], [part], []))

    def _met(self, number: int, path: str, name: str, status: os.stat_result) -> bool:
        """Whether a file with several names was found before, under another name."""
        key = (status.st_dev, status.st_ino)
        links = self._links.get(key)
        if links is None:
            where = f"{path}/{name}" if path else name
            self._links[key] = _Links(number, where, status.st_nlink)
            return False
        links.found += 1
        if self._shifts[links.tree].old != self._shifts[number].old:
            raise TreeError(
                f"layer {self._trees[number].layer_id[:12]}, {shown(links.path)}",
                "is a file that two layers with different maps share",
                "Remove the image and pull it again.",
            )
        return True

    def _attributes(
        self, number: int, path: str, fd: int, entry: t.Optional[str], shift: Shift
    ) -> Attributes:
        """The attributes that contain IDs, or that a change of owner would remove."""
        found: Attributes = []
        for attribute in attribute_names(fd, entry):
            if attribute in _OVERRIDES or attribute in _METACOPY:
                where = "/".join(part for part in (path, entry) if part)
                raise UnsupportedDriver(
                    f"layer {self._trees[number].layer_id[:12]}, {shown(where)}",
                    f"has the attribute {attribute}, so the owner of the file is not, or not only, the owner "
                    "that containers see",
                    "Remove the image and pull it again.",
                )
            if attribute in owners.WITH_IDS:
                try:
                    value = xattrs.get(fd, attribute, entry)
                except OSError as error:
                    if error.errno in owners.UNREADABLE:
                        continue
                    raise
                found.append((attribute, value, owners.translate(attribute, value, shift)))
        return found


def _moved(shift: Shift, owner: Owner) -> Owner:
    return shift.uid(owner[0]), shift.gid(owner[1])


def _moved_root(shift: Shift, owner: Owner) -> Owner:
    """The root directory of a layer; runtimes that mount the layer make the host's root its owner."""
    old = shift.old
    if not any(owner) and None in (old.uid.to_container(0), old.gid.to_container(0)):
        return shift.new.root
    return _moved(shift, owner)


def _special(name: str, mode: int, before: Owner, shift: Shift, attributes: Attributes) -> _Special:
    bits = stat.S_IMODE(mode) if mode & _SPECIAL_BITS else -1
    return _Special(name, stat.S_ISREG(mode), before, _moved(shift, before), bits, attributes)


def _changes(special: _Special) -> bool:
    return special.before != special.after or any(
        before != after for _name, before, after in special.attributes
    )


def _shares(directories: t.Sequence[_Directory], most: int) -> t.List[t.List[_Directory]]:
    """Split the work into at most this many parts of about the same size."""
    total = sum(item.calls for item in directories)
    count = max(1, min(most, total // _FEW))
    shares: t.List[t.List[_Directory]] = [[] for _number in range(count)]
    done = 0
    for item in directories:
        shares[min(done * count // max(total, 1), count - 1)].append(item)
        done += item.calls
    return shares


def _share_out(
    shares: t.Sequence[t.List[_Directory]], work: t.Callable[[t.List[_Directory]], None]
) -> None:
    """Do each share in a process of its own, the first in this process.

    :raises OSError: the first error
    """
    leader = os.getpid()
    children: t.List[t.Tuple[int, int]] = []
    failures: t.List[BaseException] = []
    try:
        for share in shares[1:]:
            results, result_fd = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    _serve(leader, result_fd, share, work)
                finally:
                    os._exit(1)
            os.close(result_fd)
            children.append((pid, results))
        try:
            work(shares[0])
        except (OSError, StorageError) as error:
            failures.append(error)
        while children:
            pid, results = children[0]
            message = _read_all(results)
            del children[0]
            os.close(results)
            _pid, status = os.waitpid(pid, 0)
            if message:
                failures.append(pickle.loads(message))
            elif status:
                failures.append(
                    TreeError(
                        "a worker process",
                        "ended before its work was done",
                        "Look for the kernel's out-of-memory killer (dmesg), then run the task again.",
                    )
                )
    finally:
        for pid, results in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.close(results)
            os.waitpid(pid, 0)
    if failures:
        raise failures[0]


def _serve(
    leader: int,
    result_fd: int,
    share: t.List[_Directory],
    work: t.Callable[[t.List[_Directory]], None],
) -> None:
    """Run a worker. Without an error it ends without a message."""
    namespaces.die_with_parent(leader)
    for number in termination.SIGNALS:
        # The leader decides how to continue.
        signal.signal(number, signal.SIG_IGN)
    try:
        work(share)
    except (OSError, StorageError) as error:
        os.write(result_fd, pickle.dumps(error)[:_LONGEST_MESSAGE])
        os._exit(1)
    os._exit(0)


def _read_all(descriptor: int) -> bytes:
    pieces: t.List[bytes] = []
    while True:
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)


def _apply(
    trees: t.Sequence[OwnTree], backwards: bool, directories: t.Iterable[_Directory]
) -> None:
    for item in directories:
        tree = trees[item.tree]
        fd = files.open_beneath(tree.root, item.path, _DIRECTORY)
        try:
            status = os.fstat(fd)
            changed = status.st_ctime_ns if item.changed and not backwards else item.changed
            if (status.st_ino, changed) != (item.inode, item.changed):
                raise StoreChanged(
                    f"layer {tree.layer_id[:12]}, {shown(item.path)}",
                    "was changed while its owners were to be changed",
                    "Run the task again.",
                )
            try:
                _apply_names(fd, item, backwards)
            except OSError as error:
                raise _at(error, tree, item.path, str(error.filename or "")) from None
            for special in item.specials:
                try:
                    _apply_special(fd, special, backwards)
                except OSError as error:
                    raise _at(error, tree, item.path, special.name) from None
            try:
                if item.before != item.after:
                    os.fchown(fd, *(item.before if backwards else item.after))
                for attribute, old, new in item.attributes:
                    xattrs.put(fd, attribute, old if backwards else new)
            except OSError as error:
                raise _at(error, tree, item.path, "") from None
        finally:
            os.close(fd)


def _apply_names(fd: int, item: _Directory, backwards: bool) -> None:
    chown = os.chown
    for before, after, names in item.names:
        uid, gid = before if backwards else after
        for name in names:
            chown(name, uid, gid, dir_fd=fd, follow_symlinks=False)


def _apply_special(parent: int, special: _Special, backwards: bool) -> None:
    owner = special.before if backwards else special.after
    fd = os.open(special.name, _READ if special.regular else _LOOK, dir_fd=parent)
    try:
        if special.regular:
            os.fchown(fd, *owner)
        else:
            # For an O_PATH descriptor, the link in /proc leads to the file itself.
            os.chown(f"/proc/self/fd/{fd}", *owner)
        # chown(2) removes capabilities, and a changed ACL would change the group's mode bits.
        for attribute, old, new in special.attributes:
            xattrs.put(fd, attribute, old if backwards else new, None if special.regular else "")
        if special.mode >= 0:
            if special.regular:
                os.fchmod(fd, special.mode)
            else:
                os.chmod(f"/proc/self/fd/{fd}", special.mode)
    finally:
        os.close(fd)


def _at(error: OSError, tree: OwnTree, path: str, name: str) -> OSError:
    where = "/".join(part for part in (tree.layer_id[:12], path, name) if part)
    return OSError(error.errno, error.strerror, shown(where))
