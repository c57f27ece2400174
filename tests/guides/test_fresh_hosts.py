# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guides work word for word, from the top, on hosts on which nothing is installed."""

from __future__ import annotations

import typing as t

import pytest
from support import examples, fresh

if t.TYPE_CHECKING:
    from support.images import Image
    from support.lab import Lab

# Guides by the name of the test; the later guides of a row assume a host on which the first was followed.
GUIDES = {
    "first_steps": (
        *("docsite/rst/first_steps.rst", "docsite/rst/troubleshooting.rst"),
        *("docsite/rst/gc_policies.rst", "docsite/rst/awx.rst", "fleet.md", "ready.md"),
    ),
    **{
        name: (f"docsite/rst/{name}.rst",)
        for name in ("workstations", "ci_runners", "many_users", "images_with_layers")
    },
}


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
@pytest.mark.parametrize("guides", list(GUIDES))
def test_guides_work_from_the_top(lab: Lab, small_image: Image, guides: str, suite: str) -> None:
    host = fresh.FreshHost(lab, suite, small_image)
    try:
        for guide in GUIDES[guides]:
            found = [item for item in examples.blocks() if item.document == f"docs/{guide}"]
            assert host.run(found), guide
        # With vfs, which Debian 12 may choose, each start would copy the whole image.
        assert host.drivers() <= {"overlay"}
    finally:
        host.close()
