# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test shared_images with podman of each release: users share the images of one store without copies."""

from __future__ import annotations

import os
import typing as t

import pytest
from support import images
from support.conversions import convert, texts
from support.images import Image
from support.lab import Lab
from support.machines import Machine
from support.modules import service_command
from support.stores import Store

Json = t.Dict[str, t.Any]
MakeStore = t.Callable[..., Store]
RunModule = t.Callable[..., Json]

RELEASES = ["machine", "trixie", "sid", "experimental"]
KEEP_ID = [{"userns": "keep-id"}]
STORES = "/var/lib/userns-storage.service"
# All paths that the module creates on a host.
PATHS = (STORES, "/etc/userns-storage", "/etc/containers/storage.rootless.conf.d")
OWNERS = "stat -c '%u:%g' / /srv/one /srv/two /etc/passwd"


class Setup:
    """A store of root, and calls of shared_images for it."""

    def __init__(self, machine: Machine, store: Store, image: Image, run_module: RunModule) -> None:
        self.machine, self.store, self.image, self._run = machine, store, image, run_module

    def share(self, *users: t.Any, fails: t.Optional[bool] = False, **more: t.Any) -> Json:
        check = more.pop("check", False)
        args = {
            "graphroot": str(self.store.graphroot),
            "runroot": str(self.store.runroot),
            "users": [user.name for user in users],
            "mappings": KEEP_ID,
            **more,
        }
        return self._run("shared_images", args, machine=self.machine, fails=fails, check=check)

    def mounts(self) -> t.List[str]:
        """Mount points of the shared stores on the machine."""
        table = self.machine.run(["cat", "/proc/self/mountinfo"]).stdout
        return [line.split()[4] for line in table.splitlines() if STORES in line.split()[4]]

    def unmount_all(self) -> None:
        """Remove all mounts, as a boot does."""
        for point in self.mounts():
            self.machine.run(["umount", "-l", point])

    def module_files(self) -> t.List[str]:
        """The module's files on the machine."""
        script = "for path; do if [ -e $path ]; then find $path; fi; done"
        return self.machine.run(["sh", "-c", script, "sh", *PATHS]).stdout.split()


@pytest.fixture
def owners_image(lab: Lab) -> Image:
    """An image of two layers; the upper layer hides a folder of the lower layer."""
    tree = images.small_layers()[0]
    lower = {
        **tree,
        "srv": images.directory(),
        "srv/one": images.file("one\n", uid=1),
        "srv/two": images.file("two\n", uid=1000, gid=1000),
        "opt": images.directory(),
        "opt/hidden": images.file("hidden\n"),
    }
    upper = {"opt": images.directory(), "opt/.wh..wh..opq": images.file("")}
    return images.build(lab.folder(), [lower, upper], "localhost/owners:1")


@pytest.fixture
def make_setup(
    lab: Lab, make_store: MakeStore, owners_image: Image, run_module: RunModule, host: t.Any
) -> t.Iterator[t.Callable[..., Setup]]:
    made: t.List[Setup] = []

    def make(release: str = "machine") -> Setup:
        machine = lab.machine if release == "machine" else host(release)
        store = make_store("overlay", owners_image, machine=machine)
        made.append(Setup(machine, store, owners_image, run_module))
        return made[-1]

    yield make
    for setup in made:
        setup.unmount_all()
        setup.machine.run(["rm", "-rf", *PATHS])


@pytest.mark.parametrize("release", RELEASES)
def test_users_start_containers_without_a_copy(
    make_setup: t.Callable[..., Setup], make_user: t.Any, make_store: MakeStore, release: str
) -> None:
    setup = make_setup(release)
    users = [make_user(setup.machine) for _number in range(2)]
    stores = [make_store("rootless-overlay", user=user, machine=setup.machine) for user in users]

    before = setup.module_files()
    predicted = setup.share(*users, check=True)
    assert predicted["changed"]
    assert [user["action"] for user in predicted["users"]] == ["shared", "shared"]
    assert setup.module_files() == before
    assert setup.mounts() == []

    done = setup.share(*users)
    assert done["changed"]
    assert [user["bytes_copied"] for user in done["users"]] == [0, 0]
    # There is one mount for each user and map, independent of the number of layers.
    assert [user["mounts"] for user in done["users"]] == [2, 2]
    assert len(setup.mounts()) == 4
    assert not setup.share(*users)["changed"]
    (listed,) = setup._run("rootless_stores_info", {}, machine=setup.machine)["shared_stores"]
    assert listed["graphroot"] == str(setup.store.graphroot)
    assert listed["users"] == [
        {"user": user.name, "images": ["*"], "mappings": 1}
        for user in sorted(users, key=lambda user: user.name)
    ]

    name = setup.image.name
    for user, store in zip(users, stores):
        listed = store.podman("images", "--format", "{{.Repository}}:{{.Tag}} {{.ReadOnly}}").stdout
        assert listed.split() == [name, "true"]
        plain = store.run(name, "sh", "-c", OWNERS).split()
        assert plain == ["0:0", "1:0", "1000:1000", "0:0"]
        keep = ("--userns=keep-id", "--user=0:0")
        assert store.run(name, "sh", "-c", OWNERS, args=keep).split() == plain
        assert store.run(name, "id", "-u", args=("--userns=keep-id",)).strip() == str(user.uid)
        # The folder of the lower layer is hidden, as it is for root.
        assert store.run(name, "ls", "/opt").split() == []
        store.create(name, "--name=kept", "--userns=keep-id")
        # The store contains only the container's own layer.
        assert len(store.layers()) == 1
        assert store.images() == []
        removed = store.podman("rmi", name, check=False)
        assert removed.rc != 0

    # Commits can use a shared image as their base.
    store = stores[0]
    store.podman("commit", "-q", "kept", "localhost/mine:1")
    assert store.run("localhost/mine:1", "cat", "/srv/one") == "one\n"
    store.podman("rmi", "localhost/mine:1")

    refused = setup.share(state="absent", fails=True)
    assert users[0].name in refused["msg"]
    assert "container kept" in refused["msg"]
    assert len(setup.mounts()) == 4
    for store in stores:
        store.podman("rm", "--all", "--force")
    assert setup.share(state="absent")["changed"]
    assert setup.mounts() == []
    assert setup.module_files() == before
    assert not setup.share(state="absent")["changed"]
    assert setup.store.image(name)["names"] == [name]


def test_start_without_mounts_fails_and_names_the_unit(
    make_setup: t.Callable[..., Setup], make_user: t.Any, make_store: MakeStore
) -> None:
    setup = make_setup()
    user = make_user()
    store = make_store("rootless-overlay", user=user)
    setup.share(user)
    store.create(setup.image.name, "--name=kept", "--userns=keep-id", command=("cat", "/srv/one"))
    setup.unmount_all()
    for command in (["start", "-a", "kept"], ["run", "--rm", setup.image.name, "true"]):
        failed = store.podman(*command, check=False)
        assert failed.rc != 0
        assert "userns-storage.service" in failed.stderr
        assert "wipe" not in failed.stderr
    # podman itself works, and so does the container after the mounts are restored.
    listed = store.podman("images", "--format", "{{.Repository}}:{{.Tag}}").stdout
    assert listed.split() == [setup.image.name]
    assert setup.share(user)["users"][0]["mounts_made"] == 2
    assert store.podman("start", "-a", "kept").stdout == "one\n"


def test_image_that_no_user_needs_is_released(
    make_setup: t.Callable[..., Setup], make_user: t.Any, make_store: MakeStore
) -> None:
    setup = make_setup()
    user = make_user()
    store = make_store("rootless-overlay", user=user)
    setup.share(user)
    store.create(setup.image.name, "--name=kept", command=("cat", "/srv/one"))
    setup.store.podman("rmi", setup.image.name)
    done = setup.share(user)
    (entry,) = done["users"]
    assert [image["offered"] for image in entry["images"]] == [False]
    assert user.name in entry["reason"]
    assert "container kept" in entry["reason"]
    assert store.podman("start", "-a", "kept").stdout == "one\n"
    store.podman("rm", "kept")
    done = setup.share(user)
    assert done["users"][0]["images"] == []
    (left,) = setup.store.images()
    assert done["released"] == [left["id"]]
    assert not left.get("names")
    # The role and the unit remove released images in this way.
    released = {"images": done["released"], "state": "absent", "driver": "overlay", **_roots(setup)}
    setup._run("image_layers", released, machine=setup.machine)
    assert setup.store.images() == []
    assert setup.store.layers() == []


def test_only_declared_images_can_be_read_by_declared_users(
    lab: Lab,
    make_setup: t.Callable[..., Setup],
    make_user: t.Any,
    make_store: MakeStore,
    small_image: Image,
) -> None:
    setup = make_setup()
    setup.store.load(small_image)
    user, other = make_user(), make_user()
    make_store("rootless-overlay", user=user)
    done = setup.share(user, images=[setup.image.name])
    folder = done["users"][0]["store"]
    readable = {layer["id"] for layer in setup.store.layers()} & {
        path.name
        for path in setup.machine.path(folder).glob("m/*/*")
        if os.path.isdir(path / "diff")
    }
    (layer_id,) = [
        image["layer"] for image in setup.store.images() if setup.image.name in image["names"]
    ]
    expected = set()
    while layer_id:
        expected.add(layer_id)
        layer_id = setup.store.layer(layer_id).get("parent", "")
    assert readable == expected
    read = ["sh", "-c", f"cat {folder}/m/*/*/diff/srv/one"]
    # The keep-id view is not readable: it belongs to subordinate IDs, which the user has only in a namespace.
    assert lab.machine.run(read, account=user, check=False).stdout == "one\n"
    refused = lab.machine.run(read, account=other, check=False)
    assert refused.rc != 0
    assert refused.stdout == ""
    written = lab.machine.run(
        ["sh", "-c", f"for path in {folder}/m/*/*/diff/srv; do touch $path/new && echo done; done"],
        account=user,
        check=False,
    )
    assert written.stdout == ""
    assert setup.mounts()
    for point in setup.mounts():
        for change in (["mount", "-o", "remount,bind,rw", point], ["umount", point]):
            in_namespace = ["unshare", "-rm", *change]
            assert lab.machine.run(in_namespace, account=user, check=False).rc != 0, change
            # The command itself is valid: root can run it in a mount namespace.
            lab.machine.run(["unshare", "-m", *change])
    assert lab.machine.run(read, account=user, check=False).stdout == "one\n"


def test_refused_users_do_not_stop_others(
    make_setup: t.Callable[..., Setup], make_user: t.Any, make_store: MakeStore
) -> None:
    setup = make_setup()
    good, bare, vfs = make_user(), make_user(subordinate=0), make_user()
    make_store("rootless-overlay", user=good)
    make_store("rootless-vfs", user=vfs)
    done = setup.share(good, bare, vfs, fails=True)
    actions = {user["user"]: user["action"] for user in done["users"]}
    assert actions == {good.name: "shared", bare.name: "refused", vfs.name: "refused"}
    assert "subordinate" in done["msg"]
    assert "vfs" in done["msg"]
    assert f"runuser -l {vfs.name} -s /bin/sh -c 'podman system reset'" in done["msg"]
    assert len(setup.mounts()) == 2


def test_image_on_mapped_layer_of_user_is_refused(
    lab: Lab, make_setup: t.Callable[..., Setup], make_user: t.Any, make_store: MakeStore
) -> None:
    """podman 5.8 and later would mount the user's layer below the shared image."""
    setup = make_setup()
    user = make_user()
    base = images.build(lab.folder(), [setup.image.layers[0]], "localhost/base:1")
    store = make_store("rootless-overlay", base, user=user)
    container = store.container(store.create(base.name, "--userns=keep-id"))
    store.podman("rm", container["id"])
    assert convert(store, [base.name], texts(container, "uidmap"))["changed"]
    done = setup.share(user)
    (entry,) = done["users"]
    assert [image["names"] for image in entry["images"]] == [[setup.image.name]]
    (refused,) = entry["images"][0]["refused"]
    assert f"image {base.name} of user {user.name}" in refused
    assert f"podman rmi {base.name}" in refused
    assert store.podman("images", "--format", "{{.Repository}}").stdout.split() == [
        "localhost/base"
    ]
    store.podman("rmi", base.name)
    assert setup.share(user)["changed"]
    plain = store.run(setup.image.name, "sh", "-c", OWNERS).split()
    assert plain == ["0:0", "1:0", "1000:1000", "0:0"]


def test_missing_objects_are_reported_before_anything_is_created(
    make_setup: t.Callable[..., Setup], make_user: t.Any
) -> None:
    setup = make_setup()
    user = make_user()
    before = setup.module_files()
    nobody = setup._run("shared_images", {"users": ["nosuchuser"], **_roots(setup)}, fails=True)
    assert "nosuchuser" in nobody["msg"]
    empty = setup._run(
        "shared_images",
        {
            "users": [user.name],
            "graphroot": f"{setup.store.base}/none",
            "runroot": f"{setup.store.base}/n",
        },
        fails=True,
    )
    assert "image_layers" in empty["msg"]
    assert setup.module_files() == before
    assert setup.mounts() == []


def _roots(setup: Setup) -> Json:
    return {"graphroot": str(setup.store.graphroot), "runroot": str(setup.store.runroot)}


def test_service_restores_mounts(
    lab: Lab, make_setup: t.Callable[..., Setup], make_user: t.Any, make_store: MakeStore
) -> None:
    setup = make_setup()
    user = make_user()
    store = make_store("rootless-overlay", user=user)
    setup.share(user)
    setup.unmount_all()
    command = service_command("share")
    done = lab.machine.run(command, env={"PYTHONPATH": str(lab.tree)})
    assert user.name in done.stdout
    assert len(setup.mounts()) == 2
    assert store.run(setup.image.name, "cat", "/srv/one") == "one\n"
    assert lab.machine.run(command, env={"PYTHONPATH": str(lab.tree)}).stdout == ""
