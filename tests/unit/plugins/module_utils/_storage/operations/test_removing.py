# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What tells the next run of a removal that was begun."""

from __future__ import annotations

import os
import pathlib
import types
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.opening import (
    OpenStore,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.removing import (
    condemn,
    condemned,
    is_condemning,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.staging import (
    StagingArea,
)

IMAGE, TOP, BASE = ("1" * 64, "2" * 64, "3" * 64)


def place_of(area: StagingArea) -> OpenStore:
    return t.cast(OpenStore, types.SimpleNamespace(store=area))


@pytest.fixture
def area(tmp_path: pathlib.Path) -> StagingArea:
    return StagingArea(str(tmp_path / "userns-storage"), timeout=5)


def test_only_what_nobody_works_on_is_condemned(area: StagingArea) -> None:
    trash = area.trash(IMAGE)
    assert not is_condemning(trash)
    condemn(trash, [TOP, BASE])
    assert is_condemning(trash)
    assert condemned(place_of(area)) == set()
    area.leave(trash)
    assert condemned(place_of(area)) == {IMAGE, TOP, BASE}
    # Who had left it does not delete it; a sweep does.
    area.discard(trash)
    assert is_condemning(trash)
    assert area.sweep() == [trash]
    assert condemned(place_of(area)) == set()


def write(data: bytes) -> t.Callable[[pathlib.Path], None]:
    return lambda note: note.write_bytes(data) and None


@pytest.mark.parametrize(
    "make",
    [
        lambda note: os.symlink("/etc/passwd", note),
        os.mkfifo,
        os.mkdir,
        write(b"\xff\xfe"),
        write(b"../../etc\n" + b"4" * 63 + b"\n" + b"A" * 64 + b"\n\0"),
    ],
)
def test_odd_notes_condemn_nobody(
    area: StagingArea, make: t.Callable[[pathlib.Path], None]
) -> None:
    trash = area.trash("orphan")
    make(pathlib.Path(trash) / "doomed")
    area.leave(trash)
    assert condemned(place_of(area)) == set()
