# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the store of CRI-O: crio.conf, its drop-ins and variables take precedence over storage.conf.

CRI-O cannot be installed for these tests. The files have the syntax that CRI-O 1.36 writes and reads.
"""

from __future__ import annotations

import os
import pathlib
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import ConfigError
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.configuration import (
    configuration,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime import detect
from ansible_collections.userns.storage.plugins.module_utils._storage.store import (
    conf_crio,
    conf_values,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import (
    Account,
    AutoUserns,
    StoreConfig,
    StoreOverrides,
)


class Node:
    """A host with its own storage.conf and crio.conf."""

    def __init__(self, base: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base, self.monkeypatch = base, monkeypatch
        monkeypatch.setattr(conf_values, "ADMIN_FILE", str(base / "etc/containers/storage.conf"))
        monkeypatch.setattr(conf_values, "VENDOR_FILE", str(base / "usr/storage.conf"))
        monkeypatch.setattr(conf_crio, "MAIN_FILE", str(base / "etc/crio/crio.conf"))
        monkeypatch.setattr(conf_crio, "DROP_IN_FOLDER", str(base / "etc/crio/crio.conf.d"))

    def storage(self, text: str) -> None:
        self.write("etc/containers/storage.conf", text)

    def crio(self, text: str, name: str = "") -> str:
        path = f"etc/crio/crio.conf.d/{name}" if name else "etc/crio/crio.conf"
        return self.write(path, text)

    def write(self, path: str, text: str) -> str:
        target = self.base / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return str(target)

    def install(self, *programs: str) -> None:
        """Install scripts that only print the version of a program."""
        folder = self.base / "bin"
        folder.mkdir(exist_ok=True)
        for program in programs:
            version = {"crio": "1.36.3", "podman": "5.4.2"}[program]
            (folder / program).write_text(f"#!/bin/sh\necho {program} version {version}\n")
            (folder / program).chmod(0o755)
        self.monkeypatch.setattr(detect, "_search_path", lambda: str(folder))

    def discover(
        self, runtime: str = "cri-o 1.36.3", environ: t.Optional[t.Dict[str, str]] = None
    ) -> StoreConfig:
        return configuration(StoreOverrides(), environ or {}, None, runtime)


@pytest.fixture
def node(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(tmp_path, monkeypatch)


def test_storage_conf_is_used_without_crio_conf(node: Node) -> None:
    node.storage(
        "[storage]\ndriver='overlay'\ngraphroot='/s'\nrunroot='/r'\ntransient_store=true\n"
        "[storage.options]\nadditionalimagestores=['/a']\nroot-auto-userns-user='other'\n"
        "auto-userns-max-size=9000\n"
    )
    found = node.discover()
    assert (found.graphroot, found.runroot, found.driver) == ("/s", "/r", "overlay")
    assert found.additional_image_stores == ("/a",)
    # CRI-O opens its store with paths, driver and options only.
    assert (found.transient, found.auto_userns) == (False, AutoUserns())
    assert node.discover("podman 5.4.2").auto_userns.owner == "other"


def test_main_file_overrides_single_keys(node: Node) -> None:
    node.storage("[storage]\ndriver='overlay'\ngraphroot='/s'\nrunroot='/r'\nimagestore='/i'\n")
    path = node.crio(
        '[crio]\nroot = "/c"\nrunroot = ""\nstorage_driver = "vfs"\n'
        '[crio.runtime]\ndefault_runtime = "crun"\n[crio.runtime.runtimes.crun]\nruntime_path = ""\n'
    )
    found = node.discover()
    assert (found.graphroot, found.runroot, found.driver) == ("/c", "/r", "vfs")
    assert found.imagestore == "/i"
    assert found.sources["graphroot"] == path
    assert found.files[-1] == path
    assert found.runtime == "cri-o"
    assert node.discover("podman 5.4.2").graphroot == "/s"


def test_drop_ins_of_any_name_and_folder_are_read_in_lexical_order(node: Node) -> None:
    node.crio("[crio]\nroot='/main'\n")
    node.crio("[crio]\nroot='/first'\nrunroot='/r1'\n", "00-default")
    node.crio("[crio]\nroot='/second'\n", "01-own/a.conf")
    node.crio("[crio]\nrunroot='/r2'\nimagestore='/images'\n", "02.conf~")
    found = node.discover()
    assert (found.graphroot, found.runroot, found.imagestore) == ("/second", "/r2", "/images")
    assert [os.path.basename(path) for path in found.files] == [
        "crio.conf",
        "00-default",
        "a.conf",
        "02.conf~",
    ]
    # In the order of bytes, uppercase letters are before lowercase letters.
    node.crio("[crio]\nroot='/capital'\n", "Z")
    node.crio("[crio]\nroot='/small'\n", "a")
    assert node.discover().graphroot == "/small"


def test_options_of_all_files_are_collected(node: Node) -> None:
    node.storage(
        "[storage]\ndriver='overlay'\n[storage.options]\nadditionalimagestores=['/a']\n"
        "[storage.options.overlay]\nmountopt='nodev'\n"
    )
    node.crio(
        '[crio]\nstorage_option = ["overlay.imagestore=/b", "overlay.mountopt=metacopy=on"]\n'
    )
    node.crio(
        '[crio]\nstorage_option = ["overlay.additionalimagestore=/c", "overlay.mountopt=nodev"]\n',
        "1",
    )
    found = node.discover()
    assert found.additional_image_stores == ("/a", "/b", "/c")
    # The last occurrence of a repeated option is used.
    assert found.options == {"mountopt": "nodev"}
    node.crio("[crio]\nstorage_option = []\n", "2")
    assert node.discover().additional_image_stores == ("/a", "/b", "/c")


def test_variables_of_the_service_override_files(node: Node) -> None:
    node.crio(
        "[crio]\nroot='/c'\nstorage_driver='overlay'\nstorage_option=['overlay.imagestore=/b']\n"
    )
    other = node.write("other.conf", "[crio]\nroot='/other'\n")
    node.write("other.d/1", "[crio]\nrunroot='/r1'\n")
    environ = {"CONTAINER_CONFIG": other, "CONTAINER_CONFIG_DIR": str(node.base / "other.d")}
    found = node.discover(environ=environ)
    assert (found.graphroot, found.runroot) == ("/other", "/r1")
    environ = {
        "CONTAINER_ROOT": "/e",
        "CONTAINER_RUNROOT": "/er",
        "CONTAINER_STORAGE_DRIVER": "vfs",
        "CONTAINER_STORAGE_OPT": "vfs.imagestore=/x,vfs.ignore_chown_errors=true",
        "CONTAINER_IMAGESTORE": "/ei",
    }
    found = node.discover(environ=environ)
    assert (found.graphroot, found.runroot, found.driver) == ("/e", "/er", "vfs")
    assert (found.additional_image_stores, found.imagestore) == (("/x",), "/ei")
    assert found.sources["graphroot"] == "CONTAINER_ROOT"


def test_output_of_crio_config_is_read(node: Node) -> None:
    """``crio config`` prints default values as comments, and configured values as keys."""
    node.crio(
        "# The CRI-O configuration file specifies all of the available configuration options\n"
        '[crio]\n\n# Path to the "root directory".\nroot = "/data/crio"\n\n'
        '# Path to the "run directory".\n# runroot = "/run/containers/storage"\n\n'
        '# Path to the "imagestore".\n# imagestore = ""\n\n# storage_driver = ""\n\n'
        "# List to pass options to the storage driver.\nstorage_option = [\n"
        '\t"overlay.imagestore=/usr/lib/images",\n]\n\nlog_dir = "/var/log/crio/pods"\n\n'
        '[crio.api]\nlisten = "/var/run/crio/crio.sock"\n[crio.metrics]\n# metrics_port = 9090\n'
    )
    found = node.discover()
    assert found.graphroot == "/data/crio"
    assert found.additional_image_stores == ("/usr/lib/images",)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[crio]\nroot = 1\n", "'root'"),
        ("[crio]\nstorage_option = 'overlay.x=1'\n", "'storage_option'"),
        ("[crio\n", "TOML"),
        ("crio = 'x'\n", "'crio'"),
        ("[crio]\nroot = 'relative'\n", "not an absolute path"),
    ],
)
def test_errors_name_the_file(node: Node, text: str, problem: str) -> None:
    path = node.crio(text, "9-broken.conf")
    with pytest.raises(ConfigError, match=problem) as caught:
        node.discover()
    assert path in str(caught.value)
    assert "storage.conf(5)" not in caught.value.hint
    # podman does not read that file.
    assert node.discover("podman 5.4.2").graphroot


def test_missing_named_file_is_an_error(node: Node) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        node.discover(environ={"CONTAINER_CONFIG": "/nonexistent"})


def test_crio_conf_does_not_apply_to_stores_of_users(node: Node, tmp_path: pathlib.Path) -> None:
    node.crio("[crio]\nroot='/c'\n")
    account = Account("alice", 1000, 1000, str(tmp_path))
    environ = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": "/run/user/1000"}
    found = configuration(StoreOverrides(), environ, account, "cri-o 1.36.3")
    assert found.graphroot == f"{tmp_path}/.local/share/containers/storage"


def test_runtime_must_be_named_if_the_programs_use_different_stores(node: Node) -> None:
    node.install("crio")
    node.crio("[crio]\nroot='/c'\n")
    # If only CRI-O is installed, it need not be named.
    found = node.discover("")
    assert (found.graphroot, found.runtime) == ("/c", "cri-o")
    node.install("podman")
    with pytest.raises(ConfigError) as caught:
        node.discover("")
    for part in ("podman", "cri-o", "/c", "runtime: cri-o"):
        assert part in str(caught.value)
    assert node.discover("cri-o").graphroot == "/c"
    assert node.discover("podman").graphroot != "/c"
    node.crio("[crio]\nroot=''\n")
    # A store that both programs use is opened for podman.
    assert node.discover("").runtime == ""


def test_hints_contain_commands_of_the_runtime(node: Node) -> None:
    node.crio("[crio]\nroot='/nonexistent/store'\n")
    assert "crio status info" in node.discover().missing()
    assert "podman" not in node.discover().missing()
    assert "podman info" in node.discover("podman 5.4.2").missing()


def test_empty_imagestore_overrides_storage_conf(node: Node) -> None:
    node.storage("[storage]\ndriver='overlay'\ngraphroot='/s'\nrunroot='/r'\nimagestore='/i'\n")
    node.crio("[crio]\nroot = ''\nimagestore = ''\n")
    found = node.discover()
    assert (found.graphroot, found.imagestore) == ("/s", "")
    node.crio("[crio]\nroot = ''\n")
    assert node.discover().imagestore == "/i"


def test_pause_image_is_read_from_the_last_file_or_the_variable(node: Node) -> None:
    assert conf_crio.pause_image({}) == ""
    node.crio('[crio.image]\npause_image = "example.org/pause:1"\n')
    node.crio('[crio.image]\npause_image = "example.org/pause:2"\n', "10-pause.conf")
    node.crio("[crio.image]\npause_image = ''\n", "20-pause.conf")
    assert conf_crio.pause_image({}) == "example.org/pause:2"
    variables = {"CONTAINER_PAUSE_IMAGE": "example.org/pause:3"}
    assert conf_crio.pause_image(variables) == "example.org/pause:3"


def test_graphroot_that_is_the_imagestore_of_crio_is_rejected(node: Node) -> None:
    path = node.crio("[crio]\nroot='/s'\nrunroot='/r'\nstorage_driver='overlay'\nimagestore='/i'\n")
    with pytest.raises(ConfigError) as caught:
        configuration(StoreOverrides(graphroot="/i"), {}, None, "cri-o 1.36.3")
    assert f"is the imagestore that {path} sets" in str(caught.value)
    assert "Leave out graphroot" in caught.value.hint
