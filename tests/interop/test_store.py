# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test the store code with the real programs: each reads the records of the other."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import traceback
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
    Account,
    StoreConfig,
    StoreOverrides,
    discover,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.libpod_db import (
    read_bolt,
    read_sqlite,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.store import Store
from support.hosts import SUITES, Host
from support.images import Image
from support.lab import Lab
from support.machines import ROOT
from support.stores import Store as RealStore
from support.stores import disk_state
from support.users import User
from support.waiting import LIMIT, wait_until

MAP = [{"container_id": 0, "host_id": 100000, "size": 65536}]
MAP_OPTIONS = ("--uidmap=0:100000:65536", "--gidmap=0:100000:65536")

MakeStore = t.Callable[..., RealStore]

# The version of containers/storage in podman, by machine.
_STORAGE = {"local": (1, 43), "trixie": (1, 57), "sid": (1, 64), "experimental": (1, 64)}
_NEW_PODMAN = capabilities("podman", (5, 8), (1, 64))


def open_store(real: RealStore, **changes: t.Any) -> Store:
    config = StoreConfig(str(real.graphroot), str(real.runroot), real.driver)
    return Store.open(dataclasses.replace(config, **changes), lock_timeout=LIMIT)


def copy(source: t.Any, target: t.Any) -> None:
    subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(target)], check=True)


def mapped_record(store: Store, template: str) -> t.Dict[str, t.Any]:
    """The record that a runtime writes for a mapped copy of a layer."""
    raw = dict(store.snapshot().layers[template].raw)
    raw.pop("names", None)
    raw.update(id=secrets.token_hex(32), uidmap=MAP, gidmap=MAP, created="2026-01-02T03:04:05Z")
    return raw


def add_mapped_layer(store: Store, image_name: str) -> str:
    """Create a mapped layer in a vfs store; the data is a plain copy, so its owners are wrong."""
    image = store.snapshot().resolve_image(image_name)
    record = mapped_record(store, image.layer)
    layer_id = record["id"]
    folder = os.path.join(store.config.graphroot, "vfs", "dir")
    with store.staging.claim(f"{image.id} map") as workspace:
        copy(os.path.join(folder, image.layer), f"{workspace.path}/tree")
        split = f"{workspace.path}/split"
        shutil.copyfile(store.tar_split_path(image.layer), split)
        with store.transaction() as transaction:
            transaction.begin_layer(record)
            os.rename(f"{workspace.path}/tree", os.path.join(folder, layer_id))
            transaction.install_tar_split(layer_id, split)
            transaction.finish_layer(layer_id)
            transaction.append_mapped_layer(image.id, layer_id)
    return str(layer_id)


def remove_mapped_layer(store: Store, layer_id: str) -> None:
    folder = os.path.join(store.config.graphroot, "vfs", "dir")
    with store.trash(layer_id) as trash, store.transaction(containers=True) as transaction:
        transaction.drop_mapped_layer(layer_id)
        transaction.mark_incomplete(layer_id)
        if os.path.exists(os.path.join(folder, layer_id)):
            os.rename(os.path.join(folder, layer_id), os.path.join(trash, layer_id))
        transaction.remove_layer(layer_id, trash)


# Records


@pytest.mark.parametrize("kind", ["vfs", "overlay", "rootless-vfs"])
def test_records_of_podman_are_read(kind: str, make_store: MakeStore, small_image: Image) -> None:
    real = make_store(kind, small_image)
    # The fixed name cannot conflict: each store is private to its test.
    container = real.create(small_image.name, "--name=web")
    before = real.snapshot_of_disk()
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
    assert before.changes(real.snapshot_of_disk()) == []
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
    assert real.leftovers(layer_id) == []
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


def test_podman_waits_for_transaction(make_store: MakeStore, small_image: Image) -> None:
    real = make_store("vfs", small_image)
    store = open_store(real)
    with store.transaction():
        process = real.machine.popen(
            ["podman", "images", "-q"], env=real.env(), stdout=subprocess.PIPE
        )
        # A line with an arrow in /proc/locks shows that podman waits in the kernel's queue.
        wait_until(lambda: waits_for_a_lock(process.pid), while_running=process)
        assert process.poll() is None
    assert process.communicate(timeout=LIMIT)[0].strip()


def waits_for_a_lock(pid: int) -> bool:
    """Whether a process waits for a POSIX lock that another process holds."""
    lines = pathlib.Path("/proc/locks").read_text().splitlines()
    return any(line.split()[1] == "->" and str(pid) in line.split() for line in lines)


def test_concurrent_podmans_and_transactions_succeed(
    make_store: MakeStore, small_image: Image
) -> None:
    """podman commands and transactions run at the same time without errors or lost changes."""
    real = make_store("vfs", small_image)
    store = open_store(real)
    script = (
        "for i in 1 2 3 4 5 6; do"
        f" podman create --name $0-$i {small_image.name} true && podman rm $0-$i || exit 1;"
        " done"
    )
    processes = [
        real.machine.popen(
            ["sh", "-c", script, f"w{number}"],
            env=real.env(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]
    rounds = 0
    while any(process.poll() is None for process in processes):
        layer_id = add_mapped_layer(store, small_image.name)
        remove_mapped_layer(store, layer_id)
        rounds += 1
    for process in processes:
        assert process.wait() == 0, process.communicate()[1]
    assert rounds
    assert len(real.layers()) == len(small_image.layers)
    assert real.containers() == []
    assert real.mapped_layers(small_image.name) == []


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


# Discovery, compared with podman info


def compare_with_podman_info(
    lab: Lab,
    machine: t.Any,
    options: t.Sequence[str] = (),
    overrides: t.Optional[StoreOverrides] = None,
    user: t.Optional[User] = None,
    env: t.Optional[t.Mapping[str, str]] = None,
) -> StoreConfig:
    """Compare discovery with podman info before and after podman's first run, which creates its database."""
    environ = machine.environ(user, env) if user else machine.environ(ROOT, env)
    account = Account(user.name, user.uid, user.gid, user.home) if user else None

    can = capabilities("podman", machine.version("podman"), _STORAGE[machine.name])

    def ours() -> StoreConfig:
        given = overrides or StoreOverrides()
        return discover(given, environ, account, user is not None, can)

    first = ours()
    podman_command = ["podman", *options, "info", "--format=json"]
    command = machine.command(podman_command, account=user, env=env)
    if user:
        # podman info reads the cgroup's controllers, which a user may not be allowed to.
        hide = """
            own=$(sed -n '$s/.*:://p' /proc/self/cgroup)
            first=${own#/}
            mount -t tmpfs none "/sys/fs/cgroup/${first%%/*}"
            mkdir -p "/sys/fs/cgroup$own"
            echo cpu memory pids > "/sys/fs/cgroup$own/cgroup.controllers"
            exec "$@"
        """
        inside = ["unshare", "-m", "--propagation=private", "sh", "-c", hide, "sh"]
        command[len(machine.prefix) : len(machine.prefix)] = inside
    answer = subprocess.run(command, capture_output=True, check=False)
    assert answer.returncode == 0, answer.stderr
    podman_store = json.loads(answer.stdout)["store"]
    found = ours()
    driver_options: t.Dict[str, str] = {}
    stores: t.List[str] = []
    for key, value in (podman_store["graphOptions"] or {}).items():
        name = key.lower().partition(".")[2]
        if isinstance(value, dict):
            value = value["Executable"]
        if name in ("imagestore", "additionalimagestore"):
            stores += value.split(",")
        else:
            driver_options[name] = value
    for config in (first, found):
        assert config.graphroot == podman_store["graphRoot"]
        assert config.runroot == podman_store["runRoot"]
        assert config.driver == podman_store["graphDriverName"]
    assert found.options == driver_options
    assert list(found.additional_image_stores) == stores
    return found


@pytest.fixture
def etc(lab: Lab) -> t.Iterator[pathlib.Path]:
    """/etc/containers/storage.conf of the laboratory, which is removed after the test."""
    path = lab.local.path("/etc/containers/storage.conf")
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path
    path.unlink(missing_ok=True)


def test_rootful_discovery_agrees_with_podman_info(lab: Lab, etc: pathlib.Path) -> None:
    base = lab.folder()
    lab.on_close(lambda: lab.remove(base))

    def text(name: str, driver: str = "vfs", more: str = "") -> str:
        return (
            f'[storage]\ndriver = "{driver}"\n'
            f'graphroot = "{base}/{name}/g"\nrunroot = "{base}/{name}/r"\n{more}'
        )

    etc.write_text(text("etc", more='[storage.options]\nignore_chown_errors = "true"\n'))
    assert compare_with_podman_info(lab, lab.local).graphroot == f"{base}/etc/g"
    other = base / "env.conf"
    other.write_text(text("env", "overlay2", '[storage.options.overlay]\nmountopt = "nodev"\n'))
    env = {"CONTAINERS_STORAGE_CONF": str(other)}
    assert compare_with_podman_info(lab, lab.local, env=env).options == {"mountopt": "nodev"}
    # The database of the first run has precedence over a driver in a file, but not over an option.
    other.write_text(text("env", "vfs"))
    assert compare_with_podman_info(lab, lab.local, env=env).driver == "overlay"
    other.write_text(text("drv", "vfs", '[storage.options.overlay]\nmountopt = "nodev"\n'))
    env["STORAGE_DRIVER"] = "overlay"
    compare_with_podman_info(lab, lab.local, env=env)
    env["STORAGE_OPTS"] = "overlay.mountopt=nosuid,.skip_mount_home=true"
    assert compare_with_podman_info(lab, lab.local, env=env).options["skip_mount_home"] == "true"
    xdg = base / "xdg"
    (xdg / "containers").mkdir(parents=True)
    (xdg / "containers" / "storage.conf").write_text(text("xdg"))
    compare_with_podman_info(lab, lab.local, env={"XDG_CONFIG_HOME": str(xdg)})
    options = ["--root", f"{base}/o/g", "--runroot", f"{base}/o/r", "--storage-driver", "overlay"]
    overrides = StoreOverrides("", f"{base}/o/g", f"{base}/o/r", "overlay")
    compare_with_podman_info(lab, lab.local, options, overrides)
    more = dataclasses.replace(overrides, storage_options=("overlay.mountopt=nodev",))
    compare_with_podman_info(
        lab, lab.local, [*options, "--storage-opt", "overlay.mountopt=nodev"], more
    )
    # With only the graphroot, the database has the other values.
    found = compare_with_podman_info(
        lab, lab.local, options[:2], StoreOverrides(graphroot=f"{base}/o/g")
    )
    assert (found.runroot, found.driver) == (f"{base}/o/r", "overlay")


def test_rootless_discovery_agrees_with_podman_info(
    lab: Lab, etc: pathlib.Path, make_user: t.Callable[..., User]
) -> None:
    user = make_user()
    found = compare_with_podman_info(lab, lab.local, user=user)
    assert found.graphroot == f"{user.home}/.local/share/containers/storage"
    assert found.runroot == f"{user.runtime_dir}/containers"

    # Another user has no database of an earlier run.
    user = make_user()
    etc.write_text(
        '[storage]\ndriver = "vfs"\ngraphroot = "/nowhere/g"\nrunroot = "/nowhere/r"\n'
        f'rootless_storage_path = "{user.home}/$UID/s"\n[storage.options]\nsize = "1G"\n'
    )
    assert (
        compare_with_podman_info(lab, lab.local, user=user).graphroot == f"{user.home}/{user.uid}/s"
    )
    compare_with_podman_info(
        lab,
        lab.local,
        user=user,
        env={"STORAGE_DRIVER": "vfs", "XDG_DATA_HOME": f"{user.home}/d"},
    )
    user.write(
        ".config/containers/storage.conf",
        f'[storage]\ndriver = "overlay"\ngraphroot = "{user.home}/own"\n'
        '[storage.options.overlay]\nmountopt = "nodev"\n',
    )
    found = compare_with_podman_info(lab, lab.local, user=user)
    assert (found.driver, found.options) == ("overlay", {"mountopt": "nodev"})
    user.write(
        "xdg/containers/storage.conf", f'[storage]\ndriver = "vfs"\ngraphroot = "{user.home}/x"\n'
    )
    compare_with_podman_info(lab, lab.local, user=user, env={"XDG_CONFIG_HOME": f"{user.home}/xdg"})


@pytest.mark.parametrize("name", ["local", *SUITES])
def test_rootless_discovery_with_storage_conf_variable(
    name: str, lab: Lab, make_user: t.Callable[..., User], host: t.Callable[[str], Host]
) -> None:
    """podman 4.3.1 and 5.4.2 ignore the paths in the file, podman 5.8 does not."""
    machine = lab.local if name == "local" else host(name)
    user = make_user(machine)
    path = user.write(
        "s.conf",
        f'[storage]\ndriver = "overlay"\ngraphroot = "{user.home}/x"\nrunroot = "{user.home}/r"\n'
        '[storage.options.overlay]\nmountopt = "nodev"\n',
    )
    env = {"CONTAINERS_STORAGE_CONF": str(path)}
    found = compare_with_podman_info(lab, machine, user=user, env=env)
    assert (found.graphroot == f"{user.home}/x") == (name in ("sid", "experimental"))


def test_database_of_podman_5_is_used_in_discovery(lab: Lab, host: t.Callable[[str], Host]) -> None:
    machine = host("trixie")
    base = lab.folder()
    lab.on_close(lambda: lab.remove(base))
    conf = base / "s.conf"
    conf.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{base}/g"\nrunroot = "{base}/r"\n')
    env = {"CONTAINERS_STORAGE_CONF": str(conf)}
    compare_with_podman_info(lab, machine, env=env)
    conf.write_text(conf.read_text().replace("vfs", "overlay").replace("/r", "/r2"))
    found = compare_with_podman_info(lab, machine, env=env)
    assert (found.driver, found.runroot) == ("vfs", f"{base}/r")
    assert found.sources["driver"].endswith("db.sql")


def test_store_is_read_from_podman_databases(
    make_store: MakeStore, host: t.Callable[[str], Host], lab: Lab
) -> None:
    # podman 4 has a bolt file, podman 5 has an SQLite database.
    real = make_store("vfs", machine=lab.local)
    real.podman("info")
    found = read_bolt(str(real.graphroot / "libpod" / "bolt_state.db"))
    fields = (found.graphroot, found.runroot, found.driver)
    assert fields == (str(real.graphroot), str(real.runroot), "vfs")
    real = make_store("vfs", machine=host("trixie"))
    real.podman("info")
    with real.service():
        before = real.snapshot_of_disk()
        found = read_sqlite(str(real.graphroot / "db.sql"))
        fields = (found.graphroot, found.runroot, found.driver)
        assert fields == (str(real.graphroot), str(real.runroot), "vfs")
        assert before.changes(real.snapshot_of_disk()) == []


# Refused stores


def test_wrong_driver_and_missing_store_are_refused(
    make_store: MakeStore, small_image: Image
) -> None:
    real = make_store("vfs", small_image)
    before = real.snapshot_of_disk()
    with pytest.raises(StoreError, match="belongs to driver vfs"):
        open_store(real, driver="overlay")
    assert before.changes(real.snapshot_of_disk()) == []
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


# Killed writers

_CALLS = (
    "open",
    "write",
    "pwrite",
    "fdatasync",
    "fsync",
    "rename",
    "unlink",
    "mkdir",
    "rmdir",
    "fchmod",
    "ftruncate",
)


def killed_after(number: int, work: t.Callable[[], t.Any]) -> bool:
    """Run `work` in a child that is killed before its call of this number; False if it made fewer calls."""
    child = os.fork()
    if child == 0:
        count = 0

        def wrapped(real: t.Callable[..., t.Any]) -> t.Callable[..., t.Any]:
            def call(*args: t.Any, **options: t.Any) -> t.Any:
                nonlocal count
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return real(*args, **options)

            return call

        code = 1
        try:
            for name in _CALLS:
                setattr(os, name, wrapped(getattr(os, name)))
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status != 0


def test_store_is_valid_after_kill_at_every_call(make_store: MakeStore) -> None:
    """After each kill podman accepts the store, and the next run completes the change without leftovers."""
    real = make_store("vfs")
    tar = real.base / "tmp" / "tiny.tar"
    subprocess.run(["tar", "-C", "/etc", "-cf", str(tar), "hostname"], check=True)
    name = "localhost/tiny:1"
    real.podman("import", tar, name)
    saved = real.base / "saved"
    copy(real.graphroot, saved)
    plain = {layer["id"] for layer in real.layers()}

    def reset() -> None:
        shutil.rmtree(real.graphroot)
        copy(saved, real.graphroot)

    def assert_podman_accepts_store() -> None:
        listed = real.podman("images", "-aq", "--no-trunc")
        assert listed.stdout.split() == [f"sha256:{real.image(name)['id']}"]
        assert "rror" not in listed.stderr
        known = real.layer_ids()
        assert plain <= known
        assert set(real.mapped_layers(name)) <= known
        # podman has deleted incomplete layers, and no other record has changed.
        assert not any(layer.get("flags", {}).get("incomplete") for layer in real.layers())
        for layer_id in known:
            assert real.layer_folder(layer_id).is_dir()

    def add() -> None:
        add_mapped_layer(open_store(real), name)

    def leftovers() -> t.List[str]:
        store = open_store(real)
        store.sweep()
        known = real.layer_ids()
        found = [name for name in os.listdir(real.graphroot / "vfs" / "dir") if name not in known]
        # Since containers/storage 1.62 runtimes move layers to this folder to remove them; it may be empty.
        removals = os.path.join(store.layers_dir, "tmp")
        empty = {"tmp"} if os.path.isdir(removals) and not os.listdir(removals) else set()
        found += [
            name
            for name in os.listdir(store.layers_dir)
            if name.partition(".")[0] not in {*known, "layers", *empty}
        ]
        for folder in ("staging", "trash"):
            path = os.path.join(store.root, folder)
            found += os.listdir(path) if os.path.isdir(path) else []
        return found

    number = 0
    while killed_after(number, add):
        open_store(real).snapshot()
        assert_podman_accepts_store()
        mapped = real.mapped_layers(name)
        if not mapped:
            # Without an entry in the image's record, a finished layer is a plain layer to all programs.
            for layer_id in real.layer_ids() - plain:
                remove_mapped_layer(open_store(real), layer_id)
            add()
            mapped = real.mapped_layers(name)
        assert real.layer_ids() == plain | set(mapped)
        assert len(mapped) == 1
        assert leftovers() == []
        number += 1
        reset()
    added = number
    assert added > 25

    shutil.rmtree(saved)
    (layer_id,) = real.mapped_layers(name)
    copy(real.graphroot, saved)
    number = 0
    while killed_after(number, lambda: remove_mapped_layer(open_store(real), layer_id)):
        open_store(real).snapshot()
        assert_podman_accepts_store()
        if layer_id in real.layer_ids():
            remove_mapped_layer(open_store(real), layer_id)
        assert real.layer_ids() == plain
        assert real.mapped_layers(name) == []
        assert leftovers() == []
        number += 1
        reset()
    assert number > 25
    assert real.layer_ids() == plain


# Scale


def write_large(real: RealStore, count: int) -> t.List[t.Dict[str, t.Any]]:
    """Write records of images with 45 layers and five mapped layers each; returns the layer records."""
    layers: t.List[t.Dict[str, t.Any]] = []
    images = []
    for number in range(count):
        parent = before = ""
        for _round in range(45):
            layer = {"id": secrets.token_hex(32), "created": "2026-01-02T03:04:05.123456789Z"}
            if parent:
                layer["parent"] = parent
            layer["diff-digest"] = layer["compressed-diff-digest"] = (
                f"sha256:{secrets.token_hex(32)}"
            )
            layers.append({**layer, "diff-size": 10240, "uidset": [0, 1, 33], "gidset": [0, 1, 33]})
            before, parent = parent, layer["id"]
        mapped = []
        for _round in range(5):
            mapped.append(secrets.token_hex(32))
            layers.append(
                {**layers[-1], "id": mapped[-1], "parent": before, "uidmap": MAP, "gidmap": MAP}
            )
        images.append(
            {
                "id": secrets.token_hex(32),
                "names": [f"localhost/i{number}:1"],
                "layer": parent,
                "mapped-layers": mapped,
            }
        )
    for kind, records in (("layers", layers), ("images", images)):
        folder = real.graphroot / f"vfs-{kind}"
        (folder / f"{kind}.json").write_text(json.dumps(records, separators=(",", ":")))
        (folder / f"{kind}.lock").write_bytes(os.urandom(64))
    return layers


def test_cost_of_reading_and_writing_is_linear(
    make_store: MakeStore,
    monkeypatch: pytest.MonkeyPatch,
    count_calls: t.Callable[[t.Callable[[], t.Any]], int],
) -> None:
    """Reading a store and changing a layer open each record file once, and cost the same for each layer."""
    real = make_store("vfs")
    real.podman("info")
    opens: t.List[str] = []
    os_open = os.open

    def logged_open(path: t.Any, *args: t.Any, **options: t.Any) -> int:
        opens.append(os.path.basename(os.fsdecode(path)))
        return os_open(path, *args, **options)

    def count_work(count: int) -> t.Tuple[int, int]:
        """The number of function calls for reading a store of `count` images, and for a change."""
        layers = write_large(real, count)
        opens.clear()
        store = open_store(real)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", logged_open)
            reading = count_calls(store.snapshot)
        assert (opens.count("layers.json"), opens.count("images.json")) == (1, 1)
        assert len(store.snapshot().layers) == count * 50
        before = disk_state(real.graphroot)

        def change() -> None:
            with store.transaction() as transaction:
                transaction.update_layer(layers[0]["id"], lambda raw: raw.update(metadata="x"))

        changing = count_calls(change)
        changes = before.changes(disk_state(real.graphroot))
        written = {os.path.basename(line.partition(": ")[0]) for line in changes}
        assert {name for name in written if name.endswith((".json", ".lock"))} == {
            "layers.json",
            "layers.lock",
        }
        return reading, changing

    # There are eight times as many layers; a quadratic cost would be 64 times as high.
    for few, many in zip(count_work(20), count_work(160)):
        assert many < 10 * few
