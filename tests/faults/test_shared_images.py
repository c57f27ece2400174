# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""shared_images is killed at any call, and users attack their shared stores."""

from __future__ import annotations

import pathlib
import subprocess
import typing as t

import pytest
from support.images import Image
from support.injection import KILL, ModuleServer
from support.lab import Lab
from support.stores import Store

Json = t.Dict[str, t.Any]
MakeStore = t.Callable[..., Store]

STORES = pathlib.Path("/var/lib/userns-storage.service")
ALIVE = ["images", "--quiet"]
# Number of kills, spread over all calls; the first three and the last are additional.
KILLS = 16


def unmount_all() -> None:
    """Unmount everything below the stores of users."""
    table = pathlib.Path("/proc/self/mountinfo").read_text()
    for line in table.splitlines():
        if str(STORES) in line.split()[4]:
            subprocess.run(["umount", "-l", line.split()[4]], check=True)


@pytest.fixture
def shared(
    make_store: MakeStore, make_user: t.Any, small_image: Image
) -> t.Iterator[t.Tuple[Store, Store, Json]]:
    """A real store, the store of a user, and the arguments of the module."""
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
def test_run_killed_at_any_call_is_completed_by_next_run(
    lab: Lab, shared: t.Tuple[Store, Store, Json], small_image: Image, state: str
) -> None:
    real, own, args = shared
    other = "absent" if state == "present" else "present"
    modules = ModuleServer(lab)
    try:

        def run(requested: str, **more: t.Any) -> t.Any:
            return modules.run("shared_images", {**args, "state": requested}, **more)

        run(other)
        points = run(state).points
        assert points > KILLS
        steps = {1, 2, 3, points, *range(1, points, max(points // KILLS, 1))}
        for at in sorted(steps):
            run(other)
            killed = run(state, at=at, fault=KILL)
            if killed.at is None:
                # This run made fewer calls than the first run.
                continue
            # The user's podman never fails, and can create a container.
            listed = own.podman(*ALIVE).stdout.split()
            if listed:
                own.podman("create", "--name=c", "--userns=keep-id", small_image.name, "/bin/true")
                own.podman("rm", "c")
            done = run(state).result
            assert not done.get("failed"), (at, killed.at, done)
            repeated = run(state).result
            assert repeated["changed"] is False, (at, killed.at, repeated)
            assert len(own.podman(*ALIVE).stdout.split()) == (1 if state == "present" else 0)
            own.storage_cli("layers")
            real.podman("images")
        if state == "absent":
            assert not STORES.exists()
    finally:
        modules.close()


def test_users_cannot_change_or_escape_shared_store(
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
    before = real.disk_state()
    for name, script in attacks.items():
        for command in (["sh", "-c", script], ["unshare", "-rm", "sh", "-c", script]):
            failed = lab.machine.run(command, account=user, check=False)
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
    assert before.changes(real.disk_state()) == []
    assert own.podman(*ALIVE).stdout.split() != []
