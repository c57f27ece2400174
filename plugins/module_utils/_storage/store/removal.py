# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Remove a directory tree whose contents are untrusted."""

from __future__ import annotations

import contextlib
import errno
import os
import typing as t
import uuid

from ..errors import StoreError
from ..kernel import mounts

# Called with the parent directory of a subvolume and its name; returns whether it was deleted.
Destroy = t.Callable[[int, str], bool]

# Called between deletions; true if enough was deleted.
Enough = t.Callable[[], bool]

# The number of entries that are deleted between two of these calls.
_STEP = 128

# The maximum number of open descriptors. Deeper directories are moved up first, so that any depth can be removed.
_DESCRIPTORS = 64
_RESCANS = 4
_NAMED = 5

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Frame:
    """A directory of the current path."""

    def __init__(self, descriptor: int, name: str, device: int) -> None:
        self.descriptor = descriptor
        self.name = name
        self.device = device
        self.folders: t.List[str] = []
        self.rescans = 0
        self.failed = False


class _Enough(Exception):
    """Enough was deleted."""


class _Removal:
    def __init__(
        self, path: str, destroy: t.Optional[Destroy], enough: t.Optional[Enough] = None
    ) -> None:
        self.path = path
        self.destroy = destroy
        self.enough = enough
        self.deleted = 0
        self.stack: t.List[_Frame] = []
        self.failures: t.List[str] = []
        self.failed = 0
        self.mount = -1

    def fail(self, name: str, error: OSError) -> None:
        self.failed += 1
        if self.stack:
            self.stack[-1].failed = True
        if len(self.failures) < _NAMED:
            names = [frame.name for frame in self.stack[1:]] + [name]
            self.failures.append(f"{'/'.join(names)[-200:]!a}: {error.strerror}")

    def scan(self, frame: _Frame) -> None:
        """Remove the files of a directory and collect its subdirectories."""
        with os.scandir(frame.descriptor) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    frame.folders.append(entry.name)
                    continue
                try:
                    os.unlink(entry.name, dir_fd=frame.descriptor)
                except FileNotFoundError:
                    pass
                except OSError as error:
                    self.fail(entry.name, error)
                self.count()

    def count(self) -> None:
        """Count a deleted entry."""
        self.deleted += 1
        if self.enough is not None and self.deleted % _STEP == 0 and self.enough():
            raise _Enough

    def enter(self, parent: int, name: str, device: int) -> None:
        """Enter a directory, unless it is deleted as a whole or is on another filesystem."""
        try:
            descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                os.unlink(name, dir_fd=parent)
                return
            raise
        try:
            found = os.fstat(descriptor)
            elsewhere = found.st_dev != device
            if mounts.mount_id(descriptor) != self.mount:
                raise OSError(errno.EBUSY, "another filesystem is mounted there")
            if elsewhere and self.destroy is not None and self.destroy(parent, name):
                return
            if not elsewhere and len(self.stack) >= _DESCRIPTORS:
                higher = f"deep-{uuid.uuid4().hex}"
                os.rename(name, higher, src_dir_fd=parent, dst_dir_fd=self.stack[0].descriptor)
                self.stack[0].folders.append(higher)
                return
            frame = _Frame(descriptor, name, found.st_dev)
            self.stack.append(frame)
            descriptor = -1
            self.scan(frame)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def leave(self, parent: int) -> None:
        """Remove the directory on top of the stack, which has no more subdirectories."""
        frame = self.stack[-1]
        if self.enough is not None and len(self.stack) == 1:
            # It is emptied, not removed.
            self.pop()
            return
        if frame.failed:
            self.pop()
            if self.stack:
                self.stack[-1].failed = True
            return
        try:
            os.rmdir(frame.name, dir_fd=parent)
        except FileNotFoundError:
            pass
        except OSError as error:
            # Some filesystems skip entries while others are removed.
            if error.errno == errno.ENOTEMPTY and frame.rescans < _RESCANS:
                frame.rescans += 1
                self.scan(frame)
                return
            self.pop()
            self.fail(frame.name, error)
            return
        self.pop()

    def pop(self) -> None:
        os.close(self.stack.pop().descriptor)

    def run(self) -> None:
        folder, name = os.path.split(self.path.rstrip("/"))
        top = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.mount = mounts.mount_id(top)
            try:
                self.enter(top, name, os.fstat(top).st_dev)
            except OSError as error:
                self.fail(name, error)
            while self.stack:
                frame = self.stack[-1]
                if frame.folders:
                    child = frame.folders.pop()
                    try:
                        self.enter(frame.descriptor, child, frame.device)
                    except OSError as error:
                        self.fail(child, error)
                else:
                    self.leave(self.stack[-2].descriptor if len(self.stack) > 1 else top)
        finally:
            while self.stack:
                self.pop()
            os.close(top)


def remove_tree(path: str, destroy: t.Optional[Destroy] = None) -> None:
    """Remove a file or a whole directory tree of any depth and size; a missing path is ignored.

    Symbolic links are not followed and other mounts not entered. An entry that cannot be removed is left,
    and everything else is removed.

    :param destroy: removes a subvolume as a whole; called wherever the device number changes
    :raises StoreError: something could not be removed; ``failures`` in the facts names the first few entries
    :raises OSError: the parent directory of ``path`` cannot be opened, or /proc is not mounted
    """
    with contextlib.suppress(FileNotFoundError):
        removal = _Removal(path, destroy)
        removal.run()
        if removal.failed:
            raise StoreError(
                path,
                f"cannot be removed completely, {removal.failed} entries remain, first {removal.failures[0]}",
                "Unmount or unlock the named entry and run the task again.",
                path=path,
                failures=removal.failures,
            )


def empty_tree(path: str, enough: Enough) -> None:
    """Delete contents of a directory until enough was deleted. The directory itself is kept, and may be missing.

    Entries that cannot be deleted are left. Symbolic links are not followed, other mounts and subvolumes not entered.

    :param enough: called after every 128 entries
    """
    with contextlib.suppress(OSError, _Enough):
        _Removal(path, None, enough).run()
