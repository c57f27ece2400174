# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Names of signals in messages."""

from __future__ import annotations

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel.termination import (
    signal_text,
)


@pytest.mark.parametrize(
    ("number", "text"),
    [(9, "signal 9 (SIGKILL)"), (15, "signal 15 (SIGTERM)"), (99, "signal 99")],
)
def test_signals_are_named(number: int, text: str) -> None:
    assert signal_text(number) == text
