# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare the discovery of stores with `podman info`, before and after podman has created its database."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.capabilities import (
    capabilities,
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
from support.hosts import SUITES, Host
from support.lab import Lab
from support.machines import ROOT
from support.stores import Store as RealStore
from support.users import User

MakeStore = t.Callable[..., RealStore]

# The version of containers/storage in podman, by machine.
_STORAGE = {"local": (1, 43), "trixie": (1, 57), "sid": (1, 64), "experimental": (1, 64)}


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
        before = real.disk_state()
        found = read_sqlite(str(real.graphroot / "db.sql"))
        fields = (found.graphroot, found.runroot, found.driver)
        assert fields == (str(real.graphroot), str(real.runroot), "vfs")
        assert before.changes(real.disk_state()) == []
