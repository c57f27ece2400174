# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Store discovery: files, environment, options and podman's database, each in its place."""

from __future__ import annotations

import os
import pathlib
import sqlite3
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import ConfigError
from ansible_collections.userns.storage.plugins.module_utils._storage.store import config
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import (
    Account,
    StoreConfig,
    StoreOverrides,
    discover,
    split_options,
)
from hypothesis import given
from hypothesis import strategies as st

NONE = StoreOverrides()


class Host:
    """Files and an environment of its own."""

    def __init__(self, base: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.admin = base / "etc" / "storage.conf"
        self.vendor = base / "usr" / "storage.conf"
        self.home = base / "home"
        self.run = base / "run"
        for path in (self.admin.parent, self.vendor.parent, self.home, self.run):
            path.mkdir()
        monkeypatch.setattr(config, "ADMIN_FILE", str(self.admin))
        monkeypatch.setattr(config, "VENDOR_FILE", str(self.vendor))
        monkeypatch.setattr(config, "_GRAPHROOT", str(base / "default"))
        self.account = Account("alice", os.getuid() or 1000, 1000, str(self.home))

    def write(self, path: t.Union[str, pathlib.Path], text: str) -> str:
        target = self.base / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return str(target)

    def rootful(self, overrides: StoreOverrides = NONE, **environ: str) -> StoreConfig:
        return discover(overrides, environ, None, False)

    def rootless(self, overrides: StoreOverrides = NONE, **environ: str) -> StoreConfig:
        environ.setdefault("XDG_RUNTIME_DIR", str(self.run))
        environ.setdefault("HOME", str(self.home))
        return discover(overrides, environ, self.account, True)


@pytest.fixture
def host(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_rootful_defaults(host: Host) -> None:
    found = host.rootful()
    assert found.graphroot == f"{host.base}/default"
    assert found.runroot == "/run/containers/storage"
    assert found.options == {}
    assert not found.rootless
    assert found.auto_userns == {"user": "containers", "min_size": 1024, "max_size": 65536}
    assert found.sources["graphroot"] == "default"


FULL = """
[storage]
driver = "overlay2"
graphroot = "/g"
runroot = "/r"
imagestore = "/i"
transient_store = true
[storage.options]
additionalimagestores = ["/ro1", "/ro2/"]
additionallayerstores = ["/als:ref"]
mountopt = "nosuid"
size = "1G"
root-auto-userns-user = "pool"
auto-userns-min-size = 2048
auto-userns-max-size = 4096
ignore_chown_errors = "true"
pull_options = {a = "b"}
[storage.options.overlay]
mountopt = "nodev,metacopy=on"
force_mask = "shared"
unknown = "x"
[storage.options.vfs]
ignore_chown_errors = "false"
"""


def test_all_keys(host: Host) -> None:
    host.write(host.admin, FULL)
    found = host.rootful()
    assert (found.driver, found.graphroot, found.runroot) == ("overlay", "/g", "/r")
    assert (found.imagestore, found.transient) == ("/i", True)
    assert found.options == {
        "mountopt": "nodev,metacopy=on",
        "size": "1G",
        "ignore_chown_errors": "true",
        "force_mask": "shared",
    }
    assert found.additional_image_stores == ("/ro1", "/ro2")
    assert found.additional_layer_stores == ("/als:ref",)
    assert found.auto_userns == {"user": "pool", "min_size": 2048, "max_size": 4096}
    assert found.sources["driver"] == found.sources["options"] == str(host.admin)


def test_search_order(host: Host) -> None:
    host.write(host.vendor, '[storage]\ngraphroot = "/vendor"')
    assert host.rootful().graphroot == "/vendor"
    host.write(host.admin, '[storage]\ndriver = "vfs"')
    # The first file counts alone.
    assert host.rootful().graphroot == f"{host.base}/default"
    host.write("xdg/containers/storage.conf", '[storage]\ngraphroot = "/xdg"')
    assert host.rootful(XDG_CONFIG_HOME=str(host.base / "xdg")).graphroot == "/xdg"
    assert host.rootful(XDG_CONFIG_HOME=str(host.base / "no")).driver == "vfs"
    other = host.write("env.conf", '[storage]\ngraphroot = "/env"')
    environ = {"CONTAINERS_STORAGE_CONF": other, "XDG_CONFIG_HOME": str(host.base / "xdg")}
    assert host.rootful(**environ).graphroot == "/env"
    option = host.write("option.conf", '[storage]\ngraphroot = "/option"')
    assert host.rootful(StoreOverrides(storage_conf=option), **environ).graphroot == "/option"


def test_environment(host: Host) -> None:
    host.write(host.admin, FULL)
    found = host.rootful(STORAGE_DRIVER="vfs", STORAGE_OPTS="vfs.a=1,vfs.IMAGESTORE=/x,.b=2=3")
    assert (found.driver, found.options) == ("vfs", {"a": "1", "b": "2=3"})
    assert found.additional_image_stores == ("/x",)
    assert found.sources["driver"] == "STORAGE_DRIVER"
    assert host.rootful(STORAGE_OPTS="").options == {}
    assert host.rootful(STORAGE_DRIVER="overlay2").driver == "overlay"


def test_paths_are_expanded(host: Host) -> None:
    (host.base / "real").mkdir()
    os.symlink(host.base / "real", host.base / "link")
    host.write(
        host.admin,
        f'[storage]\ngraphroot = "{host.base}/link"\nrunroot = "/r/$UID/${{NAME}}/$OTHER/.."\n',
    )
    found = host.rootful(NAME="x", OTHER="y")
    assert found.graphroot == str(host.base / "real")
    assert found.runroot == "/r/0/x"


def test_options_of_the_caller(host: Host) -> None:
    host.write(host.admin, FULL)
    found = host.rootful(StoreOverrides(runroot="/r2"))
    assert (found.graphroot, found.runroot, found.driver) == ("/g", "/r2", "overlay")
    assert found.options["force_mask"] == "shared"
    # As with podman's --root and --storage-driver, the file's options fall away.
    found = host.rootful(StoreOverrides(graphroot="/g2/"))
    assert (found.graphroot, found.runroot, found.driver) == ("/g2", "/r", "overlay")
    assert (found.options, found.additional_image_stores) == ({}, ())
    found = host.rootful(StoreOverrides(driver="vfs"))
    assert (found.driver, found.options) == ("vfs", {})
    found = host.rootful(StoreOverrides(storage_options=("overlay.mountopt=nodev",)))
    assert found.options == {"mountopt": "nodev"}
    assert found.additional_image_stores == ()


def write_database(path: str, graphroot: str, runroot: str, driver: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE DBConfig(GraphRoot TEXT, RunRoot TEXT, GraphDriver TEXT)")
    connection.execute("INSERT INTO DBConfig VALUES (?, ?, ?)", (graphroot, runroot, driver))
    connection.commit()
    connection.close()


def test_database(host: Host) -> None:
    graphroot = host.base / "g"
    graphroot.mkdir()
    write_database(str(graphroot / "db.sql"), str(graphroot), "/r-db", "vfs")
    host.write(host.admin, f'[storage]\ndriver="overlay"\ngraphroot="{graphroot}"\nrunroot="/r"\n')
    found = host.rootful()
    assert (found.graphroot, found.runroot, found.driver) == (str(graphroot), "/r-db", "vfs")
    assert found.sources["driver"] == f"podman's database {graphroot}/db.sql"
    assert found.sources["graphroot"] == str(host.admin)
    found = host.rootful(StoreOverrides(runroot="/r2", driver="overlay"))
    assert (found.runroot, found.driver) == ("/r2", "overlay")


def test_database_of_another_place(host: Host) -> None:
    """A store that was moved: podman goes to where the database says."""
    graphroot = host.base / "g"
    graphroot.mkdir()
    write_database(str(graphroot / "db.sql"), "/elsewhere", "relative", "")
    host.write(host.admin, f'[storage]\ndriver="overlay"\ngraphroot="{graphroot}"\nrunroot="/r"\n')
    found = host.rootful()
    assert (found.graphroot, found.runroot, found.driver) == ("/elsewhere", "/r", "overlay")
    assert host.rootful(StoreOverrides(graphroot=str(graphroot))).graphroot == str(graphroot)


# Rootless


def test_rootless_defaults(host: Host) -> None:
    found = host.rootless()
    assert found.graphroot == f"{host.home}/.local/share/containers/storage"
    assert found.runroot == f"{host.run}/containers"
    assert found.rootless
    assert host.rootless(XDG_DATA_HOME="/data").graphroot == "/data/containers/storage"


def test_rootless_takes_little_of_the_systems_file(host: Host) -> None:
    host.write(
        host.admin,
        '[storage]\ndriver = "overlay"\ngraphroot = "/g"\nrunroot = "/r"\nimagestore = "/i"\n'
        "transient_store = true\n"
        '[storage.options]\nadditionalimagestores = ["/ro"]\nmount_program = "/x"\n'
        '[storage.options.overlay]\nmountopt = "nodev"\nignore_chown_errors = "true"\n',
    )
    found = host.rootless()
    assert found.graphroot.startswith(str(host.home))
    assert (found.driver, found.options) == ("overlay", {"ignore_chown_errors": "true"})
    assert (found.imagestore, found.additional_image_stores, found.transient) == ("", (), False)
    assert host.rootless(STORAGE_DRIVER="vfs").driver == "vfs"
    found = host.rootless(STORAGE_OPTS="overlay.mountopt=x")
    assert found.options["mountopt"] == "x"
    host.write(host.admin, '[storage]\nrootless_storage_path = "/srv/$USER/$UID"\n')
    assert host.rootless(USER="alice").graphroot == f"/srv/alice/{host.account.uid}"


def test_rootless_file_counts_alone(host: Host) -> None:
    host.write(host.admin, '[storage]\ndriver = "overlay"\nrootless_storage_path = "/srv/$UID"\n')
    host.write(
        "home/.config/containers/storage.conf",
        '[storage]\ndriver = "vfs"\n[storage.options.overlay]\nmountopt = "x"\n',
    )
    found = host.rootless()
    assert (found.driver, found.options) == ("vfs", {})
    assert found.graphroot == f"/srv/{host.account.uid}"
    assert found.runroot == f"{host.run}/containers"
    host.write(
        "home/.config/containers/storage.conf",
        '[storage]\ndriver = "vfs"\nrootless_storage_path = "$HOME/s"\nrunroot = "/rr"\n',
    )
    found = host.rootless()
    assert (found.graphroot, found.runroot) == (f"{host.home}/s", "/rr")
    host.write("xdg/containers/storage.conf", '[storage]\ngraphroot = "/xdg"\n')
    assert host.rootless(XDG_CONFIG_HOME=str(host.base / "xdg")).graphroot == "/xdg"
    other = host.write("other.conf", '[storage]\ngraphroot = "/other"\n')
    assert host.rootless(CONTAINERS_STORAGE_CONF=other).graphroot == "/other"


def test_rootless_with_a_named_file(host: Host) -> None:
    """containers/storage before 1.59 takes driver and options from it, but no paths."""
    path = host.write(
        "named.conf",
        f'[storage]\ndriver = "overlay"\ngraphroot = "{host.base}/named"\nrunroot = "/rr"\n'
        'imagestore = "/i"\n[storage.options]\nadditionalimagestores = ["/ro"]\n'
        '[storage.options.overlay]\nmountopt = "nodev"\n',
    )
    environ = {"HOME": str(host.home), "XDG_RUNTIME_DIR": str(host.run)}
    default = host.home / ".local/share/containers/storage"

    def found(version: t.Optional[t.Tuple[int, ...]]) -> t.Tuple[str, str]:
        for overrides, more in (
            (StoreOverrides(storage_conf=path), {}),
            (NONE, {"CONTAINERS_STORAGE_CONF": path}),
        ):
            result = discover(overrides, {**environ, **more}, host.account, True, version)
            assert result.options == {"mountopt": "nodev"}
            assert result.additional_image_stores == ("/ro",)
            assert (result.driver, result.imagestore) == ("overlay", "/i")
        return result.graphroot, result.runroot

    old, new = (str(default), f"{host.run}/containers"), (f"{host.base}/named", "/rr")
    assert found((1, 43, 0)) == found((1, 58, 9)) == old
    assert found((1, 59, 1)) == found((1, 62)) == new
    # Without a version the one that has been written is meant.
    assert found(None) == new
    (default / "overlay-layers").mkdir(parents=True)
    assert found(None) == old
    (host.base / "named" / "overlay-layers").mkdir(parents=True)
    assert found(None) == new


def test_options_are_those_of_the_driver_that_counts(host: Host) -> None:
    host.write(host.admin, FULL.replace('"overlay2"', '"vfs"'))
    assert host.rootful().options["ignore_chown_errors"] == "false"
    assert host.rootful(STORAGE_DRIVER="overlay").options["force_mask"] == "shared"


def test_runtime_folder(host: Host, tmp_path: pathlib.Path) -> None:
    usual = f"/run/user/{host.account.uid}"
    expected = usual if os.path.isdir(usual) else f"{tmp_path}/storage-run-{host.account.uid}"
    found = host.rootless(XDG_RUNTIME_DIR="", TMPDIR=str(tmp_path))
    assert found.runroot == f"{expected}/containers"
    if not os.path.isdir(usual) and os.getuid() == host.account.uid:
        (tmp_path / f"podman-run-{host.account.uid}").mkdir(mode=0o700)
        found = host.rootless(XDG_RUNTIME_DIR="", TMPDIR=str(tmp_path))
        assert found.runroot == f"{tmp_path}/podman-run-{host.account.uid}/containers"


def test_root_is_never_rootless(host: Host) -> None:
    found = discover(NONE, {}, Account("root", 0, 0, "/root"), True)
    assert not found.rootless
    assert found.graphroot == f"{host.base}/default"
    with pytest.raises(ConfigError, match="user"):
        discover(NONE, {}, None, True)


# The driver where none is set


def test_picked_driver(host: Host) -> None:
    graphroot = host.base / "g"
    graphroot.mkdir()
    text = f'[storage]\ngraphroot = "{graphroot}"\n'
    host.write(host.admin, text)
    assert host.rootful().driver == "overlay"
    (graphroot / "vfs").mkdir()
    assert host.rootful().driver == "overlay"
    (graphroot / "btrfs").mkdir()
    assert host.rootful().driver == "btrfs"
    (graphroot / "overlay").mkdir()
    assert host.rootful().driver == "overlay"
    host.write(host.admin, f'{text}driver_priority = ["vfs", "btrfs"]\n')
    assert host.rootful().driver == "vfs"
    assert host.rootful().sources["driver"].startswith("chosen")


def test_picked_rootless_driver(host: Host) -> None:
    graphroot = host.home / ".local/share/containers/storage"
    graphroot.mkdir(parents=True)
    assert host.rootless(PATH="/nowhere").driver in ("overlay", "vfs")
    (graphroot / "vfs-images").mkdir()
    assert host.rootless().driver == "vfs"
    (graphroot / "overlay-images").mkdir()
    assert host.rootless().driver == "overlay"


def test_overlay_where_it_can_be(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        release = ""

    monkeypatch.setattr(os, "uname", lambda: Kernel)
    for release, driver in (
        ("5.12.0", "vfs"),
        ("5.13.1-x", "overlay"),
        ("6.1", "overlay"),
        ("?", "vfs"),
    ):
        Kernel.release = release
        assert host.rootless(PATH="/nowhere").driver == driver
    fuse = host.base / "bin" / "fuse-overlayfs"
    host.write(fuse, "")
    fuse.chmod(0o755)
    assert host.rootless(PATH=f"/nowhere:{fuse.parent}").driver == "overlay"


# What is wrong


@pytest.mark.parametrize(
    "text",
    [
        "[storage",
        "storage = 1",
        "[storage]\ndriver = 1",
        "[storage]\ndriver_priority = 'vfs'",
        "[storage]\ngraphroot = ['/g']",
        "[storage]\ngraphroot = 'relative'",
        "[storage]\ngraphroot = '$NOTHING'",
        '[storage]\ngraphroot = "/a\\u0000b"',
        "[storage]\ntransient_store = 'yes'",
        "[storage]\ngraphroot = '/g'\nimagestore = '/g'",
        "[storage]\noptions = 'x'",
        "[storage.options]\nadditionalimagestores = '/x'",
        "[storage.options]\nadditionalimagestores = [1]",
        "[storage.options]\nauto-userns-min-size = -1",
        "[storage.options]\nauto-userns-max-size = 4294967296",
        "[storage.options]\nmountopt = true",
        "[storage]\ndriver = 'overlay'\n[storage.options]\noverlay = []",
        "[storage]\ndriver = 'overlay'\n[storage.options.overlay]\nmountopt = 1",
    ],
)
def test_bad_file(host: Host, text: str) -> None:
    host.write(host.admin, text)
    with pytest.raises(ConfigError) as caught:
        host.rootful()
    assert str(host.admin) in str(caught.value)


def test_missing_and_unreadable_files(host: Host) -> None:
    for words in ({"CONTAINERS_STORAGE_CONF": "/no/such"}, {"CONTAINERS_STORAGE_CONF": "/"}):
        with pytest.raises(ConfigError, match="/"):
            host.rootful(**words)
    with pytest.raises(ConfigError, match="/no/such"):
        host.rootful(StoreOverrides(storage_conf="/no/such"))
    with pytest.raises(ConfigError, match="absolute"):
        host.rootful(StoreOverrides(graphroot="g"))
    with open(host.base / "big", "wb") as file:
        file.truncate(10**9)
    with pytest.raises(ConfigError, match="larger"):
        host.rootful(StoreOverrides(storage_conf=str(host.base / "big")))


def test_force_mask_as_a_number(host: Host) -> None:
    host.write(host.admin, "[storage]\ndriver='overlay'\n[storage.options]\nforce_mask = 0o700\n")
    assert host.rootful().options == {"force_mask": "700"}


def test_options_taken_apart() -> None:
    options = ["overlay.A=1", ".b=2", "c=3", "overlay2.d=4", "overlay.a=5", "vfs.e=6", "f", "", "="]
    assert split_options("overlay", options)[0] == {
        "a": "5",
        "b": "2",
        "c": "3",
        "d": "4",
        "vfs.e": "6",
        "f": "",
    }
    stores = ["overlay.imagestore=/a,/b", ".additionalimagestore=/a", ".additionallayerstore=/c:x"]
    assert split_options("overlay", stores) == ({}, ("/a", "/b"), ("/c:x",))


@given(
    st.text("[]storage.optn=\"'/\\${}UID \n#", max_size=80),
    st.dictionaries(
        st.sampled_from(["STORAGE_DRIVER", "STORAGE_OPTS", "XDG_DATA_HOME", "TMPDIR", "PATH"]),
        st.text(
            st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=20
        ),
    ),
)
def test_anything(
    tmp_path_factory: pytest.TempPathFactory, text: str, environ: t.Dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("conf") / "storage.conf"
    path.write_text(text)
    account = Account("alice", 1000, 1000, "/nowhere")
    for rootless in (True, False):
        try:
            discover(StoreOverrides(storage_conf=str(path)), environ, account, rootless)
        except ConfigError as error:
            str(error)
