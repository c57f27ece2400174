# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which loader counts: that of the installed programs, which must agree on the store.

The installed programs are made up here; real ones are asked in tests/interop/test_store_discovery.py.
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
    """A host with these programs, and a drop-in that only new ones read."""

    def __init__(self, base: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base, self.monkeypatch = base, monkeypatch
        self.asked = 0
        monkeypatch.setattr(conf_values, "ADMIN_FILE", str(base / "etc/storage.conf"))
        monkeypatch.setattr(conf_values, "VENDOR_FILE", str(base / "usr/storage.conf"))
        self.write("etc/storage.conf", f"[storage]\ngraphroot = '{base}/main'\nrunroot = '/r'\n")
        self.has(podman=(1, 62))

    def write(self, path: str, text: str) -> None:
        target = self.base / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def has(self, **programs: t.Tuple[int, ...]) -> None:
        """Set what is installed, by version of containers/storage."""

        def installed() -> t.Iterator[t.Any]:
            for name, version in programs.items():
                self.asked += 1
                yield name, capabilities(name, (), version), FoundVersion(version, "")

        self.monkeypatch.setattr(module, "installed", installed)

    def add_drop_in(self, text: str) -> None:
        self.write("etc/storage.conf.d/1.conf", text)

    def ask(self, runtime: str = "", rootless: bool = False, **options: str) -> StoreConfig:
        account = Account("alice", 1000, 1000, str(self.base)) if rootless else None
        environ = {"HOME": str(self.base), "XDG_RUNTIME_DIR": f"{self.base}/run"}
        return configuration(StoreOverrides(**options), environ, account, runtime)


@pytest.fixture
def host(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_no_program_is_looked_at_where_all_loaders_agree(host: Host) -> None:
    assert host.ask().graphroot == f"{host.base}/main"
    host.has()
    assert host.ask().graphroot == f"{host.base}/main"
    assert host.asked == 0


def test_the_installed_loader_counts(host: Host) -> None:
    host.add_drop_in(f"[storage]\ngraphroot = '{host.base}/drop'\n")
    assert host.ask().graphroot == f"{host.base}/main"
    host.has(podman=(1, 64), buildah=(1, 63))
    found = host.ask()
    assert found.graphroot == f"{host.base}/drop"
    assert [path.rpartition("/")[2] for path in found.files] == ["storage.conf", "1.conf"]
    assert found.origin("graphroot") == (
        f"graphroot is set by {host.base}/etc/storage.conf.d/1.conf"
    )


def test_options_of_a_drop_in_alone_are_read_too(host: Host) -> None:
    host.add_drop_in("[storage]\ndriver='overlay'\n[storage.options.overlay]\nmountopt = 'nodev'\n")
    host.has(podman=(1, 64))
    assert host.ask().options == {"mountopt": "nodev"}
    host.has(podman=(1, 61))
    assert host.ask().options == {}


def test_programs_that_disagree(host: Host) -> None:
    host.add_drop_in(f"[storage]\ngraphroot = '{host.base}/drop'\n")
    host.has(podman=(1, 64), buildah=(1, 57))
    with pytest.raises(ConfigError) as caught:
        host.ask()
    message = str(caught.value)
    for part in ("podman (containers/storage 1.64)", "buildah", f"{host.base}/drop", "`graphroot`"):
        assert part in message
    assert host.ask("podman 6.1.0").graphroot == f"{host.base}/drop"
    assert host.ask("podman 5.4.2").graphroot == f"{host.base}/main"
    assert host.ask(graphroot="/g", runroot="/r").graphroot == "/g"
    # What they agree on is podman's to say.
    host.add_drop_in("[storage.options.overlay]\nmountopt = 'nodev'\n")
    assert host.ask().options == {"mountopt": "nodev"}


def test_no_program_at_all(host: Host) -> None:
    host.add_drop_in(f"[storage]\ngraphroot = '{host.base}/drop'\n")
    host.has()
    with pytest.raises(ConfigError, match="no runtime is installed") as caught:
        host.ask()
    assert "`runtime`" in caught.value.hint
    assert f"{host.base}/main" in str(caught.value)
    assert f"{host.base}/drop" in str(caught.value)


def test_cri_o_has_no_rootless_store(host: Host) -> None:
    host.has(podman=(1, 64), **{"cri-o": (1, 57)})
    assert host.ask(rootless=True).graphroot == f"{host.base}/main"
    host.add_drop_in(f"[storage]\ngraphroot = '{host.base}/drop'\n")
    with pytest.raises(ConfigError, match="cri-o"):
        host.ask()


def test_an_error_of_a_file_is_reported_once(host: Host) -> None:
    host.write("etc/storage.conf", "[storage\n")
    with pytest.raises(ConfigError, match=r"etc/storage.conf, line 1"):
        host.ask()
    # Only new programs see this one.
    host.write("etc/storage.conf", "[storage]\nrunroot = '/r'\n")
    host.add_drop_in("[storage\n")
    host.ask()
    host.has(podman=(1, 64))
    with pytest.raises(ConfigError, match=r"1.conf, line 1"):
        host.ask()


def test_a_program_above_the_ceiling(host: Host) -> None:
    """A version that does not exist yet, made up here."""
    for programs, newest in (
        ({"podman": (1, 64, 9)}, ""),
        ({"podman": (1, 65, 0)}, "podman with containers/storage 1.65.0"),
        ({"podman": (1, 57), "buildah": (2, 0)}, "buildah with containers/storage 2.0"),
        ({}, ""),
    ):
        host.has(**programs)
        error = untested(False)
        assert (error.subject if error else "") == newest
    host.has(**{"cri-o": (1, 65)})
    assert untested(True) is None
    error = untested(False)
    assert error is not None
    assert "allow_untested_runtime" in error.hint
    assert "(1.64)" in str(error)
    # What is named counts alone.
    assert untested(False, "podman 5.4.2") is None


def test_all_loaders_are_distinct() -> None:
    assert len(set(LOADERS)) == len(LOADERS) == 6
    assert LOADERS[-1].reads_drop_ins
