# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the notes about interrupted removals, and of the layers that the next run removes."""

from __future__ import annotations

import json
import os
import pathlib
import types
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import clock
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.cleanup import (
    Abandoned,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.layer_removal import (
    begun_ids,
    begun_removals,
    has_note,
    mark_of,
    note_removal,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import (
    OpenStore,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.staging import (
    StagingArea,
)
from support.made_records import image_record, layer_record, snapshot_of

IMAGE, TOP, BASE = ("1" * 64, "2" * 64, "3" * 64)
DAY = 86400


def moment(wall: float) -> clock.Moment:
    return clock.now()._replace(wall=wall)


def store_ctx_of(area: StagingArea) -> OpenStore:
    return t.cast(OpenStore, types.SimpleNamespace(store=area))


@pytest.fixture
def area(tmp_path: pathlib.Path) -> StagingArea:
    return StagingArea(str(tmp_path / "userns-storage"), timeout=5)


def marks(area: StagingArea) -> t.Set[str]:
    return {
        mark for begun_removal in begun_removals(store_ctx_of(area)) for mark in begun_removal.marks
    }


def test_removal_of_live_process_is_not_interrupted(area: StagingArea) -> None:
    trash = area.trash(IMAGE)
    assert not has_note(trash)
    note_removal(trash, [layer_record(TOP), layer_record(BASE)])
    assert has_note(trash)
    assert marks(area) == set()
    area.leave(trash)
    assert marks(area) == {mark_of(layer_record(TOP)), mark_of(layer_record(BASE))}
    (begun,) = begun_removals(store_ctx_of(area))
    assert begun.image_id == IMAGE
    assert begun_ids(store_ctx_of(area)) == {IMAGE, TOP, BASE}
    # The process that left the trash does not delete it; a sweep does.
    area.discard(trash)
    assert has_note(trash)
    assert area.sweep(None, lambda path: path == trash) == []
    assert area.sweep() == [trash]
    assert marks(area) == set()


def test_name_of_trash_directory_identifies_layer(area: StagingArea) -> None:
    area.leave(area.trash(f"{TOP}-{mark_of(layer_record(TOP))}"))
    assert marks(area) == {mark_of(layer_record(TOP))}
    area.leave(area.trash("orphan"))
    area.leave(area.trash(BASE))
    assert marks(area) == {mark_of(layer_record(TOP))}


@pytest.mark.parametrize(
    "make",
    [
        lambda note: os.symlink("/etc/passwd", note),
        os.mkfifo,
        os.mkdir,
        lambda note: note.write_bytes(b"\xff\xfe") and None,
        lambda note: note.write_bytes(b"[" * 100000) and None,
        lambda note: note.write_text(json.dumps({"boot": 1, "layers": {TOP: "4" * 16}})) and None,
        lambda note: (
            note.write_text(
                json.dumps({"boot": "", "layers": {"../x": "4" * 16, TOP: 5, BASE: "4" * 17}})
            )
            and None
        ),
    ],
)
def test_invalid_notes_are_ignored(
    area: StagingArea, make: t.Callable[[pathlib.Path], None]
) -> None:
    trash = area.trash("orphan")
    make(pathlib.Path(trash) / "removal.json")
    area.leave(trash)
    assert marks(area) == set()


class TestAbandoned:
    @pytest.fixture
    def removal_after(self, area: StagingArea) -> t.Callable[[float], Abandoned]:
        """Begin to remove an image with one layer, and return the state after a given number of seconds."""
        trash = area.trash(IMAGE)
        note_removal(trash, [layer_record(TOP)])
        area.leave(trash)
        (begun,) = begun_removals(store_ctx_of(area))
        return lambda later: Abandoned([begun], moment(begun.since + later))

    def test_incomplete_layer_is_removed_at_once(
        self, removal_after: t.Callable[[float], Abandoned]
    ) -> None:
        now = snapshot_of(layer_record(TOP, flags={"incomplete": True}))
        assert [item.id for item in removal_after(1).layers(now)] == [TOP]

    def test_layer_that_pull_may_reuse_is_removed_after_a_day(
        self, removal_after: t.Callable[[float], Abandoned]
    ) -> None:
        now = snapshot_of(layer_record(TOP))
        found = removal_after(DAY - 1)
        assert found.layers(now) == []
        assert found.waits(now, found.begun[0])
        later = removal_after(DAY + 1)
        assert [item.id for item in later.layers(now)] == [TOP]
        assert not later.waits(now, later.begun[0])

    def test_layer_that_pull_has_reused_is_kept(
        self, removal_after: t.Callable[[float], Abandoned]
    ) -> None:
        now = snapshot_of(layer_record(TOP), image_record(IMAGE, TOP))
        found = removal_after(DAY * 9)
        assert found.layers(now) == []
        assert not found.waits(now, found.begun[0])

    def test_layer_is_removed_at_once_after_reboot(
        self, removal_after: t.Callable[[float], Abandoned]
    ) -> None:
        begun = removal_after(1).begun[0]._replace(boot="another")
        found = Abandoned([begun], moment(begun.since + 1))
        assert [item.id for item in found.layers(snapshot_of(layer_record(TOP)))] == [TOP]

    @pytest.mark.parametrize("flags", [{}, {"incomplete": True}])
    def test_layer_that_pull_has_recreated_is_kept(
        self, removal_after: t.Callable[[float], Abandoned], flags: t.Dict[str, bool]
    ) -> None:
        now = snapshot_of(layer_record(TOP, created="2026-01-02T00:00:00Z", flags=flags))
        found = removal_after(DAY * 9)
        assert found.layers(now) == []
        assert not found.waits(now, found.begun[0])

    def test_mapped_layer_is_removed_at_once_if_template_exists(self, area: StagingArea) -> None:
        mapped = layer_record(TOP, **{"diff-digest": "sha256:x"})
        area.leave(area.trash(f"{TOP}-{mark_of(mapped)}"))
        found = Abandoned(begun_removals(store_ctx_of(area)), moment(0.0))
        template = layer_record(BASE, **{"diff-digest": "sha256:x"})
        assert [item.id for item in found.layers(snapshot_of(mapped, template))] == [TOP]
        assert found.layers(snapshot_of(mapped)) == []
