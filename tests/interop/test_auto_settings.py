# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test that layer_template applies the settings for userns=auto in storage.conf as podman does."""

from __future__ import annotations

import json
import pathlib
import typing as t

import pytest
from support.hosts import Host
from support.images import Image
from support.lab import Lab
from support.modules import run_module
from support.stores import Store

_SETTINGS = """\
[storage.options]
root-auto-userns-user = "poolx"
auto-userns-min-size = 5000
auto-userns-max-size = {max_size}
"""
_POOL = 700_000_000


@pytest.mark.parametrize("name", ["local", "trixie", "sid", "experimental"])
def test_settings_are_applied_as_by_podman(
    name: str,
    lab: Lab,
    host: t.Callable[[str], Host],
    make_store: t.Callable[..., Store],
    small_image: Image,
) -> None:
    machine = lab.machine if name == "local" else host(name)
    etc = pathlib.Path(getattr(machine, "root", "/"), "etc")
    original = {item: (etc / item).read_bytes() for item in ("subuid", "subgid", "passwd")}
    try:
        for item in ("subuid", "subgid"):
            with open(etc / item, "a", encoding="utf-8") as file:
                file.write(f"poolx:{_POOL}:90000\n")
        with open(etc / "passwd", "a", encoding="utf-8") as file:
            file.write("poolx:x:61999:61999::/nonexistent:/usr/sbin/nologin\n")
        store = make_store("overlay-forced", small_image, machine=machine)
        # podman 4.3.1 also counts the group nogroup of the host, 65534.
        counts_host_groups = machine.version("podman")[:2] == (4, 3)
        max_size = 70000 if counts_host_groups else 9000
        settings = _SETTINGS.format(max_size=max_size)
        store.storage_conf.write_text(store.storage_conf.read_text() + settings)
        args = {
            "storage_conf": str(store.storage_conf),
            "images": [small_image.name],
            "userns": "auto:size=5500",
        }
        environ = store.env()

        def layer(**options: t.Any) -> t.Dict[str, t.Any]:
            result = run_module(
                lab, "layer_template", {**args, **options}, environ=environ, machine=machine
            )
            (entry,) = result["layers"]
            return t.cast(t.Dict[str, t.Any], entry)

        def layer_fails(**options: t.Any) -> str:
            result = run_module(
                lab,
                "layer_template",
                {**args, **options},
                environ=environ,
                machine=machine,
                fails=True,
            )
            return str(result["msg"])

        assert layer()["uidmap"] == [f"0:{_POOL}:5500"]
        message = layer_fails(userns="auto:size=80001", slots=2)
        assert "2 slots of 80001 IDs each exceed the free IDs, only 1 are possible" in message
        plain = layer(userns="auto")
        (start, size) = (int(part) for part in plain["uidmap"][0].split(":")[1:])
        assert start == _POOL
        assert size >= 5000
        before = store.mapped_layers(small_image.name)
        store.create(small_image.name, "--userns=auto", "--name=one")
        (inspected,) = json.loads(store.podman("inspect", "one").stdout)
        assert inspected["HostConfig"]["IDMappings"]["UidMap"] == [f"0:{_POOL}:{size}"]
        # podman used the pre-mapped layer.
        assert store.mapped_layers(small_image.name) == before
        # podman 4.3.1 reads etc/group below its working directory.
        warnings = run_module(
            lab, "layer_template", {**args, "userns": "auto"}, environ=environ, machine=machine
        ).get("warnings", [])
        if not counts_host_groups:
            assert warnings == []
            return
        store.podman("create", "--userns=auto", "--name=two", small_image.name, cwd=str(store.base))
        (inspected,) = json.loads(store.podman("inspect", "two").stdout)
        assert inspected["HostConfig"]["IDMappings"]["UidMap"] == [f"0:{_POOL + size}:5000"]
        assert f"uses {size} IDs for an image when it is started in /" in json.dumps(warnings)
        assert "and 5000 when it is started elsewhere" in json.dumps(warnings)
        store.podman("rm", "two")
        created = layer(userns="auto:size=5000")
        assert created["uidmap"] == [f"0:{_POOL + size}:5000"]
        before = store.mapped_layers(small_image.name)
        store.podman("create", "--userns=auto", "--name=two", small_image.name, cwd=str(store.base))
        assert store.mapped_layers(small_image.name) == before
    finally:
        for item, content in original.items():
            (etc / item).write_bytes(content)
