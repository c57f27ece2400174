# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""From what a task says to the literal map that the runtime will ask the store for."""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass

from ..errors import ConfigError
from ..idmap.grammar import UsernsContext, parse_request
from ..idmap.mapping import Mapping
from ..idmap.subids import namespace_mapping, subordinate_ids
from ..runtime.detect import Runtime, detect
from ..runtime.forms import context, shape
from ..runtime.shifting import Shifting, shifting
from .opening import OpenStore


@dataclass(frozen=True)
class Wanted:
    """A user namespace in the words of podman's options; empty for not given.

    :param runtime: the program that will ask, with its version if it is to be believed without asking
    """

    userns: str = ""
    uidmap: t.Tuple[str, ...] = ()
    gidmap: t.Tuple[str, ...] = ()
    subuidname: str = ""
    subgidname: str = ""
    runtime: str = ""


@dataclass(frozen=True)
class Question:
    """What the runtime will ask for: the map as it will write it, and whether it needs a layer at all."""

    mapping: Mapping
    shifting: Shifting
    runtime: Runtime


def question(wanted: Wanted, place: OpenStore) -> Question:
    """Work out what the runtime of this host will ask ``place`` for.

    :raises MapError: the map is malformed or cannot be had here
    :raises ConfigError: no runtime is installed, or an unknown one is named
    :raises NamespaceError: the user has no subordinate IDs
    """
    request = parse_request(
        wanted.userns, wanted.uidmap, wanted.gidmap, wanted.subuidname, wanted.subgidname
    )
    runtime = detect(wanted.runtime or None)
    if runtime is None:
        raise ConfigError(
            "runtime",
            "neither podman nor buildah nor CRI-O is installed on this host",
            'Install one, or say which one will ask, for example: runtime: "podman 5.4.2"',
        )
    mapping = request.resolve(_context(runtime, place))
    config = place.config
    answer = shifting(
        config.driver,
        config.options,
        config.rootless,
        config.graphroot,
        config.runroot,
        mapping,
        runtime,
        os.environ,
    )
    return Question(shape(mapping, runtime, answer.sorts), answer, runtime)


def _context(runtime: Runtime, place: OpenStore) -> UsernsContext:
    account = place.account
    if account is None:
        return context(runtime, rootless=False, uid=0, gid=0)
    available = namespace_mapping(
        account.uid, account.gid, subordinate_ids(account.name, account.uid)
    )
    return context(runtime, True, account.uid, account.gid, available)
