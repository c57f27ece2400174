# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test mapped layers in an additional image store: created while the store is writable, used when it is read-only."""

from __future__ import annotations

import json
import pathlib
import typing as t

import pytest
from support import hosts, matrix, mounts
from support.store_cases import ROOTFUL_MAP, Case

if t.TYPE_CHECKING:
    from support.hosts import Host
    from support.images import Image
    from support.lab import Lab
    from support.stores import Json, Store

MakeStore = t.Callable[..., "Store"]
RunModule = t.Callable[..., "Json"]
POLICY: Json = {"min_age": "0", "max_copies_per_image": 0, "max_used_space": "0"}


def only(found: t.Sequence[t.Any]) -> t.Any:
    (item,) = found
    return item


def extract_archive_of_store(store: Store, folder: pathlib.Path) -> None:
    """Archive the store and extract the archive to a folder, as the build of a host image does."""
    archive = folder.with_suffix(".tar")
    options = ["--xattrs", "--xattrs-include=*", "--numeric-owner", "-f", str(archive)]
    store.tool("tar", *options, "-C", str(store.graphroot), "-c", ".")
    store.tool("tar", *options, "-C", str(folder), "-x")


@pytest.mark.parametrize(
    ("release", "archived"),
    [*((release, False) for release in matrix.RELEASES), ("experimental", True)],
)
def test_container_uses_mapped_layer_of_read_only_store(
    release: str,
    archived: bool,
    make_store: MakeStore,
    small_image: Image,
    lab: Lab,
    host: t.Callable[[str], Host],
) -> None:
    machine = hosts.of_release(lab, release, host)
    # No program is configured to use it as its main store; only the options of the modules refer to it.
    shipped = make_store("overlay-forced", small_image, machine=machine)
    shipped_case = Case(shipped, small_image)
    entry = only(shipped_case.layer_template()["layers"])
    assert entry["action"] == "created"
    assert shipped_case.layer_template()["changed"] is False

    mount = lab.folder(0o755)
    if archived:
        extract_archive_of_store(shipped, mount)
    mounts.mount("--bind", str(mount if archived else shipped.graphroot), str(mount))
    mounts.mount("-o", "remount,bind,ro", "none", str(mount))
    reader = make_store("overlay-forced", machine=machine, read_only=[str(mount)])
    case = Case(reader, small_image)
    before = shipped.disk_state()
    container = reader.container(case.create("--name=first"))
    assert reader.layer(container["layer"])["parent"] == entry["layer_id"]
    # The only layer is that of the container.
    assert reader.layer_ids() == {container["layer"]}
    assert case.shell("cat /etc/motd; stat -c %u:%g /home/user") == "second\n1000:1000\n"
    # The module finds the mapped layer there, and creates none.
    assert only(case.layer_template()["layers"])["action"] == "existing"
    image = only(case.info()["images"])
    assert image["read_only_store"] == str(mount)
    assert [item["id"] for item in image["mapped_layers"]] == [entry["layer_id"]]
    assert image["private_copies"] == []
    # For a map without a mapped layer, the error explains how to create it.
    failed = case.layer_template(options={"fails": True}, uidmap=["0:300000:65536"])
    assert f"graphroot: {mount}" in failed["msg"]
    reader.podman("rm", "first")
    assert case.call("layer_gc", POLICY)["changed"] is False
    assert before.changes(shipped.disk_state()) == []


@pytest.fixture
def etc(lab: Lab) -> t.Iterator[t.Callable[[str, str], pathlib.Path]]:
    """Writes files below /etc of the laboratory, and removes them at teardown."""
    written: t.List[pathlib.Path] = []

    def write(name: str, text: str) -> pathlib.Path:
        path = lab.machine.path(f"/etc/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.exists()
        path.write_text(text)
        written.append(path)
        return pathlib.Path("/etc", name)

    yield write
    for path in written:
        path.unlink()


_DROP_IN = "containers/storage.conf.d/1.conf"


class TestCrio:
    """Tests with configuration files and records of CRI-O, which they write because CRI-O is not installed."""

    @pytest.fixture
    def store(self, make_store: MakeStore, small_image: Image) -> Store:
        return make_store("vfs", small_image)

    def store_args(self, store: Store) -> Json:
        return {**store.module_args(), "driver": store.driver}

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ('[crio]\nstorage_option = ["vfs.imagestore={}"]\n', "additional"),
            ('[crio]\nstorage_option = ["overlay.additionalimagestore=/x,{}/"]\n', "additional"),
            ('[crio]\nimagestore = "{}"\n', "imagestore"),
        ],
    )
    def test_rules_keep_layers_of_store_that_crio_reads(
        self,
        text: str,
        kind: str,
        store: Store,
        small_image: Image,
        run_module: RunModule,
        etc: t.Any,
    ) -> None:
        case = Case(store, small_image)
        layer = only(case.layer_template()["layers"])["layer_id"]
        path = etc("crio/crio.conf.d/10-stores.conf", text.format(store.graphroot))
        used_as = run_module("image_layers_info", self.store_args(store))["used_as"]
        assert [(item["kind"], item["program"], item["source"]) for item in used_as] == [
            (kind, "cri-o", str(path))
        ]
        kept = only(run_module("layer_gc", {**self.store_args(store), **POLICY})["kept"])
        assert (kept["id"], kept["rule"]) == (layer, "shared")
        assert str(path) in kept["reason"]
        assert store.mapped_layers(case.image.name) == [layer]
        result = run_module(
            "layer_gc", {**self.store_args(store), "layers": [layer], "min_age": "0"}
        )
        assert [item["id"] for item in result["removed"]] == [layer]

    @pytest.mark.parametrize(
        ("path", "text", "kind"),
        [
            # The same directory by another path.
            (
                _DROP_IN,
                "[storage.options]\nadditionalimagestores = ['LINK']\n",
                "additional",
            ),
            (
                _DROP_IN,
                "[storage.options]\nadditionalimagestores = ['BIND']\n",
                "additional",
            ),
            (
                "crio/crio.conf.d/1.conf",
                "[crio]\nstorage_option = ['vfs.imagestore=BIND']\n",
                "additional",
            ),
            (_DROP_IN, "[storage]\nimagestore = 'BIND'\n", "imagestore"),
            # Spellings that runtimes accept.
            (
                _DROP_IN,
                "[Storage.Options]\nAdditionalImageStores = ['HERE']\n",
                "additional",
            ),
            (
                _DROP_IN,
                "[storage.options]\nadditionalimagestores = ['/x,HERE']\n",
                "additional",
            ),
            ("crio/crio.conf", "[crio]\nstorage_option = ['VFS.imagestore=HERE']\n", "additional"),
            # A running program may have read the file while it was still valid.
            (_DROP_IN, "[storage\n", "unknown"),
            (
                _DROP_IN,
                "[storage.options]\nadditionalimagestores = 'HERE'\n",
                "unknown",
            ),
            (
                _DROP_IN,
                '[storage.options]\nadditionalimagestores = ["a\\u0000"]\n',
                "unknown",
            ),
            (
                "crio/crio.conf",
                "[crio]\nroot = 1\nstorage_option = ['vfs.imagestore=HERE']\n",
                "unknown",
            ),
        ],
    )
    def test_rules_keep_layers_if_configuration_spells_store_differently(
        self,
        path: str,
        text: str,
        kind: str,
        store: Store,
        small_image: Image,
        run_module: RunModule,
        etc: t.Any,
    ) -> None:
        layer = only(Case(store, small_image).layer_template()["layers"])["layer_id"]
        bind, link = store.base / "bind", store.base / "link"
        bind.mkdir()
        mounts.mount("--bind", str(store.graphroot), str(bind))
        link.symlink_to(store.graphroot)
        for placeholder, replacement in (("BIND", bind), ("LINK", link), ("HERE", store.graphroot)):
            text = text.replace(placeholder, str(replacement))
        etc(path, text)
        if path == _DROP_IN and kind != "additional" and store.has_merging_loader:
            # The runtime itself reads the file, so the store cannot be used until it is corrected.
            for module in ("image_layers_info", "layer_gc"):
                options = POLICY if module == "layer_gc" else {}
                failed = run_module(module, {**self.store_args(store), **options}, fails=True)
                assert f"/etc/{path}" in failed["msg"]
            assert store.mapped_layers(small_image.name) == [layer]
            return
        self.assert_kept(run_module, store, layer, kind)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("STORAGE_OPTS", "vfs.imagestore=HERE"),
            ("CONTAINER_STORAGE_OPT", "vfs.imagestore=HERE"),
            ("CONTAINERS_STORAGE_CONF", "FILE"),
            ("CONTAINERS_STORAGE_CONF_OVERRIDE", "FILE"),
        ],
    )
    def test_rules_keep_layers_if_variables_name_store(
        self, name: str, value: str, store: Store, small_image: Image, run_module: RunModule
    ) -> None:
        layer = only(Case(store, small_image).layer_template()["layers"])["layer_id"]
        file = store.base / "named.conf"
        file.write_text(f"[storage.options]\nadditionalimagestores = ['{store.graphroot}']\n")
        value = value.replace("HERE", str(store.graphroot)).replace("FILE", str(file))
        self.assert_kept(run_module, store, layer, "additional", {name: value})

    def assert_kept(
        self,
        run_module: RunModule,
        store: Store,
        layer: str,
        kind: str,
        environ: t.Optional[t.Dict[str, str]] = None,
    ) -> None:
        """layer_gc keeps the layer as shared, and image_layers_info returns the use of the store."""
        info = run_module("image_layers_info", self.store_args(store), environ=environ)
        assert kind in {item["kind"] for item in info["used_as"]}, info["used_as"]
        result = run_module("layer_gc", {**self.store_args(store), **POLICY}, environ=environ)
        assert [(item["id"], item["rule"]) for item in result["kept"]] == [(layer, "shared")]
        assert store.mapped_layers("localhost/small:1") == [layer]

    def test_warning_that_crio_removes_layers_of_its_main_store(
        self, store: Store, small_image: Image, run_module: RunModule, etc: t.Any
    ) -> None:
        etc(
            "crio/crio.conf",
            f'[crio]\nroot = "{store.graphroot}"\nrunroot = "{store.runroot}"\n'
            'storage_driver = "vfs"\n[crio.image]\npause_image = "example.org/pause:9"\n',
        )
        args: Json = {
            "images": [small_image.name],
            "uidmap": [ROOTFUL_MAP],
            "runtime": "cri-o 1.36.3",
        }
        # The graph root is neither an option nor in storage.conf.
        result = run_module("layer_template", args)
        assert result["store"]["graphroot"] == str(store.graphroot)
        assert only(result["layers"])["action"] == "created"
        warnings = str(result["warnings"])
        for part in (
            "cri-o 1.36.3 removes a mapped layer",
            "additional image store",
            "example.org/pause:9",
        ):
            assert part in warnings
        info = run_module("image_layers_info", {"runtime": "cri-o 1.36.3"})
        assert [(item["kind"], item["program"]) for item in info["used_as"]] == [("main", "cri-o")]
        absent = {**args, "runtime": "podman 5.4.2", **self.store_args(store), "state": "absent"}
        assert not run_module("layer_template", absent).get("warnings")

    def test_no_warning_for_additional_store_of_crio(
        self, store: Store, small_image: Image, run_module: RunModule, etc: t.Any
    ) -> None:
        etc("crio/crio.conf", f'[crio]\nstorage_option = ["vfs.imagestore={store.graphroot}"]\n')
        result = run_module(
            "layer_template",
            {
                "images": [small_image.name],
                "uidmap": [ROOTFUL_MAP],
                "runtime": "cri-o 1.36.3",
                **self.store_args(store),
            },
        )
        assert only(result["layers"])["action"] == "created"
        assert "removes a mapped layer" not in str(result["warnings"])

    def test_warning_names_selected_runtime_of_two_installed(
        self, store: Store, small_image: Image, run_module: RunModule
    ) -> None:
        # A replacement for crio that only prints its version.
        folder = store.lab.folder(0o755)
        (folder / "crio").write_text("#!/bin/sh\necho crio version 1.36.3\n")
        (folder / "crio").chmod(0o755)
        environ = {"PATH": f"{folder}:/usr/bin:/bin"}
        args: Json = {"images": [small_image.name], **self.store_args(store)}
        mapping = {"uidmap": [ROOTFUL_MAP]}
        warnings = str(
            run_module("layer_template", {**args, **mapping}, environ=environ)["warnings"]
        )
        assert "set runtime: cri-o" in warnings
        version = ".".join(map(str, store.machine.version("podman")))
        assert f"podman {version}" in warnings
        # The runtime of the task also applies to its mappings.
        runtime_args = {**args, "mappings": [mapping], "runtime": "cri-o"}
        warnings = str(run_module("layer_template", runtime_args, environ=environ)["warnings"])
        assert "set runtime: cri-o" not in warnings
        assert "Each pod of CRI-O" in warnings

    def test_containers_of_crio_keep_layers_and_hints_name_crictl(
        self, store: Store, small_image: Image, run_module: RunModule, etc: t.Any
    ) -> None:
        case = Case(store, small_image)
        layer = only(case.layer_template()["layers"])["layer_id"]
        container = store.container(case.create())
        # The record of a container of CRI-O.
        path = store.graphroot / "vfs-containers" / "containers.json"
        records = json.loads(path.read_text())
        name = "k8s_web_web_default_0b8e5d5c_0"
        metadata = {"pod-name": name, "pod-id": "a" * 64, "name": name, "metadata-name": "web"}
        records[0].update(names=[name], metadata=json.dumps(metadata))
        path.write_text(json.dumps(records))
        assert only(case.info()["images"])["mapped_layers"][0]["containers"] == [
            {"id": container["id"], "name": name, "known_to_podman": False}
        ]
        failed = case.layer_template(options={"fails": True}, state="absent")
        assert name in failed["msg"]
        assert "crictl" in failed["msg"]
        assert "podman ps" not in failed["msg"]
        assert case.call("layer_gc", POLICY)["changed"] is False
        assert store.mapped_layers(case.image.name) == [layer]
