# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What storage.conf says about userns=auto, from the file to podman's real container."""

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
auto-userns-max-size = {most}
"""
_POOL = 700_000_000


@pytest.mark.parametrize("name", ["local", "trixie", "sid", "experimental"])
def test_the_settings_are_those_of_podman(
    name: str,
    lab: Lab,
    host: t.Callable[[str], Host],
    make_store: t.Callable[..., Store],
    small_image: Image,
) -> None:
    machine = lab.machine if name == "local" else host(name)
    etc = pathlib.Path(getattr(machine, "root", "/"), "etc")
    kept = {item: (etc / item).read_bytes() for item in ("subuid", "subgid", "passwd")}
    try:
        for item in ("subuid", "subgid"):
            with open(etc / item, "a", encoding="utf-8") as file:
                file.write(f"poolx:{_POOL}:90000\n")
        with open(etc / "passwd", "a", encoding="utf-8") as file:
            file.write("poolx:x:61999:61999::/nonexistent:/usr/sbin/nologin\n")
        store = make_store("overlay-forced", small_image, machine=machine)
        # podman 4.3.1 counts the group nogroup of the host, 65534.
        old = machine.version("podman")[:2] == (4, 3)
        most = 70000 if old else 9000
        settings = _SETTINGS.format(most=most)
        store.storage_conf.write_text(store.storage_conf.read_text() + settings)
        words = {
            "storage_conf": str(store.storage_conf),
            "images": [small_image.name],
            "userns": "auto:size=5500",
        }
        environ = store.env()

        def layer(**more: t.Any) -> t.Dict[str, t.Any]:
            made = run_module(
                lab, "layer_template", {**words, **more}, environ=environ, machine=machine
            )
            (found,) = made["layers"]
            return t.cast(t.Dict[str, t.Any], found)

        def layer_fails(**more: t.Any) -> str:
            made = run_module(
                lab,
                "layer_template",
                {**words, **more},
                environ=environ,
                machine=machine,
                fails=True,
            )
            return str(made["msg"])

        assert layer()["uidmap"] == [f"0:{_POOL}:5500"]
        refused = layer_fails(userns="auto:size=80001", slots=2)
        assert "2 slots of 80001 IDs each exceed the free IDs, only 1 are possible" in refused
        plain = layer(userns="auto")
        (start, size) = (int(part) for part in plain["uidmap"][0].split(":")[1:])
        assert start == _POOL
        assert size >= 5000
        before = store.mapped_layers(small_image.name)
        store.create(small_image.name, "--userns=auto", "--name=one")
        (shown,) = json.loads(store.podman("inspect", "one").stdout)
        assert shown["HostConfig"]["IDMappings"]["UidMap"] == [f"0:{_POOL}:{size}"]
        # podman took the layer that was made for it.
        assert store.mapped_layers(small_image.name) == before
        # podman 4.3.1 counts the groups of the folder in which it is started.
        told = run_module(
            lab, "layer_template", {**words, "userns": "auto"}, environ=environ, machine=machine
        ).get("warnings", [])
        if not old:
            assert told == []
            return
        store.podman("create", "--userns=auto", "--name=two", small_image.name, cwd=str(store.base))
        (shown,) = json.loads(store.podman("inspect", "two").stdout)
        assert shown["HostConfig"]["IDMappings"]["UidMap"] == [f"0:{_POOL + size}:5000"]
        assert f"uses {size} IDs for an image when it is started in /" in json.dumps(told)
        assert "and 5000 when it is started elsewhere" in json.dumps(told)
        store.podman("rm", "two")
        made = layer(userns="auto:size=5000")
        assert made["uidmap"] == [f"0:{_POOL + size}:5000"]
        before = store.mapped_layers(small_image.name)
        store.podman("create", "--userns=auto", "--name=two", small_image.name, cwd=str(store.base))
        assert store.mapped_layers(small_image.name) == before
    finally:
        for one, content in kept.items():
            (etc / one).write_bytes(content)
