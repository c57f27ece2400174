# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test mapped layers with wrong owners or attributes, maps without an effect, and sizes of orphans."""

from __future__ import annotations

import functools
import os
import pathlib
import struct
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    layer_building,
    layer_removal,
    layer_template,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.mapping_options import (
    MappingOptions,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import (
    StoreRequest,
)
from support import images
from support.images import Image
from support.lab import Lab
from support.stores import Store
from support.unused_layers import only

MakeStore = t.Callable[..., Store]
RunModule = t.Callable[..., t.Dict[str, t.Any]]
Json = t.Dict[str, t.Any]

MAP = "0:100000:65536"


@pytest.fixture
def wrong(make_store: MakeStore, small_image: Image) -> t.Tuple[Store, str]:
    """A store with podman's own copy, in which /etc belongs to the host's root."""
    store = make_store("vfs", small_image)
    store.podman("rm", store.create(small_image.name, "--uidmap", MAP, "--gidmap", MAP))
    (layer,) = store.mapped_layers(small_image.name)
    os.chown(pathlib.Path(store.layer_folder(layer)) / "etc", 0, 0)
    return store, layer


def template_args(store: Store, image: Image) -> Json:
    return {**store.module_args(), "images": [image.name], "uidmap": [MAP], "gidmap": [MAP]}


def test_wrong_layer_is_replaced(
    wrong: t.Tuple[Store, str], run_module: RunModule, small_image: Image
) -> None:
    store, layer = wrong
    args = template_args(store, small_image)
    predicted = only(run_module("layer_template", args, check=True)["layers"])
    assert predicted["action"] == "created"
    made = only(run_module("layer_template", args)["layers"])
    assert made["action"] == "created"
    assert "/etc belongs to 0:0" in made["reason"]
    assert store.mapped_layers(small_image.name) == [made["layer_id"]] != [layer]
    repeated = run_module("layer_template", args)
    assert (repeated["changed"], only(repeated["layers"])["action"]) == (False, "existing")


def test_wrong_layer_in_use_is_kept_with_warning(
    wrong: t.Tuple[Store, str], run_module: RunModule, small_image: Image
) -> None:
    store, layer = wrong
    store.create(small_image.name, "--uidmap", MAP, "--gidmap", MAP)
    result = run_module("layer_template", template_args(store, small_image))
    assert (result["changed"], only(result["layers"])["action"]) == (False, "existing")
    assert "/etc belongs to 0:0" in str(result["warnings"][0])
    collected = run_module("layer_gc", {**store.module_args(), "min_age": "0", "broken": "repair"})
    assert only(collected["findings"])["rule"] == "in_use"
    assert store.mapped_layers(small_image.name) == [layer]


def test_wrong_layer_that_becomes_used_is_kept_with_warning(
    wrong: t.Tuple[Store, str], small_image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container is created after the module has read the records and before the removal."""
    store, layer = wrong
    remove = layer_removal.remove_mapped_layer

    def remove_late(*args: t.Any) -> t.Any:
        store.create(small_image.name, "--uidmap", MAP, "--gidmap", MAP)
        return remove(*args)

    monkeypatch.setattr(layer_building, "remove_mapped_layer", remove_late)
    store_request = StoreRequest(
        graphroot=str(store.graphroot), runroot=str(store.runroot), driver=store.driver
    )
    mappings = (MappingOptions(uidmap=(MAP,), gidmap=(MAP,)),)
    result = layer_template.declare(
        layer_template.TemplateRequest(store_request, (small_image.name,), mappings)
    )
    entry = only(result["layers"])
    assert (entry["action"], entry["layer_id"]) == ("existing", layer), result
    assert "/etc belongs to 0:0" in entry["reason"]
    assert "in use" in result["warnings"][0]
    assert store.mapped_layers(small_image.name) == [layer]


def test_wrong_layer_is_removed_by_repair(
    wrong: t.Tuple[Store, str], run_module: RunModule, small_image: Image
) -> None:
    store, layer = wrong
    args = {**store.module_args(), "min_age": "0"}
    assert only(run_module("layer_gc", args)["kept"])["id"] == layer
    repaired = only(run_module("layer_gc", {**args, "broken": "repair"})["repaired"])
    assert (repaired["kind"], repaired["id"]) == ("foreign_root", layer)
    assert store.mapped_layers(small_image.name) == []


@pytest.mark.parametrize("parts", [["0:0:4294967295"], ["0:0:1000", "1000:1000:4294966295"]])
def test_map_without_effect_needs_no_layer(
    parts: t.List[str], make_store: MakeStore, run_module: RunModule, small_image: Image
) -> None:
    store = make_store("vfs", small_image)
    args = {**store.module_args(), "images": [small_image.name], "uidmap": parts, "gidmap": parts}
    result = run_module("layer_template", args)
    assert (result["changed"], only(result["layers"])["action"]) == (False, "not_needed")
    assert store.mapped_layers(small_image.name) == []


def test_size_of_orphaned_folder_is_measured(
    make_store: MakeStore, run_module: RunModule, small_image: Image
) -> None:
    store = make_store("vfs", small_image)
    stray = pathlib.Path(store.layer_folder("e" * 64))
    stray.mkdir()
    (stray / "file").write_bytes(os.urandom(1 << 20))
    args = {**store.module_args(), "measure": "exclusive"}
    orphan = only(run_module("image_layers_info", args)["orphans"])
    assert orphan["size_exclusive"] == pytest.approx(1 << 20, rel=0.02)


@pytest.fixture(scope="session")
def acl_image(lab: Lab) -> Image:
    """An image with a file of owner 1000, whose access control list has entries with IDs."""
    entries = ((1, 6, -1), (2, 6, 1000), (4, 4, -1), (8, 4, 1000), (16, 6, -1), (32, 4, -1))
    listed = b"".join(struct.pack("<HHi", *entry) for entry in entries)
    acl = {"system.posix_acl_access": struct.pack("<L", 2) + listed}
    layer = {
        "etc": images.directory(),
        "etc/shared": images.file(b"x" * 100, uid=1000, gid=1000, mode=0o664, xattrs=acl),
        "etc/own": images.file(b"y" * 10, uid=1000, gid=1000, mode=0o4755),
    }
    return images.build(lab.folder(), [layer], "localhost/acl:1")


@pytest.mark.parametrize("kind", ["vfs", "overlay-forced", "btrfs"])
def test_verification_finds_differences_only_in_layer_of_podman(
    kind: str, make_store: MakeStore, run_module: RunModule, acl_image: Image
) -> None:
    store = make_store(kind, acl_image)
    store.podman("rm", store.create(acl_image.name, "--uidmap", MAP, "--gidmap", MAP))
    call = functools.partial(run_module, environ=store.module_environ())
    args = {**store.module_args(), "measure": "none"}
    verify_args = {**args, "verify": True}
    (theirs,) = only(call("image_layers_info", verify_args)["images"])["mapped_layers"]
    assert theirs["status"] == "different"
    problems_of = {item["path"]: item["problems"] for item in theirs["verification"]["differences"]}
    assert any("posix_acl_access" in problem for problem in problems_of["/etc/shared"])
    assert "/etc/own" not in problems_of
    plain = only(call("image_layers_info", args)["images"])["mapped_layers"]
    assert only(plain)["verification"] is None
    call("layer_gc", {**store.module_args(), "min_age": "0", "layers": [theirs["id"]]})
    call("layer_template", template_args(store, acl_image))
    (ours,) = only(call("image_layers_info", verify_args)["images"])["mapped_layers"]
    assert ours["origin"] == "ours"
    assert (ours["status"], ours["verification"]["different"]) == ("ok", 0)
    assert ours["verification"]["times_only"] == 0
    assert ours["verification"]["entries"] >= 4
