# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The functions that make trees, as a value. Operations that only read or remove do not import them."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass


class CloneResult(t.NamedTuple):
    """The contents of a tree, in numbers.

    * files: names of anything but directories
    * directories: with the root
    * inodes: hard-linked files once
    * apparent: bytes that all but directories claim, each inode once
    * exclusive: bytes of disk that the tree shares with no other, reckoned from its source
    """

    files: int
    directories: int
    inodes: int
    apparent: int
    exclusive: int
    strategy: str


class Suspended(Exception):
    """What a progress callback raises to have the work stop where it is, so that another call goes on.

    :ivar given_up: nobody waits for it; then even work that nothing can go on with is to stop
    """

    def __init__(self, given_up: bool = False) -> None:
        super().__init__()
        self.given_up = given_up


@dataclass(frozen=True)
class TreeTools:
    """The functions of the same names: see ``clone``, ``survey`` and ``shift`` beside this file."""

    clone: t.Callable[..., CloneResult]
    survey: t.Callable[..., CloneResult]
    shift_in_place: t.Callable[..., CloneResult]
    can_reflink: t.Callable[[str], bool]
