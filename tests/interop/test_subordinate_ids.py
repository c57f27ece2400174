# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module subordinate_ids as a process: what it returns to Ansible."""

from __future__ import annotations

import pathlib
import typing as t

from support.lab import Lab


def test_control_characters_in_results_are_escaped(
    lab: Lab, run_module: t.Callable[..., t.Any]
) -> None:
    file = pathlib.Path("/etc/subuid")
    before = file.read_bytes()
    try:
        file.write_bytes(before + b"evil\x1b[2J:900000000:1\n")
        result = run_module("subordinate_ids", {"users": ["nobody"]}, check=True, diff=True)
    finally:
        file.write_bytes(before)
    assert result["changed"]
    assert "evil\\x1b[2J:" in result["diff"][0]["after"]
    message = run_module("subordinate_ids", {"users": ["evil\x1b[2J"]}, fails=True)["msg"]
    assert "is not a valid user name" in message
    assert "\x1b" not in message
