# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the command in the error for a failed pull: it uses the same store."""

from __future__ import annotations

import shutil
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage import as_user
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import StoreError
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.image_tools import (
    Tools,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import (
    StoreRequest,
)

SOURCE = "docker://registry.example/app:1"


def hint(programs: t.Collection[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the hint if the first program fails. The search for programs and their execution are replaced."""
    monkeypatch.setattr(shutil, "which", lambda name: name if name in programs else None)
    monkeypatch.setattr(
        as_user,
        "execute",
        lambda command, account, variables, files: as_user.Finished(1, "", "", "no route"),
    )
    tools = Tools(StoreRequest(), "overlay", "/my store", "/run/s", "")
    with pytest.raises(StoreError) as caught:
        tools.copy(SOURCE, "registry.example/app:1")
    return caught.value.hint


def test_skopeo_command_names_store(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hint(("skopeo", "podman"), monkeypatch) == (
        f"Run it manually: skopeo copy --quiet {SOURCE} "
        "'containers-storage:[overlay@/my store+/run/s]registry.example/app:1'"
    )


def test_podman_command_names_store(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hint(("podman",), monkeypatch) == (
        "Run it manually: podman --root '/my store' --runroot /run/s --storage-driver overlay "
        f"pull --quiet {SOURCE}"
    )
