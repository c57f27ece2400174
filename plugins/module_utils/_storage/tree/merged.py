# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Overlay layers merged as the kernel merges them, read through file descriptors.

Source of the rules: the kernel's Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import typing as t

from ..errors import TreeError
from ..kernel import files, xattrs

# A directory tree without overlay's whiteouts and private attributes: vfs, btrfs, a mounted layer.
PLAIN = "plain"
FAMILIES = ("trusted", "user", PLAIN)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# Private attributes that move or hide content, which is not supported by the merge here.
_BEYOND_US = ("redirect", "metacopy", "whiteout", "whiteouts")


class NeedsMount(TreeError):
    """Only the kernel's overlay mount can merge this stack of layers."""


class LayerStack:
    """The directories of a stack of layers, top first, held open.

    :param dirs: paths, or descriptors of open directories (they are duplicated)
    :param xattr_family: "trusted" or "user", the namespace of overlay's private attributes; or
        "plain" for trees that no overlay wrote
    :raises OSError: a directory is missing, or is a symbolic link
    """

    def __init__(self, dirs: t.Sequence[t.Union[str, int]], xattr_family: str) -> None:
        if xattr_family not in FAMILIES:
            raise ValueError(f"xattr_family is one of {', '.join(FAMILIES)}, not {xattr_family!r}")
        self.plain = xattr_family == PLAIN
        self._private = f"{xattr_family}.overlay."
        # Attributes of an overlay in an overlay, which the outer overlay passes through.
        self._escaped = f"{xattr_family}.overlay.overlay."
        self.labels: t.List[str] = []
        self.fds: t.List[int] = []
        try:
            for item in dirs:
                path, at = (".", item) if isinstance(item, int) else (item, None)
                self.labels.append(path if at is None else os.readlink(f"/proc/self/fd/{at}"))
                opening = functools.partial(os.open, path, dir_fd=at)
                self.fds.append(files.open_unnoticed(opening, _DIRECTORY))
        except OSError:
            self.close()
            raise

    def __enter__(self) -> LayerStack:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all layers."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def __len__(self) -> int:
        return len(self.fds)

    def open(self, layer: int, path: str) -> int:
        """Open a directory of a layer without following symbolic links or entering other mounts.

        :param path: relative to the layer, of any length; empty for its root
        :raises OSError: as openat2(2)
        """
        opening = functools.partial(files.open_beneath, self.fds[layer], path)
        return files.open_unnoticed(opening, _DIRECTORY)

    def is_private(self, attribute: str) -> bool:
        """Whether an attribute is private to overlay and no content of the image."""
        if self.plain:
            return False
        return attribute.startswith(self._private) and not attribute.startswith(self._escaped)

    def content(self, attributes: t.Iterable[str]) -> t.List[str]:
        """The attributes that are content of the image.

        :raises NeedsMount: an attribute moves the content elsewhere
        """
        if self.plain:
            return list(attributes)
        result = []
        for attribute in attributes:
            if not self.is_private(attribute):
                result.append(attribute)
            elif attribute[len(self._private) :] in _BEYOND_US:
                raise NeedsMount(
                    "layer stack",
                    f"a file carries {attribute}, which only the kernel's overlay supports",
                    attribute=attribute,
                )
        return result

    def is_opaque(self, fd: int, attributes: t.Iterable[str]) -> bool:
        """Whether an open directory hides those of the layers below.

        :param attributes: names of the directory's attributes
        :raises NeedsMount: the directory contains whiteouts of an unsupported kind
        """
        opaque = f"{self._private}opaque"
        if self.plain or opaque not in attributes:
            return False
        value = os.getxattr(fd, opaque)
        if value == b"x":
            raise NeedsMount(
                "layer stack",
                f"a directory carries {opaque}=x, whose whiteouts only the kernel's overlay supports",
                attribute=opaque,
            )
        return value == b"y"

    def is_whiteout(self, status: os.stat_result) -> bool:
        """Whether an entry is a whiteout: a character device 0:0."""
        return not self.plain and stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def attribute_names(fd: int, entry: t.Optional[str] = None) -> t.List[str]:
    """As ``xattrs.names``, but empty if the filesystem does not support attributes."""
    try:
        return xattrs.names(fd, entry)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return []
        raise


def top_owners(stack: LayerStack) -> t.Iterator[t.Tuple[str, int, int]]:
    """The root directory ("") and each name in it, with the owner IDs on disk.

    :raises OSError: a directory cannot be read
    """
    if not stack.fds:
        return
    root = os.fstat(stack.fds[0])
    yield "", root.st_uid, root.st_gid
    seen: t.Set[str] = set()
    for directory in stack.fds:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            if name in seen:
                continue
            seen.add(name)
            try:
                status = os.lstat(name, dir_fd=directory)
            except FileNotFoundError:
                continue
            if not stack.is_whiteout(status):
                yield name, status.st_uid, status.st_gid
