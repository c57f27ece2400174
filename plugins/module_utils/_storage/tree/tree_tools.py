# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The functions that create trees, as a value, so that operations that only read or remove do not import them."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass


class CloneResult(t.NamedTuple):
    """The contents of a tree, in numbers.

    * files: names of everything but directories
    * directories: including the root
    * inodes: hard-linked files once
    * apparent: apparent size in bytes of everything but directories, each inode once
    * exclusive: bytes on disk that the tree does not share, estimated from its source
    """

    files: int
    directories: int
    inodes: int
    apparent: int
    exclusive: int
    strategy: str


class Suspended(Exception):
    """Raised by a progress callback to stop the work, so that another call can resume it.

    :ivar given_up: nobody waits for the result, so that even work that cannot be resumed must stop
    """

    def __init__(self, given_up: bool = False) -> None:
        super().__init__()
        self.given_up = given_up


@dataclass(frozen=True)
class TreeTools:
    """The functions of the modules ``clone``, ``survey`` and ``shift``."""

    clone: t.Callable[..., CloneResult]
    survey: t.Callable[..., CloneResult]
    shift_in_place: t.Callable[..., CloneResult]
    can_reflink: t.Callable[[str], bool]
