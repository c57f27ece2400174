# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test that every driver fulfils the contract of the base class, on real filesystems and in stores of podman.

A new driver gets an entry in ``DRIVERS``. ``generic`` is a driver that implements only the abstract methods of the base
class, so that the tests also cover the inherited methods.
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
from support.driver_access import StoreDescription, open_test_driver, run_as_owner, staging_folder

if t.TYPE_CHECKING:
    from support.images import Image
    from support.stores import Store

MakeStore = t.Callable[..., "Store"]


class GenericDriver(Driver):
    """A minimal driver for the directories of vfs, which overrides only the abstract methods."""

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
CREATED = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4
NEW_MAPPING = Mapping(IDMap.parse(["0:100000:65536"]), IDMap.parse(["0:100000:65536"]))
SHIFT = Shift(Mapping(), NEW_MAPPING)
# A file in the small image, and its owner there.
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
        """Run a check in a child process with its own mounts, as operations use a driver."""
        return run_as_owner(self.store, check, self.name, self.chain, *arguments)


def test_every_driver_has_a_case() -> None:
    assert {name for name, _kind, _options in DRIVERS.values()} == {*REGISTRY, "generic"}


# Reading


def test_layers_of_runtime_are_read(case: Case) -> None:
    before = case.store.disk_state()
    case.run(read_layers)
    assert before.changes(case.store.disk_state()) == []


def read_layers(description: StoreDescription, name: str, chain: t.List[str]) -> None:
    with open_test_driver(description, open_named(name)) as driver:
        traces = driver.traces(chain)
        assert set(traces) <= set(chain)
        assert {*chain} <= driver.present()
        for number, layer_id in enumerate(chain):
            assert driver.exists(layer_id)
            assert driver.damage(layer_id, chain[number + 1 :]) is None
            assert not driver.is_placeholder(layer_id)
            # All methods that return the dependencies of a layer agree.
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
        # Reading does not change the traces: a changed trace means that a container was created.
        assert {key: trace.value for key, trace in driver.traces(chain).items()} == {
            key: trace.value for key, trace in traces.items()
        }


def test_missing_layers_and_invalid_ids(case: Case) -> None:
    before = case.store.disk_state()
    case.run(read_missing)
    assert before.changes(case.store.disk_state()) == []


def read_missing(description: StoreDescription, name: str, _chain: t.List[str]) -> None:
    with open_test_driver(description, open_named(name)) as driver:
        assert not driver.exists(OTHER)
        assert not driver.is_placeholder(OTHER)
        assert not driver.remove_placeholder(OTHER)
        assert "missing" in (driver.damage(OTHER) or "")
        assert driver.traces([OTHER]) == {}
        assert driver.resting([OTHER]) == {}
        with contextlib.suppress(StoreError):
            # A driver that has to read the layer may raise an error.
            assert driver.dependencies(OTHER) == []
        for read in (driver.measure, lambda item: driver.strategies([item])):
            with pytest.raises(StoreError, match="Pull or load"):
                read(OTHER)
        for invalid in ("", "..", "../../etc", OTHER[:-1], OTHER.upper()):
            for method in (
                lambda item: driver.detach(item, description.graphroot),
                lambda item: driver.commit(description.graphroot, item),
                driver.exists,
                driver.erase,
            ):
                with pytest.raises(StoreError, match="not a layer ID"):
                    method(invalid)
            assert not driver.is_placeholder(invalid)


# Creating


def test_all_strategies_create_the_same_layer(case: Case) -> None:
    strategies = case.run(create_with_each_strategy)
    # Every driver can copy, and its cheapest strategy is the first.
    assert strategies[-1] == COPY
    assert len(set(strategies)) == len(strategies)


def create_with_each_strategy(
    description: StoreDescription, name: str, chain: t.List[str]
) -> t.List[str]:
    layers, strategies = [*chain], []
    with open_test_driver(description, open_named(name)) as driver:
        for number, strategy in enumerate(driver.strategies(chain)):
            layer_id = f"{number}" * 64
            create_and_check(description, driver, chain, strategy.name, layer_id, layers)
            layers.append(layer_id)
            strategies.append(strategy.name)
        with pytest.raises(UnsupportedDriver, match=strategies[0]):
            driver.predict(chain, SHIFT, "magic")
    return strategies


def create_and_check(
    description: StoreDescription,
    driver: Driver,
    chain: t.List[str],
    strategy: str,
    layer_id: str,
    known: t.List[str],
) -> None:
    before, layers = snapshot(description), driver.present()
    predicted, figures = driver.predict(chain, SHIFT, strategy)
    assert snapshot(description) == before

    folder = staging_folder(description, layer_id)
    staged = stage_in_two_calls(driver, chain, strategy, folder, layer_id)
    assert predicted.name == staged.strategy == strategy
    assert (figures.files, figures.apparent) == (staged.files, staged.apparent)
    # Before the commit the layer does not exist. At most there is a placeholder, which is no orphan.
    assert not driver.exists(layer_id)
    placeholders = {layer_id} if driver.is_placeholder(layer_id) else set()
    assert driver.present() - layers == placeholders
    assert driver.orphans(known) == []

    driver.commit(folder, layer_id)
    assert driver.exists(layer_id)
    assert not driver.is_placeholder(layer_id)
    assert driver.damage(layer_id, chain) is None
    mapped_chain = [layer_id, *chain[1:]]
    with driver.tree(chain) as old, driver.tree(mapped_chain) as new:
        assert owners(new) == {
            path: (uid + 100000, gid + 100000) for path, (uid, gid) in owners(old).items()
        }
    assert driver.read_text(mapped_chain, "etc/motd") == "second\n"
    driver.flush()


def stage_in_two_calls(
    driver: Driver, chain: t.List[str], strategy: str, folder: str, layer_id: str
) -> Staged:
    """Stage a layer with a call that stops at the first progress, if it reports any, and a second call that resumes."""

    def stop(_files: int, _bytes: int) -> None:
        raise Suspended

    try:
        return driver.stage(chain, SHIFT, strategy, folder, layer_id, stop)
    except Suspended:
        return driver.stage(chain, SHIFT, strategy, folder, layer_id)


def owners(root: int) -> t.Dict[str, t.Tuple[int, int]]:
    found = {}
    for folder, names, others, descriptor in os.fwalk(".", dir_fd=root, follow_symlinks=False):
        for name in [".", *names, *others]:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            found[os.path.normpath(os.path.join(folder, name))] = (status.st_uid, status.st_gid)
    return found


def snapshot(description: StoreDescription) -> t.List[t.Tuple[str, int, int]]:
    """Path, inode and change time of everything below the graph root."""
    found = []
    for folder, names, others in os.walk(description.graphroot):
        for name in [*names, *others]:
            status = os.lstat(os.path.join(folder, name))
            found.append((os.path.join(folder, name), status.st_ino, status.st_ctime_ns))
    return sorted(found)


def test_commit_does_not_replace_a_layer(case: Case) -> None:
    case.run(commit_over_a_layer)


def commit_over_a_layer(description: StoreDescription, name: str, chain: t.List[str]) -> None:
    with open_test_driver(description, open_named(name)) as driver:
        create(description, driver, chain, CREATED)
        folder = staging_folder(description, "again")
        driver.stage(chain, SHIFT, COPY, folder, OTHER)
        driver.commit(folder, OTHER)
        for layer_id in (CREATED, OTHER):
            assert driver.damage(layer_id, chain) is None
        before = snapshot(description)
        with pytest.raises(StoreError):
            driver.commit(folder, CREATED)
        assert driver.damage(CREATED, chain) is None
        assert [item[0] for item in snapshot(description)] == [item[0] for item in before]


def create(
    description: StoreDescription, driver: Driver, chain: t.List[str], layer_id: str
) -> None:
    folder = staging_folder(description, layer_id)
    driver.stage(chain, SHIFT, "auto", folder, layer_id)
    driver.commit(folder, layer_id)


# Removing


def test_removal_leaves_no_files(case: Case) -> None:
    layers = sorted(entry.name for entry in case.store.layer_folder("").iterdir())
    case.run(remove_layer)
    assert sorted(entry.name for entry in case.store.layer_folder("").iterdir()) == layers
    assert [path for path in case.store.remaining_paths(CREATED) if "staging" not in path] == []


def remove_layer(description: StoreDescription, name: str, chain: t.List[str]) -> None:
    trash = os.path.join(description.graphroot, "userns-storage", "trash")
    with open_test_driver(description, open_named(name)) as driver:
        create(description, driver, chain, CREATED)
        os.mkdir(trash)
        driver.detach(CREATED, trash)
        # Missing layers are ignored.
        driver.detach(CREATED, trash)
        driver.detach(OTHER, trash)
        assert_removed(driver, chain)
        assert os.listdir(trash) == [CREATED]
        descriptor = os.open(trash, os.O_RDONLY)
        if not driver.destroy(descriptor, CREATED):
            remove_tree(os.path.join(trash, CREATED), driver.destroy)
        assert not driver.destroy(descriptor, CREATED)
        os.close(descriptor)
    assert os.listdir(trash) == []


def assert_removed(driver: Driver, chain: t.List[str]) -> None:
    """The layer does not exist, and its placeholder, if there is one, can be removed once."""
    assert not driver.exists(CREATED)
    assert "missing" in (driver.damage(CREATED) or "")
    assert driver.orphans(chain) == []
    has_placeholder = driver.is_placeholder(CREATED)
    assert driver.remove_placeholder(CREATED) == has_placeholder
    assert not driver.is_placeholder(CREATED)
    assert not driver.remove_placeholder(CREATED)
    assert CREATED not in driver.present()


def test_layer_is_removed_on_full_filesystem(case: Case) -> None:
    """There is no space for a trash folder, so the files are deleted in place."""
    case.run(erase_layer)


def erase_layer(description: StoreDescription, name: str, chain: t.List[str]) -> None:
    with open_test_driver(description, open_named(name)) as driver:
        create(description, driver, chain, CREATED)
        before = driver.measure(CREATED).files
        driver.thin(CREATED, lambda: True)
        assert driver.measure(CREATED).files == before
        driver.thin(CREATED, lambda: False)
        assert driver.measure(CREATED).files < before
        driver.thin(OTHER, lambda: False)
        driver.erase(CREATED)
        assert_removed(driver, chain)


def test_orphans_are_removed_and_other_files_are_kept(case: Case) -> None:
    folder = case.store.layer_folder("")
    other = folder / "lost+found"
    other.mkdir()
    (folder / "notes").write_text("not a layer")
    case.run(drop_orphan)
    assert other.is_dir()
    assert (folder / "notes").is_file()


def drop_orphan(description: StoreDescription, name: str, chain: t.List[str]) -> None:
    trash = os.path.join(description.graphroot, "userns-storage", "trash")
    with open_test_driver(description, open_named(name)) as driver:
        create(description, driver, chain, CREATED)
        os.mkdir(trash)
        assert driver.orphans([*chain, CREATED]) == []
        (orphan,) = driver.orphans(chain)
        assert (orphan.kind, orphan.name) == ("directory", CREATED)
        assert abs(orphan.changed - time.time()) < 3600
        assert orphan.usage().files > 0
        assert driver.orphans(chain, present=driver.present())[0].name == CREATED
        driver.drop(orphan, trash)
        assert_removed(driver, chain)
        assert os.listdir(trash) == [CREATED]
        remove_tree(os.path.join(trash, CREATED), driver.destroy)


def test_read_only_driver_writes_nothing(case: Case) -> None:
    before = case.store.disk_state()
    case.run(predict_read_only)
    assert before.changes(case.store.disk_state()) == []


def predict_read_only(description: StoreDescription, name: str, chain: t.List[str]) -> None:
    def make_driver(driver_name: str, home: DriverHome) -> Driver:
        read_only_home = DriverHome(
            **{**{key: getattr(home, key) for key in home.__dataclass_fields__}, "read_only": True}
        )
        return open_named(name)(driver_name, read_only_home)

    with open_test_driver(description, make_driver) as driver:
        predicted = driver.predict(chain, SHIFT)[0].name
    with open_test_driver(description, open_named(name)) as driver:
        assert driver.predict(chain, SHIFT)[0].name == predicted
    assert files.filesystem_type(description.graphroot)
    assert not pathlib.Path(description.graphroot, "userns-storage", "staging").exists()
