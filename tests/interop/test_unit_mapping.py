# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare the filter unit_mapping with podman's quadlet and podman kube play."""

from __future__ import annotations

import random
import typing as t

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.userns.storage.plugins.filter.unit_mapping import unit_mapping
from ansible_collections.userns.storage.plugins.plugin_utils._units import split
from support.hosts import SUITES, Host
from support.images import Image
from support.lab import Lab
from support.stores import Store

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


def mapping_options(command: t.Sequence[str]) -> t.Dict[str, t.List[str]]:
    """The user namespace options of a command line."""
    found: t.Dict[str, t.List[str]] = {}
    queue = list(command)
    while queue:
        option, equals, value = queue.pop(0).partition("=")
        if option[2:] in OPTIONS and option.startswith("--"):
            found.setdefault(option[2:], []).append(value if equals else queue.pop(0))
    return found


def as_options(mapping: t.Mapping[str, t.Any]) -> t.Dict[str, t.List[str]]:
    """A mapping of the filter's result as options."""
    return {key: value if isinstance(value, list) else [value] for key, value in mapping.items()}


@pytest.fixture(params=SUITES)
def quadlet(
    request: pytest.FixtureRequest, lab: Lab, host: t.Callable[[str], Host]
) -> t.Callable[[t.Mapping[str, str]], t.Dict[str, t.List[str]]]:
    """Convert units with quadlet of a Debian release; returns the commands of each service."""
    machine = host(request.param)

    def convert(units: t.Mapping[str, str]) -> t.Dict[str, t.List[str]]:
        folder = lab.folder()
        for name, text in units.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        command = ["/usr/libexec/podman/quadlet", "-dryrun", "-user"]
        # It fails if it refuses a unit, but prints the others.
        done = machine.run(command, env={"QUADLET_UNIT_DIRS": str(folder)}, check=False)
        text = done.stdout
        services: t.Dict[str, t.List[str]] = {}
        name = ""
        for line in text.splitlines():
            if line.startswith("---"):
                name = line.strip("-").removesuffix(".service")
            if line.startswith(("ExecStart=", "ExecStartPre=")):
                services.setdefault(name, []).extend(split(line.partition("=")[2], True))
        return services

    return convert


def test_containers_agree_with_quadlet(quadlet: t.Callable[..., t.Dict[str, t.List[str]]]) -> None:
    units = {
        f"{name}.container": "\n".join(["[Container]", f"Image={IMAGE}", *lines, ""])
        for name, lines in UNITS.items()
    }
    services = quadlet(units)
    for name, text in units.items():
        command = services[name.removesuffix(".container")]
        assert IMAGE in command
        options = mapping_options(command)
        calls = unit_mapping(text)
        if options in ({}, {"userns": ["host"]}):
            assert calls == []
            continue
        assert calls == [{"images": [IMAGE], "mappings": calls[0]["mappings"]}]
        assert as_options(calls[0]["mappings"][0]) == options, name


def test_pods_images_and_builds_agree_with_quadlet(
    quadlet: t.Callable[..., t.Dict[str, t.List[str]]],
) -> None:
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
    assert as_options(calls[0]["mappings"][0]) == mapping_options(services["web-pod"])
    assert mapping_options(services["one"]) == {}
    assert as_options(calls[1]["mappings"][0]) == mapping_options(services["two"])


# Random units, including unusual ones

_VALUES: t.Dict[str, t.Tuple[str, ...]] = {
    "UserNS": ("keep-id", "keep-id:uid=5,gid=6", "nomap", "auto", "auto:size=5000", "host", ""),
    "UIDMap": ("0:1:10", "0:1:10 10:20:5", "+5:@7:1", "", "0:1:10\t10:20:5"),
    "GIDMap": ("0:1:10", "u5:@7:1", ""),
    "SubUIDMap": ("alice", ""),
    "SubGIDMap": ("bob", ""),
    "RemapUsers": ("auto", "manual", "keep-id", "", "host", "nonsense"),
    "RemapUid": ("0:1:10", "5", ""),
    "RemapGid": ("0:1:10", "6", ""),
    "RemapUidSize": ("500", "0x10", "010", "x", "", "-5"),
    "PodmanArgs": (
        "--userns=keep-id",
        "--userns keep-id",
        "--uidmap 0:1:10 '--gidmap=0:2:10'",
        '"--userns" "nomap"',
        "--tz=local --subuidname=a",
        "--label=\\x41\\x42 --userns=host",
        "",
    ),
    "Image": (
        IMAGE,
        "localhost/a:1",
        f"docker.io/library/redis@sha256:{'a' * 64}",
        "b.image",
        "c.build",
    ),
    "Pod": ("p.pod", "q.pod", ""),
    "Environment": ("A=B", "UserNS=nomap"),
}
_WEIGHTS = [*_VALUES, "UserNS", "UserNS", "UIDMap", "PodmanArgs"]


def random_value(generator: random.Random, key: str) -> str:
    value = generator.choice(_VALUES[key])
    quoting = generator.random()
    if value and quoting < 0.15:
        value = f'"{value}"'
    elif value and quoting < 0.2:
        value = f"'{value}'"
    elif value and quoting < 0.22:
        value = generator.choice((f'"{value}', f'{value}"', f'""{value}""'))
    if value and generator.random() < 0.15:
        offset = generator.randrange(len(value) + 1)
        between = generator.choice(("", "# comment\n", "; comment\n", "\n", "  \n"))
        blank = generator.choice(("", " ", "\t"))
        value = f"{value[:offset]}\\\n{between}{blank}{value[offset:]}"
    return value + generator.choice(("", "", "", " ", "\t"))


def random_lines(generator: random.Random, limit: int) -> t.List[str]:
    lines = []
    for _number in range(generator.randint(0, limit)):
        key = generator.choice(_WEIGHTS)
        equals = generator.choice(("=", "=", "=", " = ", "= ", " ="))
        lines.append(
            f"{generator.choice(('', '', ' '))}{key}{equals}{random_value(generator, key)}"
        )
        if generator.random() < 0.1:
            lines.append(
                generator.choice(
                    ("", "# UserNS=nomap", ";UIDMap=0:1:1", "[Service]", "[Container]")
                )
            )
    return lines


def random_unit(generator: random.Random, image: bool = True) -> str:
    lines = ["[Container]", *random_lines(generator, 4)]
    if image:
        lines.insert(1, f"Image={generator.choice(_VALUES['Image'])}")
    return "\n".join(lines) + generator.choice(("\n", "", "\n\n", "\n# end\n", "\r\n"))


_OTHERS = {
    "p.pod": "[Pod]\nUIDMap=0:200000:1000\nGIDMap=0:300000:1000\n",
    "q.pod": "[Pod]\n[Service]\nRestart=no\n",
    "b.image": "[Image]\nImage=docker.io/library/b:1\nImageTag=localhost/b:2\n",
    "c.build": "[Build]\nImageTag=localhost/c:1\nImageTag=localhost/c:2\nSetWorkingDirectory=unit\n",
    "d.volume": "[Volume]\nDriver=image\nImage=localhost/v:1\n",
}
_DROPINS = ("{0}.container.d", "container.d", "u-.container.d", "u-1-.container.d", "x.container.d")


def random_files(generator: random.Random, count: int) -> t.Dict[str, str]:
    files = dict(_OTHERS)
    for number in range(count):
        name = f"u-{number % 3}-{number}"
        files[f"{name}.container"] = random_unit(generator, generator.random() < 0.95)
        if generator.random() < 0.3:
            folder = generator.choice(_DROPINS[:1] * 4 + _DROPINS).format(name)
            text = "\n".join(["[Container]", *random_lines(generator, 2)])
            if folder in ("container.d", "u-.container.d", "u-1-.container.d"):
                # Drop-ins that apply to many units contain only harmless settings.
                text = f"[Container]\nSubGIDMap=\n{'Label=a' if generator.random() < 0.5 else 'GIDMap='}\n"
            files[f"{folder}/{generator.choice(('10', '20', 'a'))}.conf"] = text
    return files


def without_other_containers(files: t.Mapping[str, str], name: str) -> t.Dict[str, str]:
    """A container's unit and all files that are not units of other containers."""
    return {
        path: text
        for path, text in files.items()
        if path == name or not path.endswith(".container")
    }


@pytest.mark.parametrize("seed", range(3))
def test_random_units_agree_with_quadlet(
    quadlet: t.Callable[..., t.Dict[str, t.List[str]]], seed: int
) -> None:
    """Mappings are those of quadlet; units are refused only if quadlet refuses them or for a known reason."""
    generator = random.Random(seed)
    files = random_files(generator, 400)
    services = quadlet(files)
    mapped = unmapped = refused = 0
    for name in [path for path in files if path.endswith(".container")]:
        command = services.get(name.removesuffix(".container"))
        known_reason, reason = False, ""
        try:
            calls = unit_mapping(without_other_containers(files, name))
        except AnsibleFilterError as error:
            refused += 1
            # quadlet refuses the unit, too, or silently drops a part, or podman refuses the command.
            known = (
                *("quotation mark", "which versions of quadlet read differently", "an empty word"),
                *("cannot be combined", "only the pod can have maps", "is neither of", "has no"),
                *(
                    "userns",
                    "RemapUidSize",
                    "continues on a missing line",
                    "without a value",
                    "map entry",
                    "is not an image reference",
                ),
            )
            known_reason = any(part in str(error) for part in known)
            calls, reason = None, str(error)
        if calls is None:
            assert command is None or known_reason, (reason, files[name])
            continue
        if command is None:
            # quadlet refuses the unit for a reason other than its mapping; the filter returns no mapping.
            assert calls == [], (name, files[name])
            continue
        options = mapping_options(command)
        for pod in ("p", "q"):
            # Up to podman 5.5 the command has the pod's ID file, later the name of the pod.
            if f"%t/{pod}-pod.pod-id" in command or f"systemd-{pod}" in command:
                options = {**mapping_options(services[f"{pod}-pod"]), **options}
        for option in ("userns", "subuidname", "subgidname"):
            # The last value is used.
            if option in options:
                options[option] = options[option][-1:]
        if options in ({}, {"userns": ["host"]}):
            assert calls == [], (name, files[name], command)
            unmapped += 1
            continue
        assert len(calls) == 1, (name, files[name], command)
        (call,) = calls
        found = as_options(call["mappings"][0])
        assert found == options, (name, files[name], command)
        assert call["images"][0] in command, (name, files[name], command)
        mapped += 1
    # The comparison is meaningful only with many units of each kind.
    assert mapped > 60, (mapped, unmapped, refused)
    assert unmapped > 40, (mapped, unmapped, refused)
    assert refused > 20, (mapped, unmapped, refused)


def test_drop_ins_agree_with_quadlet(quadlet: t.Callable[..., t.Dict[str, t.List[str]]]) -> None:
    unit = f"[Container]\nImage={IMAGE}\nUserNS=nomap\n"
    files = {
        **{
            f"{name}.container": unit
            for name in ("plain", "a-b-c", "t@", "t@one", "a-b@two", "other")
        },
        "container.d/10.conf": "[Container]\nUserNS=keep-id:uid=10\n",
        "a-.container.d/20.conf": "[Container]\nUserNS=keep-id:uid=20\n",
        "a-b-.container.d/10.conf": "[Container]\nUserNS=keep-id:uid=30\n",
        "t@.container.d/30.conf": "[Container]\nUserNS=keep-id:uid=40\n",
        "t@one.container.d/05.conf": "[Container]\nUserNS=keep-id:uid=50\n",
        "a-b@two.container.d/90.conf": "[Container]\nUserNS=keep-id:uid=60\n",
        "other.container.d/10.conf": "[Container]\nUIDMap=\nUserNS=\n",
        "other.container.d/readme.txt": "[Container]\nUserNS=auto\n",
    }
    services = quadlet(files)
    for name in ("plain", "a-b-c", "t@", "t@one", "a-b@two", "other"):
        calls = unit_mapping(without_other_containers(files, f"{name}.container"))
        found = as_options(calls[0]["mappings"][0]) if calls else {}
        assert found == mapping_options(services[name]), name


def test_specifiers_and_variables_are_expanded_as_by_systemd(
    quadlet: t.Callable[..., t.Dict[str, t.List[str]]],
) -> None:
    """quadlet does not expand them, so the filter expands them as systemd does."""
    unit = "[Container]\nImage=localhost/%i:${TAG}\nUserNS=keep-id:uid=${ID}\n[Service]\nEnvironment=TAG=7 ID=5\n"
    services = quadlet({"w@.container": unit, "w@one.container": unit})
    for name in ("w@", "w@one"):
        assert "localhost/%i:${TAG}" in services[name]
        assert mapping_options(services[name]) == {"userns": ["keep-id:uid=${ID}"]}
    assert unit_mapping({"w@.container": unit, "w@one.container": unit}) == [
        {"images": ["localhost/one:7"], "mappings": [{"userns": "keep-id:uid=5"}]}
    ]


# podman kube play

POD = "kind: Pod\nmetadata: {{name: web{more}}}\nspec: {{{users}containers: [{{name: c, image: {image}}}]}}\n"
TEMPLATE = (
    "apiVersion: apps/v1\nkind: {kind}\nmetadata: {{name: web{more}}}\nspec:\n  selector: {{matchLabels: {{a: b}}}}\n"
    "  template:\n    metadata: {{labels: {{a: b}}{inner}}}\n"
    "    spec: {{{users}containers: [{{name: c, image: {image}}}]}}\n"
)
NOTE = "io.podman.annotations.userns"


def manifest(text: str, **parts: str) -> str:
    """A manifest with optional annotations of the object and of the template, and optional hostUsers."""
    notes = {
        key: f", annotations: {{{parts[key]}}}" if key in parts else "" for key in ("more", "inner")
    }
    users = f"hostUsers: {parts['users']}, " if "users" in parts else ""
    kind, image = parts.get("kind", "Deployment"), "localhost/small:1"
    return text.format(**notes, users=users, kind=kind, image=image)


KUBE = {
    "nothing": (manifest(POD), ""),
    "users": (manifest(POD, users="false"), ""),
    "users-true": (manifest(POD, users="true"), ""),
    "annotated": (manifest(POD, more=f"{NOTE}: 'auto:size=4096'"), ""),
    "by-name": (manifest(POD, more=f"{NOTE}/web: 'auto:size=4096'"), ""),
    "by-other-name": (manifest(POD, more=f"{NOTE}/other: 'auto:size=4096'"), ""),
    "private": (manifest(POD, more=f"{NOTE}: private"), ""),
    "host-before-users": (manifest(POD, more=f"{NOTE}: host", users="false"), ""),
    "unit-host": (manifest(POD, more=f"{NOTE}: auto"), "host"),
    "unit-auto": (manifest(POD), "auto:size=4096"),
    "deployment": (manifest(TEMPLATE, more=f"{NOTE}: 'auto:size=4096'"), ""),
    "deployment-by-name": (manifest(TEMPLATE, more=f"{NOTE}/web-pod: 'auto:size=4096'"), ""),
    "template": (manifest(TEMPLATE, inner=f"{NOTE}: 'auto:size=4096'"), ""),
    "deployment-users": (manifest(TEMPLATE, users="false"), ""),
    "daemon-set": (manifest(TEMPLATE, kind="DaemonSet", users="false"), ""),
    "job": (manifest(TEMPLATE, kind="Job", users="false"), ""),
    "stateful-set": (manifest(TEMPLATE, kind="StatefulSet", users="false"), ""),
    "cron-job": (
        "kind: CronJob\nmetadata: {name: web}\nspec: {jobTemplate: {spec: {template: {spec: {hostUsers: false,"
        " containers: [{name: c, image: localhost/small:1}]}}}}}\n",
        "",
    ),
}


@pytest.fixture(params=["trixie", "experimental"])
def own_host(request: pytest.FixtureRequest, lab: Lab) -> t.Iterator[Host]:
    """A host with ranges for automatic namespaces, which no other test uses."""
    machine = Host(lab, request.param)
    # libsubid of Debian experimental returns ranges only of existing users.
    lines = {"passwd": "containers:x:990:990::/:/bin/false", "group": "containers:x:990:"}
    lines.update(dict.fromkeys(("subuid", "subgid"), "containers:1000000:200000"))
    for file, line in lines.items():
        machine.run(["sh", "-c", f"echo {line} >> /etc/{file}"])
    yield machine
    machine.close()


def test_manifests_agree_with_kube_play(
    own_host: Host, make_store: t.Callable[..., Store], small_image: Image
) -> None:
    """Pods that podman kube play creates have the user namespaces that the filter returns, in the same size."""
    store = make_store("vfs", small_image, machine=own_host)
    folder = store.lab.folder(0o755)
    # The host has no program for the pause image; since no container is started, any image will do.
    (folder / "override.conf").write_text('[engine]\ninfra_image = "localhost/small:1"\n')
    override = {"CONTAINERS_CONF_OVERRIDE": str(folder / "override.conf")}
    for name, (text, userns) in KUBE.items():
        (folder / "web.yaml").write_text(text)
        command = [
            "kube",
            "play",
            "--start=false",
            "--network=host",
            *(["--userns", userns] if userns else []),
        ]
        done = store.podman(*command, str(folder / "web.yaml"), env=override, check=False)
        # podman creates nothing for unsupported kinds, with or without an error.
        assert done.rc == 0 or name in ("stateful-set", "cron-job", "job"), (name, done.stderr)
        made = {
            container["id"]: container["layer"]
            for container in store.containers()
            if "-c" in "".join(container["names"])
        }
        maps = [store.layer(layer).get("uidmap") for layer in made.values()]
        unit = "[Kube]\nYaml=web.yaml\n" + (f"UserNS={userns}\n" if userns else "")
        calls = unit_mapping({"web.kube": unit, "web.yaml": text})
        if calls:
            assert len(maps) == 1, name
            assert maps[0], name
            userns_option = calls[0]["mappings"][0]["userns"]
            if "size" in userns_option:
                assert sum(item["size"] for item in maps[0]) == 4096, name
        else:
            assert not any(maps), name
        store.podman("pod", "rm", "--all", "--force")
        store.podman("rm", "--all", "--force")
