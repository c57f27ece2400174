# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What all unit tests start with: a path to the collection for their processes, and hypothesis at work."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# For the processes that a test starts; ansible-test gives it to the test itself.
COLLECTIONS = Path(__file__).resolve().parents[4]
if COLLECTIONS.name == "ansible_collections":
    _others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(COLLECTIONS.parent), *filter(None, _others)])


# How fast a machine draws is no property of what is tested.
settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60
)
settings.load_profile("untimed")


@settings(max_examples=20, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(), min_size=50))
def _draw(_numbers: list[int]) -> None:
    pass


def pytest_collection_finish() -> None:
    """Draw: one in twenty times hypothesis takes a constant of the modules, and first it reads all of them for that.

    It would count that time as the first test's own and complain.
    """
    _draw()
