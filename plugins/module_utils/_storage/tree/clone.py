# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Copy a merged tree, with other owners."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
import typing as t

from ..errors import TreeError, UnmappedIDs
from ..idmap.mapping import Shift
from ..kernel import files, fsids, mounts, xattrs
from ..kernel.oserrors import shown, translate_oserror
from . import owners
from .merged import LayerStack, attribute_names
from .tree_tools import CloneResult
from .walk import (
    ALLOCATED,
    APPARENT,
    DIRECTORIES,
    FILE,
    FILES,
    INODES,
    MOST_IDS,
    SYMLINK,
    IDs,
    Progress,
    Token,
    Totals,
    Visitor,
    Walk,
)

REFLINK = "reflink"
METACOPY = "metacopy"
COPY = "copy"

# On a file of an overlay layer: its data is in the next layer below with the same path. An empty
# value has no digest (Linux 4.19).
_METACOPY_MARK = "trusted.overlay.metacopy"

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NAMELESS = os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

# Mount options with which new files inherit the directory's group.
_GROUP_OF_DIRECTORY = frozenset(("grpid", "bsdgroups"))

_BLOCK = 512
# For files from this size on (bytes), starting writeback at once saves more time at the end than it costs; for
# smaller files it does not (measured from 16 KB to 4 MB).
_WORTH_STARTING = 1 << 20

# For files from this size on (bytes), partial copies are resumed and progress is reported.
_LARGE = 1 << 24

# Errors of FICLONE for single files that cannot share data (no copy-on-write, swap files).
_NOT_THIS_FILE = frozenset((errno.EINVAL, errno.ETXTBSY))
_NOT_HERE = frozenset((errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.ENOSYS))


def clone(
    stack: LayerStack,
    destination_dir: t.Union[str, int],
    shift: Shift,
    strategy: str = COPY,
    workers: t.Optional[int] = None,
    progress: t.Optional[Progress] = None,
    again: bool = False,
) -> CloneResult:
    """Build the merged view of ``stack`` in an empty directory, with owners translated by ``shift``.

    Everything of the template is kept except overlay's private attributes; see the fidelity tests.
    After an error the destination contains a part of the tree and must be removed. An
    exception of ``progress`` ends the work at once, and another call can resume it.

    :param destination_dir: path or descriptor of an empty directory that no other process writes to
    :param strategy: ``REFLINK``, ``COPY``, or ``METACOPY``: files without data, which have the data
        of the layers of ``stack`` in an overlay mount with metacopy=on
    :param workers: number of processes; None for one per processor
    :param progress: called with files and bytes done, twice a second at most
    :param again: resume the work of an earlier call with the same arguments; an entry with the
        template's mtime is complete, because the mtime is set last
    :raises NeedsMount: the layers cannot be read without an overlay mount
    :raises UnmappedIDs: the facts ``uids`` and ``gids`` name container IDs
    :raises TreeError: the tree cannot be read, or cannot be built here
    :raises NoSpace: the destination's filesystem or quota is full
    :raises PermissionDenied: a file may not be read or created
    """
    if strategy not in (REFLINK, METACOPY, COPY):
        raise ValueError(f"strategy is {REFLINK!r}, {METACOPY!r} or {COPY!r}, not {strategy!r}")
    label = destination_dir if isinstance(destination_dir, str) else "destination"
    with translate_oserror(kind=TreeError):
        if isinstance(destination_dir, int):
            root = os.open(".", _DIRECTORY, dir_fd=destination_dir)
        else:
            root = os.open(destination_dir, _DIRECTORY)
        try:
            _prepare(root)
        except BaseException:
            os.close(root)
            raise
    cloner = _Cloner(stack, label, root, shift, strategy, again)
    try:
        walk = Walk(cloner, workers, progress)
        totals = walk.run()
    finally:
        cloner.close()
    raise_unmapped(stack, shift, walk.ids)
    return as_result(totals, strategy)


def can_reflink(directory: t.Union[str, int]) -> bool:
    """Test with two files whether files below a directory can share data.

    :raises OSError: the directory is not writable
    """
    node = f"/proc/self/fd/{directory}" if isinstance(directory, int) else directory
    with tempfile.TemporaryFile(dir=node) as source, tempfile.TemporaryFile(dir=node) as copy:
        source.write(b"\0" * 4096)
        source.flush()
        try:
            files.reflink(copy.fileno(), source.fileno())
        except OSError:
            return False
        return True


def as_result(totals: Totals, strategy: str) -> CloneResult:
    """The totals of a walk as a result."""
    return CloneResult(
        files=totals[FILES],
        directories=totals[DIRECTORIES],
        inodes=totals[INODES],
        apparent=totals[APPARENT],
        exclusive=totals[ALLOCATED],
        strategy=strategy,
    )


def unmapped_ids(shift: Shift) -> t.Optional[IDs]:
    """The IDs that a shift could not map so far, sorted, at most ``MOST_IDS`` of each kind."""
    if shift.complete:
        return None
    kinds = (shift.unmapped_uids, shift.unmapped_gids, shift.foreign_uids, shift.foreign_gids)
    return [sorted(numbers)[:MOST_IDS] for numbers in kinds]


def raise_unmapped(stack: LayerStack, shift: Shift, ids: IDs) -> None:
    """Raise an error if a walk could not map IDs.

    :raises UnmappedIDs: facts: ``uids``, ``gids`` (container IDs) and ``foreign_uids``,
        ``foreign_gids`` (host IDs outside the template's own map)
    """
    uids, gids, foreign_uids, foreign_gids = ids
    if not any(ids):
        return
    listed = [
        f"{kind} {_enumerate(numbers)}"
        for kind, numbers in (
            ("UIDs", uids),
            ("GIDs", gids),
            ("host UIDs", foreign_uids),
            ("host GIDs", foreign_gids),
        )
        if numbers
    ]
    raise UnmappedIDs(
        shown(stack.labels[0]),
        f"holds files of {' and '.join(listed)}, which the map {shift.new} does not cover",
        "Map these IDs too, or rebuild the image without them.",
        uids=uids,
        gids=gids,
        foreign_uids=foreign_uids,
        foreign_gids=foreign_gids,
    )


def _enumerate(numbers: t.List[int]) -> str:
    few = ", ".join(str(number) for number in numbers[:10])
    return few if len(numbers) <= 10 else f"{few} ..."


def _prepare(root: int) -> None:
    """Remove from a directory the properties that new entries would inherit."""
    for attribute in ("system.posix_acl_default", "system.posix_acl_access"):
        with contextlib.suppress(OSError):
            xattrs.remove(root, attribute)
    os.fchmod(root, 0o700)


class _Cloner(Visitor):
    """Creates each entry during the walk; directories stay private, without attributes, until they are complete."""

    def __init__(
        self,
        stack: LayerStack,
        label: str,
        root: int,
        shift: Shift,
        strategy: str,
        again: bool,
    ) -> None:
        super().__init__(stack, label)
        self._root = root
        self._shift = shift
        self._reflink = strategy == REFLINK
        self._metacopy = strategy == METACOPY
        self._again = again
        self._read = _READ | os.O_NOATIME
        # Whether new files get exactly the mode with which they are created.
        self._exact = False
        # Whether new files get their owner at creation, and the current owner.
        self._owning = False
        self._owner = (-1, -1)
        # The current directory, and its topmost source with its attributes.
        self._made = -1
        self._source = -1
        self._attributes: t.List[str] = []

    def init_worker(self) -> None:
        os.umask(0)
        self._exact = True
        entry = mounts.entry_of(self._root)
        by_directory = entry and _GROUP_OF_DIRECTORY.intersection(entry.super_options)
        self._owning = not by_directory and fsids.keep_capabilities()

    def close(self) -> None:
        """Close the destination."""
        self._close_made()
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def ids(self) -> t.Optional[IDs]:
        return unmapped_ids(self._shift)

    def enter(self, path: str, fd: int, attributes: t.List[str]) -> Token:
        self._made = files.open_beneath(self._root, path, _DIRECTORY)
        if self._again:
            # It may have been complete; new entries must not inherit from it.
            _prepare(self._made)
        self._source = fd
        self._attributes = attributes
        self.totals[DIRECTORIES] += 1
        self.totals[INODES] += 1
        return ()

    def reenter(self, path: str) -> None:
        self._made = files.open_beneath(self._root, path, _DIRECTORY)

    def directory(self, fd: int, name: str) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=self._made)
        except FileExistsError:
            if not self._again:
                raise

    def leave(self, whole: bool) -> None:
        if whole:
            self._complete(self._source, self._attributes)
        self._close_made()

    def finish(self, path: str, fd: int, token: Token) -> None:
        self._made = files.open_beneath(self._root, path, _DIRECTORY)
        self._complete(fd, self.stack.content(attribute_names(fd)))
        self._close_made()

    def link(self, path: str, fd: int, links: t.List[t.Tuple[str, str, str]]) -> None:
        made = files.open_beneath(self._root, path, _DIRECTORY)
        try:
            for name, other_path, other in links:
                there = files.open_beneath(self._root, other_path, _DIRECTORY)
                try:
                    self._link(there, other, made, name)
                finally:
                    os.close(there)
            status = os.fstat(fd)
            os.utime(made, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(made)

    def _link(self, there: int, other: str, made: int, name: str) -> None:
        try:
            os.link(other, name, src_dir_fd=there, dst_dir_fd=made, follow_symlinks=False)
        except FileExistsError:
            if not self._again:
                raise
            os.unlink(name, dir_fd=made)
            os.link(other, name, src_dir_fd=there, dst_dir_fd=made, follow_symlinks=False)

    def entry(self, fd: int, name: str, kind: int, linked: bool) -> t.Optional[t.Tuple[int, int]]:
        if kind == FILE:
            try:
                source = os.open(name, self._read, dir_fd=fd)
            except PermissionError:
                # EPERM: only the owner may use O_NOATIME.
                source = os.open(name, _READ, dir_fd=fd)
        else:
            source = os.open(name, _LOOK, dir_fd=fd)
        try:
            status = os.fstat(source)
            totals = self.totals
            if status.st_nlink > 1 and not linked:
                totals[FILES] += 1
                return status.st_dev, status.st_ino
            if not linked:
                totals[FILES] += 1
            totals[INODES] += 1
            totals[APPARENT] += status.st_size
            begun = self._made_before(name, status) if self._again else 0
            if begun is None:
                return None
            if kind == FILE:
                if not stat.S_ISREG(status.st_mode):
                    raise _changed(name)
                self._file(source, name, status, begun)
            elif kind == SYMLINK:
                self._symlink(source, name, status)
            else:
                self._special(source, name, status)
        finally:
            os.close(source)
        return None

    def _made_before(self, name: str, status: os.stat_result) -> t.Optional[int]:
        """The number of bytes that an earlier call has copied of this entry; None if it is complete.

        The partial copy of a large file is kept; any other partial entry is removed.
        """
        try:
            made = os.lstat(name, dir_fd=self._made)
        except FileNotFoundError:
            return 0
        copied = stat.S_ISREG(status.st_mode) and not (self._reflink or self._metacopy)
        if (
            made.st_mode == status.st_mode
            and made.st_mtime_ns == status.st_mtime_ns
            and made.st_size == status.st_size
            and made.st_rdev == status.st_rdev
            and made.st_uid == self._shift.uid(status.st_uid)
            and made.st_gid == self._shift.gid(status.st_gid)
        ):
            if copied:
                self.totals[ALLOCATED] += status.st_blocks * _BLOCK
            return None
        # Files are copied from start to end, so a partial file is valid up to its size.
        if copied and stat.S_ISREG(made.st_mode) and _LARGE < made.st_size <= status.st_size:
            return made.st_size - _LARGE
        os.unlink(name, dir_fd=self._made)
        return 0

    def _file(self, source: int, name: str, status: os.stat_result, begun: int) -> None:
        attributes = attribute_names(source)
        if attributes:
            attributes = self.stack.content(attributes)
        mode = stat.S_IMODE(status.st_mode)
        shift = self._shift
        owner = self._owner_of(status)
        how = _CREATE & ~os.O_EXCL if begun else _CREATE
        made = os.open(name, how, mode & 0o777, dir_fd=self._made)
        try:
            size = status.st_size
            # After an ID that cannot be mapped, the rest of the tree is only searched for others.
            if size and shift.complete:
                allocated = status.st_blocks * _BLOCK
                if self._metacopy:
                    os.ftruncate(made, size)
                    xattrs.put(made, _METACOPY_MARK, b"")
                elif not self._reflink or not self._share(made, source):
                    self.totals[ALLOCATED] += allocated
                    self._copy(made, source, size, allocated < size, begun)
                    if allocated > _WORTH_STARTING:
                        files.start_writing(made)
            # Owner first: chown(2) removes capabilities and the setuid bit.
            if owner or begun:
                os.fchown(made, shift.uid(status.st_uid), shift.gid(status.st_gid))
            if attributes:
                owners.copy_attributes(made, source, attributes, shift)
            # Changes of an inode are slow, and no other process enters incomplete directories.
            if mode & 0o7000 or attributes or not self._exact:
                os.fchmod(made, mode)
            os.utime(made, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(made)

    def _copy(self, made: int, source: int, size: int, sparse: bool, begun: int) -> None:
        if size <= _LARGE:
            files.copy_data(made, source, size, sparse=sparse)
            return
        reported = begun

        def tell(there: int) -> None:
            nonlocal reported
            self.totals[APPARENT] += there - reported
            reported = there
            self.tell()

        # It was counted at its first name.
        self.totals[APPARENT] -= size - begun
        files.copy_data(made, source, size, sparse, begun, tell)
        tell(size)

    def _owner_of(self, status: os.stat_result) -> t.Optional[t.Tuple[int, int]]:
        """The owner to set on the next new file; None if it will have that owner anyway."""
        owner = self._shift.uid(status.st_uid), self._shift.gid(status.st_gid)
        if self._owning and (owner == self._owner or self._become(owner)):
            return None
        return owner

    def _become(self, owner: t.Tuple[int, int]) -> bool:
        """Make ``owner`` the owner of new files; false if that failed."""
        self._owner = (-1, -1)
        if -1 in owner:
            return False
        self._owning = fsids.set_fs_ids(*owner) and self._given(owner)
        if self._owning:
            self._owner = owner
        return self._owning

    def _given(self, owner: t.Tuple[int, int]) -> bool:
        """Whether a new file has ``owner`` as its owner."""
        try:
            made = os.open(".", _NAMELESS, 0o600, dir_fd=self._made)
        except OSError:
            return False
        try:
            status = os.fstat(made)
        finally:
            os.close(made)
        return (status.st_uid, status.st_gid) == owner

    def _share(self, made: int, source: int) -> bool:
        try:
            files.reflink(made, source)
        except OSError as error:
            if error.errno in _NOT_THIS_FILE:
                return False
            if error.errno in _NOT_HERE:
                raise TreeError(
                    self.label,
                    f"cannot share data with the template ({error.strerror})",
                    f"Use the strategy {COPY!r}.",
                ) from error
            raise
        return True

    def _symlink(self, source: int, name: str, status: os.stat_result) -> None:
        if not stat.S_ISLNK(status.st_mode):
            raise _changed(name)
        owner = self._owner_of(status)
        os.symlink(os.readlink("", dir_fd=source), name, dir_fd=self._made)
        self._dress(source, name, status, owner)

    def _special(self, source: int, name: str, status: os.stat_result) -> None:
        mode = status.st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
            raise _changed(name)
        owner = self._owner_of(status)
        is_device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
        try:
            os.mknod(
                name,
                stat.S_IFMT(mode) | 0o600,
                status.st_rdev if is_device else 0,
                dir_fd=self._made,
            )
        except PermissionError as error:
            if not is_device:
                raise
            raise TreeError(
                shown(name),
                f"is a device ({os.major(status.st_rdev)}:{os.minor(status.st_rdev)}), which only "
                "root on the host can create",
                "Rebuild the image without it, or prepare it for a rootful store.",
            ) from error
        self._dress(source, name, status, owner)

    def _dress(
        self,
        source: int,
        name: str,
        status: os.stat_result,
        owner: t.Optional[t.Tuple[int, int]],
    ) -> None:
        """Set owner, attributes, mode and times of an entry that cannot be opened."""
        made, shift = self._made, self._shift
        if owner:
            os.chown(name, *owner, dir_fd=made, follow_symlinks=False)
        attributes = self.stack.content(attribute_names(source, ""))
        if attributes:
            owners.copy_attributes(made, source, attributes, shift, name, "")
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=made)
        os.utime(
            name,
            ns=(status.st_atime_ns, status.st_mtime_ns),
            dir_fd=made,
            follow_symlinks=False,
        )

    def _complete(self, source: int, attributes: t.List[str]) -> None:
        """Set owner, attributes, mode and times of the current directory."""
        made, shift = self._made, self._shift
        status = os.fstat(source)
        self.totals[ALLOCATED] += status.st_blocks * _BLOCK
        os.fchown(made, shift.uid(status.st_uid), shift.gid(status.st_gid))
        if attributes:
            owners.copy_attributes(made, source, attributes, shift)
        os.fchmod(made, stat.S_IMODE(status.st_mode))
        os.utime(made, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _close_made(self) -> None:
        if self._made >= 0:
            os.close(self._made)
            self._made = -1


def _changed(name: str) -> OSError:
    return OSError(errno.ESTALE, "changed its type while it was read", name)
