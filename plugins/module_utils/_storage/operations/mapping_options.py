# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of the options that describe a mapping."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from .options import Option, as_option, options_of


@dataclass(frozen=True)
class MappingOptions:
    """A user namespace as podman's options; empty if not given.

    :param runtime: the program that requests the layer, with its version if that should not be detected
    :param slots: for ``auto``, the number of simultaneous containers of the image
    """

    userns: str = field(default="", metadata=as_option(Option()))
    uidmap: t.Tuple[str, ...] = field(default=(), metadata=as_option(Option("list")))
    gidmap: t.Tuple[str, ...] = field(default=(), metadata=as_option(Option("list")))
    subuidname: str = field(default="", metadata=as_option(Option()))
    subgidname: str = field(default="", metadata=as_option(Option()))
    runtime: str = field(default="", metadata=as_option(Option()))
    slots: int = field(default=1, metadata=as_option(Option("int", 1)))


OPTIONS = options_of(MappingOptions, Option)
# The user namespace is given either as a single text or by these options.
MAPS = ("uidmap", "gidmap", "subuidname", "subgidname")
