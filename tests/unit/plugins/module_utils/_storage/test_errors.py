# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Errors: what they tell, and how much of it."""

from __future__ import annotations

import pickle

from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    StorageError,
    UnmappedIDs,
)


def test_message_and_journey() -> None:
    error = UnmappedIDs("image x", "has files of UID 5", "Map more.", uids=[5])
    assert str(error) == "image x: has files of UID 5. Map more."
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.facts) == (UnmappedIDs, str(error), {"uids": [5]})


def test_facts_do_not_grow_with_an_image() -> None:
    error = StorageError("image x", "is odd", uids=list(range(1_000_000)), path="p" * 5000)
    assert error.facts["uids"] == list(range(1000))
    assert error.facts["path"] == "p" * 5000
