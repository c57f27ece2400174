# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""All that makes trees, together: for those who may make any."""

from __future__ import annotations

from .clone import can_reflink, clone
from .craft import Craft
from .shift import shift_in_place
from .survey import survey

CRAFT = Craft(clone=clone, survey=survey, shift_in_place=shift_in_place, can_reflink=can_reflink)
