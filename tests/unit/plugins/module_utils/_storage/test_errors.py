# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the messages and facts of errors."""

from __future__ import annotations

import pickle

from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    StorageError,
    UnmappedIDs,
)


def test_error_has_message_and_can_be_pickled() -> None:
    error = UnmappedIDs("image x", "has files of UID 5", "Map more.", uids=[5])
    assert str(error) == "image x: has files of UID 5. Map more."
    unpickled = pickle.loads(pickle.dumps(error))
    assert (type(unpickled), str(unpickled), unpickled.facts) == (
        UnmappedIDs,
        str(error),
        {"uids": [5]},
    )


def test_lists_in_facts_are_truncated() -> None:
    error = StorageError("image x", "is odd", uids=list(range(1_000_000)), path="p" * 5000)
    assert error.facts["uids"] == list(range(1000))
    assert error.facts["path"] == "p" * 5000
