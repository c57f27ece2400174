# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of store discovery from files, environment variables, options and podman's database."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import sqlite3
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.capabilities import (
    Capabilities,
    capabilities,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import ConfigError
from ansible_collections.userns.storage.plugins.module_utils._storage.store import conf_values
from ansible_collections.userns.storage.plugins.module_utils._storage.store.conf_values import (
    split_options,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import (
    Account,
    AutoUserns,
    StoreConfig,
    StoreOverrides,
    discover,
)
from hypothesis import given
from hypothesis import strategies as st

NONE = StoreOverrides()


def storage(*version: int) -> Capabilities:
    """The capabilities of podman with a version of containers/storage."""
    return capabilities("podman", (5, 0), version)


OLD, NAMED, MERGED = storage(1, 43), storage(1, 62), storage(1, 64)


class Host:
    """A host with its own configuration files and environment variables."""

    def __init__(self, base: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.features = NAMED
        self.admin = base / "etc" / "storage.conf"
        self.vendor = base / "usr" / "storage.conf"
        self.home = base / "home"
        self.run = base / "run"
        for path in (self.admin.parent, self.vendor.parent, self.home, self.run):
            path.mkdir()
        monkeypatch.setattr(conf_values, "ADMIN_FILE", str(self.admin))
        monkeypatch.setattr(conf_values, "VENDOR_FILE", str(self.vendor))
        monkeypatch.setattr(conf_values, "GRAPHROOT", str(base / "default"))
        self.account = Account("alice", os.getuid() or 1000, 1000, str(self.home))

    def write(self, path: t.Union[str, pathlib.Path], text: str) -> str:
        target = self.base / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return str(target)

    def rootful(self, overrides: StoreOverrides = NONE, **environ: str) -> StoreConfig:
        return discover(overrides, environ, None, False, NAMED)

    def rootless(self, overrides: StoreOverrides = NONE, **environ: str) -> StoreConfig:
        environ.setdefault("XDG_RUNTIME_DIR", str(self.run))
        environ.setdefault("HOME", str(self.home))
        return discover(overrides, environ, self.account, True, self.features)


@pytest.fixture
def host(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_rootful_store_has_defaults(host: Host) -> None:
    found = host.rootful()
    assert found.graphroot == f"{host.base}/default"
    assert found.runroot == "/run/containers/storage"
    assert found.options == {}
    assert not found.rootless
    assert found.auto_userns == AutoUserns(1024, 65536, "containers")
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


def test_all_keys_are_read(host: Host) -> None:
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
    assert found.auto_userns == AutoUserns(2048, 4096, "pool")
    assert found.sources["driver"] == found.sources["options"] == str(host.admin)


def test_files_are_searched_in_order(host: Host) -> None:
    host.write(host.vendor, '[storage]\ngraphroot = "/vendor"')
    assert host.rootful().graphroot == "/vendor"
    host.write(host.admin, '[storage]\ndriver = "vfs"')
    # Only the first file is read.
    assert host.rootful().graphroot == f"{host.base}/default"
    host.write("xdg/containers/storage.conf", '[storage]\ngraphroot = "/xdg"')
    assert host.rootful(XDG_CONFIG_HOME=str(host.base / "xdg")).graphroot == "/xdg"
    assert host.rootful(XDG_CONFIG_HOME=str(host.base / "no")).driver == "vfs"
    other = host.write("env.conf", '[storage]\ngraphroot = "/env"')
    environ = {"CONTAINERS_STORAGE_CONF": other, "XDG_CONFIG_HOME": str(host.base / "xdg")}
    assert host.rootful(NONE, **environ).graphroot == "/env"
    option = host.write("option.conf", '[storage]\ngraphroot = "/option"')
    assert host.rootful(StoreOverrides(storage_conf=option), **environ).graphroot == "/option"


def test_environment_variables_override_files(host: Host) -> None:
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


def test_options_override_files(host: Host) -> None:
    host.write(host.admin, FULL)
    found = host.rootful(StoreOverrides(runroot="/r2"))
    assert (found.graphroot, found.runroot, found.driver) == ("/g", "/r2", "overlay")
    assert found.options["force_mask"] == "shared"
    # As with podman's --root and --storage-driver, the options of the file do not apply.
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


def test_database_overrides_files(host: Host) -> None:
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


def test_database_can_refer_to_another_graphroot(host: Host) -> None:
    """For a store that was moved, podman uses the paths in the database."""
    graphroot = host.base / "g"
    graphroot.mkdir()
    write_database(str(graphroot / "db.sql"), "/elsewhere", "relative", "")
    host.write(host.admin, f'[storage]\ndriver="overlay"\ngraphroot="{graphroot}"\nrunroot="/r"\n')
    found = host.rootful()
    assert (found.graphroot, found.runroot, found.driver) == ("/elsewhere", "/r", "overlay")
    assert host.rootful(StoreOverrides(graphroot=str(graphroot))).graphroot == str(graphroot)


# Rootless


def test_rootless_store_has_defaults(host: Host) -> None:
    found = host.rootless()
    assert found.graphroot == f"{host.home}/.local/share/containers/storage"
    assert found.runroot == f"{host.run}/containers"
    assert found.rootless
    assert host.rootless(XDG_DATA_HOME="/data").graphroot == "/data/containers/storage"


def test_rootless_store_uses_few_keys_of_the_system_file(host: Host) -> None:
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


def test_file_of_the_user_replaces_the_system_file(host: Host) -> None:
    host.write(host.admin, '[storage]\ndriver = "overlay"\nrootless_storage_path = "/srv/$UID"\n')
    host.write(
        "home/.config/containers/storage.conf",
        '[storage]\ndriver = "vfs"\n[storage.options.overlay]\nmountopt = "x"\n',
    )
    found = host.rootless()
    assert (found.driver, found.options) == ("vfs", {})
    assert found.graphroot == f"{host.home}/.local/share/containers/storage"
    assert found.runroot == f"{host.run}/containers"
    # buildah also reads the file of the system.
    host.features = capabilities("buildah", (1, 42), (1, 62))
    assert host.rootless().graphroot == f"/srv/{host.account.uid}"
    host.features = NAMED
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


def test_named_file_of_a_rootless_store_depends_on_the_version(host: Host) -> None:
    """containers/storage before 1.59 reads driver and options from that file, but no paths."""
    path = host.write(
        "named.conf",
        f'[storage]\ndriver = "overlay"\ngraphroot = "{host.base}/named"\nrunroot = "/rr"\n'
        'imagestore = "/i"\n[storage.options]\nadditionalimagestores = ["/ro"]\n'
        '[storage.options.overlay]\nmountopt = "nodev"\n',
    )
    environ = {"HOME": str(host.home), "XDG_RUNTIME_DIR": str(host.run)}
    default = host.home / ".local/share/containers/storage"

    def found(features: Capabilities) -> t.Tuple[str, str]:
        paths = ("", "")
        for overrides, more in (
            (StoreOverrides(storage_conf=path), {}),
            (NONE, {"CONTAINERS_STORAGE_CONF": path}),
        ):
            result = discover(overrides, {**environ, **more}, host.account, True, features)
            assert result.options == {"mountopt": "nodev"}
            assert result.additional_image_stores == ("/ro",)
            assert (result.driver, result.imagestore) == ("overlay", "/i")
            paths = (result.graphroot, result.runroot)
        return paths

    old, new = (str(default), f"{host.run}/containers"), (f"{host.base}/named", "/rr")
    assert found(storage(1, 47)) == found(storage(1, 58, 9)) == old
    assert found(storage(1, 59, 1)) == found(storage(1, 62)) == new


def test_options_of_the_effective_driver_are_used(host: Host) -> None:
    host.write(host.admin, FULL.replace('"overlay2"', '"vfs"'))
    assert host.rootful().options["ignore_chown_errors"] == "false"
    assert host.rootful(STORAGE_DRIVER="overlay").options["force_mask"] == "shared"


def test_run_root_without_xdg_runtime_dir_is_temporary(host: Host, tmp_path: pathlib.Path) -> None:
    usual = f"/run/user/{host.account.uid}"
    expected = usual if os.path.isdir(usual) else f"{tmp_path}/storage-run-{host.account.uid}"
    found = host.rootless(XDG_RUNTIME_DIR="", TMPDIR=str(tmp_path))
    assert found.runroot == f"{expected}/containers"
    if not os.path.isdir(usual) and os.getuid() == host.account.uid:
        (tmp_path / f"podman-run-{host.account.uid}").mkdir(mode=0o700)
        found = host.rootless(XDG_RUNTIME_DIR="", TMPDIR=str(tmp_path))
        assert found.runroot == f"{tmp_path}/podman-run-{host.account.uid}/containers"


def test_root_is_never_rootless(host: Host) -> None:
    found = discover(NONE, {}, Account("root", 0, 0, "/root"), True, NAMED)
    assert not found.rootless
    assert found.graphroot == f"{host.base}/default"
    with pytest.raises(ConfigError, match="user"):
        discover(NONE, {}, None, True, NAMED)


# The driver if none is configured


def test_driver_is_chosen_by_directories_and_priority(host: Host) -> None:
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


def test_rootless_driver_is_chosen_by_directories(host: Host) -> None:
    graphroot = host.home / ".local/share/containers/storage"
    graphroot.mkdir(parents=True)
    assert host.rootless(PATH="/nowhere").driver in ("overlay", "vfs")
    (graphroot / "vfs-images").mkdir()
    assert host.rootless().driver == "vfs"
    (graphroot / "overlay-images").mkdir()
    assert host.rootless().driver == "overlay"


def test_overlay_is_chosen_if_it_is_supported(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
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


# Invalid configuration


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
def test_invalid_file_is_named_in_the_error(host: Host, text: str) -> None:
    host.write(host.admin, text)
    with pytest.raises(ConfigError) as caught:
        host.rootful()
    assert str(host.admin) in str(caught.value)


def test_missing_and_unreadable_files_are_errors(host: Host) -> None:
    for environ in ({"CONTAINERS_STORAGE_CONF": "/no/such"}, {"CONTAINERS_STORAGE_CONF": "/"}):
        with pytest.raises(ConfigError, match="/"):
            host.rootful(NONE, **environ)
    with pytest.raises(ConfigError, match="/no/such"):
        host.rootful(StoreOverrides(storage_conf="/no/such"))
    with pytest.raises(ConfigError, match="absolute"):
        host.rootful(StoreOverrides(graphroot="g"))
    with open(host.base / "big", "wb") as file:
        file.truncate(10**9)
    with pytest.raises(ConfigError, match="larger"):
        host.rootful(StoreOverrides(storage_conf=str(host.base / "big")))


def test_force_mask_can_be_a_number(host: Host) -> None:
    host.write(host.admin, "[storage]\ndriver='overlay'\n[storage.options]\nforce_mask = 0o700\n")
    assert host.rootful().options == {"force_mask": "700"}


def test_options_and_additional_stores_are_split() -> None:
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
        st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=20),
    ),
)
def test_any_file_and_environment_is_read_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, text: str, environ: t.Dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("conf") / "storage.conf"
    path.write_text(text)
    account = Account("alice", 1000, 1000, "/nowhere")
    for rootless, features in itertools.product((True, False), (OLD, NAMED, MERGED)):
        try:
            discover(StoreOverrides(storage_conf=str(path)), environ, account, rootless, features)
        except ConfigError as error:
            str(error)


# Messages


def test_unset_variable_is_named(host: Host) -> None:
    """rootless_storage_path contains a variable that only dotfiles of a login shell set."""
    path = host.write(
        "home/.config/containers/storage.conf",
        '[storage]\nrootless_storage_path = "$XDG_DATA_HOME/containers/storage"\n',
    )
    for features in (OLD, NAMED, MERGED):
        environ = {"HOME": str(host.home), "XDG_RUNTIME_DIR": str(host.run)}
        with pytest.raises(ConfigError, match="the variable XDG_DATA_HOME is not set") as caught:
            discover(NONE, environ, host.account, True, features)
        assert path in str(caught.value)
        assert "rootless_storage_path" in str(caught.value)
        environ["XDG_DATA_HOME"] = "/data"
        found = discover(NONE, environ, host.account, True, features)
        assert found.graphroot == "/data/containers/storage"
        given = StoreOverrides(graphroot="/g")
        del environ["XDG_DATA_HOME"]
        assert discover(given, environ, host.account, True, features).graphroot == "/g"


def test_database_takes_precedence_over_storage_conf(host: Host) -> None:
    graphroot = host.base / "g"
    graphroot.mkdir()
    write_database(str(graphroot / "db.sql"), "/srv/old", "/r", "overlay")
    host.write(host.admin, f'[storage]\ndriver="overlay"\ngraphroot="{graphroot}"\nrunroot="/r"\n')
    found = host.rootful()
    assert found.graphroot == "/srv/old"
    assert found.origin("graphroot").endswith(f"podman's database {graphroot}/db.sql")
    assert "overrides storage.conf" in found.missing()
    assert "podman info" in found.missing()
    assert "--root " not in found.missing()
    # buildah does not read that database.
    buildah = discover(NONE, {}, None, False, capabilities("buildah", (1, 43), (1, 62)))
    assert buildah.graphroot == str(graphroot)


def test_hint_for_a_missing_store_has_a_command_for_its_user(host: Host) -> None:
    found = host.rootless()
    assert "runuser -l alice -s /bin/sh -c " in found.missing()
    assert f"XDG_RUNTIME_DIR={host.run} " in found.missing()
    assert host.rootless(StoreOverrides(graphroot="/g")).missing().startswith("Correct `graphroot`")


# The loader of containers/storage 1.63


def test_drop_ins_are_merged(host: Host) -> None:
    """Drop-ins extend the main file. The interop tests compare the order with podman."""
    host.write(host.admin, FULL)
    host.write(
        f"{host.admin}.d/1.conf",
        "[storage.options]\nadditionalimagestores = ['/ro3', {append = true}]\n"
        "auto-userns-min-size = 0\n[storage.options.overlay]\nmountopt = 'nodev'\n",
    )
    host.write("etc/storage.rootful.conf.d/2.conf", "[storage]\nrunroot = '/r2'\n")
    found = discover(NONE, {"HOME": str(host.home)}, None, False, MERGED)
    assert (found.driver, found.graphroot, found.runroot) == ("overlay", "/g", "/r2")
    assert found.options["mountopt"] == "nodev"
    assert "vfs.ignore_chown_errors" not in found.options
    assert found.additional_image_stores == ("/ro1", "/ro2", "/ro3")
    assert found.auto_userns == AutoUserns(1024, 4096, "pool")
    assert found.sources["runroot"].endswith("2.conf")
    assert [pathlib.Path(path).name for path in found.files] == ["storage.conf", "1.conf", "2.conf"]


@pytest.mark.parametrize(
    "text",
    [
        "[storage.options]\nadditionalimagestores = [{append = 1}]",
        "[storage.options]\nadditionalimagestores = [{prepend = true}]",
        "[storage.options]\nadditionalimagestores = [1]",
        "[storage.options]\nadditionalimagestores = 'x'",
        "[storage]\ndriver_priority = {append = true}",
        "[storage.options.btrfs]\nsize = 1",
    ],
)
def test_invalid_drop_in_is_named_in_the_error(host: Host, text: str) -> None:
    path = host.write(f"{host.admin}.d/1.conf", text)
    with pytest.raises(ConfigError) as caught:
        discover(NONE, {"HOME": str(host.home)}, None, False, MERGED)
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "environ", "command"),
    [
        (NONE, {}, "podman"),
        (NONE, {"STORAGE_DRIVER": "vfs", "LANG": "C"}, "env STORAGE_DRIVER=vfs podman"),
        (
            StoreOverrides(graphroot="/g", runroot="/r", driver="vfs"),
            {"CONTAINERS_STORAGE_CONF": "FILE"},
            "podman --root /g --runroot /r --storage-driver vfs",
        ),
        (
            StoreOverrides(
                runroot="/r", storage_options=("overlay.mountopt=nodev", ".imagestore=/i")
            ),
            {"STORAGE_DRIVER": "overlay"},
            "podman --root BASE/default --runroot /r --storage-driver overlay "
            "--storage-opt overlay.mountopt=nodev --storage-opt overlay.imagestore=/i",
        ),
        (NONE, {"CONTAINERS_STORAGE_CONF": "FILE"}, "env CONTAINERS_STORAGE_CONF=FILE podman"),
        (
            StoreOverrides(storage_conf="FILE"),
            {"CONTAINERS_STORAGE_CONF_OVERRIDE": "FILE"},
            "env CONTAINERS_STORAGE_CONF_OVERRIDE=FILE CONTAINERS_STORAGE_CONF=FILE podman",
        ),
    ],
)
@pytest.mark.parametrize("features", [OLD, MERGED])
def test_commands_in_messages_select_the_store(
    overrides: StoreOverrides,
    environ: t.Dict[str, str],
    command: str,
    features: Capabilities,
    host: Host,
) -> None:
    file = host.base / "named.conf"
    file.write_text("[storage]\n")

    def with_paths(text: str) -> str:
        return text.replace("FILE", str(file)).replace("BASE", str(host.base))

    overrides = dataclasses.replace(overrides, storage_conf=with_paths(overrides.storage_conf))
    variables = {name: with_paths(value) for name, value in environ.items()}
    found = discover(overrides, variables, None, False, features)
    assert " ".join(found.podman) == with_paths(command)
