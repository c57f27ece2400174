# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Conversions in place that are killed, or whose system calls fail, at calls that change the filesystem."""

from __future__ import annotations

import subprocess
import threading
import typing as t

import pytest
from support import fill_filesystem, mounts
from support.conversion_stops import Conversions
from support.conversions import convert
from support.hosts import Host
from support.images import Image
from support.injection import ERRORS, KILL, KILL_CALLER
from support.lab import Lab
from support.power_loss_mount import mount_after_power_loss
from support.stores import Json, Store
from support.task_stops import MAP, OTHER_IMAGE, spread, tiny_image

MakeStore = t.Callable[..., Store]


@pytest.fixture
def conversions(
    lab: Lab, make_store: MakeStore, host: t.Callable[[str], Host]
) -> t.Iterator[t.Callable[[str], Conversions]]:
    """Create a test scene in a store of the given kind."""
    made: t.List[Conversions] = []

    def make(kind: str) -> Conversions:
        made.append(Conversions(lab, make_store(kind), [lab.machine, host("trixie")]))
        return made[-1]

    yield make
    for item in made:
        item.modules.close()


@pytest.mark.parametrize("kind", ["overlay-tmpfs", "vfs-tmpfs", "btrfs"])
def test_store_is_usable_after_kill_at_any_call(
    kind: str, conversions: t.Callable[[str], Conversions]
) -> None:
    assert conversions(kind).kill_everywhere(most=14) == 14


@pytest.mark.parametrize("kind", ["overlay-tmpfs", "btrfs"])
def test_image_is_kept_after_error_at_any_call(
    kind: str, conversions: t.Callable[[str], Conversions]
) -> None:
    """Changes are reverted while the locks are held, so the image is never lost."""
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
        # Errors after the change, such as a failed deletion in the trash, are reported too.
        assert scene.form() in (("old", "new") if run.result.get("failed") else ("new",)), run
        failures[scene.form()] += bool(run.result.get("failed"))
        scene.restore()


@pytest.mark.parametrize("kind", ["overlay-ext4", "btrfs"])
def test_power_loss_leaves_no_complete_layer_with_wrong_owners(
    kind: str, lab: Lab, make_store: MakeStore
) -> None:
    """On a copy of the disk at that moment, no layer counts as complete if its owners differ from its record."""
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
            with mount_after_power_loss(store) as graphroot:
                incomplete += scene.incomplete_layers(graphroot)
        assert incomplete
    finally:
        scene.modules.close()


@pytest.mark.parametrize(
    "kind", ["overlay-ext4", "overlay-xfs", "vfs-ext4", "overlay-btrfs", "btrfs"]
)
def test_conversion_on_full_disk_succeeds_or_keeps_image(
    kind: str, lab: Lab, make_store: MakeStore
) -> None:
    store = make_store(kind, mib=320)
    scene = Conversions(lab, store, [lab.machine])
    try:
        fill_filesystem.fill_bytes(store.base / "disk")
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


def test_store_is_usable_after_kill_in_user_namespace(lab: Lab, make_store: MakeStore) -> None:
    """Only the process that works as the user is killed, while root's process waits for it."""
    scene = Conversions(lab, make_store("rootless-vfs-tmpfs"), [lab.machine])
    try:
        points = scene.run().points
        scene.restore()
        for at in spread(points, 6):
            run = scene.run(at, KILL_CALLER)
            assert "Traceback" not in run.output, run.output
            scene.check_state(may_be_lost=True)
            scene.restore()
    finally:
        scene.modules.close()


def test_concurrent_podman_is_only_delayed(
    lab: Lab, make_store: MakeStore, many_files_image: t.Callable[[int], Image]
) -> None:
    """podman lists images and creates containers while another image is converted repeatedly."""
    store = make_store("overlay-forced", tiny_image(lab, OTHER_IMAGE), many_files_image(3000))
    name = many_files_image(3000).name
    ended = threading.Event()
    failed: t.List[Json] = []

    def convert_repeatedly() -> None:
        try:
            for number in range(12):
                done = convert(store, [name], [] if number % 2 else [MAP])
                if not done.get("changed"):
                    failed.append(done)
        finally:
            ended.set()

    thread = threading.Thread(target=convert_repeatedly)
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
