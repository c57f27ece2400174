# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A single mount that contains both the staging directory and the directory of the driver.

Runtimes bind-mount the driver's folder on itself. A rename from a directory beside it would cross mounts
and fail with EXDEV, although both are on one filesystem.
"""

from __future__ import annotations

import contextlib
import errno
import os
import typing as t

from ..errors import NamespaceError, StoreError, UnsupportedDriver
from ..kernel import mounts, namespaces

_PATH_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@contextlib.contextmanager
def view_of(graphroot: str, driver: str) -> t.Iterator[str]:
    """Context manager: the graphroot as a single mount.

    In the private mount namespace of :func:`..userns.run` the graphroot is bind-mounted on itself
    without its submounts, so that every path stays valid. Nothing is written. Files that were opened
    before, through the old mount, cannot be renamed into the view.

    :param graphroot: an existing directory
    :param driver: name of the driver, that is of its folder in the graphroot
    :returns: the path to use for the graphroot
    :raises StoreError: the graphroot cannot be opened
    :raises UnsupportedDriver: another filesystem is mounted on the driver's folder
    :raises NamespaceError: a bind mount is needed and forbidden
    """
    path = os.path.realpath(graphroot)
    with contextlib.ExitStack() as undo:
        try:
            top = _opened(undo, path)
        except OSError as error:
            raise StoreError(graphroot, f"cannot be opened: {error.strerror}") from error
        folder = _opened_folder(undo, top, driver, path)
        if not namespaces.mounts_are_private():
            if folder is not None and mounts.mount_id(folder) != mounts.mount_id(top):
                raise NamespaceError(
                    os.path.join(path, driver), "is a separate mount and was not opened alone"
                )
            yield path
            return
        try:
            mounts.bind(path, path)
        except OSError as error:
            # EINVAL: mounts of a more privileged namespace cannot be unmounted.
            if folder is not None and mounts.mount_id(folder) != mounts.mount_id(top):
                raise NamespaceError(
                    os.path.join(path, driver),
                    f"is a separate mount, and {path} cannot be bind-mounted without it: "
                    f"{error.strerror}",
                    f"Unmount {os.path.join(path, driver)} or run this as root.",
                ) from error
            yield path
            return
        undo.callback(mounts.umount, path, mounts.MNT_DETACH)
        view = _opened(undo, path)
        mounts.make_private(path)
        _uncover(view, driver, path)
        if folder is not None:
            beneath = _opened_folder(undo, view, driver, path)
            if beneath is None or not _same(beneath, folder):
                raise UnsupportedDriver(
                    os.path.join(path, driver),
                    "is another filesystem mounted into the graphroot, so a layer built beside it "
                    "cannot be moved into it",
                    f"Mount that filesystem on {path} instead.",
                )
            _let_go(folder, top)
        yield path


def _opened(undo: contextlib.ExitStack, path: str) -> int:
    descriptor = os.open(path, _PATH_FLAGS)
    undo.callback(os.close, descriptor)
    return descriptor


def _opened_folder(
    undo: contextlib.ExitStack, parent: int, driver: str, path: str
) -> t.Optional[int]:
    try:
        descriptor = os.open(driver, _PATH_FLAGS | os.O_NOFOLLOW, dir_fd=parent)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise UnsupportedDriver(
                os.path.join(path, driver),
                "is a symbolic link, so a layer built beside it cannot be moved into it",
                "Bind-mount the target there, or set graphroot to the real path.",
            ) from error
        raise StoreError(
            os.path.join(path, driver), f"cannot be opened: {error.strerror}"
        ) from error
    undo.callback(os.close, descriptor)
    return descriptor


def _same(number: int, other: int) -> bool:
    first, second = os.fstat(number), os.fstat(other)
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)


def _uncover(view: int, driver: str, path: str) -> None:
    """Unmount from the view what a runtime mounted before the view was private."""
    while True:
        with contextlib.ExitStack() as undo:
            found = _opened_folder(undo, view, driver, path)
            if found is None or mounts.mount_id(found) == mounts.mount_id(view):
                return
            try:
                mounts.umount(found, mounts.MNT_DETACH)
            except OSError as error:
                raise NamespaceError(
                    os.path.join(path, driver),
                    f"was mounted during the task and cannot be unmounted: {error.strerror}",
                    "Run the task again.",
                ) from error


def _let_go(folder: int, top: int) -> None:
    """Unmount everything in the driver's folder in this namespace.

    The folder's mount is private, so unmounts of containers do not propagate to this namespace, and
    an overlay that stays mounted here cannot be mounted again elsewhere.
    """
    if mounts.mount_id(folder) != mounts.mount_id(top):
        with contextlib.suppress(OSError):
            mounts.umount(folder, mounts.MNT_DETACH)
