# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The record of a new mapped layer, and the flags that this collection sets in it."""

from __future__ import annotations

import secrets
import time
import typing as t

from ..idmap.mapping import Mapping
from ..store.records import Layer

# Keys in the record's `flags`, a map that every runtime preserves.
ORIGIN_FLAG = "userns.storage.origin"
LEASE_FLAG = "userns.storage.lease"
# Set if a full disk has no space for a folder in the trash that records a removal.
REMOVAL_FLAG = "userns.storage.removal"
ORIGIN = "layer_template"

# The fields that a mapped layer has in common with its template, in the order of containers/storage's Layer.
_BEFORE_CREATED = ("metadata", "mountlabel")
_AFTER_CREATED = (
    "compressed-diff-digest",
    "compressed-size",
    "diff-digest",
    "toc-digest",
    "diff-size",
    "compression",
    "uidset",
    "gidset",
)


def new_layer_id(taken: t.Container[str]) -> str:
    """A new layer ID: 64 hexadecimal digits, of which the first twelve are never all decimal.

    Runtimes would interpret a short ID of decimal digits as a number (containers/storage, stringid).
    """
    while True:
        candidate = secrets.token_hex(32)
        if candidate not in taken and not candidate[:12].isdecimal():
            return candidate


def mapped_record(
    layer_id: str,
    template: Layer,
    mapping: Mapping,
    now_ns: int,
    lease: t.Optional[float] = None,
) -> t.Dict[str, t.Any]:
    """The record that containers/storage would write for a mapped layer of ``template``.

    :param now_ns: nanoseconds since the epoch
    :param lease: the time until which it is kept unused, in seconds since the epoch
    """
    raw = template.raw
    record: t.Dict[str, t.Any] = {"id": layer_id}
    if template.parent:
        record["parent"] = template.parent
    record.update((key, raw[key]) for key in _BEFORE_CREATED if key in raw)
    record["created"] = rfc3339(now_ns)
    record.update((key, raw[key]) for key in _AFTER_CREATED if key in raw)
    record["flags"] = {ORIGIN_FLAG: ORIGIN}
    if lease is not None:
        record["flags"][LEASE_FLAG] = rfc3339(int(lease) * 10**9)
    if mapping.uid.ranges:
        record["uidmap"] = mapping.uid.to_record()
    if mapping.gid.ranges:
        record["gidmap"] = mapping.gid.to_record()
    return record


def rfc3339(nanoseconds: int) -> str:
    """Format a time as in records: UTC, nine digits of fraction."""
    seconds, fraction = divmod(nanoseconds, 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{fraction:09d}Z"
