# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of tree/owners.py."""

from __future__ import annotations

import struct
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import (
    Mapping,
    Shift,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import IDMap
from ansible_collections.userns.storage.plugins.module_utils._storage.tree import owners
from hypothesis import given
from hypothesis import strategies as st

ACCESS = "system.posix_acl_access"


def mapping(uid: str, gid: str) -> Mapping:
    return Mapping(IDMap.parse([uid]), IDMap.parse([gid]))


def shift(overflow: bool = False) -> Shift:
    return Shift(mapping("0:1000:100", "0:2000:100"), mapping("0:5000:50", "0:6000:50"), overflow)


def acl(*entries: t.Tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 2**32 - 1


def test_acl() -> None:
    before = acl((1, 7, NOBODY), (2, 6, 1001), (4, 5, NOBODY), (8, 4, 2002), (16, 7, NOBODY))
    after = acl((1, 7, NOBODY), (2, 6, 5001), (4, 5, NOBODY), (8, 4, 6002), (16, 7, NOBODY))
    for attribute in owners.ACLS:
        assert owners.translate(attribute, before, shift()) == after


def test_acl_with_unmapped_ids() -> None:
    one = shift()
    before = acl((2, 6, 1060), (8, 4, 2070), (2, 6, 3), (2, 6, 1001))
    after = acl((2, 6, 1060), (8, 4, 2070), (2, 6, 3), (2, 6, 5001))
    assert owners.translate(ACCESS, before, one) == after
    assert (one.unmapped_uids, one.unmapped_gids, one.foreign_uids) == ({60}, {70}, {3})


def test_acl_with_overflow() -> None:
    before, after = acl((2, 6, 1060)), acl((2, 6, 65534))
    assert owners.translate(ACCESS, before, shift(overflow=True)) == after


@given(st.binary(max_size=60))
def test_any_bytes_are_survived(value: bytes) -> None:
    for attribute in owners.WITH_IDS:
        assert len(owners.translate(attribute, value, shift())) == len(value)


def test_capability_of_a_namespace() -> None:
    before = struct.pack("<IIIIII", 0x03000001, 1, 2, 3, 4, 1000)
    after = struct.pack("<IIIIII", 0x03000001, 1, 2, 3, 4, 5000)
    assert owners.translate(owners.CAPABILITY, before, shift()) == after


def test_capability_of_the_host_stays() -> None:
    value = struct.pack("<IIIII", 0x02000001, 1, 2, 3, 4)
    assert owners.translate(owners.CAPABILITY, value, shift()) == value


def test_capability_of_an_unmapped_root() -> None:
    one = shift()
    value = struct.pack("<IIIIII", 0x03000001, 1, 2, 3, 4, 7)
    assert owners.translate(owners.CAPABILITY, value, one) == value
    assert one.foreign_uids == {7}


@pytest.mark.parametrize(
    ("attribute", "copied"),
    [
        ("user.a", True),
        ("trusted.a", True),
        ("security.selinux", True),
        ("security.capability", True),
        ("system.posix_acl_default", True),
        ("system.nfs4_acl", False),
        ("btrfs.compression", False),
        ("trusted.SGI_ACL_FILE", False),
    ],
)
def test_is_copied(attribute: str, copied: bool) -> None:
    assert owners.is_copied(attribute) is copied
