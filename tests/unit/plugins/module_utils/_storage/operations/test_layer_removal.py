# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What tells the next run of a removal that was begun, and which layers that is about."""

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
from ansible_collections.userns.storage.plugins.module_utils._storage.store.records import (
    Image,
    Layer,
    new_record,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.snapshot import (
    Snapshot,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.staging import (
    StagingArea,
)

IMAGE, TOP, BASE = ("1" * 64, "2" * 64, "3" * 64)
DAY = 86400


def layer(layer_id: str, created: str = "2026-01-01T00:00:00Z", **more: t.Any) -> Layer:
    return new_record(Layer, {"id": layer_id, "created": created, **more}, "layers.json")


def snapshot(*layers: Layer, image: str = "") -> Snapshot:
    raw = {"id": IMAGE, "layer": image, "created": "2026-01-01T00:00:00Z"}
    images = {IMAGE: new_record(Image, raw, "images.json")} if image else {}
    return Snapshot({item.id: item for item in layers}, images, {})


def moment(wall: float) -> clock.Moment:
    return clock.now()._replace(wall=wall)


def place_of(area: StagingArea) -> OpenStore:
    return t.cast(OpenStore, types.SimpleNamespace(store=area))


@pytest.fixture
def area(tmp_path: pathlib.Path) -> StagingArea:
    return StagingArea(str(tmp_path / "userns-storage"), timeout=5)


def marks(area: StagingArea) -> t.Set[str]:
    return {
        mark for begun_removal in begun_removals(place_of(area)) for mark in begun_removal.marks
    }


def test_only_entries_without_a_live_process_are_begun_removals(area: StagingArea) -> None:
    trash = area.trash(IMAGE)
    assert not has_note(trash)
    note_removal(trash, [layer(TOP), layer(BASE)])
    assert has_note(trash)
    assert marks(area) == set()
    area.leave(trash)
    assert marks(area) == {mark_of(layer(TOP)), mark_of(layer(BASE))}
    (begun,) = begun_removals(place_of(area))
    assert begun.image_id == IMAGE
    assert begun_ids(place_of(area)) == {IMAGE, TOP, BASE}
    # Who had left it does not delete it; a sweep does.
    area.discard(trash)
    assert has_note(trash)
    assert area.sweep(None, lambda path: path == trash) == []
    assert area.sweep() == [trash]
    assert marks(area) == set()


def test_the_name_of_a_folder_tells_of_one_layer(area: StagingArea) -> None:
    area.leave(area.trash(f"{TOP}-{mark_of(layer(TOP))}"))
    assert marks(area) == {mark_of(layer(TOP))}
    area.leave(area.trash("orphan"))
    area.leave(area.trash(BASE))
    assert marks(area) == {mark_of(layer(TOP))}


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
def test_odd_notes_tell_of_nothing(
    area: StagingArea, make: t.Callable[[pathlib.Path], None]
) -> None:
    trash = area.trash("orphan")
    make(pathlib.Path(trash) / "removal.json")
    area.leave(trash)
    assert marks(area) == set()


class TestAbandoned:
    @pytest.fixture
    def image_goes(self, area: StagingArea) -> t.Callable[[float], Abandoned]:
        """A removal of an image with one layer that was begun just now, seen so many seconds later."""
        trash = area.trash(IMAGE)
        note_removal(trash, [layer(TOP)])
        area.leave(trash)
        (begun,) = begun_removals(place_of(area))
        return lambda later: Abandoned([begun], moment(begun.since + later))

    def test_what_was_marked_goes_at_once(self, image_goes: t.Callable[[float], Abandoned]) -> None:
        now = snapshot(layer(TOP, flags={"incomplete": True}))
        assert [item.id for item in image_goes(1).layers(now)] == [TOP]

    def test_what_a_pull_may_have_reused_goes_a_day_later(
        self, image_goes: t.Callable[[float], Abandoned]
    ) -> None:
        now = snapshot(layer(TOP))
        found = image_goes(DAY - 1)
        assert found.layers(now) == []
        assert found.waits(now, found.begun[0])
        later = image_goes(DAY + 1)
        assert [item.id for item in later.layers(now)] == [TOP]
        assert not later.waits(now, later.begun[0])

    def test_what_a_pull_has_reused_stays(self, image_goes: t.Callable[[float], Abandoned]) -> None:
        now = snapshot(layer(TOP), image=TOP)
        found = image_goes(DAY * 9)
        assert found.layers(now) == []
        assert not found.waits(now, found.begun[0])

    def test_no_pull_outlives_a_boot(self, image_goes: t.Callable[[float], Abandoned]) -> None:
        begun = image_goes(1).begun[0]._replace(boot="another")
        found = Abandoned([begun], moment(begun.since + 1))
        assert [item.id for item in found.layers(snapshot(layer(TOP)))] == [TOP]

    @pytest.mark.parametrize("flags", [{}, {"incomplete": True}])
    def test_a_layer_that_a_pull_has_recreated_is_kept(
        self, image_goes: t.Callable[[float], Abandoned], flags: t.Dict[str, bool]
    ) -> None:
        now = snapshot(layer(TOP, "2026-01-02T00:00:00Z", flags=flags))
        found = image_goes(DAY * 9)
        assert found.layers(now) == []
        assert not found.waits(now, found.begun[0])

    def test_a_mapped_layer_goes_at_once_while_another_has_its_content(
        self, area: StagingArea
    ) -> None:
        mapped = layer(TOP, **{"diff-digest": "sha256:x"})
        area.leave(area.trash(f"{TOP}-{mark_of(mapped)}"))
        found = Abandoned(begun_removals(place_of(area)), moment(0.0))
        template = layer(BASE, **{"diff-digest": "sha256:x"})
        assert [item.id for item in found.layers(snapshot(mapped, template))] == [TOP]
        assert found.layers(snapshot(mapped)) == []
