# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter unit_mapping reads units as podman's own quadlet does."""

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


@pytest.fixture(params=SUITES)
def quadlet(
    request: pytest.FixtureRequest, lab: Lab, host: t.Callable[[str], Host]
) -> t.Callable[[t.Mapping[str, str]], t.Dict[str, t.List[str]]]:
    """Has podman's quadlet of another Debian convert units; gives the commands of each service."""
    machine = host(request.param)

    def convert(units: t.Mapping[str, str]) -> t.Dict[str, t.List[str]]:
        folder = lab.folder()
        for name, text in units.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        command = ["/usr/libexec/podman/quadlet", "-dryrun", "-user"]
        # It fails where one unit is refused, and has the others in its output.
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


# Units that nobody would write, and some would

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


def drawn_value(dice: random.Random, key: str) -> str:
    value = dice.choice(_VALUES[key])
    quoting = dice.random()
    if value and quoting < 0.15:
        value = f'"{value}"'
    elif value and quoting < 0.2:
        value = f"'{value}'"
    elif value and quoting < 0.22:
        value = dice.choice((f'"{value}', f'{value}"', f'""{value}""'))
    if value and dice.random() < 0.15:
        place = dice.randrange(len(value) + 1)
        between = dice.choice(("", "# comment\n", "; comment\n", "\n", "  \n"))
        blank = dice.choice(("", " ", "\t"))
        value = f"{value[:place]}\\\n{between}{blank}{value[place:]}"
    return value + dice.choice(("", "", "", " ", "\t"))


def drawn_lines(dice: random.Random, most: int) -> t.List[str]:
    lines = []
    for _number in range(dice.randint(0, most)):
        key = dice.choice(_WEIGHTS)
        equals = dice.choice(("=", "=", "=", " = ", "= ", " ="))
        lines.append(f"{dice.choice(('', '', ' '))}{key}{equals}{drawn_value(dice, key)}")
        if dice.random() < 0.1:
            lines.append(
                dice.choice(("", "# UserNS=nomap", ";UIDMap=0:1:1", "[Service]", "[Container]"))
            )
    return lines


def drawn_unit(dice: random.Random, image: bool = True) -> str:
    lines = ["[Container]", *drawn_lines(dice, 4)]
    if image:
        lines.insert(1, f"Image={dice.choice(_VALUES['Image'])}")
    return "\n".join(lines) + dice.choice(("\n", "", "\n\n", "\n# end\n", "\r\n"))


_OTHERS = {
    "p.pod": "[Pod]\nUIDMap=0:200000:1000\nGIDMap=0:300000:1000\n",
    "q.pod": "[Pod]\n[Service]\nRestart=no\n",
    "b.image": "[Image]\nImage=docker.io/library/b:1\nImageTag=localhost/b:2\n",
    "c.build": "[Build]\nImageTag=localhost/c:1\nImageTag=localhost/c:2\nSetWorkingDirectory=unit\n",
    "d.volume": "[Volume]\nDriver=image\nImage=localhost/v:1\n",
}
_DROPINS = ("{0}.container.d", "container.d", "u-.container.d", "u-1-.container.d", "x.container.d")


def drawn_files(dice: random.Random, count: int) -> t.Dict[str, str]:
    files = dict(_OTHERS)
    for number in range(count):
        name = f"u-{number % 3}-{number}"
        files[f"{name}.container"] = drawn_unit(dice, dice.random() < 0.95)
        if dice.random() < 0.3:
            folder = dice.choice(_DROPINS[:1] * 4 + _DROPINS).format(name)
            text = "\n".join(["[Container]", *drawn_lines(dice, 2)])
            if folder in ("container.d", "u-.container.d", "u-1-.container.d"):
                # Harmless where it counts for many.
                text = (
                    f"[Container]\nSubGIDMap=\n{'Label=a' if dice.random() < 0.5 else 'GIDMap='}\n"
                )
            files[f"{folder}/{dice.choice(('10', '20', 'a'))}.conf"] = text
    return files


def alone(files: t.Mapping[str, str], name: str) -> t.Dict[str, str]:
    """One container's unit with all that is not another container."""
    return {
        path: text
        for path, text in files.items()
        if path == name or not path.endswith(".container")
    }


@pytest.mark.parametrize("seed", range(3))
def test_drawn_units_mean_what_quadlet_makes_of_them(
    quadlet: t.Callable[..., t.Dict[str, t.List[str]]], seed: int
) -> None:
    """Where we say something it is what quadlet says; what we refuse is refused for a reason that is known."""
    dice = random.Random(seed)
    files = drawn_files(dice, 400)
    services = quadlet(files)
    equal = nothing = refused = 0
    for name in [path for path in files if path.endswith(".container")]:
        words = services.get(name.removesuffix(".container"))
        known_reason, reason = False, ""
        try:
            calls = unit_mapping(alone(files, name))
        except AnsibleFilterError as error:
            refused += 1
            # Quadlet refuses it too, or drops a part without a word, or podman itself refuses what comes of it.
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
            known_reason = any(word in str(error) for word in known)
            calls, reason = None, str(error)
        if calls is None:
            assert words is None or known_reason, (reason, files[name])
            continue
        if words is None:
            # What quadlet refuses for another reason than its mapping has none here either.
            assert calls == [], (name, files[name])
            continue
        told = given(words)
        for pod in ("p", "q"):
            # podman up to 5.5 names a file, later ones the pod.
            if f"%t/{pod}-pod.pod-id" in words or f"systemd-{pod}" in words:
                told = {**given(services[f"{pod}-pod"]), **told}
        for option in ("userns", "subuidname", "subgidname"):
            # The last one counts.
            if option in told:
                told[option] = told[option][-1:]
        if told in ({}, {"userns": ["host"]}):
            assert calls == [], (name, files[name], words)
            nothing += 1
            continue
        assert len(calls) == 1, (name, files[name], words)
        (call,) = calls
        found = expected(call["mappings"][0])
        assert found == told, (name, files[name], words)
        assert call["images"][0] in words, (name, files[name], words)
        equal += 1
    # Most of them say something.
    assert equal > 60, (equal, nothing, refused)
    assert nothing > 40, (equal, nothing, refused)
    assert refused > 20, (equal, nothing, refused)


def test_drop_ins_of_all_folders(quadlet: t.Callable[..., t.Dict[str, t.List[str]]]) -> None:
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
        calls = unit_mapping(alone(files, f"{name}.container"))
        found = expected(calls[0]["mappings"][0]) if calls else {}
        assert found == given(services[name]), name


def test_specifiers_and_variables_are_left_to_systemd(
    quadlet: t.Callable[..., t.Dict[str, t.List[str]]],
) -> None:
    """Quadlet passes them on as they are, so what we replace is what systemd replaces."""
    unit = "[Container]\nImage=localhost/%i:${TAG}\nUserNS=keep-id:uid=${ID}\n[Service]\nEnvironment=TAG=7 ID=5\n"
    services = quadlet({"w@.container": unit, "w@one.container": unit})
    for name in ("w@", "w@one"):
        assert "localhost/%i:${TAG}" in services[name]
        assert given(services[name]) == {"userns": ["keep-id:uid=${ID}"]}
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
    """A manifest with an annotation of the object, one of the template, and hostUsers, where given."""
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
    """A host with ranges for automatic namespaces, for one test alone."""
    machine = Host(lab, request.param)
    # Debian's newest libsubid knows the ranges only of users that there are.
    lines = {"passwd": "containers:x:990:990::/:/bin/false", "group": "containers:x:990:"}
    lines.update(dict.fromkeys(("subuid", "subgid"), "containers:1000000:200000"))
    for file, line in lines.items():
        machine.run(["sh", "-c", f"echo {line} >> /etc/{file}"])
    yield machine
    machine.close()


def test_manifests_mean_what_podman_makes_of_them(
    own_host: Host, make_store: t.Callable[..., Store], small_image: Image
) -> None:
    """The pods that podman kube play creates have a user namespace where we say so, and of the size that we say."""
    store = make_store("vfs", small_image, machine=own_host)
    folder = store.lab.folder(0o755)
    # The root has no program for the pause image, which nothing is started of here.
    (folder / "override.conf").write_text('[engine]\ninfra_image = "localhost/small:1"\n')
    override = {"CONTAINERS_CONF_OVERRIDE": str(folder / "override.conf")}
    for name, (text, userns) in KUBE.items():
        (folder / "web.yaml").write_text(text)
        words = [
            "kube",
            "play",
            "--start=false",
            "--network=host",
            *(["--userns", userns] if userns else []),
        ]
        done = store.podman(*words, str(folder / "web.yaml"), env=override, check=False)
        # Of kinds that it does not know podman makes nothing, and says so by its status or not at all.
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
            asked = calls[0]["mappings"][0]["userns"]
            if "size" in asked:
                assert sum(item["size"] for item in maps[0]) == 4096, name
        else:
            assert not any(maps), name
        store.podman("pod", "rm", "--all", "--force")
        store.podman("rm", "--all", "--force")
