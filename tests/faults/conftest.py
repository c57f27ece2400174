# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of the faults tests."""

from __future__ import annotations

import typing as t

import pytest

if t.TYPE_CHECKING:
    from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import (
        Account,
    )
    from support.lab import Lab


@pytest.fixture(scope="module")
def alice(lab: Lab) -> t.Iterator[Account]:
    """A user for all tests of a module, as an account of the collection."""
    from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import (
        Account,
    )
    from support import users

    user = users.add_user(lab)
    yield Account(user.name, user.uid, user.gid, user.home)
    users.remove_user(lab, user)
