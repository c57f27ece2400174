# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The contract of the drivers: the same tests for each of them, on real filesystems and stores of the real podman.

A new driver gets an entry in ``DRIVERS``. ``generic`` is a driver that has only what the base class demands, so that
these tests hold for what every driver inherits.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.drivers.base import (
    COPY,
    Driver,
    DriverHome,
    Staged,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.drivers.registry import (
    REGISTRY,
    open_driver,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    StoreError,
    UnsupportedDriver,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import (
    Mapping,
    Shift,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import IDMap
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import files
from ansible_collections.userns.storage.plugins.module_utils._storage.store.staging import (
    remove_tree,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.merged import LayerStack
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.tree_tools import (
    Suspended,
)
from support.driver_stores import Place, inside, opened, staging_folder

if t.TYPE_CHECKING:
    from support.images import Image
    from support.stores import Store

MakeStore = t.Callable[..., "Store"]


class GenericDriver(Driver):
    """What a driver must have at the least: trees as vfs has them, and nothing of its own."""

    name = "generic"
    folders = ("vfs", "dir")

    def _readable(self, chain: t.Sequence[str]) -> t.ContextManager[LayerStack]:
        return self._whole_layer(chain)


# For each case the driver, the kind of store in support/stores.py on which it works, and the driver's options there.
DRIVERS: t.Mapping[str, t.Tuple[str, str, t.Dict[str, str]]] = {
    "overlay on the machine's filesystem": ("overlay", "overlay-forced", {}),
    "overlay on xfs": ("overlay", "overlay-xfs", {}),
    "overlay with metacopy": ("overlay", "overlay-forced", {"mountopt": "nodev,metacopy=on"}),
    "vfs on the machine's filesystem": ("vfs", "vfs", {}),
    "vfs on xfs": ("vfs", "vfs-xfs", {}),
    "btrfs": ("btrfs", "btrfs", {}),
    "generic": ("generic", "vfs", {}),
}
MADE = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4
NEW = Mapping(IDMap.parse(["0:100000:65536"]), IDMap.parse(["0:100000:65536"]))
SHIFT = Shift(Mapping(), NEW)
# In the small image, with the owner that it has there.
NOTES, OWNER = "home/user/notes", 1000


def open_named(name: str) -> t.Callable[[str, DriverHome], Driver]:
    return (lambda _name, home: GenericDriver(home)) if name == "generic" else open_driver


@pytest.fixture(params=DRIVERS)
def case(request: pytest.FixtureRequest, make_store: MakeStore, small_image: Image) -> Case:
    """A driver, and a store of its kind with the small image."""
    name, kind, options = DRIVERS[request.param]
    store = make_store(kind, small_image, options=options)
    chain, layer = [], store.image(small_image.name)["layer"]
    while layer:
        chain.append(layer)
        layer = store.layer(layer).get("parent", "")
    return Case(store, name, chain)


class Case(t.NamedTuple):
    store: Store
    name: str
    chain: t.List[str]

    def run(self, check: t.Callable[..., t.Any], *arguments: t.Any) -> t.Any:
        """Run a check as operations use a driver: in a child with mounts of its own."""
        return inside(self.store, check, self.name, self.chain, *arguments)


def test_every_driver_has_a_case() -> None:
    assert {name for name, _kind, _options in DRIVERS.values()} == {*REGISTRY, "generic"}


# Reading


def test_layers_of_a_runtime_are_read(case: Case) -> None:
    before = case.store.snapshot_of_disk()
    case.run(read_layers)
    assert before.changes(case.store.snapshot_of_disk()) == []


def read_layers(place: Place, name: str, chain: t.List[str]) -> None:
    with opened(place, open_named(name)) as driver:
        traces = driver.traces(chain)
        assert set(traces) <= set(chain)
        assert {*chain} <= driver.present()
        for number, layer_id in enumerate(chain):
            assert driver.exists(layer_id)
            assert driver.damage(layer_id, chain[number + 1 :]) is None
            assert not driver.is_placeholder(layer_id)
            # What a layer rests on is told the same way by all that tell it.
            below = driver.dependencies(layer_id)
            assert below in ([], chain[number + 1 :])
            assert driver.resting([layer_id]).get(layer_id, []) == below
            for lower in below:
                assert layer_id in driver.dependents(lower)
        assert not {*driver.links().values()} - {*chain}
        assert driver.orphans(chain) == []
        assert isinstance(driver.has_copy(chain[0]), bool)

        usage = driver.measure(chain[0], exclusive=True)
        assert usage.files > 0
        assert usage.inodes >= usage.files
        assert usage.least <= usage.exclusive <= usage.most
        folder = os.path.join(driver.folder, chain[0])
        assert driver.measure_path(folder).inodes >= usage.inodes

        assert driver.read_text(chain, "etc/motd") == "second\n"
        assert driver.read_text(chain, "etc/none") is None
        assert driver.read_text(chain, "etc") is None
        with driver.tree(chain) as root:
            assert os.stat(NOTES, dir_fd=root).st_uid == OWNER
            names = {*os.listdir(root), ""}
        assert {item for item, _uid, _gid in driver.top_owners(chain)} == names
        # Nothing that this library reads looks like a container that was created.
        assert {key: trace.value for key, trace in driver.traces(chain).items()} == {
            key: trace.value for key, trace in traces.items()
        }


def test_layers_that_are_missing_and_names_that_are_no_ids(case: Case) -> None:
    before = case.store.snapshot_of_disk()
    case.run(read_missing)
    assert before.changes(case.store.snapshot_of_disk()) == []


def read_missing(place: Place, name: str, _chain: t.List[str]) -> None:
    with opened(place, open_named(name)) as driver:
        assert not driver.exists(OTHER)
        assert not driver.is_placeholder(OTHER)
        assert not driver.remove_placeholder(OTHER)
        assert "missing" in (driver.damage(OTHER) or "")
        assert driver.traces([OTHER]) == {}
        assert driver.resting([OTHER]) == {}
        with contextlib.suppress(StoreError):
            # A driver that has to look at the layer for it may fail.
            assert driver.dependencies(OTHER) == []
        for ask in (driver.measure, lambda item: driver.strategies([item])):
            with pytest.raises(StoreError, match="Pull or load"):
                ask(OTHER)
        for bad in ("", "..", "../../etc", OTHER[:-1], OTHER.upper()):
            for change in (
                lambda item: driver.detach(item, place.graphroot),
                lambda item: driver.commit(place.graphroot, item),
                driver.exists,
                driver.erase,
            ):
                with pytest.raises(StoreError, match="not a layer ID"):
                    change(bad)
            assert not driver.is_placeholder(bad)


# Making


def test_each_strategy_makes_the_same_layer(case: Case) -> None:
    found = case.run(make_with_each_strategy)
    # Every driver can copy, and has its cheapest way first.
    assert found[-1] == COPY
    assert len(set(found)) == len(found)


def make_with_each_strategy(place: Place, name: str, chain: t.List[str]) -> t.List[str]:
    known, found = [*chain], []
    with opened(place, open_named(name)) as driver:
        for number, way in enumerate(driver.strategies(chain)):
            layer_id = f"{number}" * 64
            make_and_look(place, driver, chain, way.name, layer_id, known)
            known.append(layer_id)
            found.append(way.name)
        with pytest.raises(UnsupportedDriver, match=found[0]):
            driver.predict(chain, SHIFT, "magic")
    return found


def make_and_look(
    place: Place,
    driver: Driver,
    chain: t.List[str],
    strategy: str,
    layer_id: str,
    known: t.List[str],
) -> None:
    there, layers = everything(place), driver.present()
    way, told = driver.predict(chain, SHIFT, strategy)
    assert everything(place) == there

    into = staging_folder(place, layer_id)
    staged = stage_in_two_calls(driver, chain, strategy, into, layer_id)
    assert way.name == staged.strategy == strategy
    assert (told.files, told.apparent) == (staged.files, staged.apparent)
    # Until the commit there is no layer, at most a placeholder, which nobody takes for an orphan.
    assert not driver.exists(layer_id)
    held = {layer_id} if driver.is_placeholder(layer_id) else set()
    assert driver.present() - layers == held
    assert driver.orphans(known) == []

    driver.commit(into, layer_id)
    assert driver.exists(layer_id)
    assert not driver.is_placeholder(layer_id)
    assert driver.damage(layer_id, chain) is None
    whole = [layer_id, *chain[1:]]
    with driver.tree(chain) as old, driver.tree(whole) as new:
        assert owners(new) == {
            path: (uid + 100000, gid + 100000) for path, (uid, gid) in owners(old).items()
        }
    assert driver.read_text(whole, "etc/motd") == "second\n"
    driver.flush()


def stage_in_two_calls(
    driver: Driver, chain: t.List[str], strategy: str, into: str, layer_id: str
) -> Staged:
    """Stage a layer and stop at the first progress; the second call goes on, or the first has ended all the same."""

    def stop(_files: int, _bytes: int) -> None:
        raise Suspended

    try:
        return driver.stage(chain, SHIFT, strategy, into, layer_id, stop)
    except Suspended:
        return driver.stage(chain, SHIFT, strategy, into, layer_id)


def owners(root: int) -> t.Dict[str, t.Tuple[int, int]]:
    found = {}
    for folder, names, others, descriptor in os.fwalk(".", dir_fd=root, follow_symlinks=False):
        for name in [".", *names, *others]:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            found[os.path.normpath(os.path.join(folder, name))] = (status.st_uid, status.st_gid)
    return found


def everything(place: Place) -> t.List[t.Tuple[str, int, int]]:
    """All that is below the graphroot."""
    found = []
    for folder, names, others in os.walk(place.graphroot):
        for name in [*names, *others]:
            status = os.lstat(os.path.join(folder, name))
            found.append((os.path.join(folder, name), status.st_ino, status.st_ctime_ns))
    return sorted(found)


def test_a_commit_never_replaces_a_layer(case: Case) -> None:
    case.run(commit_over_a_layer)


def commit_over_a_layer(place: Place, name: str, chain: t.List[str]) -> None:
    with opened(place, open_named(name)) as driver:
        make(place, driver, chain, MADE)
        into = staging_folder(place, "again")
        driver.stage(chain, SHIFT, COPY, into, OTHER)
        driver.commit(into, OTHER)
        for layer_id in (MADE, OTHER):
            assert driver.damage(layer_id, chain) is None
        before = everything(place)
        with pytest.raises(StoreError):
            driver.commit(into, MADE)
        assert driver.damage(MADE, chain) is None
        assert [item[0] for item in everything(place)] == [item[0] for item in before]


def make(place: Place, driver: Driver, chain: t.List[str], layer_id: str) -> None:
    into = staging_folder(place, layer_id)
    driver.stage(chain, SHIFT, "auto", into, layer_id)
    driver.commit(into, layer_id)


# Removing


def test_a_removed_layer_leaves_nothing(case: Case) -> None:
    layers = sorted(entry.name for entry in case.store.layer_folder("").iterdir())
    case.run(remove_layer)
    assert sorted(entry.name for entry in case.store.layer_folder("").iterdir()) == layers
    assert [path for path in case.store.leftovers(MADE) if "staging" not in path] == []


def remove_layer(place: Place, name: str, chain: t.List[str]) -> None:
    trash = os.path.join(place.graphroot, "userns-storage", "trash")
    with opened(place, open_named(name)) as driver:
        make(place, driver, chain, MADE)
        os.mkdir(trash)
        driver.detach(MADE, trash)
        # What is gone already is no error.
        driver.detach(MADE, trash)
        driver.detach(OTHER, trash)
        gone(driver, chain)
        assert os.listdir(trash) == [MADE]
        descriptor = os.open(trash, os.O_RDONLY)
        if not driver.destroy(descriptor, MADE):
            remove_tree(os.path.join(trash, MADE), driver.destroy)
        assert not driver.destroy(descriptor, MADE)
        os.close(descriptor)
    assert os.listdir(trash) == []


def gone(driver: Driver, chain: t.List[str]) -> None:
    """A layer is gone, and its place, where one is held, can be given up once."""
    assert not driver.exists(MADE)
    assert "missing" in (driver.damage(MADE) or "")
    assert driver.orphans(chain) == []
    held = driver.is_placeholder(MADE)
    assert driver.remove_placeholder(MADE) == held
    assert not driver.is_placeholder(MADE)
    assert not driver.remove_placeholder(MADE)
    assert MADE not in driver.present()


def test_a_layer_is_removed_on_a_full_disk(case: Case) -> None:
    """There is no room for a trash folder, so its files are deleted where they are."""
    case.run(erase_layer)


def erase_layer(place: Place, name: str, chain: t.List[str]) -> None:
    with opened(place, open_named(name)) as driver:
        make(place, driver, chain, MADE)
        before = driver.measure(MADE).files
        driver.thin(MADE, lambda: True)
        assert driver.measure(MADE).files == before
        driver.thin(MADE, lambda: False)
        assert driver.measure(MADE).files < before
        driver.thin(OTHER, lambda: False)
        driver.erase(MADE)
        gone(driver, chain)


def test_orphans_are_dropped_and_other_names_are_not_touched(case: Case) -> None:
    folder = case.store.layer_folder("")
    strange = folder / "lost+found"
    strange.mkdir()
    (folder / "notes").write_text("not a layer")
    case.run(drop_orphan)
    assert strange.is_dir()
    assert (folder / "notes").is_file()


def drop_orphan(place: Place, name: str, chain: t.List[str]) -> None:
    trash = os.path.join(place.graphroot, "userns-storage", "trash")
    with opened(place, open_named(name)) as driver:
        make(place, driver, chain, MADE)
        os.mkdir(trash)
        assert driver.orphans([*chain, MADE]) == []
        (orphan,) = driver.orphans(chain)
        assert (orphan.kind, orphan.name) == ("directory", MADE)
        assert abs(orphan.changed - time.time()) < 3600
        assert orphan.usage().files > 0
        assert driver.orphans(chain, present=driver.present())[0].name == MADE
        driver.drop(orphan, trash)
        gone(driver, chain)
        assert os.listdir(trash) == [MADE]
        remove_tree(os.path.join(trash, MADE), driver.destroy)


def test_a_driver_opened_to_look_writes_nothing(case: Case) -> None:
    before = case.store.snapshot_of_disk()
    case.run(predict_read_only)
    assert before.changes(case.store.snapshot_of_disk()) == []


def predict_read_only(place: Place, name: str, chain: t.List[str]) -> None:
    def make_driver(asked: str, home: DriverHome) -> Driver:
        looking = DriverHome(
            **{**{key: getattr(home, key) for key in home.__dataclass_fields__}, "read_only": True}
        )
        return open_named(name)(asked, looking)

    with opened(place, make_driver) as driver:
        looked = driver.predict(chain, SHIFT)[0].name
    with opened(place, open_named(name)) as driver:
        assert driver.predict(chain, SHIFT)[0].name == looked
    assert files.filesystem_type(place.graphroot)
    assert not pathlib.Path(place.graphroot, "userns-storage", "staging").exists()
