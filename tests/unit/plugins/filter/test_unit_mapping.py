# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What units and manifests ask for, as options of layer_template."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
from ansible.errors import AnsibleFilterError
from ansible.module_utils.common.yaml import yaml_load
from ansible_collections.userns.storage.plugins.filter import unit_mapping as plugin
from ansible_collections.userns.storage.plugins.filter.unit_mapping import unit_mapping
from ansible_collections.userns.storage.plugins.modules import layer_template

ROOT = Path(__file__).resolve().parents[4]
IMAGE = "docker.io/library/postgres:17"


def container(*lines: str) -> str:
    """A .container unit."""
    return "\n".join(["[Unit]", "After=x", "[Container]", f"Image={IMAGE}", *lines, ""])


def call(**mapping: t.Any) -> list[dict[str, t.Any]]:
    """The one call for the unit's image."""
    return [{"images": [IMAGE], "mappings": [mapping]}]


@pytest.mark.parametrize(
    ("lines", "mapping"),
    [
        (["UserNS=keep-id"], {"userns": "keep-id"}),
        (["UserNS=keep-id:uid=200,gid=210"], {"userns": "keep-id:uid=200,gid=210"}),
        (["UserNS=nomap"], {"userns": "nomap"}),
        (["UserNS=auto:size=500"], {"userns": "auto:size=500"}),
        (["UIDMap=0:1:10", "UIDMap=+5:@7:1"], {"uidmap": ["0:1:10", "+5:@7:1"]}),
        (["UIDMap=0:1:10 10:20:5"], {"uidmap": ["0:1:10", "10:20:5"]}),
        (["GIDMap=0:1:10"], {"gidmap": ["0:1:10"]}),
        (["SubUIDMap=a", "SubGIDMap=b"], {"subuidname": "a", "subgidname": "b"}),
        (["UserNS=nomap", "UserNS=keep-id"], {"userns": "keep-id"}),
        (["UIDMap=0:1:10", "UIDMap=", "UIDMap=0:9:10"], {"uidmap": ["0:9:10"]}),
        (["UserNS=\\", "  keep-id"], {"userns": "keep-id"}),
        (["# UserNS=nomap", "; UserNS=nomap", " UserNS = keep-id "], {"userns": "keep-id"}),
        (["UserNS=keep-id", "[Service]", "UserNS=nomap"], {"userns": "keep-id"}),
        (["UserNS=nomap", "[Service]", "X=1", "[Container]", "UserNS=auto"], {"userns": "auto"}),
        (["RemapUsers=manual", "RemapUid=0:1:10", "RemapGid=0:2:10"],
         {"uidmap": ["0:1:10"], "gidmap": ["0:2:10"]}),
        (["RemapUsers=auto"], {"userns": "auto"}),
        (["RemapUsers=auto", "RemapUid=0:1:2", "RemapGid=0:3:4", "RemapUidSize=500"],
         {"userns": "auto:uidmapping=0:1:2,gidmapping=0:3:4,size=500"}),
        (["RemapUsers=keep-id"], {"userns": "keep-id"}),
        (["RemapUsers=keep-id", "RemapUid=5", "RemapGid=6"], {"userns": "keep-id:uid=5,gid=6"}),
        (["PodmanArgs=--userns=keep-id --tz=local"], {"userns": "keep-id"}),
        (["PodmanArgs=--userns keep-id"], {"userns": "keep-id"}),
        (["PodmanArgs=--uidmap 0:1:10 '--gidmap=0:2:10'"],
         {"uidmap": ["0:1:10"], "gidmap": ["0:2:10"]}),
        (["PodmanArgs=--subuidname=a", "PodmanArgs=--subgidname b"],
         {"subuidname": "a", "subgidname": "b"}),
        (["UserNS=nomap", "PodmanArgs=--userns=keep-id"], {"userns": "keep-id"}),
        (["UIDMap=0:1:10", "PodmanArgs=--uidmap=10:20:5"], {"uidmap": ["0:1:10", "10:20:5"]}),
    ],
)  # fmt: skip
def test_containers(lines: list[str], mapping: dict[str, t.Any]) -> None:
    assert unit_mapping(container(*lines)) == call(**mapping)


@pytest.mark.parametrize(
    "lines",
    [[], ["UserNS=host"], ["PodmanArgs=--network=host"], ["UserNS=keep-id", "Rootfs=/srv/x"]],
)
def test_without_a_namespace_of_its_own_there_is_no_call(lines: list[str]) -> None:
    assert unit_mapping(container(*lines)) == []


def test_slots_and_runtime() -> None:
    auto = container("UserNS=auto")
    assert unit_mapping(auto, slots=3) == call(userns="auto", slots=3)
    fixed = container("UserNS=keep-id")
    assert unit_mapping(fixed, slots=3, runtime="podman 5.4.2") == call(
        userns="keep-id", runtime="podman 5.4.2"
    )


def test_specifiers() -> None:
    unit = "[Container]\nImage=localhost/%i:1%%\nUserNS=keep-id:uid=%U"
    assert unit_mapping(unit, specifiers={"i": "web", "U": 1000}) == [
        {"images": ["localhost/web:1%"], "mappings": [{"userns": "keep-id:uid=1000"}]}
    ]
    with pytest.raises(AnsibleFilterError, match=r"UserNS has %U.*specifiers"):
        unit_mapping(unit)


POD = "[Pod]\nPodName=web\nUserNS=auto:size=2000\n"


def test_pods() -> None:
    unit = container("Pod=web.pod")
    assert unit_mapping(unit, pod=POD) == call(userns="auto:size=2000")
    assert unit_mapping({"web.pod": POD, "db.container": unit}) == call(userns="auto:size=2000")
    assert unit_mapping(unit, pod="[Pod]\n") == []
    alone = [{"images": [], "mappings": [{"userns": "auto:size=2000"}]}]
    assert unit_mapping(POD) == alone
    assert unit_mapping("[Pod]\n") == []
    with pytest.raises(AnsibleFilterError, match=r"from the pod web\.pod: give"):
        unit_mapping(unit)
    with pytest.raises(AnsibleFilterError, match="only the pod can have maps"):
        unit_mapping(container("Pod=web.pod", "UserNS=keep-id"), pod=POD)
    with pytest.raises(AnsibleFilterError, match=r"from the pod db: give"):
        unit_mapping(container("PodmanArgs=--pod db"))


def test_images_of_other_units() -> None:
    pulled = container("UserNS=keep-id").replace(IMAGE, "db.image")
    built = container("UserNS=keep-id").replace(IMAGE, "app.build")
    files = {
        "db.container": pulled,
        "app.container": built,
        "db.image": f"[Image]\nImage={IMAGE}\n",
        "app.build": "[Build]\nImageTag=localhost/app:1\nImageTag=localhost/app:latest\nFile=x\n",
    }
    assert [one["images"] for one in unit_mapping(files)] == [[IMAGE], ["localhost/app:1"]]
    files["db.image"] += "ImageTag=localhost/db:1\n"
    assert unit_mapping(files)[0]["images"] == ["localhost/db:1"]
    with pytest.raises(AnsibleFilterError, match=r"from the unit db\.image: give all units"):
        unit_mapping(pulled)
    files["app.build"] = "[Build]\n"
    with pytest.raises(AnsibleFilterError, match=r"app\.build does not name its image"):
        unit_mapping(files)


MANIFEST = """\
---
apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  hostUsers: false
  initContainers:
    - {name: first, image: "localhost/init:1"}
  containers:
    - {name: one, image: "docker.io/library/nginx:1.29"}
    - {name: two, image: "localhost/init:1"}
---
apiVersion: v1
kind: ConfigMap
data: {a: b}
---
apiVersion: apps/v1
kind: Deployment
spec:
  template:
    spec:
      hostUsers: false
      containers: [{image: "localhost/deployed:1"}]
---
apiVersion: batch/v1
kind: CronJob
spec: {jobTemplate: {spec: {template: {spec: {hostUsers: false, containers: [{image: "localhost/job:1"}]}}}}}
---
apiVersion: v1
kind: List
items:
  - {kind: Pod, spec: {hostUsers: false, containers: [{image: "localhost/listed:1"}]}}
---
apiVersion: v1
kind: Pod
spec: {containers: [{image: "localhost/with-host-users:1"}]}
---
"""
IMAGES = [
    ["localhost/init:1", "docker.io/library/nginx:1.29"],
    ["localhost/deployed:1"],
    ["localhost/job:1"],
    ["localhost/listed:1"],
]


def block(start: int) -> dict[str, t.Any]:
    """The map of a pod that the kubelet has given these IDs."""
    return {
        "uidmap": [f"0:{start}:65536"],
        "gidmap": [f"0:{start}:65536"],
        "runtime": "cri-o",
    }


def test_manifests_for_cri_o() -> None:
    found = unit_mapping(MANIFEST)
    assert found == [{"images": images, "mappings": [block(65536)]} for images in IMAGES]
    two = unit_mapping(MANIFEST, slots=2, first_id=131072)
    assert two[0]["mappings"] == [block(131072), block(196608)]
    assert unit_mapping(MANIFEST, runtime="cri-o 1.33.0")[0]["mappings"] == [
        {**block(65536), "runtime": "cri-o 1.33.0"}
    ]
    as_json = json.dumps(
        {"kind": "Pod", "spec": {"hostUsers": False, "containers": [{"image": "x"}]}}
    )
    assert unit_mapping(as_json)[0]["images"] == ["x"]


def test_manifests_for_podman() -> None:
    found = unit_mapping(MANIFEST, runtime="podman", slots=2)
    mapping = {"userns": "auto", "slots": 2, "runtime": "podman"}
    assert found == [{"images": images, "mappings": [mapping]} for images in IMAGES]
    noted = """\
kind: Pod
metadata: {annotations: {io.podman.annotations.userns: keep-id}}
spec: {containers: [{image: x}]}
"""
    unit = "[Kube]\nYaml=web.yaml\n"
    files = {"web.kube": unit, "web.yaml": noted}
    assert unit_mapping(files) == [{"images": ["x"], "mappings": [{"userns": "keep-id"}]}]
    files["web.kube"] = f"{unit}UserNS=nomap\n"
    assert unit_mapping(files) == [{"images": ["x"], "mappings": [{"userns": "nomap"}]}]
    files["web.kube"] = unit.replace("web.yaml", "./sub/web.yaml")
    assert unit_mapping(files)[0]["mappings"] == [{"userns": "keep-id"}]
    with pytest.raises(AnsibleFilterError, match=r"names the manifest web\.yaml: give all files"):
        unit_mapping(unit)
    # Without a .kube unit it is CRI-O's.
    assert unit_mapping({"web.yaml": MANIFEST})[0]["mappings"] == [block(65536)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (5, "not int"),
        (None, "not NoneType"),
        ({"a.container": 5}, "not dict"),
        ("[Volume]\nX=1\n", r"no section \[Container\]"),
        ("nothing of the kind", "neither a unit"),
        ("a: [", "neither a unit nor YAML"),
        ("a: 1", "manifest with a kind"),
        ("kind: Pod", "Pod has no spec"),
        ("kind: Pod\nspec: {hostUsers: false}", "has no containers"),
        ("kind: Pod\nspec: {hostUsers: false, containers: 5}", "containers is no list"),
        ("kind: Pod\nspec: {hostUsers: false, containers: [{}]}", "one of containers has no image"),
        ("kind: Job\nspec: {template: 5}", "has no spec.template.spec"),
        ("[Container]\nUserNS=keep-id\n", "has no Image="),
        (container("what is this"), "line 5: 'what is this' is not KEY=VALUE"),
        (container("UserNS=keep-it"), "userns keep-it"),
        (container("UIDMap=0:1:x"), "0:1:x"),
        (container("UserNS=keep-id", "UIDMap=0:1:1"), "cannot be combined"),
        (container("UserNS=container:db"), "joins the user namespace"),
        (container("PodmanArgs=--userns"), "--userns without a value"),
        (container("PodmanArgs=--userns='x"), "No closing quotation"),
        (container("RemapUid=0:1:1"), "without RemapUsers"),
        (container("RemapUsers=some"), "'some', not manual"),
        (container("RemapUsers=keep-id", "RemapUid=1", "RemapUid=2"), "takes one RemapUid"),
    ],
)
def test_bad_input(given: t.Any, words: str) -> None:
    with pytest.raises(AnsibleFilterError, match=words):
        unit_mapping(given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slots": 0}, "slots is 0"),
        ({"slots": "2"}, "slots is '2'"),
        ({"first_id": True}, "first_id is True"),
        ({"slots": 70000}, "more than there are"),
    ],
)
def test_bad_options(options: dict[str, t.Any], words: str) -> None:
    with pytest.raises(AnsibleFilterError, match=words):
        unit_mapping(MANIFEST, **options)


def test_what_is_given_are_options_of_the_module() -> None:
    options = yaml_load(layer_template.DOCUMENTATION)["options"]
    suboptions = options["mappings"]["suboptions"]
    texts = [container(*lines) for lines in (["UserNS=auto"], ["UIDMap=0:1:1", "GIDMap=0:1:1"])]
    for text in [*texts, MANIFEST]:
        for one in unit_mapping(text, slots=2):
            assert set(one) <= set(options)
            for mapping in one["mappings"]:
                assert set(mapping) <= set(suboptions)


def test_examples_run(tmp_path: Path) -> None:
    tasks = yaml_load(plugin.EXAMPLES)
    # Shown instead of carried out: what the module would be given.
    for task in tasks:
        if "userns.storage.layer_template" in task:
            task["ansible.builtin.debug"] = {"msg": task.pop("userns.storage.layer_template")}
    units = tmp_path / "quadlets"
    units.mkdir()
    (units / "web.pod").write_text(POD)
    (units / "db.container").write_text(container("Pod=web.pod"))
    playbook = tmp_path / "play.json"
    playbook.write_text(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]))
    environment = {**os.environ, "HOME": str(tmp_path), "ANSIBLE_CALLBACK_RESULT_FORMAT": "yaml"}
    environment["ANSIBLE_LOCAL_TEMP"] = environment["ANSIBLE_REMOTE_TEMP"] = str(tmp_path / "tmp")
    if ROOT.parent.parent.name == "ansible_collections":
        environment["ANSIBLE_COLLECTIONS_PATH"] = str(ROOT.parents[2])
    # ansible-test's own copy of ansible-core has no programs, only what they call.
    program = "import sys; from ansible.cli.playbook import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "-i", "localhost,", "-c", "local"]
    done = subprocess.run(
        [*command, str(playbook)], env=environment, cwd=tmp_path, capture_output=True, check=False
    )
    said = done.stdout.decode() + done.stderr.decode()
    assert done.returncode == 0, said
    for expected in (
        "auto:size=70000",
        "0:200000:65536",
        "0:196608:65536",
        "auto:size=2000",
        IMAGE,
    ):
        assert expected in said
