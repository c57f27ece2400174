# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The layouts of the role prepare that need no copy.

`shared`: images, mounts and units are created and removed. `mapped`: the own layers of images carry the map.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import typing as t

from support import mounts

if t.TYPE_CHECKING:
    from fleet.conftest import Play
    from support.images import Image
    from support.lab import Lab
    from support.stores import Store
    from support.users import User

LOCAL = {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}
UNITS = pathlib.Path("/etc/systemd/system")
STORES = pathlib.Path("/var/lib/userns-storage.service")


def units() -> t.List[str]:
    """The paths of the collection's units, and of the links that enable them."""
    return sorted(str(path.relative_to(UNITS)) for path in UNITS.rglob("userns-storage*"))


def test_shared_layout_is_created_and_removed(
    play: t.Callable[..., Play],
    lab: Lab,
    make_store: t.Callable[..., Store],
    make_user: t.Callable[..., User],
    small_image: Image,
) -> None:
    # Other tests of the session may have left units and stores.
    for name in units():
        (UNITS / name).unlink()
    mounts.detach_all(str(STORES))
    for path in (STORES, pathlib.Path("/etc/userns-storage")):
        shutil.rmtree(path, ignore_errors=True)
    users = [make_user(), make_user()]
    stores = [make_store("rootless-overlay", user=user) for user in users]
    base = lab.folder()
    inventory = {
        "all": {
            "hosts": {"host": {}},
            "vars": {
                **LOCAL,
                "prepare_install": False,
                "prepare_subordinate_ids": False,
                "prepare_layout": "shared",
                "prepare_users": " ".join(user.name for user in users),
                "prepare_images": f"{small_image.name}={small_image.source}",
                "prepare_mappings": "keep-id",
                "prepare_shared_graphroot": f"{base}/g",
                "prepare_shared_runroot": f"{base}/r",
            },
        }
    }
    play("userns.storage.prepare", inventory, "--check")
    assert not STORES.exists()
    assert units() == []

    done = play("userns.storage.prepare", inventory)
    assert done.recap("host")["failed"] == 0
    for user, store in zip(users, stores):
        assert f"{user.name}: shared images: 1 image, 2 mounts, shared" in done.output
        answer = store.run(small_image.name, "id", "-u", args=("--userns=keep-id",))
        assert answer.strip() == str(user.uid)
        assert store.layers() == []
    assert units() == [
        "multi-user.target.wants/userns-storage.service",
        "paths.target.wants/userns-storage-follow.path",
        "userns-storage-follow.path",
        "userns-storage-follow.service",
        "userns-storage.service",
    ]
    paths = [str(UNITS / name) for name in units() if "/" not in name]
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    assert [line for line in verified.stderr.splitlines() if "userns-storage" in line] == []

    assert play("userns.storage.prepare", inventory).recap("host")["changed"] == 0

    playbook = done.folder / "absent.yml"
    playbook.write_text(
        "- hosts: all\n"
        "  gather_facts: false\n"
        "  roles:\n"
        "    - role: userns.storage.share\n"
        "      vars:\n"
        "        share_state: absent\n"
        f"        share_graphroot: {base}/g\n"
        f"        share_runroot: {base}/r\n"
    )
    play(playbook, inventory)
    assert not STORES.exists()
    assert units() == []
    assert str(STORES) not in pathlib.Path("/proc/self/mountinfo").read_text()
    assert play(playbook, inventory).recap("host")["changed"] == 0


def test_mapped_layout_needs_no_copy(
    play: t.Callable[..., Play],
    make_store: t.Callable[..., Store],
    make_user: t.Callable[..., User],
    small_image: Image,
) -> None:
    users = [make_user(), make_user()]
    # The first user has the image already, without a map.
    stores = [
        make_store("rootless-overlay", *images, user=user)
        for user, images in zip(users, ([small_image], []))
    ]
    plain = stores[0].layers()

    def run_prepare(fails: bool = False, **more: t.Any) -> Play:
        variables = {
            **LOCAL,
            "prepare_install": False,
            "prepare_subordinate_ids": False,
            "prepare_layout": "mapped",
            "prepare_users": " ".join(user.name for user in users),
            "prepare_images": f"{small_image.name}={small_image.source}",
            **more,
        }
        inventory = {"all": {"hosts": {"host": {}}, "vars": variables}}
        return play("userns.storage.prepare", inventory, fails=fails)

    for wrong in (
        {"prepare_mappings": "auto:size=4096"},
        {"prepare_mappings": "keep-id\n0:100000:65536"},
        {"prepare_pull": "never"},
    ):
        refused = run_prepare(fails=True, **wrong)
        assert refused.recap("host")["failed"] == 1
        assert "prepare_layout: mapped needs one mapping with fixed IDs" in refused.output
        assert stores[1].images() == []

    refused = run_prepare(fails=True)
    assert refused.recap("host")["failed"] == 1
    assert f"For {users[0].name}: " in refused.output
    assert "convert: true" in refused.output
    assert stores[0].layers() == plain

    done = run_prepare(prepare_convert=True)
    assert done.recap("host")["failed"] == 0
    for user, store in zip(users, stores):
        layers = store.layer_ids()
        assert layers == {layer["id"] for layer in plain}
        answer = store.run(small_image.name, "id", "-u", args=("--userns=keep-id",))
        assert answer.strip() == str(user.uid)
        assert store.layer_ids() == layers
    assert run_prepare(prepare_convert=True).recap("host")["changed"] == 0
