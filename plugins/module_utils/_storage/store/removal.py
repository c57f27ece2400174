# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Removing a directory tree that strangers may have filled."""

from __future__ import annotations

import contextlib
import errno
import os
import typing as t
import uuid

from ..errors import StoreError
from ..kernel import mounts

# Called with the directory that holds a subvolume and its name; True when it is gone.
Destroy = t.Callable[[int, str], bool]

# Descriptors held at once; what lies deeper is first moved up, so that no depth is too deep.
_DESCRIPTORS = 64
_RESCANS = 4
_NAMED = 5

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Frame:
    """One directory on the way down."""

    def __init__(self, descriptor: int, name: str, device: int) -> None:
        self.descriptor = descriptor
        self.name = name
        self.device = device
        self.folders: t.List[str] = []
        self.rescans = 0
        self.failed = False


class _Removal:
    def __init__(self, path: str, destroy: t.Optional[Destroy]) -> None:
        self.path = path
        self.destroy = destroy
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
        """Remove the files of a directory and note its folders."""
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

    def enter(self, parent: int, name: str, device: int) -> None:
        """Begin with a directory, unless it goes in one piece or is none of ours."""
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
        """Remove the directory on top of the stack, which has no folder left to enter."""
        frame = self.stack[-1]
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
            # Some filesystems skip entries while others are being removed.
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
    """Remove a file or a whole directory tree of any depth and size; nothing there is fine.

    No symbolic link is followed and no other mount is entered. Whatever cannot be removed is left,
    and all the rest is removed.

    :param destroy: removes a subvolume in one piece; asked wherever the device number changes
    :raises StoreError: something is left; ``failures`` of the facts names the first few
    :raises OSError: the directory that holds ``path`` cannot be opened, or /proc is not there
    """
    with contextlib.suppress(FileNotFoundError):
        removal = _Removal(path, destroy)
        removal.run()
        if removal.failed:
            raise StoreError(
                path,
                f"cannot be removed whole, {removal.failed} entries are left, "
                f"first {removal.failures[0]}",
                "Unmount or unlock what is named there and run this again.",
                path=path,
                failures=removal.failures,
            )
