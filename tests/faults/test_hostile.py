# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images of untrusted origin, and stores that users tampered with before root works in them."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import stat
import subprocess
import typing as t

import pytest
from support import images
from support.injection import ModuleServer, Run
from support.lab import Lab
from support.stores import Store, disk_state
from support.task_stops import MAP, tiny_image
from support.users import User

MakeStore = t.Callable[..., Store]
Json = t.Dict[str, t.Any]

SECRET = "what only root may read"


@pytest.fixture
def modules(lab: Lab) -> t.Iterator[ModuleServer]:
    """The modules of the collection, whose system calls can be recorded."""
    server = ModuleServer(lab)
    yield server
    server.close()


def checked_result(run: Run) -> Json:
    """The result of a run, which must be a success or a documented error without secrets."""
    assert run.result, run.output
    assert SECRET not in run.output
    assert "exception" not in run.result, run.output
    assert "unexpected" not in str(run.result.get("msg")), run.output
    return run.result


# Trees


def hostile_tree(tree: pathlib.Path, outside: pathlib.Path) -> None:
    """Add the most hostile files that an image can contain to a layer; some of them refer to `outside`."""
    for number in range(1, 256):
        if number != ord("/"):
            os.mkdir(os.fsencode(tree) + b"/" + bytes([number]) + b"..\n")
    os.symlink(outside, tree / "absolute")
    os.symlink("../" * 40 + str(outside), tree / "upwards")
    os.symlink("loop", tree / "loop")
    os.symlink("/proc/self/root", tree / "proc")
    for name in ("passwd", "shadow"):
        os.symlink(outside / "secret", tree / name)
    os.link(outside / "secret", tree / "linked")
    os.mknod(tree / "disk", stat.S_IFBLK | 0o666, os.makedev(7, 0))
    os.mknod(tree / "memory", stat.S_IFCHR | 0o666, os.makedev(1, 1))
    os.mkfifo(tree / "fifo")
    with open(tree / "sparse", "wb") as sparse:
        sparse.truncate(1 << 40)
        sparse.seek(1 << 39)
        sparse.write(b"middle")
    (tree / "setuid").write_bytes(b"x")
    os.chown(tree / "setuid", 1000, 1000)
    os.chmod(tree / "setuid", 0o6755)
    os.setxattr(tree / "setuid", "user.large", b"v" * 60000)
    os.setxattr(tree / "setuid", "trusted.overlay.redirect", b"/../../../etc")
    wide = tree / "wide"
    wide.mkdir()
    fill(wide, 5000)
    fd = os.open(tree, os.O_RDONLY)
    for _level in range(2000):
        os.mkdir("d", dir_fd=fd)
        deeper = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(fd)


def fill(folder: pathlib.Path, count: int) -> None:
    """Create empty files."""
    fd = os.open(folder, os.O_RDONLY)
    for number in range(count):
        os.close(os.open(f"{number}", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd))
    os.close(fd)


def test_hostile_image_affects_nothing_outside_its_layer(
    lab: Lab, make_store: MakeStore, modules: ModuleServer
) -> None:
    image = tiny_image(lab)
    store = make_store("vfs-tmpfs", image)
    outside = store.graphroot.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_text(SECRET)
    (outside / "secret").chmod(0o600)
    template = store.layer_folder(store.image(image.name)["layer"])
    hostile_tree(template, outside)
    before = disk_state(outside)
    others = {path: os.lstat(path) for path in store.layer_folder("x").parent.iterdir()}
    args = {**store.module_args(), "images": [image.name], "uidmap": [MAP]}
    creation = modules.run("layer_template", args, opens=True)
    result = checked_result(creation)
    assert result["changed"], creation.output
    # The module does not even open it for reading.
    assert not [call for call in creation.calls if str(outside) in call.paths[0]]
    assert before.changes(disk_state(outside)) == []
    assert {item: os.lstat(item) for item in others} == others
    _assert_changes_in_store(creation, store)
    # The output does not list each file.
    assert len(creation.output) < 20_000
    (entry,) = result["layers"]
    mapped = store.layer_folder(entry["layer_id"])
    assert entry["files"] > 5000
    _assert_owners_in_map(mapped)
    info = os.lstat(mapped / "setuid")
    assert (info.st_uid, stat.S_IMODE(info.st_mode)) == (101000, 0o6755)
    assert os.lstat(mapped / "sparse").st_blocks < 100
    assert os.readlink(mapped / "absolute") == str(outside)
    assert os.lstat(mapped / "disk").st_rdev == os.makedev(7, 0)
    removal = modules.run("layer_template", {**args, "state": "absent"}, record=True)
    assert checked_result(removal)["changed"]
    _assert_changes_in_store(removal, store)
    assert not mapped.exists()
    assert list((store.graphroot / "userns-storage/trash").iterdir()) == []
    assert before.changes(disk_state(outside)) == []
    subprocess.run(["rm", "-rf", str(template)], check=True)


def test_directory_with_100000_entries_is_mapped_and_removed(
    lab: Lab, make_store: MakeStore, run_module: t.Callable[..., Json]
) -> None:
    # Separate from the test above, which records each system call.
    image = tiny_image(lab)
    store = make_store("overlay-tmpfs", image)
    wide = store.layer_folder(store.image(image.name)["layer"]) / "diff/wide"
    wide.mkdir()
    fill(wide, 100_000)
    args = {**store.module_args(), "images": [image.name], "uidmap": [MAP], "force": True}
    result = run_module("layer_template", args)
    (entry,) = result["layers"]
    assert entry["files"] > 100_000
    assert len(json.dumps(result)) < 20_000
    mapped = store.layer_folder(entry["layer_id"]) / "diff/wide"
    assert {(item.name, item.stat().st_uid) for item in os.scandir(mapped)} == {
        (str(number), 100000) for number in range(100_000)
    }
    assert run_module("layer_template", {**args, "state": "absent"})["changed"]
    assert not mapped.exists()


def _assert_changes_in_store(run: Run, store: Store) -> None:
    """Assert that each call that could change a file concerns a folder of the store."""
    graphroot, driver = str(store.graphroot), store.driver
    allowed = [f"{graphroot}/{name}/" for name in ("userns-storage", f"{driver}/dir")]
    allowed += [f"{base}/{driver}-" for base in (graphroot, str(store.runroot))]
    exact = {f"{graphroot}/userns-storage", f"{graphroot}/{driver}/dir"}
    for call in run.calls:
        if call.name.startswith("open") and not call.changes:
            continue
        for path in call.paths:
            known = path.startswith((*allowed, "pipe:", "/dev/", "/proc/", "anon_inode:"))
            assert known or path in exact or "memfd" in path or "/dev/shm" in path, call


def _assert_owners_in_map(tree: pathlib.Path) -> None:
    """Assert that all owners of a tree are in the map: 100000 to 165535."""
    found = subprocess.run(
        ["find", str(tree), "-not", "(", "-uid", "+99999", "-uid", "-165536", "-gid", "+99999",
         "-gid", "-165536", ")", "-print", "-quit"],
        capture_output=True, check=True,
    )  # fmt: skip
    assert found.stdout == b""


# Results


def test_results_are_bounded_and_do_not_disclose_content(
    lab: Lab, make_store: MakeStore, modules: ModuleServer
) -> None:
    layer = {
        f"data/{number // 500}/{SECRET} {number}": images.file(SECRET, uid=number)
        for number in range(70_000, 75_000)
    }
    image = images.build(lab.folder(), [layer], "localhost/owners:1")
    store = make_store("vfs-tmpfs", image)
    args = {**store.module_args(), "images": [image.name], "_ansible_diff": True}
    wide = ["0:100000:100000"]
    for more in (
        {"uidmap": [MAP]},
        {"uidmap": [MAP], "_ansible_check_mode": True},
        {"uidmap": wide},
        {"uidmap": [MAP], "unmapped_ids": "overflow"},
    ):
        run = modules.run("layer_template", {**args, **more, "_ansible_verbosity": 4})
        checked_result(run)
        assert len(run.output) < 30_000, len(run.output)
    for name in ("image_layers_info", "layer_gc"):
        run = modules.run(name, {**store.module_args(), "_ansible_verbosity": 4})
        checked_result(run)
        assert len(run.output) < 30_000


# A user's store, as root sees it


class Tampered:
    """A user's store that can be restored, and files of root that no run may change."""

    def __init__(self, lab: Lab, store: Store, modules: ModuleServer) -> None:
        assert store.user is not None
        self.user: User = store.user
        self.store, self.modules = store, modules
        self.kept = store.base / "kept"
        self.roots = lab.folder(0o755)
        (self.roots / "secret").write_text(SECRET)
        (self.roots / "secret").chmod(0o600)
        (self.roots / "folder").mkdir(mode=0o755)
        (self.roots / "folder" / "file").write_text("x")
        # All users may read this folder, and it has the files of a records folder, so that links to it work.
        for name in ("layers", "images", "containers"):
            (self.roots / "folder" / f"{name}.json").write_text("[]")
            (self.roots / "folder" / f"{name}.lock").write_text("")
        subprocess.run(["cp", "-a", str(store.graphroot), str(self.kept)], check=True)

    def restore(self) -> None:
        """Undo the tampering."""
        shutil.rmtree(self.store.graphroot, ignore_errors=True)
        if os.path.lexists(self.store.graphroot):
            os.unlink(self.store.graphroot)
        subprocess.run(["cp", "-a", str(self.kept), str(self.store.graphroot)], check=True)

    def link(self, path: str, target: t.Union[str, pathlib.Path]) -> None:
        """Replace a file or folder of the store with a link of the user."""
        location = self.store.graphroot / path
        if location.is_dir() and not location.is_symlink():
            shutil.rmtree(location)
        elif os.path.lexists(location):
            location.unlink()
        location.parent.mkdir(exist_ok=True)
        os.symlink(target, location)
        os.lchown(location, self.user.uid, self.user.gid)

    def change_records(self, kind: str, change: t.Callable[[t.List[Json]], None]) -> None:
        """Change a file of records, which remains the user's."""
        path = self.store.graphroot / f"{self.store.driver}-{kind}" / f"{kind}.json"
        records = json.loads(path.read_text())
        change(records)
        path.write_text(json.dumps(records))


def _first(change: t.Callable[[Json], None]) -> t.Callable[[t.List[Json]], None]:
    return lambda records: change(records[0])


def _fifo(case: Tampered, path: str) -> None:
    location = case.store.graphroot / path
    location.unlink()
    os.mkfifo(location)
    os.chown(location, case.user.uid, case.user.gid)


def _cycle(records: t.List[Json]) -> None:
    records[0]["parent"] = records[-1]["id"]


def _slashes(records: t.List[Json]) -> None:
    for item in records:
        item["id"] = "../../" + item["id"][6:]


TRICKS: t.Mapping[str, t.Callable[[Tampered], None]] = {
    "graphroot": lambda case: case.link("", case.roots / "folder"),
    "driver's folder": lambda case: case.link("vfs", case.roots / "folder"),
    "folder of layers": lambda case: case.link("vfs/dir", case.roots / "folder"),
    "folder of records": lambda case: case.link("vfs-layers", case.roots / "folder"),
    "folder of images": lambda case: case.link("vfs-images", case.roots / "folder"),
    "records": lambda case: case.link("vfs-layers/layers.json", case.roots / "secret"),
    "lock": lambda case: case.link("vfs-layers/layers.lock", case.roots / "secret"),
    "folder of the collection": lambda case: case.link("userns-storage", case.roots / "folder"),
    "staging": lambda case: case.link("userns-storage/staging", case.roots / "folder"),
    "trash": lambda case: case.link("userns-storage/trash", case.roots / "folder"),
    "lock of the collection": lambda case: case.link("userns-storage/lock", case.roots / "secret"),
    "ledger": lambda case: case.link("userns-storage/ledger.json", case.roots / "secret"),
    "partial ledger": lambda case: case.link(
        "userns-storage/ledger.json.tmp", case.roots / "secret"
    ),
    "database": lambda case: case.link("libpod/bolt_state.db", case.roots / "secret"),
    "records are a pipe": lambda case: _fifo(case, "vfs-images/images.json"),
    "lock is a pipe": lambda case: _fifo(case, "vfs-images/images.lock"),
    "cycle of parents": lambda case: case.change_records("layers", _cycle),
    "slashes in IDs": lambda case: case.change_records("layers", _slashes),
    "slashes in image IDs": lambda case: case.change_records("images", _slashes),
    "huge numbers": lambda case: case.change_records(
        "layers", _first(lambda item: item.update({"diff-size": 10**300, "uidset": [2**70]}))
    ),
    "map of all IDs": lambda case: case.change_records(
        "layers",
        _first(
            lambda item: item.update(
                uidmap=[{"container_id": 0, "host_id": 0, "size": 2**32}], gidmap=[{}]
            )
        ),
    ),
    "layer is a link": lambda case: case.link(
        f"vfs/dir/{case.store.layers()[-1]['id']}", case.roots / "folder"
    ),
    "tar-split is a link": lambda case: case.link(
        f"vfs-layers/{case.store.layers()[-1]['id']}.tar-split.gz", case.roots / "secret"
    ),
}


@pytest.fixture(scope="module")
def tampered(lab: Lab) -> t.Iterator[Tampered]:
    """The store of a user, for all tricks."""
    from support import users

    user = users.add_user(lab)
    image = images.build(
        lab.folder(), [{"etc": images.directory(), "etc/a": images.file("a")}], "localhost/tiny:1"
    )
    store = Store(lab, "rootless-vfs-tmpfs", user=user)
    server = ModuleServer(lab)
    try:
        store.load(image)
        case = Tampered(lab, store, server)
        yield case
    finally:
        server.close()
        store.close()
        users.remove_user(lab, user)


@pytest.mark.parametrize("trick", TRICKS)
def test_tampered_store_cannot_trick_root(tampered: Tampered, trick: str) -> None:
    case = tampered
    args = {**case.store.module_args(), "lock_timeout": 3}
    options = {"images": ["localhost/tiny:1"], "userns": "keep-id", "force": True}
    case.restore()
    first = case.modules.run("layer_template", {**args, **options})
    assert first.result["changed"], first.output
    TRICKS[trick](case)
    before = disk_state(case.roots)
    for module, more in (
        ("layer_template", {**options, "state": "absent"}),
        ("layer_template", options),
        (
            "layer_gc",
            {"min_age": "0", "max_copies_per_image": 0, "orphans": "remove", "broken": "repair"},
        ),
        ("image_layers_info", {}),
    ):
        run = case.modules.run(module, {**args, **more}, record=True)
        checked_result(run)
        assert before.changes(disk_state(case.roots)) == [], (module, run.output)
    _assert_owned_by_user(case)


def test_every_file_of_users_store_is_opened_as_the_user(tampered: Tampered) -> None:
    case = tampered
    case.restore()
    args = {**case.store.module_args(), "images": ["localhost/tiny:1"], "userns": "keep-id"}
    for state in ("present", "absent"):
        run = case.modules.run("layer_template", {**args, "state": state}, opens=True)
        assert run.result["changed"], run.output
        calls_in_home = [call for call in run.calls if call.paths[0].startswith(case.user.home)]
        assert len(calls_in_home) > 50
        assert {call.uid for call in calls_in_home} == {case.user.uid}


def _assert_owned_by_user(case: Tampered) -> None:
    """Assert that all files of the store belong to the user or to the user's subordinate IDs."""
    user = case.user
    if case.store.graphroot.is_symlink():
        return
    allowed = {user.uid, *range(user.subuid_start, user.subuid_start + user.subuid_count)}
    for parent, folders, files in os.walk(case.store.graphroot):
        for name in [*folders, *files]:
            info = os.lstat(os.path.join(parent, name))
            assert info.st_uid in allowed, (parent, name, info)
