# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the filter unit_mapping, which converts units and manifests to options of layer_template."""

from __future__ import annotations

import contextlib
import json
import typing as t
from pathlib import Path

import pytest
from ansible.errors import AnsibleFilterError
from ansible.module_utils.common.yaml import yaml_load
from ansible_collections.userns.storage.plugins.doc_fragments._mapping import ModuleDocFragment
from ansible_collections.userns.storage.plugins.filter import unit_mapping as plugin
from ansible_collections.userns.storage.plugins.filter.unit_mapping import unit_mapping
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.grammar import (
    parse_request,
    resolve_auto_extras,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime import auto, forms
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime.detect import runtime
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import AutoUserns
from ansible_collections.userns.storage.plugins.modules import layer_template
from hypothesis import given
from hypothesis import strategies as st
from support.local_play import run_tasks

ROOT = Path(__file__).resolve().parents[4]
IMAGE = "docker.io/library/postgres:17"


def container(*lines: str) -> str:
    """A .container unit."""
    return "\n".join(["[Unit]", "After=x", "[Container]", f"Image={IMAGE}", *lines, ""])


def call(**mapping: t.Any) -> list[dict[str, t.Any]]:
    """The only call, for the image of the unit."""
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
def test_container_units_are_converted(lines: list[str], mapping: dict[str, t.Any]) -> None:
    assert unit_mapping(container(*lines)) == call(**mapping)


@pytest.mark.parametrize(
    "lines",
    [[], ["UserNS=host"], ["PodmanArgs=--network=host"], ["UserNS=keep-id", "Rootfs=/srv/x"]],
)
def test_unit_without_a_user_namespace_needs_no_call(lines: list[str]) -> None:
    assert unit_mapping(container(*lines)) == []


def test_slots_and_runtime_are_added_to_the_mapping() -> None:
    auto = container("UserNS=auto")
    assert unit_mapping(auto, slots=3) == call(userns="auto", slots=3)
    fixed = container("UserNS=keep-id")
    assert unit_mapping(fixed, slots=3, runtime="podman 5.4.2") == call(
        userns="keep-id", runtime="podman 5.4.2"
    )


def test_specifiers_are_expanded() -> None:
    names = "[Container]\nImage=localhost/%i:1\nSubUIDMap=%U%%-50%1\n"
    assert unit_mapping(names, specifiers={"i": "web", "U": 1000}) == [
        {"images": ["localhost/web:1"], "mappings": [{"subuidname": "1000%-50%1"}]}
    ]
    unit = "[Container]\nImage=localhost/%i:1\nUserNS=keep-id:uid=%U"
    with pytest.raises(AnsibleFilterError, match=r"UserNS=keep-id:uid=%U has %U.*specifiers"):
        unit_mapping(unit)


POD = "[Pod]\nPodName=web\nUserNS=auto:size=2000\n"


def test_containers_in_a_pod_use_the_map_of_the_pod() -> None:
    unit = container("Pod=web.pod")
    assert unit_mapping(unit, pod=POD) == call(userns="auto:size=2000")
    assert unit_mapping({"web.pod": POD, "db.container": unit}) == call(userns="auto:size=2000")
    assert unit_mapping(unit, pod="[Pod]\n") == []
    alone = [{"images": [], "mappings": [{"userns": "auto:size=2000"}]}]
    assert unit_mapping(POD) == alone
    assert unit_mapping("[Pod]\n") == []
    with pytest.raises(AnsibleFilterError, match=r"the maps of the pod web\.pod: pass"):
        unit_mapping(unit)
    with pytest.raises(AnsibleFilterError, match="only the pod can have maps"):
        unit_mapping(container("Pod=web.pod", "UserNS=keep-id"), pod=POD)
    with pytest.raises(AnsibleFilterError, match=r"the maps of the pod db: pass"):
        unit_mapping(container("PodmanArgs=--pod db"))


def test_image_is_read_from_other_units() -> None:
    pulled = container("UserNS=keep-id").replace(IMAGE, "db.image")
    built = container("UserNS=keep-id").replace(IMAGE, "app.build")
    files = {
        "db.container": pulled,
        "app.container": built,
        "db.image": f"[Image]\nImage={IMAGE}\n",
        "app.build": "[Build]\nImageTag=localhost/app:1\nImageTag=localhost/app:latest\nFile=x\n",
    }
    assert [item["images"] for item in unit_mapping(files)] == [[IMAGE], ["localhost/app:1"]]
    files["db.image"] += "ImageTag=localhost/db:1\n"
    assert unit_mapping(files)[0]["images"] == ["localhost/db:1"]
    with pytest.raises(
        AnsibleFilterError, match=r"the image of the unit db\.image: pass all units"
    ):
        unit_mapping(pulled)
    files["app.build"] = "[Build]\n"
    with pytest.raises(AnsibleFilterError, match=r"app\.build does not set the name of its image"):
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


def pod_map(start: int, size: int = 65536) -> dict[str, t.Any]:
    """The content of /var/lib/kubelet/pods/UID/userns, in which the kubelet keeps the map of a pod."""
    entry = {"hostId": start, "containerId": 0, "length": size}
    return {"uidMappings": [entry], "gidMappings": [entry]}


# One pod exists.
EXISTING: dict[str, t.Any] = {"pod_maps": [pod_map(65536)]}


def block(start: int) -> dict[str, t.Any]:
    """The mapping of a pod to which the kubelet assigned the IDs from `start`."""
    return {
        "uidmap": [f"0:{start}:65536"],
        "gidmap": [f"0:{start}:65536"],
        "runtime": "cri-o",
    }


def test_manifests_are_converted_for_cri_o() -> None:
    found = unit_mapping(MANIFEST, first_id=65536)
    assert found == [{"images": images, "mappings": [block(65536)]} for images in IMAGES]
    two = unit_mapping(MANIFEST, slots=2, first_id=131072)
    assert two[0]["mappings"] == [block(131072), block(196608)]
    assert unit_mapping(MANIFEST, runtime="cri-o 1.33.0", first_id=65536)[0]["mappings"] == [
        {**block(65536), "runtime": "cri-o 1.33.0"}
    ]
    as_json = json.dumps(
        {"kind": "Pod", "spec": {"hostUsers": False, "containers": [{"image": "x"}]}}
    )
    assert unit_mapping(as_json, first_id=65536)[0]["images"] == ["x"]


def test_maps_of_new_pods_of_the_kubelet_cannot_be_predicted(
    warnings: list[str],
) -> None:
    assert unit_mapping(MANIFEST) == []
    assert len(warnings) == len(IMAGES)
    assert "random range" in warnings[0]
    assert "/var/lib/kubelet/pods/*/userns" in warnings[0]
    warnings.clear()
    unit_mapping(MANIFEST, first_id=65536, slots=2)
    assert "at random" in warnings[0]
    assert "first_id" in warnings[0]


def test_maps_of_existing_pods_are_read_from_files_of_the_kubelet(warnings: list[str]) -> None:
    texts = {
        "/var/lib/kubelet/pods/1/userns": json.dumps(pod_map(131072)),
        "/var/lib/kubelet/pods/2/userns": json.dumps(pod_map(6553600)),
        "/var/lib/kubelet/pods/3/userns": json.dumps(pod_map(131072)),
    }
    found = unit_mapping(MANIFEST, pod_maps=texts)
    assert found[0]["mappings"] == [block(131072), block(6553600)]
    assert [entry["images"] for entry in found] == IMAGES
    assert warnings == []
    assert unit_mapping(MANIFEST, pod_maps=[pod_map(131072)])[0]["mappings"] == [block(131072)]


def test_no_layer_is_needed_without_existing_pods(warnings: list[str]) -> None:
    assert unit_mapping(MANIFEST, pod_maps=[]) == []
    assert len(warnings) == len(IMAGES)
    assert "pod_maps is empty" in warnings[0]


def test_ids_per_pod_is_the_size_of_the_map() -> None:
    found = unit_mapping(MANIFEST, first_id=131072, slots=2, ids_per_pod=131072)
    assert [item["uidmap"] for item in found[0]["mappings"]] == [
        ["0:131072:131072"],
        ["0:262144:131072"],
    ]


def test_pause_image_is_added_if_cri_o_runs_the_pod() -> None:
    pause = "registry.k8s.io/pause:3.10"
    found = unit_mapping(MANIFEST, pod_maps=[pod_map(131072)], pause_image=pause)
    assert [entry["images"] for entry in found] == [[*images, pause] for images in IMAGES]
    noted = deployment(inner="userns-mode.crio.io: 'auto:size=65536'")
    assert unit_mapping(noted, pause_image=pause)[0]["images"][-1] == pause
    for entry in unit_mapping(MANIFEST, runtime="podman", pause_image=pause):
        assert pause not in entry["images"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pod_maps": "x"}, "pod_maps is str"),
        ({"pod_maps": ["{"]}, "not the content of a file"),
        ({"pod_maps": ["[]"]}, "no uidMappings"),
        ({"pod_maps": [{"uidMappings": [{}]}]}, "containerId is None"),
        ({"pod_maps": [{**pod_map(1), "gidMappings": []}]}, "no gidMappings"),
        ({"pod_maps": [pod_map(-1)]}, "hostId is -1"),
        ({"pod_maps": [pod_map(2**32)]}, "hostId is 4294967296"),
        ({"ids_per_pod": 65537}, "not a multiple of 65536"),
        ({"ids_per_pod": 0}, "not a positive integer"),
        ({"pause_image": "Not An Image"}, "pause_image"),
        ({"first_id": 2**31, "slots": 2, "ids_per_pod": 2**31}, "exceed"),
    ],
)
def test_wrong_options_for_pods_are_rejected(options: dict[str, t.Any], message: str) -> None:
    with pytest.raises(AnsibleFilterError, match=message):
        unit_mapping(MANIFEST, **options)


def test_manifests_are_converted_for_podman() -> None:
    found = unit_mapping(MANIFEST, runtime="podman", slots=2)
    mapping = {"userns": "auto", "slots": 2, "runtime": "podman"}
    assert found == [
        {"images": images, "mappings": [mapping]}
        for images in IMAGES
        if images != ["localhost/job:1"]
    ]
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
    with pytest.raises(
        AnsibleFilterError, match=r"references the manifest web\.yaml: pass all files"
    ):
        unit_mapping(unit)
    # Without a .kube unit, the manifest is for CRI-O.
    assert unit_mapping({"web.yaml": MANIFEST}, first_id=65536)[0]["mappings"] == [block(65536)]


@pytest.mark.parametrize(
    ("given", "message"),
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
        ("kind: Pod\nspec: {hostUsers: false, containers: 5}", "containers is not a list"),
        ("kind: Pod\nspec: {hostUsers: false, containers: [{}]}", "one of containers has no image"),
        ("kind: Job\nspec: {template: 5}", "has no spec.template.spec"),
        ("[Container]\nUserNS=keep-id\n", "has no Image="),
        (container("what is this"), "line 5: 'what is this' is not KEY=VALUE"),
        (container("UserNS=keep-it"), "userns keep-it"),
        (container("UIDMap=0:1:x"), "0:1:x"),
        (container("UserNS=keep-id", "UIDMap=0:1:1"), "cannot be combined"),
        (container("UserNS=container:db"), "joins another user namespace"),
        (container("PodmanArgs=--userns"), "--userns without a value"),
        (container("PodmanArgs=--userns='x"), "quotation mark ' is not closed"),
        (container("RemapUid=0:1:1"), "without RemapUsers"),
        (container("RemapUsers=some"), "'some', not manual"),
        (
            container("RemapUsers=keep-id", "RemapUid=1", "RemapUid=2"),
            "requires exactly one RemapUid",
        ),
    ],
)
def test_bad_input_is_rejected(given: t.Any, message: str) -> None:
    with pytest.raises(AnsibleFilterError, match=message):
        unit_mapping(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots is 0"),
        ({"slots": "2"}, "slots is '2'"),
        ({"first_id": True}, "first_id is True"),
        ({"first_id": 65536, "slots": 70000}, "exceed the available IDs"),
    ],
)
def test_bad_options_are_rejected(options: dict[str, t.Any], message: str) -> None:
    with pytest.raises(AnsibleFilterError, match=message):
        unit_mapping(MANIFEST, **options)


def test_result_contains_only_options_of_the_module() -> None:
    options = yaml_load(layer_template.DOCUMENTATION)["options"]
    fragment = yaml_load(ModuleDocFragment.DOCUMENTATION)["options"]
    suboptions = fragment["mappings"]["suboptions"]
    texts = [container(*lines) for lines in (["UserNS=auto"], ["UIDMap=0:1:1", "GIDMap=0:1:1"])]
    for text in [*texts, MANIFEST]:
        for item in unit_mapping(text, slots=2, **EXISTING):
            assert set(item) <= set(options)
            for mapping in item["mappings"]:
                assert set(mapping) <= set(suboptions)


def test_examples_run(tmp_path: Path) -> None:
    tasks = yaml_load(plugin.EXAMPLES)
    # Display the arguments of the module instead of calling it.
    for task in tasks:
        if "userns.storage.layer_template" in task:
            task["ansible.builtin.debug"] = {"msg": task.pop("userns.storage.layer_template")}
    units = tmp_path / "quadlets"
    units.mkdir()
    (units / "web.pod").write_text(POD)
    (units / "db.container").write_text(container("Pod=web.pod"))
    output = run_tasks(tmp_path, tasks, {"ANSIBLE_CALLBACK_RESULT_FORMAT": "yaml"})
    for expected in (
        "auto:size=70000",
        "0:200000:65536",
        "0:131072:65536",
        "auto:size=2000",
        IMAGE,
    ):
        assert expected in output


# Cases reported by users


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    shown: list[str] = []
    monkeypatch.setattr(plugin.display, "warning", shown.append)
    return shown


@pytest.mark.parametrize(
    ("lines", "mapping"),
    [
        (['UserNS="keep-id:uid=999,gid=999"'], {"userns": "keep-id:uid=999,gid=999"}),
        (["UserNS=keep-\\", "# comment", "", "   id"], {"userns": "keep-id"}),
        (["UserNS=keep-id\\"], {"userns": "keep-id"}),
        (['UIDMap="0:1:10" \'10:20:5\''], {"uidmap": ["0:1:10", "10:20:5"]}),
        (["PodmanArgs=\"--userns\" keep-id\\x3auid=5"], {"userns": "keep-id:uid=5"}),
        (["UserNS=keep-id\r"], {"userns": "keep-id"}),
        (["RemapUsers=auto", "RemapUidSize=0x10"], {"userns": "auto:size=16"}),
        (["RemapUsers=auto", "RemapUidSize=010"], {"userns": "auto:size=8"}),
        (["UserNS=keep-id", "Label=a\u2028b\x0bc\x85d"], {"userns": "keep-id"}),
        (["UserNS=keep-id:uid=${ID}", "[Service]", 'Environment="ID=7"'], {"userns": "keep-id:uid=7"}),
        (["UserNS=$NS", "[Service]", "Environment=NS=nomap"], {"userns": "nomap"}),
    ],
)  # fmt: skip
def test_values_are_read_as_quadlet_and_systemd_read_them(
    lines: list[str], mapping: dict[str, t.Any]
) -> None:
    assert unit_mapping(container(*lines)) == call(**mapping)


def test_quotation_marks_of_names_are_removed() -> None:
    files = {
        "a.container": '[Container]\nImage="docker.io/x"\nPod="w.pod"\n',
        "w.pod": POD,
        "k.kube": '[Kube]\nYaml="one.yaml"\nUserNS=keep-id\n',
        "one.yaml": "kind: Pod\nspec: {containers: [{image: y}]}\n",
    }
    assert unit_mapping(files) == [
        {"images": ["docker.io/x"], "mappings": [{"userns": "auto:size=2000"}]},
        {"images": ["y"], "mappings": [{"userns": "keep-id"}]},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('UserNS="keep-id', "quotation marks that do not enclose the whole value"),
        ('UserNS=""keep-id""', "quotation marks that do not enclose the whole value"),
        ('UserNS="', "quotation marks that do not enclose the whole value"),
        ("userns=keep-id", "line 5: quadlet does not support the key userns, but UserNS"),
        ("UidMap=0:1:1", "line 5: quadlet does not support the key UidMap, but UIDMap"),
        ('UIDMap="" 0:1:1', "UIDMap: quadlet ignores the text after an empty word"),
        ('UIDMap=0:1:1 "0', "a quotation mark \" is not closed"),
        ("PodmanArgs=--userns=keep-id \\z", "is not an escape sequence"),
        ("RemapUsers=auto\nRemapUidSize=many", "RemapUidSize is 'many'"),
        ("RemapUsers=auto\nRemapUidSize=99999999999", "RemapUidSize is '99999999999'"),
        ("UserNS=keep-id\nRemapUid=", "keys of both kinds"),
        ("UserNS=keep-id:uid=${ID}", r"UserNS=keep-id:uid=\$\{ID\} has the variable ID: set its value in variables"),
        ("UserNS=keep-id:uid=${ID:-5}", r"has \$\{ID:-5\}, which is not expanded"),
        ("UserNS=keep-id:uid=%i", "has %i, the instance: set it in specifiers"),
        ("UserNS=keep-id\\\n# the end", "continues on a missing line"),
        ("[]", "is not a section"),
        ("UserNS=keep-id\nImage=Docker.io/X", "Image: image Docker.io/X: is not an image reference"),
        ("UserNS=keep-id\nImage='x'", "is not an image reference"),
    ],
)  # fmt: skip
def test_unknown_values_are_reported(line: str, message: str) -> None:
    with pytest.raises(AnsibleFilterError, match=message):
        unit_mapping(container(*line.split("\n")))


def test_variables_in_images_are_expanded() -> None:
    unit = "[Container]\nImage=docker.io/postgres:${PG_MAJOR}-alpine\nUserNS=keep-id\n"
    with pytest.raises(
        AnsibleFilterError, match="the variable PG_MAJOR: set its value in variables"
    ):
        unit_mapping(unit)
    assert unit_mapping(unit, variables={"PG_MAJOR": 17})[0]["images"] == [
        "docker.io/postgres:17-alpine"
    ]
    manifest = "kind: Pod\nspec: {hostUsers: false, containers: [{image: 'x:${PG_MAJOR}'}]}\n"
    with pytest.raises(AnsibleFilterError, match="the variable PG_MAJOR"):
        unit_mapping(manifest)
    assert unit_mapping(manifest, variables={"PG_MAJOR": "9"}, **EXISTING)[0]["images"] == ["x:9"]
    with pytest.raises(AnsibleFilterError, match="has a template: render the manifest first"):
        unit_mapping(manifest.replace("${PG_MAJOR}", "{{ .Values.tag }}"))


def test_instance_names_define_specifiers() -> None:
    unit = "[Container]\nImage=localhost/%p-%j:%i\nUserNS=keep-id:uid=%U\n"
    files = {"a-web@.container": unit, "a-web@one.container": unit, "plain.container": unit}
    files["plain.container"] = "[Container]\nImage=localhost/%N-%n\nUserNS=nomap\n"
    # A template without an instance is not started.
    assert [item["images"] for item in unit_mapping(files, specifiers={"U": 5})] == [
        ["localhost/a-web-web:one"],
        ["localhost/plain-plain.service"],
    ]
    del files["a-web@one.container"]
    with pytest.raises(AnsibleFilterError, match=r"a-web@\.container: .* has %[ij], .*specifiers"):
        unit_mapping(files, specifiers={"U": 5})


def test_drop_ins_are_assigned_by_their_paths(warnings: list[str]) -> None:
    files = {
        "quadlets/a-b.container": container("UserNS=nomap"),
        "quadlets/a-b.container.d/20.conf": "[Container]\nImage=localhost/own:1\n",
        "quadlets/a-.container.d/20.conf": "[Container]\nImage=localhost/less:1\n",
        "quadlets/container.d/10.conf": "[Container]\nUserNS=keep-id\n",
        "quadlets/other.container.d/x.conf": "[Container]\nUserNS=auto\n",
    }
    assert unit_mapping(files) == [
        {"images": ["localhost/own:1"], "mappings": [{"userns": "keep-id"}]}
    ]
    assert len(warnings) == 1
    assert "quadlets/a-.container.d/20.conf, quadlets/other.container.d/x.conf" in warnings[0]


CONFIG_MAP = """\
# A database
apiVersion: v1
kind: ConfigMap
data:
  my.cnf: |
    [mysqld]
    user=mysql
  php.ini: |
    [PHP]
    [Container]
    UserNS=auto
---
kind: Pod
spec: {hostUsers: false, containers: [{image: x}]}
"""


def test_manifests_that_contain_units_are_manifests(warnings: list[str]) -> None:
    assert unit_mapping(CONFIG_MAP, **EXISTING) == [{"images": ["x"], "mappings": [block(65536)]}]
    assert unit_mapping({"a.yaml": CONFIG_MAP}, **EXISTING)[0]["images"] == ["x"]
    # Comments in a unit do not make it a manifest.
    assert unit_mapping("# kind: Pod\n; [Pod]\n" + container("UserNS=keep-id")) == call(
        userns="keep-id"
    )
    assert warnings == []


DEPLOYMENT = """\
kind: Deployment
metadata: {{name: web, annotations: {{{own}}}}}
spec:
  template:
    metadata: {{annotations: {{{inner}}}}}
    spec: {{containers: [{{image: x}}]{users}}}
"""
USERNS = "io.podman.annotations.userns"


def named_pod(name: str, annotation: str) -> str:
    metadata = f"{{name: {name}, annotations: {{{annotation}}}}}"
    return f"kind: Pod\nmetadata: {metadata}\nspec: {{containers: [{{image: x}}]}}\n"


def deployment(own: str = "", inner: str = "", users: str = "") -> str:
    return DEPLOYMENT.format(own=own, inner=inner, users=users)


@pytest.mark.parametrize(
    ("manifest", "userns"),
    [
        (deployment(own=f"{USERNS}: 'auto:size=4096'"), "auto:size=4096"),
        (deployment(own=f"{USERNS}/web-pod: nomap"), "nomap"),
        (deployment(own=f"{USERNS}: private"), "auto"),
        (deployment(own=f"{USERNS}: host", users=", hostUsers: false"), ""),
        (deployment(own=f"{USERNS}: ''", users=", hostUsers: false"), ""),
        (deployment(users=", hostUsers: no"), "auto"),
        (deployment(users=", hostUsers: true"), ""),
        (deployment(inner=f"{USERNS}: keep-id"), ""),
        (named_pod("a", f"{USERNS}/a: keep-id"), "keep-id"),
        (named_pod("a", f"{USERNS}/b: keep-id"), ""),
    ],
)  # fmt: skip
def test_annotations_are_read_as_podman_reads_them(
    manifest: str, userns: str, warnings: list[str]
) -> None:
    expected = [{"images": ["x"], "mappings": [{"userns": userns}]}] if userns else []
    files = {"web.kube": "[Kube]\nYaml=web.yaml\n", "web.yaml": manifest}
    assert unit_mapping(files) == expected
    for item in unit_mapping(manifest, runtime="podman"):
        assert item["mappings"] == [{"userns": userns, "runtime": "podman"}]
    assert bool(warnings) == ("template:\n    metadata: {annotations: {io" in manifest)
    # UserNS of the unit takes precedence over the manifest.
    files["web.kube"] += "UserNS=host\n"
    assert unit_mapping(files) == []
    files["web.kube"] += "UserNS=nomap\n"
    assert unit_mapping(files) == [{"images": ["x"], "mappings": [{"userns": "nomap"}]}]


def test_kinds_that_podman_does_not_support_are_reported(warnings: list[str]) -> None:
    manifest = deployment(users=", hostUsers: false").replace("Deployment", "StatefulSet")
    assert unit_mapping(manifest, runtime="podman") == []
    assert "podman kube play does not create pods of a StatefulSet" in warnings[0]
    assert len(unit_mapping(manifest, **EXISTING)) == 1
    assert unit_mapping(manifest.replace("StatefulSet", "Rollout")) == []
    assert "Rollout has a pod template, but its kind is not supported" in warnings[1]
    with pytest.raises(AnsibleFilterError, match="hostUsers is neither true nor false"):
        unit_mapping(deployment(users=", hostUsers: 'false'"))


@pytest.mark.parametrize("name", ["io.kubernetes.cri-o.userns-mode", "userns-mode.crio.io"])
@pytest.mark.parametrize(
    ("value", "context", "mapping"),
    [
        ("auto", "", {"userns": "auto"}),
        ("auto:size=65536", "", {"userns": "auto:size=65536"}),
        ("auto", "runAsUser: 1000, runAsGroup: 1000",
         {"userns": "auto:uidmapping=0:1000:1,gidmapping=0:1000:1"}),
        ("auto:keep-id=true", "runAsUser: 1000",
         {"userns": "auto:uidmapping=1000:1000:1"}),
        ("auto:map-to-root=true;size=2000", "runAsUser: 7",
         {"userns": "auto:size=2000,uidmapping=0:7:1"}),
        ("auto", "fsGroup: 5, supplementalGroups: [6]",
         {"userns": "auto:gidmapping=0:5:1,gidmapping=1:6:1"}),
        ("private:uidmapping=0:300000:1000,1000:400000:1000", "runAsUser: 0",
         {"uidmap": ["0:300000:1000", "1000:400000:1000", "2000:0:1"],
          "gidmap": ["0:300000:1000", "1000:400000:1000"]}),
        ("private:uidmapping=0:0:10;gidmapping=0:5:10", "runAsUser: 0",
         {"uidmap": ["0:0:10"], "gidmap": ["0:5:10"]}),
        ("host", "", None),
    ],
)  # fmt: skip
def test_annotations_of_cri_o_are_converted(
    name: str, value: str, context: str, mapping: dict[str, t.Any] | None
) -> None:
    manifest = deployment(inner=f"{name}: '{value}'", users=f", securityContext: {{{context}}}")
    expected = [{"images": ["x"], "mappings": [{**mapping, "runtime": "cri-o"}]}] if mapping else []
    assert unit_mapping(manifest) == expected
    # The kubelet reads the annotations of the template, and sends a map of its own for hostUsers: false.
    assert unit_mapping(deployment(own=f"{name}: auto")) == []
    own = deployment(inner=f"{name}: auto", users=", hostUsers: false")
    assert unit_mapping(own, **EXISTING)[0]["mappings"] == [block(65536)]


@pytest.mark.parametrize(
    ("value", "context", "uids", "gids"),
    [
        ("auto", "", ["0:200000:65536"], ["0:200000:65536"]),
        ("auto:size=4096", "", ["0:200000:4096"], ["0:200000:4096"]),
        ("auto", "runAsUser: 1000, runAsGroup: 1000", ["1:200000:65535", "0:1000:1"], ["1:200000:65535", "0:1000:1"]),
        ("auto:keep-id=true", "runAsUser: 1000, runAsGroup: 1000",
         ["0:200000:1000", "1001:201000:64535", "1000:1000:1"], ["0:200000:1000", "1001:201000:64535", "1000:1000:1"]),
        ("private:uidmapping=0:300000:1000,1000:400000:1000", "runAsUser: 0",
         ["0:300000:1000", "1000:400000:1000", "2000:0:1"], ["0:300000:1000", "1000:400000:1000"]),
        # CRI-O does not sort or merge the entries.
        ("private:uidmapping=1000:301000:1000,0:300000:1000", "runAsUser: 300000",
         ["1000:301000:1000", "0:300000:1000"], ["1000:301000:1000", "0:300000:1000"]),
    ],
)  # fmt: skip
def test_crio_records_the_annotations_in_these_forms(
    value: str, context: str, uids: list[str], gids: list[str]
) -> None:
    """As recorded by CRI-O 1.36.3 and 1.32.13 with containers:200000:1000000 in /etc/subuid."""
    manifest = deployment(
        inner=f"userns-mode.crio.io: '{value}'", users=f", securityContext: {{{context}}}"
    )
    (call_,) = unit_mapping(manifest)
    (mapping,) = call_["mappings"]
    mapping_options = {key: given for key, given in mapping.items() if key != "runtime"}
    request = parse_request(**mapping_options)
    crio = runtime("cri-o", "1.36.3")
    node_context = forms.context(crio, rootless=False, uid=0, gid=0)
    if request.kind == "auto":
        assert request.userns is not None
        size = auto.namespace_size(crio, AutoUserns(), auto.ImageIDs(70000), request.userns.size)
        extra = resolve_auto_extras(request.userns, node_context)
        spans = [(200000, 1200000)]
        (found,) = auto.slots(1, size, (spans, spans), [], [], extra)
    else:
        found = request.resolve(node_context)
    found = forms.recorded_form(found, crio, shifting_checked=False)
    assert (found.uid.to_strings(), found.gid.to_strings()) == (uids, gids)


@pytest.mark.parametrize(
    "value",
    ["", "keep-id", "auto:size", "auto:colour=red", "private", "auto:keep-id=true;map-to-root=true",
     "private:uidmapping=0:1", "private:uidmapping=0:1:1", "auto:uidmapping=0:1:1"],
)  # fmt: skip
def test_annotations_that_cri_o_refuses_are_rejected(value: str) -> None:
    users = "" if "0:1:1" in value else ", securityContext: {runAsUser: 0}"
    with pytest.raises(AnsibleFilterError, match="CRI-O|size|crio.conf|CONTAINER:HOST:SIZE"):
        unit_mapping(deployment(inner=f"userns-mode.crio.io: '{value}'", users=users))


def test_other_files_in_folders_are_ignored(warnings: list[str]) -> None:
    files = {
        "app/db.container": container("UserNS=keep-id"),
        "app/values.yaml": "replicas: 3\n",
        "app/chart/templates/x.yaml": "{{ if .Values.a }}\nkind: Pod\n{{ end }}",
        "app/list.json": "[1, 2]",
        "app/README.md": "# [Container]\n",
        "app/empty.yml": "",
        "app/.git/config": "[core]\n\tbare = false\n",
        "app/k8s/pod.yaml": "kind: Pod\nspec: {hostUsers: false, containers: [{image: x}]}\n",
        "app/data.volume": "[Volume]\nDriver=image\nImage=y\n",
    }
    assert [item["images"] for item in unit_mapping(files, **EXISTING)] == [[IMAGE], ["x"]]
    assert warnings == [
        "unit_mapping: ignored because they are neither units, nor drop-ins of units, nor "
        "manifests: app/README.md, app/.git/config, "
        "app/values.yaml, app/chart/templates/x.yaml, app/list.json"
    ]
    # A file that a unit refers to must be a manifest.
    files["app/w.kube"] = "[Kube]\nYaml=values.yaml\n"
    with pytest.raises(AnsibleFilterError, match="nor a manifest with a kind"):
        unit_mapping(files)


def test_questionable_settings_are_reported(warnings: list[str]) -> None:
    unit = container(
        "UserNS=auto", "User=1000", "GlobalArgs=--root /srv", "[Service]", "UIDMap=0:1:1"
    )
    unit_mapping(unit)
    assert [warning.partition(": ")[2] for warning in warnings] == [
        "the unit line 9: quadlet does not read UIDMap in [Service]",
        "the unit does not use the default store: set graphroot in layer_template",
        "the unit: podman derives the size of the namespace from User. Set the size, for example "
        "UserNS=auto:size=65536",
    ]


# Input that would take endless time without limits

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + number)}: &{chr(98 + number)} [{', '.join([f'*{chr(97 + number)}'] * 9)}]\n"
    for number in range(24)
)
MERGES = "m0: &m0 {x: y}\n" + "".join(
    f"m{number}: &m{number} {{<<: [{', '.join([f'*m{number - 1}'] * 9)}]}}\n"
    for number in range(1, 40)
)
SPEC = "kind: Pod\nspec: {hostUsers: false, containers: [{image: x}]}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS + SPEC, ""),
        (LAUGHS + "kind: Pod\nspec: {hostUsers: false, containers: *y}\n", "has no image"),
        (MERGES + SPEC, ""),
        (MERGES + "<<: *m39\n" + SPEC, ""),
        ("&a\nkind: Pod\nspec: {hostUsers: false, containers: [*a]}\n", "has no image"),
        ("&a\nkind: List\nitems: [*a]\n", "lists of lists"),
        ("&a\nkind: Pod\nspec: *a\n", ""),
        ("&a\nkind: Pod\n<<: *a\n" + SPEC.partition("\n")[2], ""),
        ("i: &i {kind: List, items: []}\n" + "".join(
            f"i{number}: &i{number} {{kind: List, items: [{', '.join(['*i' + str(number - 1 or '')] * 9)}]}}\n"
            for number in range(1, 9)
        ) + "kind: List\nitems: [*i8]\n", "lists of more than"),
        ("kind: Pod\nx: " + "[" * 5000 + "]" * 5000 + "\n", "nested more than|neither a unit nor YAML"),
        ("[" * 100_000, "nested more than|neither a unit nor YAML"),
        ('{"a":' * 100_000, "nested more than|neither a unit nor YAML"),
        (f"kind: Pod\nn: {'9' * 100_000}\n" + SPEC.partition("\n")[2], ""),
        (f"kind: Pod\nn: {':'.join(['59'] * 50_000)}\nd: 2026-99-99\n" + SPEC.partition("\n")[2], ""),
        ("x" * 9_000_000, "larger than 8 MB"),
        ("kind: Pod\n\x00", "neither a unit nor YAML"),
        ("kind: \udc80", "neither a unit nor YAML"),
        ("kind: Pod\na: *unknown\n", "neither a unit nor YAML"),
        ("kind: Pod\na: !!python/object/apply:os.system [id]\n" + SPEC.partition("\n")[2], ""),
        ('{\n\t"kind": "Pod",\n\t"spec": {"hostUsers": false, "containers": [{"image": "x"}]}\n}', ""),
    ],
)  # fmt: skip
def test_hostile_manifests_are_read_or_rejected(text: str, message: str) -> None:
    """Only the needed parts of such texts are read, because processing all of them would not end."""
    if message:
        with pytest.raises(AnsibleFilterError, match=message) as error:
            unit_mapping(text)
        assert len(str(error.value)) < 6000
        assert str(error.value).isprintable()
    else:
        unit_mapping(text, **EXISTING)


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["Pod", "List", "x", "auto"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["kind", "spec", "items", "template", "metadata", "annotations", "containers", "image", "hostUsers",
             "securityContext", "runAsUser", "userns-mode.crio.io", USERNS, "initContainers", "name", "<<"]
        ),
        inner,
        max_size=5,
    ),
    max_leaves=15,
)  # fmt: skip


@given(nested, st.sampled_from(["", "podman", "cri-o"]))
def test_any_structure_is_read_or_rejected(structure: t.Any, runtime: str) -> None:
    pod = {"kind": "Pod", "spec": structure}
    for document in (structure, pod, {"kind": "List", "items": [structure, pod]}):
        for text in (json.dumps(document), json.dumps(document, indent=1)):
            with contextlib.suppress(AnsibleFilterError):
                for item in unit_mapping(text, runtime=runtime or None, **EXISTING):
                    assert set(item) == {"images", "mappings"}


pieces = st.sampled_from(
    ["[Container]", "[Pod]", "[Kube]", "[", "]", "\n", "=", "UserNS", "UIDMap", "Image", "PodmanArgs", "Yaml",
     "keep-id", "auto", "--userns", "%", "%i", "%%", "$", "${A}", "$A", "\\", '"', "'", "#", ";", " ", "\t", "\r",
     "\x00", "\u2028", "\udc80", "0:1:1", "RemapUsers", "RemapUid", "Pod", "x.image", "\\x41", "\\u0000"]
)  # fmt: skip


@given(
    st.lists(pieces, max_size=30).map("".join),
    st.sampled_from(["container", "pod", "kube", "image", "conf"]),
)
def test_any_unit_is_read_or_rejected(text: str, kind: str) -> None:
    for given_text in (
        text,
        {f"a.{kind}": text, "a.container.d/x.conf": text, "b@x.container": text},
    ):
        with contextlib.suppress(AnsibleFilterError):
            unit_mapping(given_text)
