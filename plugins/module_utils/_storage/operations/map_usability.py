# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Find ID maps that are no longer usable, because their host IDs are no longer subordinate IDs."""

from __future__ import annotations

import typing as t

from ..errors import (
    NamespaceError,
)
from ..idmap.mapping import Mapping
from ..idmap.ranges import IDMap
from ..idmap.subids import everybodys_ranges, subordinate_ids
from .store_opening import OpenStore

# Host IDs below this are never subordinate IDs.
_FIRST_SUBORDINATE = 65536


class MapUsability:
    """The subordinate ID ranges of a store's owner, or of the whole host, to compare ID maps with."""

    def __init__(self, store_ctx: OpenStore) -> None:
        self.rootless = store_ctx.account is not None
        self.owner = ""
        self.spans: t.Dict[str, t.List[t.Tuple[int, int]]] = {}
        try:
            if store_ctx.account is not None:
                self.owner = f"user {store_ctx.account.name}"
                mine = subordinate_ids(
                    store_ctx.account.name, store_ctx.account.uid, required=False
                )
                for kind, ranges in (("uid", mine.uid), ("gid", mine.gid)):
                    self.spans[kind] = [(0, 1 + sum(item.size for item in ranges))]
            else:
                self.owner = "this host"
                for kind in ("uid", "gid"):
                    self.spans[kind] = [
                        (everybodys_range.start, everybodys_range.start + everybodys_range.size)
                        for everybodys_range in everybodys_ranges(kind)
                    ]
        except NamespaceError:
            self.spans = {}

    def reason(self, mapping: Mapping) -> t.Optional[str]:
        """Why the map is not usable, as a clause; None if it is usable or this cannot be determined."""
        for kind, idmap in (("uid", mapping.uid), ("gid", mapping.gid)):
            outside = self._outside(kind, idmap)
            if outside:
                return (
                    f"the {kind} range {outside} is no longer a subordinate range of {self.owner}"
                )
        return None

    def _outside(self, kind: str, idmap: IDMap) -> str:
        spans = self.spans.get(kind)
        if not spans:
            return ""
        for entry in idmap.ranges:
            first, last = entry.host_id, entry.host_id + entry.size
            if not entry.size or (not self.rootless and first < _FIRST_SUBORDINATE):
                continue
            if not any(start <= first and last <= end for start, end in spans):
                return f"{first}-{last - 1}"
        return ""
