# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test images whose own layers carry a map: image_layers pulls them, podman and buildah use them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import tarfile
import typing as t

import pytest
from support import hosts, images
from support.images import Image
from support.registry import Receiver
from support.store_cases import ROOTFUL_MAP, Case
from support.stores import Store
from support.unused_layers import only

if t.TYPE_CHECKING:
    from support.hosts import Host
    from support.lab import Lab

Json = t.Dict[str, t.Any]
MakeCase = t.Callable[..., Case]

NAME = "localhost/app:1"
# podman has `podman system check` since this version.
CHECK_COMMAND_SINCE = (5, 4)
PLAIN: t.List[str] = []


def maps(record: Json, key: str = "uidmap") -> t.List[str]:
    """The map of a record, in the form of the modules' results."""
    return [
        f"{part['container_id']}:{part['host_id']}:{part['size']}" for part in record.get(key) or ()
    ]


def chain(store: Store, name: str) -> t.List[Json]:
    """The records of an image's own layers, from the top."""
    found, layer_id = [], store.image(name)["layer"]
    while layer_id:
        found.append(store.layer(layer_id))
        layer_id = found[-1].get("parent")
    return found


def without_images(case: Case) -> Case:
    """Remove the image from the case's store, so that a test can pull it."""
    case.store.podman("rmi", case.image.name)
    case.image = dataclasses.replace(case.image, name=NAME)
    return case


def pull(case: Case, **args: t.Any) -> Json:
    """Run image_layers for the case's namespace."""
    options = args.pop("options", {})
    module_args = {"image": NAME, "source": case.image.source, **case.mapping_args, **args}
    module_args = {key: value for key, value in module_args.items() if value is not None}
    return case.call("image_layers", module_args, **options)


def disk_usage(case: Case) -> int:
    """Bytes that the store uses: the used space of its btrfs filesystem, or the disk usage of its files."""
    local, graphroot = case.store.lab.local, str(case.store.graphroot)
    if case.store.driver == "btrfs":
        local.run(["btrfs", "filesystem", "sync", graphroot])
        space = os.statvfs(graphroot)
        return (space.f_blocks - space.f_bfree) * space.f_frsize
    return int(local.run(["du", "-s", "-B1", graphroot]).stdout.split()[0])


def assert_runtime_checks_pass(store: Store) -> None:
    """Assert that `podman system check` and `containers-storage check` report no error."""
    if store.machine.version("podman") >= CHECK_COMMAND_SINCE:
        for run, args in ((store.podman, ("system", "check")), (store.storage_cli, ("check",))):
            checked = run(*args, check=False)
            assert checked.rc == 0, checked


def exported_files(store: Store, folder: pathlib.Path) -> t.Dict[str, str]:
    """Names and SHA-256 of the manifest, configuration and layers that podman pushes and saves."""
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    store.podman("push", "-q", NAME, f"dir:{folder}/pushed")
    store.podman("save", "-q", "--format", "oci-dir", "-o", f"{folder}/saved", NAME)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def exported_top_layer(
    store: Store, name: str, folder: pathlib.Path
) -> t.List[t.Tuple[t.Any, ...]]:
    """The entries of an image's top layer in an exported archive, with their content."""
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    store.skopeo("copy", "-q", f"containers-storage:{name}", f"dir:{folder}/image")
    layers = json.loads((folder / "image/manifest.json").read_text())["layers"]
    blob = folder / "image" / layers[-1]["digest"].partition(":")[2]
    with tarfile.open(blob) as archive:
        return sorted(
            (m.name, m.uid, m.gid, m.mode, m.type, m.linkname, _content(store, archive, m))
            for m in archive
        )


def _content(store: Store, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The content of a file; in the account files, placeholders replace the name and ID of the store's user.

    In a container with keep-id, podman adds the user to etc/passwd, and the user's group to etc/group.
    """
    content = archive.extractfile(member) if member.isreg() else None
    data = content.read() if content else b""
    if member.name not in ("etc/passwd", "etc/group") or not store.user:
        return data
    text = re.sub(rf"\b{store.user.name}\b", "NAME", data.decode())
    assert text != data.decode()
    return re.sub(rf"\b{store.user.uid}\b", "ID", text).encode()


def large(lab: Lab) -> Image:
    """The small image and another layer of 8 MiB, so that a container's own files are small compared with the image."""
    more: images.Layer = {"data": images.file(os.urandom(8 << 20), uid=1000, gid=1000)}
    return images.build(lab.folder(), [*images.small_layers(), more], "localhost/large:1")


COMBINATIONS = [
    ("bookworm", "rootless-overlay"),
    ("bookworm", "vfs"),
    ("trixie", "rootless-overlay"),
    ("trixie", "btrfs"),
    ("sid", "rootless-overlay"),
    ("sid", "overlay-forced"),
    ("experimental", "rootless-overlay"),
    ("experimental", "overlay-forced"),
]


@pytest.mark.parametrize(("release", "kind"), COMBINATIONS)
def test_containers_use_own_layers_of_mapped_image(
    release: str, kind: str, make_case: MakeCase, lab: Lab, host: t.Callable[[str], Host]
) -> None:
    machine = hosts.of_release(lab, release, host)
    case = without_images(make_case(kind, large(lab), machine=machine))
    case.as_user = case.keep_id and release == "sid"
    store = case.store

    before = store.disk_state()
    predicted = pull(case, options={"check": True, "diff": True})
    assert before.changes(store.disk_state()) == []
    empty = disk_usage(case)
    done = pull(case, options={"diff": True})
    for result in (predicted, done):
        assert (result["changed"], result["actions"]) == (True, ["pulled"])
        entry = only(result["mappings"])
        assert (entry["status"], entry["uidmap"], entry["gidmap"]) == ("mapped", case.map, case.map)
        assert entry["image_id"] == only(store.images())["id"]
    assert predicted["diff"] == done["diff"]
    assert (predicted["images"], predicted["mappings"][0]["layers"]) == ([], [])
    own = chain(store, NAME)
    assert len(own) == 5
    assert {tuple(maps(layer, key)) for layer in own for key in ("uidmap", "gidmap")} == {
        tuple(case.map)
    }
    assert only(store.images())["names"] == [NAME]
    assert only(done["images"])["uidmap"] == case.map
    image_size = disk_usage(case) - empty

    # A container adds only its own layer.
    container = store.container(case.create("--name=kept"))
    assert store.layer_ids() - {layer["id"] for layer in own} == {container["layer"]}
    assert store.layer(container["layer"])["parent"] == own[0]["id"]
    if store.driver != "vfs":
        # vfs copies the whole image into the layer of each container, with or without a map.
        assert disk_usage(case) - empty <= image_size * 1.02
    assert case.shell("cat /etc/motd; stat -c %u:%g /home/user /data") == (
        "second\n1000:1000\n1000:1000\n"
    )
    assert case.mapped() == []
    assert_runtime_checks_pass(store)
    case.assert_podman_works()

    # layer_template and a second image_layers task change nothing.
    entry = only(case.layer_template()["layers"])
    assert (entry["action"], entry["layer_id"]) == ("existing", own[0]["id"])
    before = store.disk_state()
    assert pull(case)["changed"] is False
    assert pull(case, pull="always", options={"check": True})["changed"] is False
    assert before.changes(store.disk_state()) == []

    # podman removes the image without leftovers.
    store.podman("rm", "kept")
    store.podman("rmi", NAME)
    assert (store.layer_ids(), store.images()) == (set(), [])
    for layer in own:
        assert store.remaining_paths(layer["id"]) == []


@pytest.mark.parametrize("release", ["bookworm", "trixie", "sid", "experimental"])
def test_exported_content_equals_that_of_unmapped_image(
    release: str, make_case: MakeCase, lab: Lab, host: t.Callable[[str], Host]
) -> None:
    machine = hosts.of_release(lab, release, host)
    pair = [without_images(make_case("rootless-overlay", machine=machine)) for _number in range(2)]
    mapped, plain = pair
    pull(mapped)
    pull(plain, userns=None)
    assert (maps(chain(mapped.store, NAME)[0]), maps(chain(plain.store, NAME)[0])) == (
        mapped.map,
        [],
    )
    folder = lab.folder(0o777)
    exported: t.List[t.List[t.Any]] = []
    for number, case in enumerate(pair):
        store = case.store
        container = case.create("--name=changed")
        case.store.podman("rm", container)
        store.podman(
            *("run", "--name=changed", "--user=0", *case.podman_args, NAME),
            *("sh", "-c", "echo 1 > /new; echo 1 > /home/user/new"),
        )
        store.podman("commit", "-q", "changed", "localhost/committed:1")
        store.podman("rm", "changed")
        (folder / "Containerfile").write_text(f"FROM {NAME}\nCOPY Containerfile /srv/built\n")
        store.podman("build", "-q", "-t", "localhost/built:1", str(folder))
        second = pull(case, pull="always", **({} if case is mapped else {"userns": None}))
        assert second["changed"] is False
        exported.append(
            [
                exported_files(store, folder / f"files{number}"),
                exported_top_layer(store, "localhost/committed:1", folder / f"committed{number}"),
                exported_top_layer(store, "localhost/built:1", folder / f"built{number}"),
            ]
        )
    assert exported[0] == exported[1]
    assert only(mapped.info(images=[NAME])["images"])["uidmap"] == mapped.map
    for case in pair:
        case.store.podman("rmi", "-af")
        assert (case.store.layer_ids(), case.store.images()) == (set(), [])


@pytest.fixture
def registry(lab: Lab) -> t.Iterator[Receiver]:
    """A registry without TLS that the programs of the laboratory trust; its /etc is private."""
    receiver = Receiver()
    trusted = lab.machine.path("/etc/containers/registries.conf.d/mapped-images.conf")
    trusted.parent.mkdir(parents=True, exist_ok=True)
    trusted.write_text(f'[[registry]]\nlocation = "{receiver.address}"\ninsecure = true\n')
    yield receiver
    trusted.unlink()
    receiver.close()


class TestSources:
    @pytest.mark.parametrize("tool", ["buildah", "podman", "podman without skopeo"])
    def test_image_is_pulled_from_every_source(
        self,
        tool: str,
        registry: Receiver,
        make_case: MakeCase,
        lab: Lab,
        make_store: t.Callable[..., Store],
    ) -> None:
        case = without_images(make_case("vfs"))
        store, image = case.store, case.image
        other = images.build(lab.folder(), [{"x": images.file("y")}], "localhost/other:1")
        store.load(other)
        folder = lab.folder()
        remote = f"docker://{registry.address}/app:1"
        archive = f"docker-archive:{folder}/docker.tar"
        # The archive gives the image the name of another image.
        store.skopeo("copy", "-q", image.source, f"{archive}:localhost/other:1")
        store.skopeo("copy", "-q", image.source, remote)
        environ = {"CONTAINERS_CONF": str(store.containers_conf)}
        sources = [archive, remote]
        if tool != "buildah":
            programs = lab.folder()
            missing = {"buildah", *(["skopeo"] if "without" in tool else [])}
            for name in ("podman", "skopeo", "crun", "runc", "conmon", "python3", "rm", "mktemp"):
                found = shutil.which(name)
                if found and name not in missing:
                    (programs / name).symlink_to(found)
            environ["PATH"] = str(programs)
        else:
            # buildah 1.28 uses the path as the image's name, for which this path is not valid.
            shutil.copytree(image.path, folder / "_No-Name_")
            elsewhere = make_store("vfs", dataclasses.replace(image, name="localhost/there:1"))
            inside = f"[vfs@{elsewhere.graphroot}+{elsewhere.runroot}]localhost/there:1"
            store.skopeo("copy", "-q", image.source, f"oci-archive:{folder}/oci.tar:v1")
            store.skopeo("copy", "-q", image.source, f"dir:{folder}/dir")
            sources += [f"oci:{folder}/_No-Name_:{image.tag}", f"containers-storage:{inside}"]
            sources += [f"oci-archive:{folder}/oci.tar", f"dir:{folder}/dir"]
        for source in sources:
            done = pull(case, source=source, options={"environ": environ})
            assert done["actions"] == ["pulled"], source
            assert {tuple(maps(layer)) for layer in chain(store, NAME)} == {(ROOTFUL_MAP,)}
            assert store.image(NAME)["names"] == [NAME], source
            assert store.image("localhost/other:1")["layer"] != store.image(NAME)["layer"]
            assert store.containers() == []
            case.call("image_layers", {"image": NAME, "state": "absent"})

    def test_temporary_copies_of_killed_pull_are_removed_after_one_day(
        self, make_case: MakeCase, make_store: t.Callable[..., Store]
    ) -> None:
        case = without_images(make_case("vfs"))
        there = dataclasses.replace(case.image, name="localhost/there:1")
        elsewhere = make_store("vfs", there)
        temporary = case.store.machine.path("/var/tmp")
        folders = [temporary / f"userns-storage-{letter * 10}" for letter in "abc"]
        for folder in folders:
            folder.mkdir()
            (folder / "image").write_text("x")
        old, _recent, owned_by_user = folders
        os.chown(owned_by_user, 1000, 1000)
        for folder in (old, owned_by_user):
            os.utime(folder, (0, 0))
        inside = f"[vfs@{elsewhere.graphroot}+{elsewhere.runroot}]{there.name}"
        assert pull(case, source=f"containers-storage:{inside}")["changed"] is True
        assert [folder.exists() for folder in folders] == [False, True, True]
        for folder in folders[1:]:
            shutil.rmtree(folder)

    def test_source_without_the_image_is_reported(self, make_case: MakeCase) -> None:
        case = without_images(make_case("vfs"))
        result = pull(case, source="oci:/nowhere:1", options={"fails": True})
        assert "/nowhere" in result["msg"]
        assert case.store.images() == []


class TestMixedMaps:
    """A layer inherits the map of its parent layer, and a pull with another map fails."""

    @pytest.fixture
    def base_and_app(self, lab: Lab) -> t.List[Image]:
        base: images.Layer = {"base": images.file("b" * 5000, uid=7)}
        more = [{"a": images.file("1")}, {"b": images.file("2")}]
        return [
            images.build(lab.folder(), [base], "localhost/base:1"),
            images.build(lab.folder(), [base, *more], NAME),
        ]

    @pytest.mark.parametrize("kind", ["overlay-forced", "rootless-overlay"])
    @pytest.mark.parametrize("first", ["plain", "mapped", "other map"])
    def test_pull_with_other_map_than_base_layers_is_refused(
        self, first: str, kind: str, make_case: MakeCase, base_and_app: t.List[Image]
    ) -> None:
        base, app = base_and_app
        case = make_case(kind, base)
        store = case.store
        other = {"uidmap": ["0:1:2000"]} if case.keep_id else {"uidmap": ["0:300000:65536"]}
        requested: Json = {"source": app.source, "image": NAME, **case.mapping_args}
        present: t.List[str] = PLAIN
        if first != "plain":
            store.podman("rmi", base.name)
            mapping = other if first == "other map" else case.mapping_args
            args = {"image": base.name, "source": base.source, **mapping}
            case.call("image_layers", args)
            present = other["uidmap"] if first == "other map" else case.map
        if first == "mapped":
            # A pull without a mapping would get mapped layers; `userns: host` requests layers without a map.
            requested = {"source": app.source, "image": NAME, "userns": "host"}

        # The request is refused before anything is pulled, also in check mode.
        before = store.disk_state()
        for check in (True, False):
            result = case.call("image_layers", requested, check=check, fails=True)
            assert (result["changed"], result["actions"]) == (False, [])
            entry = only(result["mappings"])
            assert (entry["status"], entry["image_names"]) == ("different", [NAME])
            layer = only(entry["layers"])
            assert (layer["uidmap"], layer["images"]) == (present, [base.name])
            assert entry["reason"] == result["msg"]
            assert f"belong to image {base.name}" in result["msg"]
            assert "state: absent" in result["msg"]
        assert before.changes(store.disk_state()) == []

        # The runtime itself creates the layers that the module predicted.
        flags = []
        for item in [] if first == "mapped" else case.map:
            flags += ["--userns-uid-map", item, "--userns-gid-map", item]
        store.buildah(*flags, "pull", "-q", app.source)
        name = next(i["names"][0] for i in store.images() if len(chain(store, i["id"])) == 3)
        store.podman("tag", name, NAME)
        store.podman("untag", name, name)
        assert {tuple(maps(item)) for item in chain(store, NAME)} == {tuple(present)}
        for check in (True, False):
            result = case.call("image_layers", requested, check=check, fails=True)
            assert (result["changed"], result["actions"]) == (False, [])
            entry = only(result["mappings"])
            assert [item["uidmap"] for item in entry["layers"]] == [present] * 3
            assert [item["images"] for item in entry["layers"]] == [[], [], [base.name]]
            assert "is in the store with" in result["msg"]

        # The hint of the message works.
        for name in (NAME, base.name):
            case.call("image_layers", {"image": name, "state": "absent"})
        done = case.call("image_layers", requested)
        assert only(done["mappings"])["status"] == ("not_needed" if first == "mapped" else "mapped")
        form = PLAIN if first == "mapped" else case.map
        assert {tuple(maps(item)) for item in chain(store, NAME)} == {tuple(form)}

    def test_refused_image_does_not_stop_pull_of_others(
        self, registry: Receiver, make_case: MakeCase, lab: Lab
    ) -> None:
        """Of two images of a registry, the first is present without the map, and the second is pulled."""
        names = [f"{registry.address}/{name}:1" for name in ("plain", "app")]
        built = [images.build(lab.folder(), [{"x": images.file(name)}], name) for name in names]
        case = make_case("vfs", built[0])
        case.store.skopeo("copy", "-q", built[1].source, f"docker://{names[1]}")
        result = case.call("image_layers", {"images": names, **case.mapping_args}, fails=True)
        assert [item["status"] for item in result["mappings"]] == ["different", "mapped"]
        assert (result["changed"], result["actions"]) == (True, ["pulled"])
        assert result["msg"].startswith("1 of 2 images failed. ")
        assert names[0] in result["msg"]
        assert {tuple(maps(item)) for item in chain(case.store, names[1])} == {(ROOTFUL_MAP,)}

    def test_automatic_ranges_are_refused(self, make_case: MakeCase) -> None:
        case = without_images(make_case("vfs"))
        for check in (True, False):
            result = pull(case, userns="auto", uidmap=None, options={"fails": True, "check": check})
            assert "a range of IDs of its own" in result["msg"]
            assert "layer_template" in result["msg"]
        assert case.store.images() == []

    def test_no_map_is_needed_where_kernel_shifts_ids(self, make_case: MakeCase) -> None:
        case = without_images(make_case("overlay"))
        for check in (True, False):
            done = pull(case, options={"check": check})
            entry = only(done["mappings"])
            assert (entry["status"], entry["uidmap"]) == ("not_needed", [])
            assert "shifts IDs" in entry["reason"]
        assert {tuple(maps(item)) for item in chain(case.store, NAME)} == {()}
        before = case.store.layer_ids()
        case.create()
        assert len(case.store.layer_ids() - before) == 1
        assert pull(case)["changed"] is False


@pytest.mark.parametrize("kind", ["vfs", "rootless-overlay"])
def test_mapped_image_can_have_mapped_layers(kind: str, make_case: MakeCase) -> None:
    """Containers without a map or with another map need copies of a mapped image, which are ordinary mapped layers."""
    case = without_images(make_case(kind))
    store = case.store
    pull(case)
    own = [layer["id"] for layer in chain(store, NAME)]
    other = {"uidmap": ["0:1:2000"]} if case.keep_id else {"uidmap": ["0:300000:65536"]}
    predicted = case.layer_template(userns="host", options={"check": True})
    assert only(predicted["layers"])["action"] == "created"
    for mapping in ({"userns": "host"}, other):
        entry = only(case.layer_template(**mapping)["layers"])
        assert entry["action"] == "created"
        assert entry["uidmap"] == mapping.get("uidmap", PLAIN)
        assert entry["template_id"] == own[0]
        case.assert_tree(entry["layer_id"])
    identity, another = case.mapped()
    # The runtime uses both, and creates no copies.
    before = store.layer_ids()
    plain = store.container(store.create(NAME))
    flags = [f"--{name}={other['uidmap'][0]}" for name in ("uidmap", "gidmap")]
    shifted = store.container(store.create(NAME, *flags))
    assert store.layer_ids() - before == {plain["layer"], shifted["layer"]}
    assert store.layer(plain["layer"])["parent"] == identity
    assert store.layer(shifted["layer"])["parent"] == another
    assert store.shell(NAME, "stat -c %u:%g /home/user /etc") == "1000:1000\n0:0\n"

    # image_layers_info lists them with their sizes.
    image = only(case.info(measure="exclusive")["images"])
    assert (image["uidmap"], image["identity_copy"]) == (case.map, identity)
    listed = {item["id"]: item for item in image["mapped_layers"]}
    assert {item["status"] for item in [*image["layers"], *listed.values()]} == {"ok"}
    assert listed[identity]["size_exclusive"] > 1_000_000
    assert listed[identity]["origin"] == "ours"
    verified = only(case.info(verify=True)["images"])["mapped_layers"]
    assert [item["verification"]["different"] for item in verified] == [0, 0]
    assert [item["status"] for item in verified] == ["ok", "ok"]

    # layer_gc removes them like other mapped layers, and never the image's own layers.
    policy = {"min_age": "0", "max_copies_per_image": 0}
    assert case.call("layer_gc", policy)["changed"] is False
    store.podman("rm", "--all")
    done = case.call("layer_gc", policy)
    assert {item["id"] for item in done["removed"]} == {identity, another}
    assert [layer["id"] for layer in chain(store, NAME)] == own
    assert store.layer_ids() == set(own)
    entry = only(case.layer_template(userns="host")["layers"])
    removed = only(case.layer_template(userns="host", state="absent")["layers"])
    assert (removed["action"], removed["layer_id"]) == ("removed", entry["layer_id"])
    store.create(NAME)
    case.assert_podman_works()
    store.podman("rm", "--all")
    store.podman("rmi", NAME)
    assert store.layer_ids() == set()
