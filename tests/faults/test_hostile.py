# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images that strangers made, and stores that users have tampered with before root works in them."""

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
from support.injection import Modules, Run
from support.lab import Lab
from support.stops import MAP, tiny_image
from support.stores import Store, disk_state
from support.users import User

MakeStore = t.Callable[..., Store]
Json = t.Dict[str, t.Any]

SECRET = "what only root may read"


@pytest.fixture
def modules(lab: Lab) -> t.Iterator[Modules]:
    """Our modules, each run recorded."""
    server = Modules(lab)
    yield server
    server.close()


def refused_or_done(run: Run) -> Json:
    """The result of a run: a success or an error in our words, with nothing secret in it."""
    assert run.result, run.output
    assert SECRET not in run.output
    assert "exception" not in run.result, run.output
    assert "unexpected" not in str(run.result.get("msg")), run.output
    return run.result


# Trees


def hostile_tree(tree: pathlib.Path, outside: pathlib.Path) -> None:
    """Make of a layer's tree what an image can hold at its worst; `outside` is not its own."""
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
    """Make so many empty files."""
    fd = os.open(folder, os.O_RDONLY)
    for number in range(count):
        os.close(os.open(f"{number}", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd))
    os.close(fd)


def test_a_hostile_image(lab: Lab, make_store: MakeStore, modules: Modules) -> None:
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
    made = modules.run("layer_template", args, opens=True)
    result = refused_or_done(made)
    assert result["changed"], made.output
    # Not even to read it.
    assert not [call for call in made.calls if str(outside) in call.paths[0]]
    assert before.changes(disk_state(outside)) == []
    assert {item: os.lstat(item) for item in others} == others
    _written_below(made, store)
    # Named, not told one by one.
    assert len(made.output) < 20_000
    (entry,) = result["layers"]
    mapped = store.layer_folder(entry["layer_id"])
    assert entry["files"] > 5000
    _no_foreign_owner(mapped)
    info = os.lstat(mapped / "setuid")
    assert (info.st_uid, stat.S_IMODE(info.st_mode)) == (101000, 0o6755)
    assert os.lstat(mapped / "sparse").st_blocks < 100
    assert os.readlink(mapped / "absolute") == str(outside)
    assert os.lstat(mapped / "disk").st_rdev == os.makedev(7, 0)
    gone = modules.run("layer_template", {**args, "state": "absent"}, record=True)
    assert refused_or_done(gone)["changed"]
    _written_below(gone, store)
    assert not mapped.exists()
    assert list((store.graphroot / "userns-storage/trash").iterdir()) == []
    assert before.changes(disk_state(outside)) == []
    subprocess.run(["rm", "-rf", str(template)], check=True)


def test_a_hundred_thousand_entries_in_one_directory(
    lab: Lab, make_store: MakeStore, run_module: t.Callable[..., Json]
) -> None:
    # Apart from the other one, for each call of that one is looked at.
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


def _written_below(run: Run, store: Store) -> None:
    """Each call that could change something was about the store's own folders."""
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


def _no_foreign_owner(tree: pathlib.Path) -> None:
    """All IDs below are of the map: 100000 to 165535."""
    found = subprocess.run(
        ["find", str(tree), "-not", "(", "-uid", "+99999", "-uid", "-165536", "-gid", "+99999",
         "-gid", "-165536", ")", "-print", "-quit"],
        capture_output=True, check=True,
    )  # fmt: skip
    assert found.stdout == b""


# Results


def test_results_are_bounded_and_tell_nothing_of_the_content(
    lab: Lab, make_store: MakeStore, modules: Modules
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
        refused_or_done(run)
        assert len(run.output) < 30_000, len(run.output)
    for name in ("image_layers_info", "layer_gc"):
        run = modules.run(name, {**store.module_args(), "_ansible_verbosity": 4})
        refused_or_done(run)
        assert len(run.output) < 30_000


# A user's store, as root sees it


class Tampered:
    """A user's store that can be put back, and what root owns and nobody may touch."""

    def __init__(self, lab: Lab, store: Store, modules: Modules) -> None:
        assert store.user is not None
        self.user: User = store.user
        self.store, self.modules = store, modules
        self.kept = store.base / "kept"
        self.roots = lab.folder(0o755)
        (self.roots / "secret").write_text(SECRET)
        (self.roots / "secret").chmod(0o600)
        (self.roots / "folder").mkdir(mode=0o755)
        (self.roots / "folder" / "file").write_text("x")
        # Everybody may list it, so that a name leads somewhere.
        for name in ("layers", "images", "containers"):
            (self.roots / "folder" / f"{name}.json").write_text("[]")
            (self.roots / "folder" / f"{name}.lock").write_text("")
        subprocess.run(["cp", "-a", str(store.graphroot), str(self.kept)], check=True)

    def put_back(self) -> None:
        """Undo what was tampered with."""
        shutil.rmtree(self.store.graphroot, ignore_errors=True)
        if os.path.lexists(self.store.graphroot):
            os.unlink(self.store.graphroot)
        subprocess.run(["cp", "-a", str(self.kept), str(self.store.graphroot)], check=True)

    def link(self, path: str, target: t.Union[str, pathlib.Path]) -> None:
        """Have the user put a link in the place of something of his."""
        place = self.store.graphroot / path
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        elif os.path.lexists(place):
            place.unlink()
        place.parent.mkdir(exist_ok=True)
        os.symlink(target, place)
        os.lchown(place, self.user.uid, self.user.gid)

    def records(self, kind: str, change: t.Callable[[t.List[Json]], None]) -> None:
        """Have the user change a file of records."""
        path = self.store.graphroot / f"{self.store.driver}-{kind}" / f"{kind}.json"
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))


def _first(change: t.Callable[[Json], None]) -> t.Callable[[t.List[Json]], None]:
    return lambda found: change(found[0])


def _fifo(case: Tampered, path: str) -> None:
    place = case.store.graphroot / path
    place.unlink()
    os.mkfifo(place)
    os.chown(place, case.user.uid, case.user.gid)


def _circle(found: t.List[Json]) -> None:
    found[0]["parent"] = found[-1]["id"]


def _slashes(found: t.List[Json]) -> None:
    for item in found:
        item["id"] = "../../" + item["id"][6:]


TRICKS: t.Mapping[str, t.Callable[[Tampered], None]] = {
    "graphroot": lambda case: case.link("", case.roots / "folder"),
    "driver's folder": lambda case: case.link("vfs", case.roots / "folder"),
    "folder of layers": lambda case: case.link("vfs/dir", case.roots / "folder"),
    "folder of records": lambda case: case.link("vfs-layers", case.roots / "folder"),
    "folder of images": lambda case: case.link("vfs-images", case.roots / "folder"),
    "records": lambda case: case.link("vfs-layers/layers.json", case.roots / "secret"),
    "lock": lambda case: case.link("vfs-layers/layers.lock", case.roots / "secret"),
    "own folder": lambda case: case.link("userns-storage", case.roots / "folder"),
    "staging": lambda case: case.link("userns-storage/staging", case.roots / "folder"),
    "trash": lambda case: case.link("userns-storage/trash", case.roots / "folder"),
    "own lock": lambda case: case.link("userns-storage/lock", case.roots / "secret"),
    "ledger": lambda case: case.link("userns-storage/ledger.json", case.roots / "secret"),
    "half ledger": lambda case: case.link("userns-storage/ledger.json.tmp", case.roots / "secret"),
    "database": lambda case: case.link("libpod/bolt_state.db", case.roots / "secret"),
    "records are a pipe": lambda case: _fifo(case, "vfs-images/images.json"),
    "lock is a pipe": lambda case: _fifo(case, "vfs-images/images.lock"),
    "parents in a circle": lambda case: case.records("layers", _circle),
    "slashes in IDs": lambda case: case.records("layers", _slashes),
    "slashes in the image": lambda case: case.records("images", _slashes),
    "huge numbers": lambda case: case.records(
        "layers", _first(lambda item: item.update({"diff-size": 10**300, "uidset": [2**70]}))
    ),
    "a map of everything": lambda case: case.records(
        "layers",
        _first(
            lambda item: item.update(
                uidmap=[{"container_id": 0, "host_id": 0, "size": 2**32}], gidmap=[{}]
            )
        ),
    ),
    "layer elsewhere": lambda case: case.link(
        f"vfs/dir/{case.store.layers()[-1]['id']}", case.roots / "folder"
    ),
    "tar-split elsewhere": lambda case: case.link(
        f"vfs-layers/{case.store.layers()[-1]['id']}.tar-split.gz", case.roots / "secret"
    ),
}


@pytest.fixture(scope="module")
def tampered(lab: Lab) -> t.Iterator[Tampered]:
    """One user's store for all tricks."""
    from support import users

    user = users.add_user(lab)
    image = images.build(
        lab.folder(), [{"etc": images.directory(), "etc/a": images.file("a")}], "localhost/tiny:1"
    )
    store = Store(lab, "rootless-vfs-tmpfs", user=user)
    server = Modules(lab)
    try:
        store.load(image)
        # Ours is there already, with a layer.
        case = Tampered(lab, store, server)
        yield case
    finally:
        server.close()
        store.close()
        users.remove_user(lab, user)


@pytest.mark.parametrize("trick", TRICKS)
def test_root_is_not_tricked_by_a_users_store(tampered: Tampered, trick: str) -> None:
    case = tampered
    args = {**case.store.module_args(), "lock_timeout": 3}
    wanted = {"images": ["localhost/tiny:1"], "userns": "keep-id", "force": True}
    case.put_back()
    first = case.modules.run("layer_template", {**args, **wanted})
    assert first.result["changed"], first.output
    TRICKS[trick](case)
    before = disk_state(case.roots)
    for module, more in (
        ("layer_template", {**wanted, "state": "absent"}),
        ("layer_template", wanted),
        (
            "layer_gc",
            {"min_age": "0", "max_copies_per_image": 0, "orphans": "remove", "broken": "repair"},
        ),
        ("image_layers_info", {}),
    ):
        run = case.modules.run(module, {**args, **more}, record=True)
        refused_or_done(run)
        assert before.changes(disk_state(case.roots)) == [], (module, run.output)
    _still_the_users(case)


def test_every_file_of_a_users_store_is_opened_as_the_user(tampered: Tampered) -> None:
    case = tampered
    case.put_back()
    args = {**case.store.module_args(), "images": ["localhost/tiny:1"], "userns": "keep-id"}
    for state in ("present", "absent"):
        run = case.modules.run("layer_template", {**args, "state": state}, opens=True)
        assert run.result["changed"], run.output
        there = [call for call in run.calls if call.paths[0].startswith(case.user.home)]
        assert len(there) > 50
        assert {call.uid for call in there} == {case.user.uid}


def _still_the_users(case: Tampered) -> None:
    """All in the store belongs to the user, or to one of the user's subordinate IDs."""
    user = case.user
    if case.store.graphroot.is_symlink():
        return
    allowed = {user.uid, *range(user.subuid_start, user.subuid_start + user.subuid_count)}
    for parent, folders, files in os.walk(case.store.graphroot):
        for name in [*folders, *files]:
            info = os.lstat(os.path.join(parent, name))
            assert info.st_uid in allowed, (parent, name, info)
