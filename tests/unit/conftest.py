# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Lets the processes that a test starts import the collection too, as ansible-test does for the test itself."""

from __future__ import annotations

import os
from pathlib import Path

COLLECTIONS = Path(__file__).resolve().parents[4]
if COLLECTIONS.name == "ansible_collections":
    _others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(COLLECTIONS.parent), *filter(None, _others)])
