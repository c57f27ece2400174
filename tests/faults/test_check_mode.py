# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The kernel confirms that check mode makes no system call that changes a file."""

from __future__ import annotations

import contextlib
import json
import pathlib
import sqlite3
import typing as t

import pytest
from support.injection import ModuleServer
from support.lab import Lab
from support.registry import Registry
from support.stores import Store
from support.task_stops import MAP, OTHER_IMAGE, tiny_image
from support.users import User

MakeStore = t.Callable[..., Store]
TINY = "localhost/tiny:1"
HOST = "registry.example.org"
LOGIN = {"username": "robot", "password": "secret"}
# LAYOUT and USER are placeholders.
TASKS: t.Sequence[t.Tuple[str, t.Dict[str, t.Any]]] = (
    ("layer_template", {"images": [TINY], "uidmap": [MAP], "force": True}),
    ("layer_template", {"images": [TINY], "uidmap": [MAP], "state": "absent"}),
    (
        "layer_template",
        {"images": [f"{HOST}/one:1"], "uidmap": [MAP], "pull": "missing", **LOGIN},
    ),
    ("layer_gc", {"min_age": "0", "max_copies_per_image": 0, "orphans": "remove"}),
    ("image_layers", {"images": [TINY], "state": "absent"}),
    ("image_layers", {"images": ["localhost/new:1"], "source": "LAYOUT"}),
    ("image_layers", {"images": [f"{HOST}/one:1", f"{HOST}/two:1"], "pull": "newer", **LOGIN}),
    ("image_layers", {"images": [f"{HOST}/one:1"], "uidmap": [MAP], **LOGIN}),
    ("image_layers", {"images": [TINY], "source": "LAYOUT", "uidmap": [MAP], "convert": True}),
    ("image_layers_info", {"measure": "exclusive"}),
    ("shared_images", {"users": ["USER"], "mappings": [{"userns": "keep-id"}]}),
    ("storage_conf", {"settings": ["driver=overlay"]}),
    ("storage_conf", {"settings": ["overlay.mountopt=nodev"], "user": "USER"}),
    ("subordinate_ids", {"users": ["USER"], "count": 200_000}),
    ("rootless_stores_info", {}),
)
# The probe for ID-mapped mounts creates these directories on a tmpfs in its own mount namespace.
PROBE = tuple(f"/overlay/{name}" for name in ("mapped", "empty", "merged"))
# These modules change hosts, and have no options for a store.
HOST_MODULES = ("storage_conf", "subordinate_ids", "rootless_stores_info")


@pytest.mark.parametrize("kind", ["overlay-xfs", "overlay-ext4", "btrfs"])
def test_check_mode_changes_no_file(
    kind: str, lab: Lab, make_store: MakeStore, make_user: t.Callable[..., User]
) -> None:
    image, user = tiny_image(lab), make_user()
    store = make_store(kind, image)
    # SQLite itself would write to this journal.
    connection = sqlite3.connect(store.graphroot / "db.sql")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE ContainerConfig (ID TEXT, JSON TEXT)")
    connection.commit()
    assert (store.graphroot / "db.sql-wal").stat().st_size > 0
    registry = Registry(tiny_image(lab, OTHER_IMAGE), (HOST,))
    registries = lab.machine.path("/etc/containers/registries.conf")
    original = registries.read_bytes() if registries.exists() else None
    registry.configure(registries.parent)
    modules = ModuleServer(lab)
    try:
        before, files_before = store.disk_state(), host_files(user)
        for module, args in TASKS:
            arguments = json.loads(
                json.dumps(args).replace("LAYOUT", image.source).replace("USER", user.name)
            )
            store_args = {} if module in HOST_MODULES else store.module_args()
            if module == "shared_images":
                store_args = {key: store_args[key] for key in ("graphroot", "runroot")}
            arguments = {**store_args, **arguments, "_ansible_check_mode": True}
            run = modules.run(module, arguments, below="", record=True)
            if not (module == "shared_images" and kind == "btrfs"):
                assert not run.result.get("failed"), (module, args, run.output)
            assert run.calls
            changing = [
                str(call)
                for call in run.calls
                if call.changes
                and not call.paths[0].startswith(
                    ("/proc/", "pipe:", "socket:", "/dev/null", "/memfd:")
                )
                and not (call.name == "mkdir" and call.paths[0].endswith(PROBE))
            ]
            assert [
                item for item in changing if not item.startswith(("write(", "syncfs(", "fsync("))
            ] == [], (module, args)
            # The programs that the module starts change no file either.
            assert before.changes(store.disk_state()) == [], (module, args)
            assert host_files(user) == files_before, (module, args)
    finally:
        modules.close()
        connection.close()
        registry.close()
        if original is None:
            registries.unlink()
        else:
            registries.write_bytes(original)


def host_files(user: User) -> t.Dict[str, t.Tuple[int, int]]:
    """The sizes and change times of files outside the store."""
    # Other programs of the machine also use /tmp and /var/tmp.
    paths = [*pathlib.Path("/tmp").glob("userns-storage*"), *pathlib.Path("/var/tmp").iterdir()]
    for root in ("/etc", "/run", "/var/lib", user.home):
        paths += pathlib.Path(root).rglob("*")
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            found[str(path)] = (status.st_size, status.st_ctime_ns)
    return found
