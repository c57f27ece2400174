# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the translation of IDs in access control lists and file capabilities."""

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


UNDEFINED_ID = 2**32 - 1


def test_ids_in_acl_are_translated() -> None:
    before = acl(
        (1, 7, UNDEFINED_ID),
        (2, 6, 1001),
        (4, 5, UNDEFINED_ID),
        (8, 4, 2002),
        (16, 7, UNDEFINED_ID),
    )
    after = acl(
        (1, 7, UNDEFINED_ID),
        (2, 6, 5001),
        (4, 5, UNDEFINED_ID),
        (8, 4, 6002),
        (16, 7, UNDEFINED_ID),
    )
    for attribute in owners.ACLS:
        assert owners.translate(attribute, before, shift()) == after


def test_unmapped_ids_in_acl_are_kept_and_recorded() -> None:
    id_shift = shift()
    before = acl((2, 6, 1060), (8, 4, 2070), (2, 6, 3), (2, 6, 1001))
    after = acl((2, 6, 1060), (8, 4, 2070), (2, 6, 3), (2, 6, 5001))
    assert owners.translate(ACCESS, before, id_shift) == after
    assert (id_shift.unmapped_uids, id_shift.unmapped_gids, id_shift.foreign_uids) == (
        {60},
        {70},
        {3},
    )


def test_unmapped_ids_in_acl_become_the_overflow_id() -> None:
    before, after = acl((2, 6, 1060)), acl((2, 6, 65534))
    assert owners.translate(ACCESS, before, shift(overflow=True)) == after


@given(st.binary(max_size=60))
def test_any_value_keeps_its_length(value: bytes) -> None:
    for attribute in owners.WITH_IDS:
        assert len(owners.translate(attribute, value, shift())) == len(value)


def test_root_id_of_capability_is_translated() -> None:
    before = struct.pack("<IIIIII", 0x03000001, 1, 2, 3, 4, 1000)
    after = struct.pack("<IIIIII", 0x03000001, 1, 2, 3, 4, 5000)
    assert owners.translate(owners.CAPABILITY, before, shift()) == after


def test_capability_without_root_id_is_unchanged() -> None:
    value = struct.pack("<IIIII", 0x02000001, 1, 2, 3, 4)
    assert owners.translate(owners.CAPABILITY, value, shift()) == value


def test_capability_with_unmapped_root_id_is_unchanged() -> None:
    id_shift = shift()
    value = struct.pack("<IIIIII", 0x03000001, 1, 2, 3, 4, 7)
    assert owners.translate(owners.CAPABILITY, value, id_shift) == value
    assert id_shift.foreign_uids == {7}


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
def test_attributes_with_file_metadata_are_copied(attribute: str, copied: bool) -> None:
    assert owners.is_copied(attribute) is copied
