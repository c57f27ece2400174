# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The roles reject invalid variables before they read or write anything."""

from __future__ import annotations

import pathlib
import typing as t

import pytest
from support import managed_hosts

LOCAL = {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}


@pytest.fixture
def refused(play: t.Any, lab: t.Any) -> t.Callable[..., t.List[str]]:
    """refused(role, *cases): run a role on a host for each case, in check mode and without it.

    The role must fail on every host and change nothing. Returns the error messages of each host.
    """

    def run(role: str, *cases: t.Mapping[str, t.Any]) -> t.List[str]:
        names = [f"host{number}" for number in range(len(cases))]
        fixed = {**LOCAL, "prepare_install": False}
        hosts = {name: {**fixed, **case} for name, case in zip(names, cases)}
        subids = [pathlib.Path(f"/etc/sub{kind}").read_text() for kind in ("uid", "gid")]
        output = ""
        for options in (["--check"], []):
            done = play(f"userns.storage.{role}", {"all": {"hosts": hosts}}, *options, fails=True)
            for name in names:
                recap = done.recap(name)
                assert (recap["changed"], recap["failed"]) == (0, 1), done.output
            assert "Copy the images" not in done.output
            output = done.output
        assert subids == [pathlib.Path(f"/etc/sub{kind}").read_text() for kind in ("uid", "gid")]
        lines = output.splitlines()
        return ["\n".join(line for line in lines if f"fatal: [{name}]" in line) for name in names]

    return run


def test_misspelt_variables_are_rejected(refused: t.Any) -> None:
    for role, names in (
        ("prepare", {"prepare_user": "prepare_users", "prepare_image": "prepare_images"}),
        ("prune", {"prune_unsed_for": "prune_unused_for"}),
        ("report", {"report_user": "report_users"}),
    ):
        outputs = refused(role, *({name: "x"} for name in names))
        for (name, intended), output in zip(names.items(), outputs):
            assert f"{name} (did you mean {intended}?)" in output


def test_unknown_variables_are_rejected_unless_ignored(refused: t.Any, play: t.Any) -> None:
    variables = {"prune_rosebushes": True, "prune_rootful": False, "prune_users": []}
    (output,) = refused("prune", variables)
    assert "prune_rosebushes" in output
    variables["prune_ignore_variables"] = "prune_rosebushes"
    play("userns.storage.prune", {"all": {"hosts": {"one": {**LOCAL, **variables}}}})


def test_missing_users_are_rejected(refused: t.Any, make_user: t.Any) -> None:
    existing = make_user(subordinate=0).name
    names = ("zoe", "-zoe", "../zoe", "0")
    outputs = refused("prepare", *({"prepare_users": [existing, name]} for name in names))
    outputs += refused(
        "prune",
        *({"prune_users": [name]} for name in names),
        *({"prune_policies": {name: {"unused_for": "2w"}}} for name in names),
    )
    for name, output in zip(names * 3, outputs):
        assert f"no such user on this host: {name}." in output


def test_invalid_mappings_are_rejected(refused: t.Any) -> None:
    mappings = {
        "keep-it": "'keep-it'",
        "0:x:1": "'0:x:1'",
        "auto:size=x": "'x'",
        "0:1:2/zoe": "'zoe'",
    }
    images = {"prepare_images": "localhost/nowhere:1"}
    outputs = refused("prepare", *({**images, "prepare_mappings": mapping} for mapping in mappings))
    for quoted, output in zip(mappings.values(), outputs):
        assert quoted in output


def test_invalid_storage_conf_keys_are_rejected(refused: t.Any) -> None:
    (output,) = refused("prepare", {"prepare_storage_options": "overlay"})
    assert "overlay" in output


def test_check_mode_works_without_python_apt(play: t.Any, lab: t.Any) -> None:
    host = managed_hosts.ManagedHost(lab, "debian13")
    assert host.machine.run(["python3", "-c", "import apt"], check=False).rc != 0
    variables = {**host.variables, "prepare_rootful": True}
    for packages, predicted in (("", 0), ("cowsay", 1)):
        hosts = {"all": {"hosts": {"one": {**variables, "prepare_packages": packages}}}}
        done = play("userns.storage.prepare", hosts, "--check")
        recap = done.recap("one")
        assert (recap["failed"], recap["changed"]) == (0, predicted), done.output


def test_prepare_ignores_variables_of_other_services(play: t.Any, lab: t.Any) -> None:
    variables = {"prepare_install": False, "prepare_service": "absent", "service_port": 80}
    done = play("userns.storage.prepare", {"all": {"hosts": {"one": {**LOCAL, **variables}}}})
    assert "userns.storage.service : Check whether systemd runs" in done.output
