# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter unit_mapping reads units as podman's own quadlet does."""

from __future__ import annotations

import shlex
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.filter.unit_mapping import unit_mapping
from support.hosts import Host
from support.lab import Lab

IMAGE = "docker.io/library/postgres:17"
OPTIONS = ("userns", "uidmap", "gidmap", "subuidname", "subgidname")

UNITS = {
    "keep-id": ["UserNS=keep-id:uid=200,gid=210"],
    "auto": ["UserNS=auto:size=5000"],
    "host": ["UserNS=host"],
    "nothing": [],
    "maps": ["UIDMap=0:1:10", "UIDMap=10:20:5 15:30:5", "GIDMap=+5:@7:1"],
    "emptied": ["UIDMap=0:1:10", "UIDMap=", "UIDMap=0:9:10"],
    "names": ["SubUIDMap=alice", "SubGIDMap=bob"],
    "continued": ["UserNS=\\", "  nomap"],
    "last": ["UserNS=nomap", "UserNS=keep-id"],
    "remap-manual": ["RemapUsers=manual", "RemapUid=0:1:10", "RemapUid=10:20:5", "RemapGid=0:2:10"],
    "remap-auto": ["RemapUsers=auto", "RemapUid=0:1:2", "RemapGid=0:3:4", "RemapUidSize=500"],
    "remap-bare": ["RemapUsers=auto"],
    "remap-keep-id": ["RemapUsers=keep-id", "RemapUid=5", "RemapGid=6"],
    "arguments": ["PodmanArgs=--uidmap 0:1:10 '--gidmap=0:2:10'", "PodmanArgs=--tz=local"],
    "both": ["UIDMap=0:1:10", "PodmanArgs=--uidmap=10:20:5"],
    "percent": ["UserNS=keep-id", "Environment=A=50%%"],
}


def given(words: t.Sequence[str]) -> t.Dict[str, t.List[str]]:
    """The options for user namespaces on a command line."""
    found: t.Dict[str, t.List[str]] = {}
    queue = list(words)
    while queue:
        option, equals, value = queue.pop(0).partition("=")
        if option[2:] in OPTIONS and option.startswith("--"):
            found.setdefault(option[2:], []).append(value if equals else queue.pop(0))
    return found


def expected(mapping: t.Mapping[str, t.Any]) -> t.Dict[str, t.List[str]]:
    """A mapping of ours as such options."""
    return {key: value if isinstance(value, list) else [value] for key, value in mapping.items()}


@pytest.fixture(params=["trixie", "sid"])
def quadlet(
    request: pytest.FixtureRequest, lab: Lab, host: t.Callable[[str], Host]
) -> t.Callable[[t.Mapping[str, str]], t.Dict[str, t.List[str]]]:
    """Has podman's quadlet of another Debian convert units; gives the commands of each service."""
    machine = host(request.param)

    def convert(units: t.Mapping[str, str]) -> t.Dict[str, t.List[str]]:
        folder = lab.folder()
        for name, text in units.items():
            (folder / name).write_text(text)
        command = ["/usr/libexec/podman/quadlet", "-dryrun", "-user"]
        text = machine.run(command, env={"QUADLET_UNIT_DIRS": str(folder)}).stdout
        services: t.Dict[str, t.List[str]] = {}
        name = ""
        for line in text.splitlines():
            if line.startswith("---"):
                name = line.strip("-").removesuffix(".service")
            if line.startswith(("ExecStart=", "ExecStartPre=")):
                services.setdefault(name, []).extend(shlex.split(line.partition("=")[2]))
        return services

    return convert


def test_containers(quadlet: t.Callable[..., t.Dict[str, t.List[str]]]) -> None:
    units = {
        f"{name}.container": "\n".join(["[Container]", f"Image={IMAGE}", *lines, ""])
        for name, lines in UNITS.items()
    }
    services = quadlet(units)
    for name, text in units.items():
        words = services[name.removesuffix(".container")]
        assert IMAGE in words
        told = given(words)
        calls = unit_mapping(text)
        if told in ({}, {"userns": ["host"]}):
            assert calls == []
            continue
        assert calls == [{"images": [IMAGE], "mappings": calls[0]["mappings"]}]
        assert expected(calls[0]["mappings"][0]) == told, name


def test_pods_images_and_builds(quadlet: t.Callable[..., t.Dict[str, t.List[str]]]) -> None:
    units = {
        "web.pod": "[Pod]\nUIDMap=0:200000:1000\nGIDMap=0:300000:1000\n",
        "one.container": f"[Container]\nImage={IMAGE}\nPod=web.pod\n",
        "two.container": "[Container]\nImage=two.image\nUserNS=keep-id\n",
        "two.image": "[Image]\nImage=docker.io/library/redis:8\n",
        "three.container": "[Container]\nImage=three.build\nUserNS=keep-id\n",
        "three.build": "[Build]\nImageTag=localhost/three:1\nSetWorkingDirectory=unit\n",
    }
    services = quadlet(units)
    calls = unit_mapping(units)
    assert len(calls) == 3
    for call, name in zip(calls, ("one", "two", "three")):
        assert call["images"][0] in services[name]
    assert expected(calls[0]["mappings"][0]) == given(services["web-pod"])
    assert given(services["one"]) == {}
    assert expected(calls[1]["mappings"][0]) == given(services["two"])
