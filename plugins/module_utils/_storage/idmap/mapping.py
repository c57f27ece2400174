# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A pair of ID maps, and the change of owners from one pair to another."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ..errors import MapError
from .ranges import IDENTITY, IDMap

OVERFLOW_ID = 65534


@dataclass(frozen=True)
class Mapping:
    """The UID and the GID map of a layer or container; ``Mapping()`` is the identity."""

    uid: IDMap = IDENTITY
    gid: IDMap = IDENTITY

    @property
    def identity(self) -> bool:
        """Whether both maps are absent, as in the record of an unmapped layer."""
        return not self.uid.ranges and not self.gid.ranges

    @property
    def changes_nothing(self) -> bool:
        """Whether every ID is stored unchanged, in any notation: ``0:0:4294967295`` as well as no map."""
        return self.same_meaning(UNMAPPED)

    def same_form(self, other: Mapping) -> bool:
        """Whether both have the same notation, which is what runtimes compare."""
        return self == other

    def same_meaning(self, other: Mapping) -> bool:
        """Whether both map every ID to the same ID, in any notation."""
        return self.uid.same_meaning(other.uid) and self.gid.same_meaning(other.gid)

    @property
    def meaning(self) -> t.Hashable:
        """A value that is equal for all mappings of the same meaning."""
        return self.uid.meaning, self.gid.meaning

    @property
    def contiguous(self) -> bool:
        """Whether both maps are contiguous, as the checks of old runtimes require."""
        return self.uid.contiguous and self.gid.contiguous

    @property
    def root(self) -> t.Tuple[int, int]:
        """Host UID and GID of the container's root.

        :raises MapError: a map does not contain root
        """
        uid, gid = self.uid.root, self.gid.root
        if uid is None or gid is None:
            lacking = "UID" if uid is None else "GID"
            raise MapError(
                f"mapping {self}",
                f"has no {lacking} for the container's root",
                "Add an entry that maps container ID 0.",
            )
        return uid, gid

    def __str__(self) -> str:
        return f"uid {self.uid} gid {self.gid}"


UNMAPPED = Mapping()


class Shift:
    """Translates the owners of files from one mapping to another.

    An ID is translated from the host ID under ``old`` to the container ID, and then to the host ID under
    ``new``. An ID that cannot be mapped becomes the overflow ID if ``overflow`` is set. Otherwise it
    is recorded and the result is -1, so that a walk finds all of them:

    * ``unmapped_uids``, ``unmapped_gids``: container IDs that ``new`` does not contain
    * ``foreign_uids``, ``foreign_gids``: host IDs that ``old`` does not contain
    """

    def __init__(self, old: Mapping, new: Mapping, overflow: bool = False) -> None:
        self.old = old
        self.new = new
        self.overflow = overflow
        self.unmapped_uids: t.Set[int] = set()
        self.unmapped_gids: t.Set[int] = set()
        self.foreign_uids: t.Set[int] = set()
        self.foreign_gids: t.Set[int] = set()
        self._uids: t.Dict[int, int] = {}
        self._gids: t.Dict[int, int] = {}

    def uid(self, host_id: int) -> int:
        """The new host UID of a file that host UID ``host_id`` owns, -1 if it has none."""
        known = self._uids.get(host_id)
        if known is None:
            known = self._uids[host_id] = self._translate(
                host_id, self.old.uid, self.new.uid, self.unmapped_uids, self.foreign_uids
            )
        return known

    def gid(self, host_id: int) -> int:
        """The new host GID of a file that host GID ``host_id`` owns, -1 if it has none."""
        known = self._gids.get(host_id)
        if known is None:
            known = self._gids[host_id] = self._translate(
                host_id, self.old.gid, self.new.gid, self.unmapped_gids, self.foreign_gids
            )
        return known

    @property
    def new_ids(self) -> t.Tuple[t.Set[int], t.Set[int]]:
        """The host UIDs and GIDs that were returned so far."""
        return {*self._uids.values()} - {-1}, {*self._gids.values()} - {-1}

    @property
    def complete(self) -> bool:
        """Whether all IDs so far could be translated."""
        return not (
            self.unmapped_uids or self.unmapped_gids or self.foreign_uids or self.foreign_gids
        )

    def _translate(
        self, host_id: int, old: IDMap, new: IDMap, unmapped: t.Set[int], foreign: t.Set[int]
    ) -> int:
        container_id = old.to_container(host_id)
        if container_id is not None:
            result = new.to_host(container_id)
            if result is not None:
                return result
        if self.overflow:
            return OVERFLOW_ID
        if container_id is None:
            foreign.add(host_id)
        else:
            unmapped.add(container_id)
        return -1
