# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test that the store code and podman read each other's records."""

from __future__ import annotations

import json
import os
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.capabilities import (
    capabilities,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    PermissionDenied,
    ReadOnlyStore,
    StoreError,
    UnsupportedDriver,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import (
    StoreOverrides,
    discover,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.store import Store
from support.hosts import Host
from support.images import Image
from support.mapped_layers import (
    MAP_OPTIONS,
    add_mapped_layer,
    open_store,
    remove_mapped_layer,
)
from support.stores import Store as RealStore
from support.stores import disk_state
from support.users import User

MakeStore = t.Callable[..., RealStore]

_NEW_PODMAN = capabilities("podman", (5, 8), (1, 64))


@pytest.mark.parametrize("kind", ["vfs", "overlay", "rootless-vfs"])
def test_records_of_podman_are_read(kind: str, make_store: MakeStore, small_image: Image) -> None:
    real = make_store(kind, small_image)
    # The fixed name cannot conflict: each store is private to its test.
    container = real.create(small_image.name, "--name=web")
    before = real.disk_state()
    store = open_store(real)
    snapshot = store.snapshot()
    assert {layer.id: layer.raw for layer in snapshot.layers.values()} == {
        layer["id"]: layer for layer in real.layers()
    }
    assert {image.id: image.raw for image in snapshot.images.values()} == {
        image["id"]: image for image in real.images()
    }
    assert list(snapshot.containers) == [container]
    found = snapshot.containers[container]
    assert (found.name, found.podman_name) == ("web", "web")
    assert snapshot.containers_on(snapshot.images[found.image].layer) == [found]
    assert all(
        os.path.exists(store.tar_split_path(layer))
        for layer in snapshot.layers
        if not snapshot.layers[layer].names
    )
    assert before.changes(real.disk_state()) == []
    digest = ""
    for reference in (
        "small:1",
        small_image.name,
        found.image,
        found.image[:12],
        "sha256:" + found.image,
    ):
        listed = json.loads(real.podman("inspect", "--type=image", reference).stdout)
        assert snapshot.resolve_image(reference).id == listed[0]["Id"]
        digest = listed[0]["Digest"]
    for reference in (f"small@{digest}", f"localhost/small@{digest}"):
        listed = json.loads(real.podman("inspect", "--type=image", reference).stdout)
        assert snapshot.resolve_image(reference).id == listed[0]["Id"]


def test_podman_uses_written_record(make_store: MakeStore, small_image: Image) -> None:
    real = make_store("vfs", small_image)
    store = open_store(real)
    layer_id = add_mapped_layer(store, small_image.name)
    before = real.layer_ids()
    container = real.create(small_image.name, *MAP_OPTIONS)
    (own,) = real.layer_ids() - before
    assert real.layer(own)["parent"] == layer_id
    assert [item.id for item in store.snapshot().containers_on(layer_id)] == [container]
    real.podman("rm", container)
    assert real.layer_ids() == before
    assert real.podman("images", "-q", "--no-trunc").stdout.split()
    remove_mapped_layer(store, layer_id)
    assert real.layer_ids() == before - {layer_id}
    assert real.remaining_paths(layer_id) == []
    real.podman("rmi", small_image.name)
    assert real.layers() == real.images() == []


def test_flags_are_kept_when_podman_rewrites_records(
    make_store: MakeStore, small_image: Image, host: t.Callable[[str], Host]
) -> None:
    """Runtimes drop unknown fields, but keep unknown keys of the map `flags`."""
    for machine in (None, host("trixie")):
        real = make_store("vfs", small_image, machine=machine)
        store = open_store(real)
        layer_id = add_mapped_layer(store, small_image.name)
        flags = {"userns.storage": {"lease": "2026-02-03T00:00:00Z", "origin": "ours"}}

        def change(raw: t.Dict[str, t.Any]) -> None:
            raw.update(
                flags={"userns.storage": {"lease": "2026-02-03T00:00:00Z", "origin": "ours"}}
            )

        with store.transaction() as transaction:
            transaction.update_layer(layer_id, change)
        container = real.create(small_image.name, *MAP_OPTIONS)
        real.podman("rm", container)
        assert store.snapshot().layers[layer_id].flags == flags
        assert next(iter(store.snapshot().images.values())).mapped_layers == (layer_id,)


def test_running_podman_service_and_store_see_changes(
    make_store: MakeStore, small_image: Image
) -> None:
    real = make_store("vfs", small_image)
    store = open_store(real)
    with real.service() as service:

        def size() -> int:
            (image,) = service.call("GET", "images/json")
            return int(image["Size"])

        plain = size()
        layer_id = add_mapped_layer(store, small_image.name)
        more = size()
        assert more > plain
        remove_mapped_layer(store, layer_id)
        assert size() == plain
        for number in range(5):
            made = service.call(
                "POST", "containers/create", {"image": small_image.name, "name": f"c{number}"}
            )
            assert made["Id"] in store.snapshot().containers
            service.call("DELETE", f"containers/{made['Id']}")
            assert made["Id"] not in store.snapshot().containers


def test_images_of_read_only_store_are_read(make_store: MakeStore, small_image: Image) -> None:
    shared = make_store("vfs", small_image)
    real = make_store("vfs", read_only=[str(shared.graphroot)])
    real.podman("images")
    config = discover(
        StoreOverrides(storage_conf=str(real.storage_conf)), {}, None, False, _NEW_PODMAN
    )
    assert config.additional_image_stores == (str(shared.graphroot),)
    before = disk_state(shared.graphroot)
    store = Store.open(config)
    image = store.snapshot().resolve_image(small_image.name)
    assert image.store == str(shared.graphroot)
    assert {item.read_only_store for item in store.snapshot().chain(image.layer)} == {image.store}
    with store.transaction() as transaction, pytest.raises(ReadOnlyStore):
        transaction.append_mapped_layer(image.id, image.layer)
    assert before.changes(disk_state(shared.graphroot)) == []
    container = real.create(small_image.name)
    own = store.snapshot().layers[store.snapshot().containers[container].layer]
    assert (own.parent, own.read_only_store) == (image.layer, None)


@pytest.mark.parametrize("layout", ["transient", "imagestore", "rm"])
def test_layouts_of_newer_podman_are_read(
    layout: str, make_store: MakeStore, small_image: Image, host: t.Callable[[str], Host]
) -> None:
    """podman 5.8 writes volatile records, a transient store and a separate image store."""
    real = make_store("overlay", machine=host("sid"))
    images = real.base / "i"
    text = real.storage_conf.read_text()
    if layout == "transient":
        real.storage_conf.write_text(f"{text}transient_store = true\n")
    elif layout == "imagestore":
        images.mkdir(mode=0o700)
        real.storage_conf.write_text(f'{text}imagestore = "{images}"\n')
    real.skopeo("copy", "-q", small_image.source, f"containers-storage:{small_image.name}")
    container = real.create(small_image.name, *(("--rm",) if layout == "rm" else ()))
    config = discover(
        StoreOverrides(storage_conf=str(real.storage_conf)), {}, None, False, _NEW_PODMAN
    )
    assert config.transient == (layout == "transient")
    store = Store.open(config)
    before = disk_state(real.base)
    snapshot = store.snapshot()
    image = snapshot.resolve_image("small:1")
    assert [item.id for item in snapshot.containers.values()] == [container]
    assert snapshot.containers[container].volatile == (layout != "imagestore")
    layers = snapshot.chain(snapshot.containers[container].layer)
    assert len(layers) == len(small_image.layers) + 1
    assert layers[1].id == image.layer
    assert {layer.location for layer in layers[1:]} == {
        "imagestore" if layout == "imagestore" else "stable"
    }
    assert layers[0].location == ("stable" if layout == "imagestore" else "volatile")
    assert disk_state(real.base).changes(before) == []
    if layout == "imagestore":
        assert config.imagestore == str(images)
        with pytest.raises(UnsupportedDriver), store.transaction():
            pass
        return
    with store.transaction(containers=True) as transaction:
        transaction.update_layer(layers[0].id, lambda raw: raw.update(flags={"x": 1}))
    assert store.snapshot().layers[layers[0].id].location == "volatile"
    assert real.podman("ps", "-aq", "--no-trunc").stdout.split() == [container]
    real.podman("rm", container)
    assert store.snapshot().containers == {}


def test_wrong_driver_and_missing_store_are_refused(
    make_store: MakeStore, small_image: Image
) -> None:
    real = make_store("vfs", small_image)
    before = real.disk_state()
    with pytest.raises(StoreError, match="belongs to driver vfs"):
        open_store(real, driver="overlay")
    assert before.changes(real.disk_state()) == []
    fresh = make_store("overlay")
    with pytest.raises(StoreError) as caught:
        open_store(fresh)
    assert not fresh.graphroot.exists()
    # The hint does not advise creating a second store.
    assert caught.value.hint.startswith("Compare with the output of podman info ")
    fresh.podman("info")
    assert open_store(fresh).snapshot().images == {}


def test_store_of_another_user_is_refused(
    make_store: MakeStore, small_image: Image, make_user: t.Callable[..., User]
) -> None:
    real = make_store("vfs", small_image)
    user = make_user()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setresgid(user.gid, user.gid, user.gid)
            os.setresuid(user.uid, user.uid, user.uid)
            try:
                open_store(real).snapshot()
            except PermissionDenied as error:
                code = 0 if "become: true" in error.hint else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
