# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A conversion in place that is killed, or refused by the system, at the calls with which it changes the filesystem."""

from __future__ import annotations

import subprocess
import threading
import typing as t

import pytest
from support import full, mounts
from support.conversion_stops import Conversions
from support.conversions import convert
from support.hosts import Host
from support.images import Image
from support.injection import ERRORS, KILL, KILL_ONE
from support.lab import Lab
from support.power_cut import cut_off
from support.stops import MAP, OTHER_IMAGE, spread, tiny_image
from support.stores import Json, Store

MakeStore = t.Callable[..., Store]


@pytest.fixture
def conversions(
    lab: Lab, make_store: MakeStore, host: t.Callable[[str], Host]
) -> t.Iterator[t.Callable[[str], Conversions]]:
    """Makes the scene in a store of a kind."""
    made: t.List[Conversions] = []

    def make(kind: str) -> Conversions:
        made.append(Conversions(lab, make_store(kind), [lab.machine, host("trixie")]))
        return made[-1]

    yield make
    for item in made:
        item.modules.close()


@pytest.mark.parametrize("kind", ["overlay-tmpfs", "vfs-tmpfs", "btrfs"])
def test_killed_at_calls_from_first_to_last(
    kind: str, conversions: t.Callable[[str], Conversions]
) -> None:
    assert conversions(kind).kill_everywhere(most=14) == 14


@pytest.mark.parametrize("kind", ["overlay-tmpfs", "btrfs"])
def test_refused_by_the_system_at_calls_from_first_to_last(
    kind: str, conversions: t.Callable[[str], Conversions]
) -> None:
    """What was changed is restored under the locks: the image is never lost."""
    scene = conversions(kind)
    points = scene.run().points
    scene.restore()
    failures = {"old": 0, "new": 0}
    for number, at in enumerate(spread(points, 40)):
        run = scene.run(at, ERRORS[number % len(ERRORS)])
        assert run.at is not None
        assert run.result, run.output
        assert "Traceback" not in run.output, run.output
        assert "unexpected" not in str(run.result.get("msg")), run.output
        # What fails after the change, such as a deletion in the trash, is told as well.
        assert scene.form() in (("old", "new") if run.result.get("failed") else ("new",)), run
        failures[scene.form()] += bool(run.result.get("failed"))
        scene.restore()


@pytest.mark.parametrize("kind", ["overlay-ext4", "btrfs"])
def test_power_is_lost(kind: str, lab: Lab, make_store: MakeStore) -> None:
    """On the disk as it is at that moment no layer counts as whole whose owners are not those of its record."""
    store = make_store(kind, mib=256)
    scene = Conversions(lab, store, [lab.machine])
    try:
        disk = str(store.base / "disk")
        mounts.mount("-o", "remount,commit=600", disk)
        points = scene.run().points
        incomplete = 0
        for at in spread(points, 16):
            scene.restore()
            subprocess.run(["sync", "-f", disk], check=True)
            assert scene.run(at, KILL).at is not None
            with cut_off(store) as graphroot:
                incomplete += scene.incomplete_layers(graphroot)
        assert incomplete
    finally:
        scene.modules.close()


@pytest.mark.parametrize(
    "kind", ["overlay-ext4", "overlay-xfs", "vfs-ext4", "overlay-btrfs", "btrfs"]
)
def test_on_a_full_disk(kind: str, lab: Lab, make_store: MakeStore) -> None:
    store = make_store(kind, mib=320)
    scene = Conversions(lab, store, [lab.machine])
    try:
        full.fill_bytes(store.base / "disk")
        done = scene.run()
        assert "unexpected" not in str(done.result.get("msg")), done.output
        assert scene.form() == ("old" if done.result.get("failed") else "new"), done.result
        for path in (store.base / "disk").glob("fill-*"):
            path.unlink()
        done = scene.run()
        assert not done.result.get("failed"), done.output
        assert scene.form() == "new"
    finally:
        scene.modules.close()


def test_killed_in_a_users_namespace(lab: Lab, make_store: MakeStore) -> None:
    """Only the process that works as the user, while root's waits for it."""
    scene = Conversions(lab, make_store("rootless-vfs-tmpfs"), [lab.machine])
    try:
        points = scene.run().points
        scene.restore()
        for at in spread(points, 6):
            run = scene.run(at, KILL_ONE)
            assert "Traceback" not in run.output, run.output
            scene.look(may_be_lost=True)
            scene.restore()
    finally:
        scene.modules.close()


def test_podman_beside_it_is_only_delayed(
    lab: Lab, make_store: MakeStore, many_files_image: t.Callable[[int], Image]
) -> None:
    """podman lists, inspects and creates containers while another image is converted again and again."""
    store = make_store("overlay-forced", tiny_image(lab, OTHER_IMAGE), many_files_image(3000))
    name = many_files_image(3000).name
    ended = threading.Event()
    failed: t.List[Json] = []

    def convert_all_the_time() -> None:
        try:
            for number in range(12):
                done = convert(store, [name], [] if number % 2 else [MAP])
                if not done.get("changed"):
                    failed.append(done)
        finally:
            ended.set()

    thread = threading.Thread(target=convert_all_the_time)
    thread.start()
    rounds = 0
    while not ended.is_set():
        rounds += 1
        listed = store.podman("images", "--format={{.Repository}}").stdout.split()
        assert len(listed) == 2
        store.podman("rm", store.create(OTHER_IMAGE))
    thread.join()
    assert failed == []
    assert rounds >= 3
