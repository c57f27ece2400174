# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""shared_images killed at any point, and the users it serves as attackers."""

from __future__ import annotations

import pathlib
import subprocess
import typing as t

import pytest
from support.images import Image
from support.injection import KILL, Modules
from support.lab import Lab
from support.stores import Store

Json = t.Dict[str, t.Any]
MakeStore = t.Callable[..., Store]

STORES = pathlib.Path("/var/lib/userns-storage.service")
ALIVE = ["images", "--quiet"]
# So many kills, spread over all calls; the first ones and the last one among them.
KILLS = 16


def unmount_all() -> None:
    """End what is mounted below the stores of users."""
    table = pathlib.Path("/proc/self/mountinfo").read_text()
    for line in table.splitlines():
        if str(STORES) in line.split()[4]:
            subprocess.run(["umount", "-l", line.split()[4]], check=True)


@pytest.fixture
def shared(
    make_store: MakeStore, make_user: t.Any, small_image: Image
) -> t.Iterator[t.Tuple[Store, Store, Json]]:
    """A real store, that of a user, and what the module is told."""
    real = make_store("overlay", small_image)
    user = make_user()
    own = make_store("rootless-overlay", user=user)
    args = {
        "graphroot": str(real.graphroot),
        "runroot": str(real.runroot),
        "users": [user.name],
        "mappings": [{"userns": "keep-id"}],
    }
    yield real, own, args
    unmount_all()
    subprocess.run(["rm", "-rf", str(STORES), "/etc/userns-storage"], check=True)


@pytest.mark.parametrize("state", ["present", "absent"])
def test_killed_at_any_point(
    lab: Lab, shared: t.Tuple[Store, Store, Json], small_image: Image, state: str
) -> None:
    real, own, args = shared
    other = "absent" if state == "present" else "present"
    modules = Modules(lab)
    try:

        def run(wanted: str, **more: t.Any) -> t.Any:
            return modules.run("shared_images", {**args, "state": wanted}, **more)

        run(other)
        points = run(state).points
        assert points > KILLS
        steps = {1, 2, 3, points, *range(1, points, max(points // KILLS, 1))}
        for at in sorted(steps):
            run(other)
            killed = run(state, at=at, what=KILL)
            if killed.at is None:
                # This run made fewer calls than the first one.
                continue
            # podman of the user never fails, and what it starts has its files.
            listed = own.podman(*ALIVE).stdout.split()
            if listed:
                own.podman("create", "--name=c", "--userns=keep-id", small_image.name, "/bin/true")
                own.podman("rm", "c")
            done = run(state).result
            assert not done.get("failed"), (at, killed.at, done)
            again = run(state).result
            assert again["changed"] is False, (at, killed.at, again)
            assert len(own.podman(*ALIVE).stdout.split()) == (1 if state == "present" else 0)
            own.storage_cli("layers")
            real.podman("images")
        if state == "absent":
            assert not STORES.exists()
    finally:
        modules.close()


def test_users_cannot_change_or_leave_what_they_are_shown(
    lab: Lab,
    shared: t.Tuple[Store, Store, Json],
    run_module: t.Callable[..., Json],
    make_user: t.Any,
) -> None:
    real, own, args = shared
    done = run_module("shared_images", args)
    folder = done["users"][0]["store"]
    user, other = own.user, make_user()
    view = f"{folder}/m/$(ls {folder}/m | grep -v not | head -n1)"
    attacks = {
        "write": f"echo x > {view}/x",
        "records": f"echo '[]' > {folder}/overlay-images/images.json",
        "lock": f": > {folder}/overlay-images/images.lock",
        "link": f"ln -sfn /etc {folder}/overlay/l/x",
        "rename": f"mv {folder} {folder}.old",
        "remove": f"rm -rf {folder}/overlay-images {folder}/overlay-layers",
        "upwards": f"cat {view}/../../../../*/*/overlay-images/images.json.new",
        "copies": "cat /var/lib/userns-storage.service/copies/*/*",
        "device": f"mknod {view}/null c 1 3",
    }
    before = real.snapshot_of_disk()
    for name, script in attacks.items():
        for words in (["sh", "-c", script], ["unshare", "-rm", "sh", "-c", script]):
            failed = lab.machine.run(words, account=user, check=False)
            assert failed.rc != 0, name
    for script in (
        f"mount -o remount,bind,rw {view}",
        f"mount -o remount,bind,suid,dev {view}",
        f"umount {view}",
        f"mount --move {view} /mnt",
    ):
        failed = lab.machine.run(["unshare", "-rm", "sh", "-c", script], account=user, check=False)
        assert failed.rc != 0, script
    for path in (folder, f"{folder}/overlay-images/images.json"):
        failed = lab.machine.run(["ls", path], account=other, check=False)
        assert failed.rc != 0
        assert "ermission denied" in failed.stderr
    assert before.changes(real.snapshot_of_disk()) == []
    assert own.podman(*ALIVE).stdout.split() != []
