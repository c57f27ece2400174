# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the choice of the configuration loader: that of the installed programs, which must agree on the store.

The installed programs are simulated; tests/interop/test_store_discovery.py uses real ones.
"""

from __future__ import annotations

import pathlib
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.capabilities import (
    LOADERS,
    capabilities,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import ConfigError
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    configuration as module,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.configuration import (
    configuration,
    untested,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime.storage_version import (
    FoundVersion,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store import conf_values
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import (
    Account,
    StoreConfig,
    StoreOverrides,
)


class Host:
    """A host with given programs, and a drop-in that only new programs read."""

    def __init__(self, base: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base, self.monkeypatch = base, monkeypatch
        self.detections = 0
        monkeypatch.setattr(conf_values, "ADMIN_FILE", str(base / "etc/storage.conf"))
        monkeypatch.setattr(conf_values, "VENDOR_FILE", str(base / "usr/storage.conf"))
        self.write("etc/storage.conf", f"[storage]\ngraphroot = '{base}/main'\nrunroot = '/r'\n")
        self.install(podman=(1, 62))

    def write(self, path: str, text: str) -> None:
        target = self.base / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def install(self, **programs: t.Tuple[int, ...]) -> None:
        """Set the installed programs and their containers/storage versions."""

        def installed() -> t.Iterator[t.Any]:
            for name, version in programs.items():
                self.detections += 1
                yield name, capabilities(name, (), version), FoundVersion(version, "")

        self.monkeypatch.setattr(module, "installed", installed)

    def add_drop_in(self, text: str) -> None:
        self.write("etc/storage.conf.d/1.conf", text)

    def load(self, runtime: str = "", rootless: bool = False, **options: t.Any) -> StoreConfig:
        account = Account("alice", 1000, 1000, str(self.base)) if rootless else None
        environ = {"HOME": str(self.base), "XDG_RUNTIME_DIR": f"{self.base}/run"}
        return configuration(StoreOverrides(**options), environ, account, runtime)


@pytest.fixture
def host(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_programs_are_not_examined_if_all_loaders_agree(host: Host) -> None:
    assert host.load().graphroot == f"{host.base}/main"
    host.install()
    assert host.load().graphroot == f"{host.base}/main"
    assert host.detections == 0


def test_loader_of_installed_program_is_used(host: Host) -> None:
    host.add_drop_in(f"[storage]\ngraphroot = '{host.base}/drop'\n")
    assert host.load().graphroot == f"{host.base}/main"
    host.install(podman=(1, 64), buildah=(1, 63))
    found = host.load()
    assert found.graphroot == f"{host.base}/drop"
    assert [path.rpartition("/")[2] for path in found.files] == ["storage.conf", "1.conf"]
    assert found.origin("graphroot") == (
        f"graphroot is set by {host.base}/etc/storage.conf.d/1.conf"
    )


def test_driver_options_of_drop_in_are_read(host: Host) -> None:
    host.add_drop_in("[storage]\ndriver='overlay'\n[storage.options.overlay]\nmountopt = 'nodev'\n")
    host.install(podman=(1, 64))
    assert host.load().options == {"mountopt": "nodev"}
    host.install(podman=(1, 61))
    assert host.load().options == {}


def test_disagreement_of_programs_is_reported(host: Host) -> None:
    host.add_drop_in(f"[storage]\ngraphroot = '{host.base}/drop'\n")
    host.install(podman=(1, 64), buildah=(1, 57))
    with pytest.raises(ConfigError) as caught:
        host.load()
    message = str(caught.value)
    for part in ("podman (containers/storage 1.64)", "buildah", f"{host.base}/drop", "`graphroot`"):
        assert part in message
    assert host.load("podman 6.1.0").graphroot == f"{host.base}/drop"
    assert host.load("podman 5.4.2").graphroot == f"{host.base}/main"
    assert host.load(graphroot="/g", runroot="/r").graphroot == "/g"
    # If the programs agree on the store, the options are those of podman.
    host.add_drop_in("[storage.options.overlay]\nmountopt = 'nodev'\n")
    assert host.load().options == {"mountopt": "nodev"}


def test_missing_runtime_is_reported(host: Host) -> None:
    host.add_drop_in(f"[storage]\ngraphroot = '{host.base}/drop'\n")
    host.install()
    with pytest.raises(ConfigError, match="no runtime is installed") as caught:
        host.load()
    assert "`runtime`" in caught.value.hint
    assert f"{host.base}/main" in str(caught.value)
    assert f"{host.base}/drop" in str(caught.value)


def test_cri_o_is_ignored_for_rootless_store(host: Host) -> None:
    host.install(podman=(1, 64), **{"cri-o": (1, 57)})
    assert host.load(rootless=True).graphroot == f"{host.base}/main"
    host.add_drop_in(f"[storage]\ngraphroot = '{host.base}/drop'\n")
    with pytest.raises(ConfigError, match="cri-o"):
        host.load()


def test_error_in_file_is_reported(host: Host) -> None:
    host.write("etc/storage.conf", "[storage\n")
    with pytest.raises(ConfigError, match=r"etc/storage.conf, line 1"):
        host.load()
    # Only new programs read the drop-in.
    host.write("etc/storage.conf", "[storage]\nrunroot = '/r'\n")
    host.add_drop_in("[storage\n")
    host.load()
    host.install(podman=(1, 64))
    with pytest.raises(ConfigError, match=r"1.conf, line 1"):
        host.load()


def test_program_newer_than_tested_versions_is_reported(host: Host) -> None:
    """The untested versions do not exist yet."""
    for programs, newest in (
        ({"podman": (1, 64, 9)}, ""),
        ({"podman": (1, 65, 0)}, "podman with containers/storage 1.65.0"),
        ({"podman": (1, 57), "buildah": (2, 0)}, "buildah with containers/storage 2.0"),
        ({}, ""),
    ):
        host.install(**programs)
        error = untested(False)
        assert (error.subject if error else "") == newest
    host.install(**{"cri-o": (1, 65)})
    assert untested(True) is None
    error = untested(False)
    assert error is not None
    assert "allow_untested_runtime" in error.hint
    assert "(1.64)" in str(error)
    # If a runtime is named, only that runtime is checked.
    assert untested(False, "podman 5.4.2") is None


def test_all_loaders_are_distinct() -> None:
    assert len(set(LOADERS)) == len(LOADERS) == 6
    assert LOADERS[-1].reads_drop_ins
