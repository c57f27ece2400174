# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test layer_template with podman and buildah."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.capabilities import (
    capabilities,
    released_storage,
)
from support import images
from support.hosts import SUITES, Host
from support.images import Image
from support.lab import Lab
from support.machines import busy_pids
from support.modules import finish_module, run_module
from support.store_cases import ROOTFUL_MAP, Case, names_below
from support.stores import DiskState, Store, disk_state
from support.users import User
from support.waiting import wait_until

MakeCase = t.Callable[..., Case]
MakeStore = t.Callable[..., Store]
Json = t.Dict[str, t.Any]

OTHER_MAP = "0:300000:65536"


def only(result: Json) -> Json:
    """The only entry of a result."""
    (entry,) = result["layers"]
    return t.cast(Json, entry)


def assert_unchanged(case: Case, before: DiskState) -> None:
    """Assert that nothing was written to the store since `before`."""
    changes = before.changes(case.store.disk_state())
    assert not changes, "\n".join(changes)


# Creating layers


def test_podman_uses_our_layer(case: Case) -> None:
    store = case.store
    before = store.layer_ids()
    template = store.layer(case.template())

    result = case.layer_template()
    assert result["changed"] is True
    entry = only(result)
    assert entry["action"] == "created", entry
    assert entry["image_id"] == store.image(case.image.name)["id"]
    assert entry["image_names"] == [case.image.name]
    assert entry["template_id"] == template["id"]
    assert entry["uidmap"] == case.map
    assert entry["gidmap"] == case.map
    assert entry["strategy"] == "copy"
    assert entry["reason"]
    assert 0 <= entry["lock_seconds"] <= entry["seconds"]
    assert entry["lock_seconds"] < 0.5
    layer_id = entry["layer_id"]
    assert store.layer_ids() - before == {layer_id}
    assert case.mapped() == [layer_id]
    store_result = result["store"]
    assert store_result["graphroot"] == str(store.graphroot)
    assert store_result["runroot"] == str(store.runroot)
    assert store_result["driver"] == store.driver
    assert store_result["backing_filesystem"]
    assert store_result["rootless"] is case.keep_id
    assert store_result["shifting"] is False

    container = case.create()
    own = store.container(container)["layer"]
    assert store.layer_ids() - before == {layer_id, own}
    assert store.layer(own)["parent"] == layer_id
    assert case.mapped() == [layer_id]
    case.assert_podman_works()


def test_record_equals_record_of_runtime(case: Case) -> None:
    store = case.store
    layer_id = only(case.layer_template())["layer_id"]
    record, template = store.layer(layer_id), store.layer(case.template())
    copied = (
        *("parent", "metadata", "mountlabel", "compressed-diff-digest", "compressed-size"),
        *("diff-digest", "diff-size", "toc-digest", "compression", "uidset", "gidset"),
    )
    for field in copied:
        assert record.get(field) == template.get(field), field
    map_entries = [
        dict(zip(("container_id", "host_id", "size"), map(int, m.split(":")))) for m in case.map
    ]
    assert record["uidmap"] == map_entries
    assert record["gidmap"] == map_entries
    assert "names" not in record
    assert not (record.get("flags") or {}).get("incomplete")
    assert record["created"] > template["created"]
    folder = store.graphroot / f"{store.driver}-layers"
    tar_split = folder / f"{layer_id}.tar-split.gz"
    assert tar_split.read_bytes() == (folder / f"{template['id']}.tar-split.gz").read_bytes()
    assert tar_split.stat().st_mode & 0o777 == 0o600

    # Entry by entry, the container's map equals that of our record.
    container = store.container(case.create())
    assert store.layer(container["layer"]).get("uidmap", map_entries) == map_entries
    assert container["uidmap"] == map_entries
    assert container["gidmap"] == map_entries


def test_tree_is_that_of_image_with_map_applied(case: Case) -> None:
    case.assert_tree(only(case.layer_template())["layer_id"])


def test_returned_sizes_equal_sizes_on_disk(case: Case) -> None:
    entry = only(case.layer_template())
    with case.store.mounted(entry["layer_id"]) as tree:
        found = [os.lstat(tree / name) for name in names_below(tree) if not _is_folder(tree / name)]
        assert entry["files"] == len(found)
        inode_sizes = {info.st_ino: info.st_size for info in found}
        assert entry["size_apparent"] == sum(inode_sizes.values())
    # Files share no data on the laboratory's filesystem, so all allocated bytes belong to the layer.
    assert entry["size_exclusive"] >= sum(len(f.content) for f in _files(case.image)) - 65536


def _is_folder(path: pathlib.Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _files(image: Image) -> t.List[images.Entry]:
    return [entry for entry in image.tree().values() if entry.kind == "file"]


# Lists the files in a container, without the files that podman adds.
_LIST = r"""
find / -xdev \( -path /dev -o -path /proc -o -path /sys -o -path /run -o -path /etc/hosts \
  -o -path /etc/hostname -o -path /etc/resolv.conf -o -path /etc/mtab -o -path /etc/passwd \
  -o -path /etc/group \) -prune -o -exec stat -c '%u %g %a %n' {} +
"""


def test_started_container_sees_owners_of_image(case: Case) -> None:
    layer_id = only(case.layer_template())["layer_id"]
    lines = case.shell(
        _LIST + "echo --; readlink /home/user/link; cat /home/user/link"
    ).splitlines()
    split = lines.index("--")
    found: t.Dict[str, t.Tuple[int, int, int]] = {}
    for line in lines[:split]:
        uid, gid, mode, path = line.split(" ", 3)
        found[path.lstrip("/") or "."] = (int(uid), int(gid), int(mode, 8))
    hidden = ("dev", "proc", "sys", "run", "etc/passwd", "etc/group")
    expected = {
        path: (entry.uid, entry.gid, entry.mode)
        for path, entry in case.image.tree().items()
        if path not in hidden
    }
    with case.store.mounted(case.template()) as tree:
        expected["."] = (0, 0, os.lstat(tree).st_mode & 0o7777)
    assert found == expected
    assert lines[split + 1 :] == ["/home/user/notes", "mine"]
    assert case.mapped() == [layer_id]


@pytest.mark.parametrize("setup", ["vfs", "overlay-forced", "rootless-as-root"])
def test_setuid_program_changes_user(setup: str, lab: Lab, make_case: MakeCase) -> None:
    layers = images.small_layers()
    # In busybox only applets such as su keep the privileges of the setuid bit; root has an empty password.
    layers[1]["usr/bin/su"] = images.file(layers[0]["bin/busybox"].content, 0o4755)
    layers[1]["etc/passwd"] = images.file("root::0:0::/:/bin/sh\ndaemon:x:1:1::/:/bin/sh\n")
    case = make_case(setup, images.build(lab.folder(), layers, "localhost/suid:1"))
    layer_id = only(case.layer_template())["layer_id"]
    args = [*case.podman_args, "--user=1:1"]
    script = "id -u; /usr/bin/su -c 'id -u' root"
    assert case.store.shell(case.image.name, script, args).split() == ["1", "0"]
    assert case.mapped() == [layer_id]


def test_gidmap_alone_and_different_uidmap_and_gidmap(make_case: MakeCase) -> None:
    case = make_case("vfs")
    entry = only(case.layer_template(gidmap=[OTHER_MAP]))
    assert (entry["uidmap"], entry["gidmap"]) == ([OTHER_MAP], [OTHER_MAP])
    entry = only(case.layer_template(uidmap=[ROOTFUL_MAP], gidmap=[OTHER_MAP]))
    assert (entry["uidmap"], entry["gidmap"]) == ([ROOTFUL_MAP], [OTHER_MAP])
    case.assert_tree(entry["layer_id"])
    before = case.store.layer_ids()
    case.store.create(case.image.name, f"--uidmap={ROOTFUL_MAP}", f"--gidmap={OTHER_MAP}")
    assert len(case.store.layer_ids() - before) == 1


@pytest.mark.parametrize("reference", ["id", "short", "sha256", "untagged", "digest"])
def test_image_references_of_podman_are_accepted(
    reference: str, lab: Lab, make_case: MakeCase
) -> None:
    image = images.build(lab.folder(), images.small_layers(), "localhost/named:latest")
    case = make_case("vfs", image)
    record = case.store.image(image.name)
    names = {
        "id": record["id"],
        "short": record["id"][:12],
        "sha256": f"sha256:{record['id']}",
        "untagged": "named",
        "digest": f"localhost/named@{record['digest']}",
    }
    case.store.podman("image", "exists", names[reference])
    entry = only(case.layer_template(images=[names[reference]], options={"check": True}))
    assert entry["image_id"] == record["id"]


def test_duplicate_image_references_create_one_layer(make_case: MakeCase) -> None:
    case = make_case("vfs")
    record = case.store.image(case.image.name)
    result = case.layer_template(images=[case.image.name, record["id"]])
    assert only(result)["action"] == "created"
    assert len(case.mapped()) == 1


@pytest.mark.parametrize("kind", ["vfs", "overlay-forced", "rootless-overlay"])
@pytest.mark.parametrize("suite", SUITES)
def test_newer_podman_uses_our_layer_and_finds_no_damage(
    kind: str, suite: str, make_case: MakeCase, host: t.Callable[[str], Host]
) -> None:
    case = make_case(kind, machine=host(suite))
    case.as_user = case.keep_id
    store = case.store
    layer_id = only(case.layer_template())["layer_id"]
    before = store.layer_ids()
    case.assert_tree(layer_id)
    assert case.shell("cat /etc/motd") == "second\n"
    own = store.container(case.create())["layer"]
    assert store.layer_ids() - before == {own}
    assert store.layer(own)["parent"] == layer_id
    checked = store.storage_cli("check")
    assert layer_id not in checked.stdout + checked.stderr
    assert "damage" not in checked.stdout.lower() + checked.stderr.lower()
    case.assert_podman_works()


@pytest.mark.parametrize("kind", ["vfs", "overlay-forced"])
def test_store_of_newer_podman_is_managed_from_outside_its_host(
    kind: str, make_case: MakeCase, host: t.Callable[[str], Host], lab: Lab
) -> None:
    case = make_case(kind, machine=host("trixie"))
    # The podman outside has another version, and may shift although this one is configured not to.
    result = case.layer_template(force=True, options={"machine": lab.machine})
    layer_id = only(result)["layer_id"]
    before = case.store.layer_ids()
    own = case.store.container(case.create())["layer"]
    assert case.store.layer_ids() - before == {own}
    assert case.store.layer(own)["parent"] == layer_id


@pytest.mark.parametrize("setup", ["vfs", "overlay-forced", "rootless-as-root"])
def test_first_container_adds_no_more_files_than_second(
    setup: str, make_case: MakeCase, many_files_image: t.Callable[[int], Image]
) -> None:
    """It adds its own layer with as many files as the second container, and does not change our layer."""
    case = make_case(setup, many_files_image(500))
    case.layer_template()
    (layer_id,) = case.mapped()
    folder = case.store.layer_folder(layer_id)
    before = disk_state(folder)
    added: t.List[int] = []
    for _container in range(2):
        layers, paths = case.store.layer_ids(), set(disk_state(case.store.graphroot).entries)
        own = case.store.container(case.create())["layer"]
        assert case.store.layer_ids() - layers == {own}
        assert case.store.layer(own)["parent"] == layer_id
        new = set(disk_state(case.store.layer_folder(own)).entries) - paths
        added.append(len(new))
    # vfs copies the whole layer for each container, overlay creates a few empty folders.
    assert added[0] == added[1]
    assert (added[0] > 500) == (case.store.driver == "vfs")
    changed = [line for line in before.changes(disk_state(folder)) if "/merged" not in line]
    assert changed == []
    assert case.mapped() == [layer_id]


# Repeated runs


def test_second_run_writes_nothing(case: Case) -> None:
    first = only(case.layer_template())
    before = case.store.disk_state()
    second = case.layer_template()
    assert second["changed"] is False
    assert only(second)["action"] == "existing"
    assert only(second)["layer_id"] == first["layer_id"]
    assert_unchanged(case, before)


def test_check_mode_predicts_result_and_writes_nothing(case: Case) -> None:
    before = case.store.disk_state()
    predicted = case.layer_template(options={"check": True, "diff": True})
    assert_unchanged(case, before)
    assert predicted["changed"] is True
    result = case.layer_template(options={"diff": True})
    fields = ("action", "files", "size_apparent", "strategy", "uidmap", "gidmap", "template_id")
    for field in fields:
        assert only(predicted)[field] == only(result)[field], field
    assert only(predicted)["layer_id"] == ""
    assert predicted["diff"] == result["diff"]
    assert result["diff"]["before"] != result["diff"]["after"]
    maps = {"uidmap": case.map, "gidmap": case.map}
    assert result["diff"]["before"] == {case.image.name: []}
    assert result["diff"]["after"] == {case.image.name: [maps]}

    before = case.store.disk_state()
    repeated = case.layer_template(options={"check": True, "diff": True})
    assert repeated["changed"] is False
    assert repeated["diff"]["before"] == repeated["diff"]["after"]
    removal = case.layer_template(state="absent", options={"check": True, "diff": True})
    assert removal["changed"] is True
    assert only(removal)["action"] == "removed"
    assert removal["diff"]["after"] == {case.image.name: []}
    assert_unchanged(case, before)


def test_layer_created_by_podman_is_found(case: Case) -> None:
    case.create()
    (podman_layer,) = case.mapped()
    before = case.store.disk_state()
    result = case.layer_template()
    assert result["changed"] is False
    assert only(result)["action"] == "existing"
    assert only(result)["layer_id"] == podman_layer
    assert_unchanged(case, before)


# Removing the image


def test_removal_of_image_removes_our_files(case: Case) -> None:
    store = case.store
    layer_id = only(case.layer_template())["layer_id"]
    case.assert_podman_works()
    case.shell("true")
    store.podman("rmi", case.image.name)
    assert store.layers() == []
    assert store.images() == []
    assert store.remaining_paths(layer_id) == []
    folder = store.layer_folder("x").parent
    assert [p.name for p in folder.iterdir() if re.fullmatch("[0-9a-f]{64}", p.name)] == []
    if store.driver == "overlay":
        assert list((folder / "l").iterdir()) == []
    own_folder = store.graphroot / "userns-storage"
    assert [*own_folder.glob("staging/*"), *own_folder.glob("trash/*")] == []
    case.assert_podman_works()


# With a running podman service


def _nsmode(case: Case) -> Json:
    if case.keep_id:
        return {"userns": {"nsmode": "keep-id"}}
    parts = [{"container_id": 0, "host_id": 100000, "size": 65536}]
    maps = {"HostUIDMapping": False, "HostGIDMapping": False, "UIDMap": parts, "GIDMap": parts}
    return {"userns": {"nsmode": "private"}, "idmappings": maps}


def test_running_service_and_module_see_each_others_changes(case: Case) -> None:
    store = case.store
    name = case.image.name
    with store.service() as service:
        (old,) = service.call("GET", "images/json")
        layer_id = only(case.layer_template())["layer_id"]
        (new,) = service.call("GET", "images/json")
        # The runtime adds the recorded size of each mapped layer, which is that of the template.
        assert new["Size"] - old["Size"] == case.image.sizes[-1]

        before = store.layer_ids()
        spec = {"image": name, "command": ["true"], **_nsmode(case)}
        container = service.call("POST", "containers/create", spec)["Id"]
        own = store.container(container)["layer"]
        assert store.layer_ids() - before == {own}
        assert store.layer(own)["parent"] == layer_id

        failed = case.layer_template(state="absent", options={"fails": True})
        assert (
            container[:12] in failed["msg"]
            or store.container(container)["names"][0] in failed["msg"]
        )
        service.call("DELETE", f"containers/{container}?force=true")
        assert case.layer_template(state="absent")["changed"] is True
        (last,) = service.call("GET", "images/json")
        assert last["Size"] == old["Size"]

        container = service.call("POST", "containers/create", spec)["Id"]
        (podman_layer,) = case.mapped()
        assert podman_layer != layer_id
        found = case.layer_template()
        assert (found["changed"], only(found)["layer_id"]) == (False, podman_layer)


# state=absent


def test_absent_removes_only_that_layer(case: Case) -> None:
    store = case.store
    before, images_before = store.layers(), store.images()
    kept: t.List[str] = []
    if not case.keep_id:
        kept.append(only(case.layer_template(uidmap=[OTHER_MAP]))["layer_id"])
    layer_id = only(case.layer_template())["layer_id"]
    result = case.layer_template(state="absent")
    assert result["changed"] is True
    entry = only(result)
    assert (entry["action"], entry["layer_id"]) == ("removed", layer_id)
    assert case.mapped() == kept
    assert store.remaining_paths(layer_id) == []
    assert {layer["id"] for layer in before} | set(kept) == store.layer_ids()
    if not kept:
        assert (store.layers(), store.images()) == (before, images_before)
    # Take the snapshot before podman reads the other layer, because the ledger would record that as use.
    state = store.disk_state()
    repeated = case.layer_template(state="absent")
    assert repeated["changed"] is False
    assert_unchanged(case, state)
    case.assert_podman_works()
    # podman creates its own copy again.
    assert case.shell("cat /etc/motd") == "second\n"


@pytest.mark.parametrize("setup", ["overlay-forced", "rootless-as-root"])
def test_copy_by_podman_with_wrong_owners_is_replaced(
    setup: str, make_case: MakeCase, small_image: Image
) -> None:
    case = make_case(setup, small_image)
    store = case.store
    case.create("--name=first")
    (copy,) = case.mapped()
    store.empty_layer(copy)
    if not case.keep_id:
        assert store.podman("start", "first", check=False).rc != 0

    failed = case.layer_template(options={"fails": True})
    assert "first" in failed["msg"]
    store.podman("rm", "first")
    predicted = case.layer_template(options={"check": True})
    assert case.mapped() == [copy]
    result = case.layer_template()
    assert predicted["changed"] is result["changed"] is True
    entry = only(result)
    assert entry["action"] == "created"
    assert "its owners are still the owners of the image: /etc belongs to 0:0" in entry["reason"]
    assert case.mapped() == [entry["layer_id"]] != [copy]
    assert store.remaining_paths(copy) == []
    assert case.shell("cat /etc/motd") == "second\n"
    assert case.layer_template()["changed"] is False


def test_absent_keeps_layer_in_use(case: Case) -> None:
    store = case.store
    layer_id = only(case.layer_template())["layer_id"]
    ran = case.create("--name=ran")
    store.podman("start", "--attach", "ran")
    # podman's cleanup processes, whose arguments contain the ID, write to the store after the container's end.
    wait_until(lambda: not busy_pids(ran))
    created = case.create("--name=merely-created")
    before = store.disk_state()
    failed = case.layer_template(state="absent", options={"fails": True})
    for name, identity in (("ran", ran), ("merely-created", created)):
        assert name in failed["msg"] or identity[:12] in failed["msg"], failed["msg"]
    assert only(failed)["action"] == "refused"
    changes = before.changes(case.store.disk_state())
    # Our ledger may record the use of the layer. Nothing else in the store changes.
    own = (f"{store.graphroot}/userns-storage", f"{store.graphroot}/db.sql")
    paths = {line.partition(": ")[0] for line in changes} - {str(store.graphroot)}
    assert not [path for path in paths if not path.startswith(own)]
    before = case.store.disk_state()
    predicted = case.layer_template(state="absent", options={"fails": True, "check": True})
    assert predicted["msg"] == failed["msg"]
    assert_unchanged(case, before)
    assert case.mapped() == [layer_id]
    store.podman("rm", "ran", "merely-created")
    assert case.layer_template(state="absent")["changed"] is True
    assert case.mapped() == []


def test_absent_keeps_layer_used_by_buildah(make_case: MakeCase) -> None:
    case = make_case("vfs")
    case.layer_template()
    maps = [f"--userns-uid-map={ROOTFUL_MAP}", f"--userns-gid-map={ROOTFUL_MAP}"]
    name = case.store.buildah("from", *maps, case.image.name).stdout.strip()
    assert len(case.mapped()) == 1
    failed = case.layer_template(state="absent", options={"fails": True})
    assert name in failed["msg"]
    case.store.buildah("rm", name)
    assert case.layer_template(state="absent")["changed"] is True


def test_absent_for_unknown_image_changes_nothing(make_case: MakeCase) -> None:
    case = make_case("vfs")
    before = case.store.disk_state()
    result = case.layer_template(images=["localhost/never:1"], state="absent")
    assert (result["changed"], result["layers"]) == (False, [])
    assert_unchanged(case, before)


# Stores that need no copy


@pytest.mark.parametrize("kind", ["overlay", "rootless-fuse"])
def test_shifting_store_needs_no_layer(kind: str, make_case: MakeCase) -> None:
    case = make_case(kind)
    before = case.store.disk_state()
    result = case.layer_template()
    assert_unchanged(case, before)
    entry = only(result)
    assert (result["changed"], entry["action"]) == (False, "not_needed")
    assert result["store"]["shifting"] is True
    assert ("idmapped" if kind == "overlay" else "fuse-overlayfs") in entry["reason"].lower()
    assert entry["layer_id"] == ""
    # As predicted, podman creates no copy.
    case.shell("true")
    assert case.mapped() == []


def test_force_creates_layer_although_runtime_shifts(make_case: MakeCase) -> None:
    case = make_case("overlay")
    assert "force" in only(case.layer_template())["reason"]
    forced = case.layer_template(force=True)
    assert (forced["changed"], only(forced)["action"]) == (True, "created")
    assert case.mapped() == [only(forced)["layer_id"]]
    case.assert_tree(only(forced)["layer_id"])
    assert case.layer_template(force=True)["changed"] is False
    case.assert_podman_works()
    case.store.podman("rmi", case.image.name)
    assert case.store.layers() == []


def test_force_is_rejected_with_mount_program(make_case: MakeCase) -> None:
    # fuse-overlayfs would shift a mapped layer a second time, so the reason does not suggest force.
    case = make_case("rootless-fuse")
    assert "force" not in only(case.layer_template())["reason"]
    assert_rejected(case, "fuse-overlayfs", force=True)


def test_host_namespace_needs_no_layer(case: Case) -> None:
    before = case.store.disk_state()
    result = case.layer_template(userns="host")
    assert (result["changed"], only(result)["action"]) == (False, "not_needed")
    assert_unchanged(case, before)


# Invalid input: an error message, and no change


def assert_rejected(
    case: Case, *parts: str, options: t.Optional[Json] = None, **args: t.Any
) -> str:
    """Assert that the module fails with all `parts` in its message, also in check mode, and writes nothing."""
    before = case.store.disk_state()
    messages = []
    for check in (False, True):
        settings: Json = {"fails": True, "check": check, **(options or {})}
        result = case.layer_template(options=settings, **args)
        messages.append(str(result["msg"]))
        for part in parts:
            assert part in messages[-1], messages[-1]
        assert "Traceback" not in messages[-1]
        assert not result.get("changed")
    assert_unchanged(case, before)
    assert messages[0] == messages[1]
    return messages[0]


@pytest.mark.parametrize(
    "reference", ["localhost/never:1", "small:2", "f" * 64, "no spaces please"]
)
def test_unknown_image_is_rejected(reference: str, make_case: MakeCase) -> None:
    assert_rejected(make_case("vfs"), reference, images=[reference])


def test_ambiguous_image_id_is_rejected(lab: Lab, make_store: MakeStore) -> None:
    seen: t.Dict[str, int] = {}
    layers = [images.shell()]
    number, prefix = 0, ""
    while not prefix:
        config = {"Labels": {"number": str(number)}}
        start = images.image_id(layers, config)[:3]
        # Names take precedence over IDs; no image has a name of only three digits.
        if start in seen:
            prefix = start
        else:
            seen[start] = number
            number += 1
    pair = [
        images.build(
            lab.folder(), layers, f"localhost/pair:{which}", {"Labels": {"number": str(which)}}
        )
        for which in (seen[prefix], number)
    ]
    store = make_store("vfs", *pair)
    ids = [store.image(image.name)["id"] for image in pair]
    assert [identity[:3] for identity in ids] == [prefix, prefix]
    assert_rejected(Case(store, pair[0]), prefix, ids[0][:12], ids[1][:12], images=[prefix])


@pytest.mark.parametrize(
    ("maps", "parts"),
    [
        (["0:abc:1"], ["0:abc:1"]),
        (["-1:100000:10"], ["-1:100000:10"]),
        (["0:100000:0"], ["0:100000:0"]),
        (["0:4294967290:100"], ["0:4294967290:100"]),
        (["0:100000:1000", "500:200000:1000"], ["500:200000:1000", "overlap"]),
        (["0:100000:1000", "1000:100500:1000"], ["1000:100500:1000", "overlap"]),
    ],
)
def test_invalid_map_is_rejected(
    maps: t.List[str], parts: t.List[str], make_case: MakeCase
) -> None:
    assert_rejected(make_case("vfs"), *parts, uidmap=maps)


def test_map_without_size(make_case: MakeCase) -> None:
    """Runtimes that support map flags read it as a range of one ID, older runtimes reject it."""
    case = make_case("vfs")
    version = case.store.machine.version("podman")
    if capabilities("podman", version, released_storage("podman", version)).map_flags:
        result = case.layer_template(uidmap=["0:100000"], unmapped_ids="overflow")
        assert only(result)["uidmap"] == ["0:100000:1"]
    else:
        assert_rejected(case, "0:100000", uidmap=["0:100000"])


def test_invalid_userns_is_rejected(make_case: MakeCase) -> None:
    case = make_case("rootless-as-root")
    assert_rejected(case, "keep-it", userns="keep-it")
    assert_rejected(case, "uid=x", userns="keep-id:uid=x")


def test_userns_with_uidmap_and_neither_are_rejected(make_case: MakeCase) -> None:
    case = make_case("vfs")
    before = case.store.disk_state()
    both = case.layer_template(userns="host", uidmap=[ROOTFUL_MAP], options={"fails": True})
    assert "userns" in both["msg"]
    bare = {"images": [case.image.name]}
    neither = case.call("layer_template", bare, fails=True)
    assert "uidmap" in neither["msg"]
    assert_unchanged(case, before)


@pytest.mark.parametrize("setup", ["vfs", "overlay-forced"])
def test_ids_outside_map_are_rejected_or_mapped_to_overflow(
    setup: str, make_case: MakeCase
) -> None:
    case = make_case(setup)
    message = assert_rejected(case, "1000", case.image.name, uidmap=["0:100000:1000"])
    assert "500" not in re.findall(r"\d+", message)

    result = case.layer_template(uidmap=["0:100000:1000"], unmapped_ids="overflow")
    layer_id = only(result)["layer_id"]
    with case.store.mounted(layer_id) as tree:
        assert os.lstat(tree / "home/user").st_uid == 65534
        assert os.lstat(tree / "home/user").st_gid == 65534
        assert os.lstat(tree / "opt/app").st_uid == 100500
        assert os.lstat(tree / "usr/bin/sgid").st_uid == 100000
        assert os.lstat(tree / "usr/bin/sgid").st_gid == 65534


def test_ids_outside_map_are_found_in_tree_without_uidset(make_case: MakeCase) -> None:
    # Records in old stores have no uidset, so the owners of the files decide.
    case = make_case("vfs")
    path = case.store.graphroot / "vfs-layers/layers.json"
    records = json.loads(path.read_text())
    for record in records:
        record.pop("uidset", None)
        record.pop("gidset", None)
    path.write_text(json.dumps(records))
    assert_rejected(case, "1000", uidmap=["0:100000:1000"])


@pytest.mark.parametrize("kind", ["vfs", "overlay-forced"])
def test_image_in_read_only_store_is_rejected(
    kind: str, make_store: MakeStore, small_image: Image
) -> None:
    shared = make_store(kind, small_image)
    store = make_store(kind, read_only=[str(shared.graphroot)])
    store.podman("images")
    case = Case(store, small_image)
    before = shared.disk_state()
    assert_rejected(case, "read-only", str(shared.graphroot), small_image.name)
    assert before.changes(shared.disk_state()) == []


def test_wrong_driver_is_rejected(make_case: MakeCase) -> None:
    case = make_case("vfs")
    assert_rejected(case, "overlay", "vfs", str(case.store.graphroot), driver="overlay")
    assert not [p.name for p in case.store.graphroot.iterdir() if p.name.startswith("overlay")]
    assert_rejected(case, "zfs", driver="zfs")
    assert_rejected(case, "tape", driver="tape")


@pytest.mark.parametrize("graphroot_exists", [False, True])
def test_uninitialized_store_is_rejected(
    graphroot_exists: bool, lab: Lab, make_case: MakeCase
) -> None:
    case = make_case("vfs")
    folder = lab.folder()
    graphroot, runroot = folder / "g", folder / "r"
    if graphroot_exists:
        graphroot.mkdir(0o700)
    assert_rejected(case, str(graphroot), graphroot=str(graphroot), runroot=str(runroot))
    assert sorted(p.name for p in folder.rglob("*")) == (["g"] if graphroot_exists else [])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("layers", "half"),
        ("layers", "wrong type"),
        ("layers", "not UTF-8"),
        ("images", "half"),
        ("images", "garbage"),
        ("images", "object"),
        ("containers", "half"),
        ("containers", "string ID"),
    ],
)
def test_damaged_json_is_rejected(name: str, damage: str, make_case: MakeCase) -> None:
    case = make_case("vfs")
    case.create()
    path = case.store.graphroot / f"vfs-{name}" / f"{name}.json"
    original = path.read_bytes()
    records = json.loads(original)
    records[0]["id"] = 5
    contents = {
        "half": original[: len(original) // 2],
        "garbage": b"\0" * len(original),
        "object": b'{"id": "x"}',
        "wrong type": json.dumps(records).encode(),
        "string ID": b'["' + b"a" * 64 + b'"]',
        "not UTF-8": b'[{"id": "\xff\xfe"}]',
    }
    path.write_bytes(contents[damage])
    assert_rejected(case, str(path))
    path.write_bytes(original)
    assert case.layer_template()["changed"] is False


def test_unreadable_json_is_rejected(make_case: MakeCase) -> None:
    case = make_case("vfs")
    path = case.store.graphroot / "vfs-images/images.json"
    path.unlink()
    path.mkdir()
    assert_rejected(case, str(path))


def test_store_without_permission_is_rejected(
    make_case: MakeCase, make_user: t.Callable[..., User]
) -> None:
    case = make_case("vfs")
    # The user can find the store, but cannot open it.
    assert_rejected(case, str(case.store.graphroot), options={"user": make_user()})


def test_only_root_can_use_store_of_other_user(
    make_case: MakeCase, make_user: t.Callable[..., User]
) -> None:
    case = make_case("rootless-as-root")
    assert_rejected(
        case, case.store.user.name if case.store.user else "", options={"user": make_user()}
    )
    assert_rejected(case, "nobody-of-that-name", user="nobody-of-that-name")


@pytest.mark.parametrize("as_user", [True, False])
def test_user_without_subordinate_ids_is_rejected(as_user: bool, make_case: MakeCase) -> None:
    case = make_case("rootless-as-user" if as_user else "rootless-as-root")
    user, machine = case.store.user, case.store.machine
    assert user is not None
    # The pause process keeps a namespace with ranges that the files no longer contain.
    case.store.lab.kill(user.home)
    machine.path(f"{user.runtime_dir}/libpod/tmp/pause.pid").unlink(missing_ok=True)
    for name in ("subuid", "subgid"):
        path = machine.path(f"/etc/{name}")
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if not line.startswith(f"{user.name}:")))
    message = assert_rejected(case, "/etc/subuid", user.name)
    line = re.search(rf"{user.name}:(\d+):65536", message)
    assert line, message
    taken = [
        range(int(start), int(start) + int(count))
        for _name, start, count in (
            entry.split(":") for entry in machine.path("/etc/subuid").read_text().splitlines()
        )
    ]
    proposed = range(int(line[1]), int(line[1]) + 65536)
    assert not any(r.start < proposed.stop and proposed.start < r.stop for r in taken)


# Full filesystem


def test_missing_space_is_detected_before_copy(make_case: MakeCase) -> None:
    case = make_case("vfs-ext4", mib=64)
    filler = case.store.graphroot.parent / "filler"
    fill(filler, leave=1 << 20)
    assert_rejected(case, "free", "may need", str(case.store.graphroot))
    failed = case.layer_template(options={"fails": True})
    # An earlier call may have changed the free space by a few blocks.
    assert abs(failed["free"] - (1 << 20)) < 64 << 10
    assert failed["free"] < failed["needed"]
    filler.unlink()
    assert case.layer_template()["changed"] is True


def test_nothing_changes_if_filesystem_fills_up_during_copy(
    make_case: MakeCase, many_files_image: t.Callable[[int], Image]
) -> None:
    case = make_case("vfs-ext4", many_files_image(6000), mib=256)
    store = case.store
    layers, records = store.layers(), store.images()
    staging = store.graphroot / "userns-storage" / "staging"
    filler = store.graphroot.parent / "filler"
    process = case.start("layer_template", {"images": [case.image.name], **case.mapping_args})
    # In the middle of the copy: there was enough space at its start.
    wait_until(
        lambda: sum(1 for _path in staging.rglob("*")) >= 500, while_running=process, pause=0.002
    )
    fill(filler, leave=0)
    result = finish_module(process)
    assert result["failed"], result
    assert str(store.graphroot) in result["msg"]
    assert "userns.storage.layer_gc" in result["msg"]
    assert (store.layers(), store.images()) == (layers, records)
    filler.unlink()
    assert list(staging.glob("*")) == []
    case.assert_podman_works()
    assert case.layer_template()["changed"] is True
    assert len(store.layers()) == len(layers) + 1
    assert case.shell("cat /data/00000/7 | head -n 1") == "7\n"


def fill(path: pathlib.Path, leave: int) -> None:
    """Use all free bytes of a filesystem except `leave`."""
    with open(path, "wb") as filler:
        size = 0
        step = 64 << 20
        while step >= 4096:
            if shutil.disk_usage(path).free - leave < step:
                step //= 2
                continue
            try:
                os.posix_fallocate(filler.fileno(), size, step)
            except OSError:
                step //= 2
            else:
                size += step


# In playbooks


def test_playbook_for_rootful_and_rootless_stores(
    make_store: MakeStore,
    small_image: Image,
    run_playbook: t.Callable[..., t.List[Json]],
) -> None:
    rootful = Case(make_store("vfs", small_image), small_image)
    rootless = Case(make_store("rootless-overlay", small_image), small_image)
    user = rootless.store.user
    assert user is not None
    name = "userns.storage.layer_template"
    image = {"images": small_image.name}
    become_task = {
        name: {**image, "userns": "keep-id"},
        "become": True,
        "become_user": user.name,
        "become_method": "su",
    }
    tasks = [
        {name: {**image, **rootful.mapping_args, **rootful.store.module_args()}},
        {name: {**image, **rootless.mapping_args, "user": user.name}},
        become_task,
        {name: {**image, "userns": "keep-it", "user": user.name}},
    ]
    first, second, third, failed = run_playbook(tasks, diff=True)
    assert [first["changed"], second["changed"], third["changed"]] == [True, True, False]
    assert not third.get("failed"), third["msg"]
    assert only(third)["layer_id"] == only(second)["layer_id"]
    assert failed["failed"]
    assert "keep-it" in failed["msg"]
    for case in (rootful, rootless):
        before = case.store.layer_ids()
        case.create()
        assert len(case.store.layer_ids() - before) == 1


def test_store_is_read_only_for_untested_runtime(make_store: MakeStore, small_image: Image) -> None:
    """For a future version of podman, the store is only read unless allow_untested_runtime is set."""
    case = Case(make_store("vfs", small_image), small_image)
    untested: Json = {"runtime": "podman 99.0"}
    before = case.store.disk_state()
    for check in (True, False):
        failed = case.layer_template(options={"fails": True, "check": check}, **untested)
        assert "newer than this version of the collection was tested with (1.64)" in failed["msg"]
        assert "allow_untested_runtime" in failed["msg"]
    assert case.call("image_layers_info", {}, check=False)["images"]
    assert before.changes(case.store.disk_state()) == []
    created = case.layer_template(**untested, allow_untested_runtime=True)
    assert created["changed"]
    before = case.store.disk_state()
    collect = {"max_copies_per_image": 0, "min_age": "0s", "runtime": "podman 99.0"}
    predicted = case.call("layer_gc", collect, check=True)
    assert predicted["changed"]
    assert "so the store is read-only for this task" in str(predicted["warnings"])
    failed = case.call("layer_gc", collect, fails=True)
    assert "so the store is read-only for this task" in failed["msg"]
    assert case.mapped() != []
    assert case.call("layer_gc", {**collect, "allow_untested_runtime": True})["changed"]
    assert case.mapped() == []


def test_leftovers_are_removed_for_untested_runtime(
    make_store: MakeStore, small_image: Image
) -> None:
    """Leftovers in our own folder are removed, except those of an interrupted removal; nothing else is written."""
    case = Case(make_store("vfs", small_image), small_image)
    layer_id = only(case.layer_template())["layer_id"]
    own = case.store.graphroot / "userns-storage"
    for name in ("staging/0123456789abcdef", "trash/plain", f"trash/{layer_id}-{'0' * 16}-x"):
        (own / name).mkdir(parents=True)
        (own / name / "content").write_text("x")
    others = [path for path in case.store.graphroot.iterdir() if path.is_dir() and path != own]
    before = disk_state(*others)
    for check in (True, False):
        result = case.layer_template(runtime="podman 99.0", options={"check": check})
        assert only(result)["action"] == "existing"
        assert (own / "trash" / "plain").exists() is check
    assert not (own / "staging" / "0123456789abcdef").exists()
    assert (own / "trash" / f"{layer_id}-{'0' * 16}-x").exists()
    assert before.changes(disk_state(*others)) == []
    case.layer_template()
    assert not (own / "trash" / f"{layer_id}-{'0' * 16}-x").exists()
    assert case.mapped() == [layer_id]


def test_module_runs_inside_podman_unshare(make_store: MakeStore, small_image: Image) -> None:
    """The become method podman_unshare runs modules as root of the namespace, which is the user who owns the store."""
    case = Case(make_store("rootless-overlay", small_image), small_image, as_user=True)
    store = case.store
    assert store.user is not None

    def call(module: str, args: t.Mapping[str, t.Any], fails: bool = False) -> t.Any:
        return run_module(
            store.lab,
            module,
            args,
            user=store.user,
            machine=store.machine,
            environ=store.env(),
            fails=fails,
            prefix=("podman", "unshare"),
        )

    layer_args = {"images": [small_image.name], "userns": "keep-id"}
    created = call("layer_template", layer_args)
    assert only(created)["action"] == "created"
    assert created["store"]["graphroot"] == str(store.graphroot)
    assert created["store"]["rootless"]
    assert only(created)["uidmap"] == case.map
    assert (
        only(call("layer_template", {**layer_args, "user": store.user.name}))["action"]
        == "existing"
    )
    # The module finds the layer outside the namespace too, and podman uses it.
    assert only(case.layer_template())["action"] == "existing"
    assert (
        store.layer(store.container(case.create())["layer"])["parent"] == only(created)["layer_id"]
    )
    # A file of records and a folder that belong to root are reported.
    folder = store.graphroot / "overlay-layers"
    for path, mode in ((folder / "layers.json", 0o600), (folder, 0o700)):
        os.chown(path, 0, 0)
        os.chmod(path, mode)
        for failed in (
            call("image_layers_info", {}, fails=True),
            case.info(options={"fails": True}),
            Case(store, small_image).info(options={"fails": True}),
            call("layer_gc", {"max_copies_per_image": 0}, fails=True),
        ):
            assert f"cannot be used by {store.user.name}" in failed["msg"]
            assert f"chown -h {store.user.name}:" in failed["msg"]
            assert "user: root" not in failed["msg"]
            assert "contradict" not in failed["msg"]
