# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guides work word for word, from the top, on hosts on which nothing is installed."""

from __future__ import annotations

import pytest
from support import examples, fresh

GUIDES = ("first_steps", "workstations", "ci_runners", "many_users", "images_with_layers")


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
@pytest.mark.parametrize("guide", GUIDES)
def test_guide_works_from_the_top(lab, small_image, guide, suite):
    document = f"docs/docsite/rst/{guide}.rst"
    found = [block for block in examples.blocks() if block.document == document]
    host = fresh.FreshHost(lab, suite, small_image)
    try:
        assert len(host.run(found)) > 2
        # With vfs, which Debian 12 may choose, each start would copy the whole image.
        assert host.drivers() <= {"overlay"}
    finally:
        host.close()
