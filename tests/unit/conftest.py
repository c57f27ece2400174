# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Settings of all unit tests: the path to the collection for subprocesses, and the profile of hypothesis."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# For subprocesses of tests. ansible-test sets the path for the tests only.
COLLECTIONS = Path(__file__).resolve().parents[4]
if COLLECTIONS.name == "ansible_collections":
    _others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(COLLECTIONS.parent), *filter(None, _others)])


# The time for generating data depends on the machine, not on the tested code.
settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60
)
settings.load_profile("untimed")


@settings(max_examples=20, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(), min_size=50))
def _draw(_numbers: list[int]) -> None:
    pass


def pytest_collection_finish() -> None:
    """Generate data before the first test.

    For one value in twenty, hypothesis uses a constant of the loaded modules, and first reads all of them.
    That time would count for the first test, which would fail the health check.
    """
    _draw()
