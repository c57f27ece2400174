# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test which time counts as unused, with containers that are created between runs of layer_gc.

The tests do not change the machine's clock: they call layer_gc in this process with a given time.
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


class GcRuns:
    """Runs of layer_gc on a rootful store, with a simulated clock that starts now."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.start = clock.now()
        self.passed = 0.0

    def moment(self, passed: float, jump: float = 0.0, boot: str = "") -> Moment:
        """The time after ``passed`` seconds; ``jump`` is the error of the wall clock in seconds."""
        wall, uptime, this = self.start
        return Moment(wall + passed + jump, uptime + passed, boot or this)

    def collect(self, later: float = 0.0, **rules: t.Any) -> Json:
        """Run layer_gc ``later`` seconds after the previous run, or at ``moment``."""
        self.passed += later
        moment = rules.pop("moment", None) or self.moment(self.passed)
        store_request = StoreRequest(
            graphroot=str(self.store.graphroot),
            runroot=str(self.store.runroot),
            driver=self.store.driver,
        )
        return layer_gc.collect(layer_gc.GcRequest(store_request, rules), moment)

    def removed(self, later: float = 0.0, **rules: t.Any) -> t.List[str]:
        return [item["id"] for item in self.collect(later, **rules)["removed"]]


def options(text: str) -> t.List[str]:
    return ["--uidmap", text, "--gidmap", text]


def mapped(store: Store, image: Image) -> t.List[str]:
    """Create a mapped layer for each of the two maps, with no container that uses it."""
    for text in MAPS:
        store.podman("rm", store.create(image.name, *options(text)))
    return store.mapped_layers(image.name)


def age_access_times(store: Store, layer_id: str) -> None:
    """Set access times to two days ago, so that relatime updates them when the layer is read."""
    then = time.time_ns() - int(2 * DAY) * 10**9
    folder = store.layer_folder(layer_id)
    for path in [folder] if store.driver == "vfs" else list(folder.iterdir()):
        os.utime(path, ns=(then, path.lstat().st_mtime_ns), follow_symlinks=False)


@pytest.mark.parametrize("kind", ["overlay-forced", "vfs", "btrfs"])
@pytest.mark.parametrize("name", ["local", *SUITES])
def test_layer_used_only_between_runs_counts_as_used(
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
    runs = GcRuns(store)
    assert runs.removed(unused_for="4d") == []
    removed: t.List[str] = []
    for _half_day in range(12):
        if kind != "btrfs":
            age_access_times(store, busy)
        store.podman("rm", store.create(small_image.name, *options(MAPS[0])))
        removed += runs.removed(12 * HOUR, unused_for="4d")
    assert removed == [idle]
    assert store.mapped_layers(small_image.name) == [busy]


@pytest.mark.parametrize("kind", ["overlay-forced", "vfs", "btrfs"])
def test_without_access_times_only_time_without_containers_counts(
    kind: str, make_store: MakeStore, small_image: Image
) -> None:
    store = make_store(kind, small_image)
    mounts.mount("--bind", str(store.graphroot), str(store.graphroot))
    mounts.mount("-o", "remount,bind,noatime", str(store.graphroot))
    layers = mapped(store, small_image)
    runs = GcRuns(store)
    runs.collect()
    for _half_day in range(12):
        store.podman("rm", store.create(small_image.name, *options(MAPS[0])))
        result = runs.collect(12 * HOUR, unused_for="4d")
        if kind == "btrfs":
            continue
        assert result["removed"] == []
        assert any("no container was created or removed" in note for note in result["notes"])
    if kind == "btrfs":
        # btrfs itself records snapshots of the layer.
        assert store.mapped_layers(small_image.name) == layers[:1]
        return
    removed = [
        entry for _half_day in range(8) for entry in runs.removed(12 * HOUR, unused_for="4d")
    ]
    assert sorted(removed) == sorted(layers)


class TestGapsAndJumps:
    @pytest.fixture
    def store(self, make_store: MakeStore, small_image: Image) -> Store:
        store = make_store("overlay-forced", small_image)
        for layer_id in mapped(store, small_image):
            age_access_times(store, layer_id)
        return store

    @pytest.fixture
    def runs(self, store: Store) -> GcRuns:
        """Runs in each hour of a day."""
        runs = GcRuns(store)
        for _hour in range(24):
            runs.collect(HOUR)
        return runs

    AGES: t.ClassVar[Json] = {"unused_for": "4w", "created_before": "4w"}

    def test_time_in_which_host_is_off_does_not_count(self, runs: GcRuns) -> None:
        off: Json = {"moment": runs.moment(91 * DAY, boot="later")}
        result = runs.collect(**self.AGES, **off)
        assert result["removed"] == []
        assert {item["unused_seconds"] for item in result["kept"]} == {int(23 * HOUR)}
        notes = "\n".join(result["notes"])
        assert "does not count the time from" in notes
        assert "nothing is removed because of its age: the host was off for 90 days" in notes
        assert "was observed for 23 hours" in notes
        for hour in range(25):
            moment = runs.moment(91 * DAY + hour * HOUR, boot="later")
            result = runs.collect(moment=moment, **self.AGES)
        # After a day of runs the clock is reliable again, and the layers are old according to it.
        assert {item["rule"] for item in result["removed"]} == {"created_before"}

    def test_time_without_runs_does_not_count(self, runs: GcRuns) -> None:
        result = runs.collect(90 * DAY, unused_for="4w")
        assert result["removed"] == []
        assert "does not count the time from" in "\n".join(result["notes"])
        for _day in range(27):
            assert runs.removed(DAY, unused_for="4w") == []
        assert len(runs.removed(DAY, unused_for="4w")) == 2

    @pytest.mark.parametrize("jump", [YEARS, -YEARS])
    @pytest.mark.parametrize("boot", ["", "later"])
    def test_wrong_clock_in_one_run_removes_nothing(
        self, jump: float, boot: str, runs: GcRuns
    ) -> None:
        wrong: Json = {"moment": runs.moment(DAY + HOUR, jump, boot)}
        result = runs.collect(**self.AGES, max_copies_per_image=5, orphans="remove", **wrong)
        assert not result["changed"]
        assert "The clock is unreliable" in result["notes"][0]
        # The uptime counts the elapsed time, independent of the wall clock.
        seconds = 24 * HOUR if not boot else 23 * HOUR
        assert {item["unused_seconds"] for item in result["kept"]} == {int(seconds)}
        right = runs.collect(2 * HOUR, created_before="2h")
        assert len(right["removed"]) == 2

    def test_new_layer_is_not_old_with_wrong_clock(
        self, runs: GcRuns, store: Store, small_image: Image
    ) -> None:
        store.podman("rm", store.create(small_image.name, *options("0:300000:65536")))
        fresh = store.mapped_layers(small_image.name)[-1]
        moment = runs.moment(DAY + HOUR, YEARS)
        result = runs.collect(moment=moment, max_copies_per_image=0)
        assert fresh not in [item["id"] for item in result["removed"]]
        assert [item["rule"] for item in result["kept"] if item["id"] == fresh] == ["min_age"]
        assert len(result["removed"]) == 2

    def test_wrong_clock_in_first_run_removes_nothing(self, store: Store) -> None:
        runs = GcRuns(store)
        ahead: Json = {"moment": runs.moment(HOUR, YEARS)}
        result = runs.collect(**self.AGES, max_copies_per_image=0, **ahead)
        assert result["removed"] == []
        assert "nothing was written to the store" in result["notes"][0]

    def test_layers_with_future_creation_time_are_removed_in_time(self, store: Store) -> None:
        """Layers that were created while the clock was ahead are neither old at once nor new forever."""
        runs = GcRuns(store)
        past: Json = {"moment": runs.moment(0, -30 * DAY)}
        assert not runs.collect(**self.AGES, max_copies_per_image=0, **past)["changed"]
        moment = runs.moment(0, -30 * DAY)
        for hour in range(26):
            moment = runs.moment(hour * HOUR, -30 * DAY)
            assert not runs.collect(moment=moment, created_before="0")["changed"]
        assert len(runs.collect(moment=moment, max_copies_per_image=0)["removed"]) == 2


@pytest.mark.parametrize("kind", ["overlay-forced", "vfs", "btrfs", "rootless-overlay"])
def test_own_modules_do_not_change_access_times(
    kind: str, lab: Lab, make_store: MakeStore, many_files_image: t.Callable[[int], Image]
) -> None:
    # In podman 4.3.1's layers, files with names of one character belong to root; layer_template replaces such layers.
    image = many_files_image(5)
    store = make_store(kind, image)
    podman_args = ["--userns=keep-id"] if store.user else options(MAPS[0])
    store.podman("rm", store.create(image.name, *podman_args))
    (layer,) = store.mapped_layers(image.name)
    folder = store.layer_folder(layer)
    read = [folder / "link"] if store.driver == "overlay" else [folder]
    if store.driver != "btrfs":
        age_access_times(store, layer)

    def access_times() -> t.List[int]:
        return [path.lstat().st_atime_ns for path in read]

    before = access_times()
    mapping = {"userns": "keep-id"} if store.user else {"uidmap": [MAPS[0]]}
    template_args = {**store.module_args(), "images": [image.name]}
    run_module(lab, "image_layers_info", {**store.module_args(), "measure": "exclusive"})
    run_module(lab, "layer_gc", {**store.module_args(), "unused_for": "1w"})
    made = run_module(lab, "layer_template", {**template_args, **mapping})
    assert made["changed"] is False
    assert access_times() == before
    store.podman("rm", store.create(image.name, *podman_args))
    assert (access_times() == before) == (store.driver == "btrfs")
