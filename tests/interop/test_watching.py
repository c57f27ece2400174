# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which time counts as unused: real containers between the looks, and moments that are told to layer_gc.

The clock of the machine is left alone: layer_gc is called in this process with the moment given.
"""

from __future__ import annotations

import os
import time
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import clock
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel.clock import Moment
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import layer_gc
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import (
    StoreRequest,
)
from support import mounts
from support.hosts import SUITES, Host
from support.images import Image
from support.lab import Lab
from support.modules import run_module
from support.stores import Store

MakeStore = t.Callable[..., Store]
Json = t.Dict[str, t.Any]

HOUR, DAY = 3600.0, 86400.0
YEARS = 14 * 365 * DAY
MAPS = ["0:100000:65536", "0:200000:65536"]


class Looks:
    """layer_gc on one rootful store, by a clock of its own that begins now."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.start = clock.now()
        self.passed = 0.0

    def moment(self, passed: float, jump: float = 0.0, boot: str = "") -> Moment:
        """After so many seconds; ``jump`` is by how much the wall clock is wrong."""
        wall, uptime, this = self.start
        return Moment(wall + passed + jump, uptime + passed, boot or this)

    def collect(self, later: float = 0.0, **words: t.Any) -> Json:
        """layer_gc so many seconds later than the last time, unless ``moment`` is given."""
        self.passed += later
        moment = words.pop("moment", None) or self.moment(self.passed)
        where = StoreRequest(
            graphroot=str(self.store.graphroot),
            runroot=str(self.store.runroot),
            driver=self.store.driver,
        )
        return layer_gc.collect(layer_gc.GcRequest(where, words), moment)

    def removed(self, later: float = 0.0, **words: t.Any) -> t.List[str]:
        return [item["id"] for item in self.collect(later, **words)["removed"]]


def options(text: str) -> t.List[str]:
    return ["--uidmap", text, "--gidmap", text]


def mapped(store: Store, image: Image) -> t.List[str]:
    """A layer for each of the two maps, with no container on it any more."""
    for text in MAPS:
        store.podman("rm", store.create(image.name, *options(text)))
    return store.mapped_layers(image.name)


def let_a_day_pass(store: Store, layer_id: str) -> None:
    """Set back what relatime compares, as if the layer had last been read two days ago."""
    then = time.time_ns() - int(2 * DAY) * 10**9
    folder = store.layer_folder(layer_id)
    for path in [folder] if store.driver == "vfs" else list(folder.iterdir()):
        os.utime(path, ns=(then, path.lstat().st_mtime_ns), follow_symlinks=False)


@pytest.mark.parametrize("kind", ["overlay-forced", "vfs", "btrfs"])
@pytest.mark.parametrize("name", ["local", *SUITES])
def test_a_layer_used_between_the_looks_only(
    name: str,
    kind: str,
    lab: Lab,
    host: t.Callable[[str], Host],
    make_store: MakeStore,
    small_image: Image,
) -> None:
    machine = lab.machine if name == "local" else host(name)
    store = make_store(kind, small_image, machine=machine)
    busy, idle = mapped(store, small_image)
    looks = Looks(store)
    assert looks.removed(unused_for="4d") == []
    gone: t.List[str] = []
    for _half_day in range(12):
        if kind != "btrfs":
            let_a_day_pass(store, busy)
        store.podman("rm", store.create(small_image.name, *options(MAPS[0])))
        gone += looks.removed(12 * HOUR, unused_for="4d")
    assert gone == [idle]
    assert store.mapped_layers(small_image.name) == [busy]


@pytest.mark.parametrize("kind", ["overlay-forced", "vfs", "btrfs"])
def test_without_access_times_only_quiet_time_counts(
    kind: str, make_store: MakeStore, small_image: Image
) -> None:
    store = make_store(kind, small_image)
    mounts.mount("--bind", str(store.graphroot), str(store.graphroot))
    mounts.mount("-o", "remount,bind,noatime", str(store.graphroot))
    layers = mapped(store, small_image)
    looks = Looks(store)
    looks.collect()
    for _half_day in range(12):
        store.podman("rm", store.create(small_image.name, *options(MAPS[0])))
        result = looks.collect(12 * HOUR, unused_for="4d")
        if kind == "btrfs":
            continue
        assert result["removed"] == []
        assert any("no container was created or removed" in note for note in result["notes"])
    if kind == "btrfs":
        # Snapshots are counted by btrfs itself.
        assert store.mapped_layers(small_image.name) == layers[:1]
        return
    gone = [entry for _half_day in range(8) for entry in looks.removed(12 * HOUR, unused_for="4d")]
    assert sorted(gone) == sorted(layers)


class TestGapsAndJumps:
    @pytest.fixture
    def store(self, make_store: MakeStore, small_image: Image) -> Store:
        store = make_store("overlay-forced", small_image)
        for layer_id in mapped(store, small_image):
            let_a_day_pass(store, layer_id)
        return store

    @pytest.fixture
    def looks(self, store: Store) -> Looks:
        """A store that was looked at each hour for a day."""
        looks = Looks(store)
        for _hour in range(24):
            looks.collect(HOUR)
        return looks

    AGES: t.ClassVar[Json] = {"unused_for": "4w", "created_before": "4w"}

    def test_the_host_was_off_for_ninety_days(self, looks: Looks) -> None:
        off: Json = {"moment": looks.moment(91 * DAY, boot="later")}
        result = looks.collect(**self.AGES, **off)
        assert result["removed"] == []
        assert {item["unused_seconds"] for item in result["kept"]} == {int(23 * HOUR)}
        told = "\n".join(result["notes"])
        assert "does not count the time from" in told
        assert "nothing is removed because of its age: the host was off for 90 days" in told
        assert "was observed for 23 hours" in told
        for hour in range(25):
            moment = looks.moment(91 * DAY + hour * HOUR, boot="later")
            result = looks.collect(moment=moment, **self.AGES)
        # A day of looking has shown that the clock is right, and the records are old by it.
        assert {item["rule"] for item in result["removed"]} == {"created_before"}

    def test_the_service_was_stopped_for_ninety_days(self, looks: Looks) -> None:
        result = looks.collect(90 * DAY, unused_for="4w")
        assert result["removed"] == []
        assert "does not count the time from" in "\n".join(result["notes"])
        for _day in range(27):
            assert looks.removed(DAY, unused_for="4w") == []
        assert len(looks.removed(DAY, unused_for="4w")) == 2

    @pytest.mark.parametrize("jump", [YEARS, -YEARS])
    @pytest.mark.parametrize("boot", ["", "later"])
    def test_the_clock_is_wrong_for_one_run(self, jump: float, boot: str, looks: Looks) -> None:
        wrong: Json = {"moment": looks.moment(DAY + HOUR, jump, boot)}
        result = looks.collect(**self.AGES, max_copies_per_image=5, orphans="remove", **wrong)
        assert not result["changed"]
        assert "The clock is unreliable" in result["notes"][0]
        # Seconds that have passed are seconds, whatever the wall clock says.
        seconds = 24 * HOUR if not boot else 23 * HOUR
        assert {item["unused_seconds"] for item in result["kept"]} == {int(seconds)}
        right = looks.collect(2 * HOUR, created_before="2h")
        assert len(right["removed"]) == 2

    def test_a_layer_just_made_is_not_old_by_a_wrong_clock(
        self, looks: Looks, store: Store, small_image: Image
    ) -> None:
        store.podman("rm", store.create(small_image.name, *options("0:300000:65536")))
        fresh = store.mapped_layers(small_image.name)[-1]
        moment = looks.moment(DAY + HOUR, YEARS)
        result = looks.collect(moment=moment, max_copies_per_image=0)
        assert fresh not in [item["id"] for item in result["removed"]]
        assert [item["rule"] for item in result["kept"] if item["id"] == fresh] == ["min_age"]
        assert len(result["removed"]) == 2

    def test_the_first_run_ever_is_years_ahead(self, store: Store) -> None:
        looks = Looks(store)
        ahead: Json = {"moment": looks.moment(HOUR, YEARS)}
        result = looks.collect(**self.AGES, max_copies_per_image=0, **ahead)
        assert result["removed"] == []
        assert "nothing was written to the store" in result["notes"][0]

    def test_records_of_the_future(self, store: Store) -> None:
        """What was made while the clock was ahead is neither old nor young for ever."""
        looks = Looks(store)
        past: Json = {"moment": looks.moment(0, -30 * DAY)}
        assert not looks.collect(**self.AGES, max_copies_per_image=0, **past)["changed"]
        moment = looks.moment(0, -30 * DAY)
        for hour in range(26):
            moment = looks.moment(hour * HOUR, -30 * DAY)
            assert not looks.collect(moment=moment, created_before="0")["changed"]
        assert len(looks.collect(moment=moment, max_copies_per_image=0)["removed"]) == 2


@pytest.mark.parametrize("kind", ["overlay-forced", "vfs", "btrfs", "rootless-overlay"])
def test_our_own_modules_leave_no_trace(
    kind: str, lab: Lab, make_store: MakeStore, many_files_image: t.Callable[[int], Image]
) -> None:
    # podman 4.3.1 leaves names of one character to root, and layer_template replaces such a layer.
    image = many_files_image(5)
    store = make_store(kind, image)
    words = ["--userns=keep-id"] if store.user else options(MAPS[0])
    store.podman("rm", store.create(image.name, *words))
    (layer,) = store.mapped_layers(image.name)
    folder = store.layer_folder(layer)
    read = [folder / "link"] if store.driver == "overlay" else [folder]
    if store.driver != "btrfs":
        let_a_day_pass(store, layer)

    def traces() -> t.List[int]:
        return [path.lstat().st_atime_ns for path in read]

    before = traces()
    wanted = {"userns": "keep-id"} if store.user else {"uidmap": [MAPS[0]]}
    asked = {**store.module_args(), "images": [image.name]}
    run_module(lab, "image_layers_info", {**store.module_args(), "measure": "exclusive"})
    run_module(lab, "layer_gc", {**store.module_args(), "unused_for": "1w"})
    made = run_module(lab, "layer_template", {**asked, **wanted})
    assert made["changed"] is False
    assert traces() == before
    store.podman("rm", store.create(image.name, *words))
    assert (traces() == before) == (store.driver == "btrfs")
