# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test that storage_conf writes a file or drop-in that podman reads and that does not affect other users."""

from __future__ import annotations

import pathlib
import typing as t

import pytest
from support import hosts

Json = t.Dict[str, t.Any]
STORE = "{{.Store.GraphDriverName}} {{.Store.GraphRoot}} {{.Store.GraphOptions}}"
EARLIER = """\
[storage]
driver = "overlay"
runroot = "/run/containers/storage"
graphroot = "/var/lib/containers/storage"

[storage.options.overlay]
mountopt = "metacopy=on"
"""


class Site:
    """A machine whose /etc/containers and rootful store are private to the test."""

    def __init__(self, lab: t.Any, machine: t.Any, run_module: t.Any, user: t.Any) -> None:
        self.machine, self._run_module, self.user = machine, run_module, user
        self.mounted = ("/etc/containers", "/var/lib/containers")
        for path in self.mounted:
            machine.run(["mkdir", "-p", path])
            machine.run(["mount", "--bind", str(lab.folder()), path])

    def close(self) -> None:
        for path in self.mounted:
            self.machine.run(["umount", "-l", path], check=False)

    def declare(self, **options: t.Any) -> Json:
        run_options = {name: options.pop(name) for name in ("check", "diff") if name in options}
        result: Json = self._run_module(
            "storage_conf", options, machine=self.machine, **run_options
        )
        return result

    def write(self, path: str, text: str) -> None:
        self.machine.run(["mkdir", "-p", str(pathlib.PurePath(path).parent)])
        self.machine.run(["tee", path], stdin=text)

    def read(self, path: str) -> str:
        return str(self.machine.run(["cat", path]).stdout)

    def files(self) -> t.List[str]:
        """Files below /etc/containers; the names of backups are shortened to '.conf~'."""
        found = self.machine.run(
            ["find", "/etc/containers", "-type", "f", "-printf", "%P\n"]
        ).stdout
        return sorted(
            name.split(".conf.")[0] + ".conf~" if name.endswith("~") else name
            for name in found.split()
        )

    def rootful_info(self) -> str:
        return str(self.machine.run(["podman", "info", "--format", STORE]).stdout)

    def run_rootless(self) -> t.Any:
        return self.machine.run(["podman", "images"], account=self.user, check=False)


@pytest.fixture(params=["sid", "experimental"])
def newest(
    lab: t.Any, host: t.Any, make_user: t.Any, run_module: t.Any, request: t.Any
) -> t.Iterator[Site]:
    """A host whose podman merges drop-ins."""
    machine = host(request.param)
    site = Site(lab, machine, run_module, make_user(machine))
    yield site
    site.close()


@pytest.fixture(params=["bookworm", "trixie"])
def older(
    lab: t.Any, host: t.Any, make_user: t.Any, run_module: t.Any, request: t.Any
) -> t.Iterator[Site]:
    """A host whose podman reads a single file."""
    machine = hosts.of_release(lab, request.param, host)
    site = Site(lab, machine, run_module, make_user(machine))
    yield site
    site.close()


DROP_IN = "storage.rootful.conf.d/50-userns-storage.conf"


def test_rootful_keys_are_in_drop_in_that_rootless_podman_ignores(newest: Site) -> None:
    assert newest.declare(metacopy=True, check=True)["changed"]
    assert newest.files() == []
    made = newest.declare(metacopy=True, settings={"driver": "overlay"})
    assert (made["file"], made["moved"]) == (f"/etc/containers/{DROP_IN}", "")
    assert newest.files() == [DROP_IN]
    assert not newest.declare(metacopy=True, settings={"driver": "overlay"})["changed"]
    # The keys are added to the settings of the distribution's file.
    assert (
        newest.rootful_info()
        == "overlay /var/lib/containers/storage map[overlay.mountopt:nodev,metacopy=on]\n"
    )
    assert newest.run_rootless().rc == 0


def test_file_of_earlier_run_is_moved_once(newest: Site) -> None:
    newest.write("/etc/containers/storage.conf", EARLIER)
    failed = newest.run_rootless()
    assert failed.rc != 0, "this podman no longer needs the move"
    assert "permission denied" in failed.stderr
    before = newest.rootful_info()
    predicted = newest.declare(metacopy=True, check=True, diff=True)
    assert predicted["changed"]
    assert newest.files() == ["storage.conf"]
    moved = newest.declare(metacopy=True, diff=True)
    assert moved["moved"] == "/etc/containers/storage.conf"
    assert [item["after"] for item in moved["diff"]] == [
        item["after"] for item in predicted["diff"]
    ]
    assert newest.read(moved["backup_file"]) == EARLIER
    assert newest.files() == ["storage.conf~", DROP_IN]
    assert newest.rootful_info() == before
    assert newest.run_rootless().rc == 0
    repeated = newest.declare(metacopy=True)
    assert (repeated["changed"], repeated["moved"]) == (False, "")


def test_copy_of_shipped_file_is_moved(newest: Site, lab: t.Any) -> None:
    """An earlier run creates this file on Debian 12 and 13, and it remains after an upgrade."""
    shipped = pathlib.Path("/usr/share/containers/storage.conf").read_text()
    text = shipped.replace('mountopt = "nodev"\n', 'mountopt = "nodev,metacopy=on"\n')
    assert text != shipped
    newest.write("/etc/containers/storage.conf", text)
    assert newest.run_rootless().rc != 0
    assert newest.declare(metacopy=True)["moved"] == "/etc/containers/storage.conf"
    assert (
        newest.rootful_info()
        == "overlay /var/lib/containers/storage map[overlay.mountopt:nodev,metacopy=on]\n"
    )
    assert newest.run_rootless().rc == 0


@pytest.mark.parametrize(
    "text",
    [
        '# ours, do not touch\n[storage]\ndriver = "overlay"\nrunroot = "/run/containers/storage"\n',
        '[storage]\ndriver = "overlay"\nrunroot = "/run/containers/storage"\ngraphroot = "/srv/containers"\n',
    ],
)
def test_file_not_written_by_module_is_kept_with_warning(newest: Site, text: str) -> None:
    newest.write("/etc/containers/storage.conf", text)
    for options in ({}, {"settings": {"overlay.mountopt": "+nodev"}}):
        done = newest.declare(**options)
        (warning,) = done["warnings"]
        assert "/etc/containers/storage.conf sets " in str(warning)
        assert "storage.rootful.conf.d" in str(warning)
        assert newest.read("/etc/containers/storage.conf") == text
    newest.write(
        "/etc/containers/storage.conf", '[storage]\nrunroot = "/run/user/$UID/containers"\n'
    )
    assert "warnings" not in newest.declare()


def test_keys_of_user_are_in_drop_in(newest: Site) -> None:
    made = newest.declare(user=newest.user.name, settings={"driver": "vfs"})
    home = newest.user.home
    assert made["file"] == f"{home}/.config/containers/storage.conf.d/50-userns-storage.conf"
    assert newest.run_rootless().rc == 0
    assert (pathlib.Path(home) / ".local/share/containers/storage/vfs-images").is_dir()
    assert not newest.declare(user=newest.user.name, settings={"driver": "vfs"})["changed"]
    assert newest.files() == []


def test_keys_for_older_podman_are_in_single_file(older: Site) -> None:
    made = older.declare(metacopy=True)
    assert made["file"] == "/etc/containers/storage.conf"
    assert older.files() == ["storage.conf"]
    assert (
        older.rootful_info()
        == "overlay /var/lib/containers/storage map[overlay.mountopt:nodev,metacopy=on]\n"
    )
    # Rootless podman ignores the paths of the rootful store in this file.
    assert older.run_rootless().rc == 0
    older.declare(user=older.user.name, settings={"driver": "overlay"})
    assert pathlib.Path(older.user.home, ".config/containers/storage.conf").read_text() == (
        '[storage]\ndriver = "overlay"\n'
    )
    assert older.run_rootless().rc == 0
