# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a quadlet unit or a Kubernetes manifest to the options of layer_template."""

from __future__ import annotations

DOCUMENTATION = r"""
name: unit_mapping
author:
  - The userns.storage contributors (@userns-storage)
version_added: 1.0.0
short_description: The mapped layers that a quadlet unit or a Kubernetes manifest will ask for
description:
  - Takes the text of a unit for podman's quadlet, or of a Kubernetes manifest, and gives the images and mappings for
    M(userns.storage.layer_template), so that the user namespace is said in one place only.
  - Of C(.container) and C(.pod) units it reads C(Image), C(Pod), C(UserNS), C(UIDMap), C(GIDMap), C(SubUIDMap), C(SubGIDMap),
    the older C(RemapUsers), C(RemapUid), C(RemapGid) and C(RemapUidSize), and the options for user namespaces in C(PodmanArgs).
    Drop-ins count when they are appended to the text of their unit.
  - Of a manifest it takes the pods with C(hostUsers) V(false), in any number of documents, with their containers and init
    containers, be they pods themselves or what makes pods, such as a deployment or a cron job.
positional: _input
options:
  _input:
    description:
      - The text of a unit or manifest.
      - Or a dictionary of several, with file names as keys. Then pods, C(.image), C(.build) and C(.kube) units and manifests that
        the units name are found in it.
    type: raw
    required: true
  pod:
    description:
      - The text of the C(.pod) unit that C(Pod) of a C(.container) unit names, where the dictionary of all units is not at hand.
    type: str
  slots:
    description:
      - For how many containers, or pods of a manifest, that run at once to prepare layers where each has a range of its own.
      - That is so with C(UserNS=auto) and with C(hostUsers) V(false).
    type: int
    default: 1
  runtime:
    description:
      - The program that will ask for the layers, as option O(userns.storage.layer_template#module:runtime) takes it.
      - A manifest is for CRI-O unless a C(.kube) unit names it, or this says V(podman), which gives pods with C(hostUsers)
        V(false) automatic namespaces.
    type: str
  first_id:
    description:
      - The first host ID of the kubelet's range. The pods of a node take 65536 IDs each from there on, the lowest free ones.
    type: int
    default: 65536
  specifiers:
    description:
      - What systemd's specifiers stand for, by their letter. The key C(i) holds the name of the instance, for example.
    type: dict
    default: {}
seealso:
  - module: userns.storage.layer_template
"""

EXAMPLES = r"""
- name: Show what a unit asks for
  ansible.builtin.debug:
    msg: "{{ unit | userns.storage.unit_mapping }}"
  vars:
    unit: |
      [Container]
      Image=docker.io/library/postgres:17
      UserNS=auto:size=70000

- name: Show what a container in a pod asks for
  ansible.builtin.debug:
    msg: "{{ container | userns.storage.unit_mapping(pod=pod) }}"
  vars:
    pod: |
      [Pod]
      UIDMap=0:200000:65536
      GIDMap=0:300000:65536
    container: |
      [Container]
      Image=docker.io/library/redis:8
      Pod=web.pod

- name: Show what three pods of a node ask CRI-O for
  ansible.builtin.debug:
    msg: "{{ manifest | userns.storage.unit_mapping(slots=3) }}"
  vars:
    manifest: |
      apiVersion: v1
      kind: Pod
      metadata:
        name: web
      spec:
        hostUsers: false
        containers:
          - name: web
            image: docker.io/library/nginx:1.29

- name: Pre-map what the quadlets of this project ask for
  userns.storage.layer_template:
    images: "{{ item.images }}"
    mappings: "{{ item.mappings }}"
  loop: "{{ dict(names | zip(texts)) | userns.storage.unit_mapping }}"
  vars:
    files: "{{ query('ansible.builtin.fileglob', 'quadlets/*') }}"
    names: "{{ files | map('basename') }}"
    texts: "{{ query('ansible.builtin.file', *files) }}"
"""

RETURN = r"""
_value:
  description:
    - The options of one call of M(userns.storage.layer_template) for each container or pod that has a user namespace of its own.
      Empty where none has.
    - The text of a C(.pod) unit alone names no images. They are to be added, or all units given together.
  type: list
  elements: dict
  contains:
    images:
      description: Option O(userns.storage.layer_template#module:images).
      type: list
      elements: str
    mappings:
      description: Option O(userns.storage.layer_template#module:mappings).
      type: list
      elements: dict
  sample:
    - images: [docker.io/library/postgres:17]
      mappings:
        - userns: auto:size=70000
"""

import re
import shlex
import typing as t

from ansible.errors import AnsibleFilterError
from ansible.module_utils.common.yaml import yaml_load_all
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import MapError
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.grammar import (
    parse_request,
)

Call = t.Dict[str, t.Any]
Mapping = t.Dict[str, t.Any]
# Keys of a section, each with its values in order.
Section = t.Dict[str, t.List[str]]

_OPTIONS = ("userns", "uidmap", "gidmap", "subuidname", "subgidname")
_LISTS = ("uidmap", "gidmap")
# What the kubelet gives to each pod.
_POD_SIZE = 65536
_HIGHEST = 2**32 - 1
_ANNOTATION = "io.podman.annotations.userns"
# Where the kinds keep their pod's spec.
_POD_SPECS = {
    "Pod": ("spec",),
    **dict.fromkeys(
        ("Deployment", "DaemonSet", "StatefulSet", "ReplicaSet", "ReplicationController", "Job"),
        ("spec", "template", "spec"),
    ),
    "CronJob": ("spec", "jobTemplate", "spec", "template", "spec"),
}


class FilterModule:
    """The filters of this file."""

    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        """By name."""
        return {"unit_mapping": unit_mapping}


def unit_mapping(
    units: t.Any,
    pod: t.Optional[str] = None,
    slots: t.Any = 1,
    runtime: t.Optional[str] = None,
    first_id: t.Any = 65536,
    specifiers: t.Optional[t.Mapping[str, t.Any]] = None,
) -> t.List[Call]:
    """The calls of layer_template for units or manifests; see DOCUMENTATION.

    :raises AnsibleFilterError: what is given is no unit and no manifest, or says what cannot be
    """
    reader = _Reader(
        pod, _number("slots", slots), runtime, _number("first_id", first_id), specifiers or {}
    )
    if isinstance(units, str):
        return reader.text("the unit", units)
    if isinstance(units, t.Mapping) and all(
        isinstance(part, str) for item in units.items() for part in item
    ):
        reader.files = {str(name): str(text) for name, text in units.items()}
        return reader.all()
    raise AnsibleFilterError(
        f"unit_mapping takes the text of a unit, or a dictionary of file names and texts, not {type(units).__name__}"
    )


def _number(name: str, value: t.Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AnsibleFilterError(f"{name} is {value!r}, not a number from 1 on")
    return value


class _Reader:
    """Reads units with the same settings."""

    def __init__(
        self,
        pod: t.Optional[str],
        slots: int,
        runtime: t.Optional[str],
        first_id: int,
        specifiers: t.Mapping[str, t.Any],
    ) -> None:
        if first_id + slots * _POD_SIZE > _HIGHEST:
            raise AnsibleFilterError(
                f"{slots} slots of {_POD_SIZE} IDs from {first_id} on are more than there are"
            )
        self.files: t.Dict[str, str] = {}
        self._pod = pod
        self._slots = slots
        self._runtime = runtime
        self._first_id = first_id
        self._specifiers = {str(key): str(value) for key, value in specifiers.items()}

    def all(self) -> t.List[Call]:
        """Calls of all files; pods and images serve the containers, and manifests the .kube units."""
        calls = []
        used = {
            _last(_section(name, text, "Kube"), "Yaml").rpartition("/")[2]
            for name, text in self.files.items()
            if name.endswith(".kube")
        }
        for name, text in self.files.items():
            manifest = name.endswith((".yaml", ".yml", ".json"))
            if name.endswith((".container", ".kube")) or (manifest and name not in used):
                calls += self.text(name, text)
        return calls

    def text(self, name: str, text: str) -> t.List[Call]:
        """Calls of one file."""
        headings = re.findall(r"^\s*\[([A-Za-z-]+)\]\s*$", text, flags=re.MULTILINE)
        for heading, read in (
            ("Container", self._container),
            ("Pod", self._pod_alone),
            ("Kube", self._kube),
        ):
            if heading in headings:
                return read(name, _section(name, text, heading))
        if headings:
            raise AnsibleFilterError(
                f"{name} has no section [Container], [Pod] or [Kube], only [{']['.join(headings)}]"
            )
        return self._manifest(name, text)

    # Quadlet units

    def _container(self, name: str, section: Section) -> t.List[Call]:
        mapping = self._mapping(name, section)
        arguments = _arguments(name, section)
        pod = _last(section, "Pod")
        if pod or "pod" in arguments:
            if mapping:
                raise AnsibleFilterError(f"{name} is in a pod, so only the pod can have maps")
            mapping = self._mapping_of_pod(name, pod or arguments["pod"][-1])
        if not mapping or _last(section, "Rootfs"):
            return []
        return [{"images": [self._image(name, section)], "mappings": [mapping]}]

    def _pod_alone(self, name: str, section: Section) -> t.List[Call]:
        mapping = self._mapping(name, section)
        return [{"images": [], "mappings": [mapping]}] if mapping else []

    def _mapping_of_pod(self, name: str, pod: str) -> t.Optional[Mapping]:
        text = self.files.get(pod) or self._pod
        if not text:
            raise AnsibleFilterError(
                f"{name} takes its maps from the pod {pod}: give its text as pod, or all units as a dictionary"
            )
        return self._mapping(pod, _section(pod, text, "Pod"))

    def _kube(self, name: str, section: Section) -> t.List[Call]:
        path = _last(section, "Yaml")
        manifest = self.files.get(path.rpartition("/")[2])
        if manifest is None:
            raise AnsibleFilterError(
                f"{name} names the manifest {path or 'of no file'}: give all files as a dictionary"
            )
        return self._manifest(path, manifest, True, self._mapping(name, section))

    def _image(self, name: str, section: Section) -> str:
        image = self._expanded(name, "Image", _last(section, "Image"))
        if not image:
            raise AnsibleFilterError(f"{name} has no Image=")
        kind = image.rpartition(".")[2]
        if kind not in ("image", "build"):
            return image
        if image not in self.files:
            raise AnsibleFilterError(
                f"{name} takes its image from the unit {image}: give all units as a dictionary"
            )
        other = _section(image, self.files[image], kind.capitalize())
        tags = other.get("ImageTag") or (other.get("Image") if kind == "image" else None)
        if not tags:
            raise AnsibleFilterError(f"{image} does not name its image")
        # The first of a build's tags is the one that containers are made with.
        return self._expanded(image, "ImageTag", tags[0] if kind == "build" else tags[-1])

    def _mapping(self, name: str, section: Section) -> t.Optional[Mapping]:
        """The options of layer_template for a section's keys; None when it has no namespace of its own."""
        given = {
            option: self._values(name, section, key, option in _LISTS)
            for option, key in (
                ("userns", "UserNS"),
                ("uidmap", "UIDMap"),
                ("gidmap", "GIDMap"),
                ("subuidname", "SubUIDMap"),
                ("subgidname", "SubGIDMap"),
            )
        }
        if not any(given.values()):
            given.update(self._remapped(name, section))
        for option, values in _arguments(name, section).items():
            if option != "pod":
                given.setdefault(option, []).extend(
                    self._expanded(name, "PodmanArgs", one) for one in values
                )
        mapping: Mapping = {}
        for option in _OPTIONS:
            values = [value for value in given.get(option, ()) if value]
            if values:
                mapping[option] = values if option in _LISTS else values[-1]
        return self._checked(name, mapping)

    def _checked(self, name: str, mapping: Mapping) -> t.Optional[Mapping]:
        try:
            request = parse_request(**mapping)
        except MapError as error:
            raise AnsibleFilterError(f"{name}: {error}") from error
        if request.kind == "host":
            return None
        if request.kind == "auto" and self._slots > 1:
            mapping["slots"] = self._slots
        if self._runtime:
            mapping["runtime"] = self._runtime
        return mapping

    def _remapped(self, name: str, section: Section) -> t.Dict[str, t.List[str]]:
        """The keys of podman 4.4, from before there was one for each option."""
        kind = _last(section, "RemapUsers")
        uids, gids = (self._values(name, section, key, True) for key in ("RemapUid", "RemapGid"))
        size = _last(section, "RemapUidSize")
        if not kind:
            if uids or gids:
                raise AnsibleFilterError(f"{name} has RemapUid or RemapGid without RemapUsers")
            return {}
        if kind == "manual":
            return {"uidmap": uids, "gidmap": gids}
        if kind == "auto":
            options = [f"uidmapping={one}" for one in uids]
            options += [f"gidmapping={one}" for one in gids]
            options += [f"size={size}"] if size else []
        elif kind == "keep-id":
            if len(uids) > 1 or len(gids) > 1:
                raise AnsibleFilterError(
                    f"{name}: RemapUsers=keep-id takes one RemapUid and one RemapGid"
                )
            options = [f"uid={one}" for one in uids] + [f"gid={one}" for one in gids]
        else:
            raise AnsibleFilterError(f"{name}: RemapUsers is {kind!r}, not manual, auto or keep-id")
        return {"userns": [":".join([kind, ",".join(options)]).rstrip(":")]}

    def _values(self, name: str, section: Section, key: str, split: bool) -> t.List[str]:
        values = section.get(key, [])
        if split:
            values = [word for value in values for word in _words(name, key, value)]
        return [self._expanded(name, key, value) for value in values]

    def _expanded(self, name: str, key: str, value: str) -> str:
        def stand_in(match: t.Match[str]) -> str:
            letter = match[1]
            if letter == "%":
                return "%"
            if letter in self._specifiers:
                return self._specifiers[letter]
            raise AnsibleFilterError(
                f"{name}: {key} has %{letter}, which systemd knows on the host only: give it in specifiers"
            )

        return re.sub(r"%(.)", stand_in, value)

    # Kubernetes manifests

    def _manifest(
        self,
        name: str,
        text: str,
        podman: bool = False,
        mapping: t.Optional[Mapping] = None,
    ) -> t.List[Call]:
        try:
            # As bytes, for Ansible's own kinds of strings are too much for the reader.
            documents = list(yaml_load_all(text.encode()))
        except Exception as error:
            raise AnsibleFilterError(f"{name} is neither a unit nor YAML: {error}") from error
        podman = podman or (self._runtime or "").startswith("podman")
        calls = []
        for document in documents:
            for kind, one in _objects(name, document):
                calls += self._pods(f"{name}: {kind}", kind, one, podman, mapping)
        return calls

    def _pods(
        self,
        name: str,
        kind: str,
        document: t.Mapping[str, t.Any],
        podman: bool,
        mapping: t.Optional[Mapping],
    ) -> t.List[Call]:
        if kind not in _POD_SPECS:
            return []
        *above, last = _POD_SPECS[kind]
        holder: t.Any = document
        for key in above:
            holder = holder.get(key) if isinstance(holder, dict) else None
        spec = holder.get(last) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or not isinstance(spec, dict):
            raise AnsibleFilterError(f"{name} has no {'.'.join(_POD_SPECS[kind])}")
        private = spec.get("hostUsers") is False
        if podman:
            asked = _annotation(holder) or ("auto" if private else "")
            mappings = [mapping or self._checked(name, {"userns": asked} if asked else {})]
        else:
            mappings = [self._kubelets(number) for number in range(self._slots if private else 0)]
        found = [one for one in mappings if one]
        return [{"images": _images(name, spec), "mappings": found}] if found else []

    def _kubelets(self, number: int) -> Mapping:
        """The map that the kubelet gives to a node's pod of this number."""
        one = f"0:{self._first_id + number * _POD_SIZE}:{_POD_SIZE}"
        return {"uidmap": [one], "gidmap": [one], "runtime": self._runtime or "cri-o"}


def _objects(name: str, document: t.Any) -> t.Iterator[t.Tuple[str, t.Mapping[str, t.Any]]]:
    """A manifest's object with its kind, and those of a list."""
    if document is None:
        return
    if not isinstance(document, dict) or not isinstance(document.get("kind"), str):
        raise AnsibleFilterError(
            f"{name} is neither a unit with a section [Container], [Pod] or [Kube] nor a manifest with a kind"
        )
    if isinstance(document.get("items"), list):
        for one in document["items"]:
            yield from _objects(name, one)
        return
    yield document["kind"], document


def _images(name: str, spec: t.Mapping[str, t.Any]) -> t.List[str]:
    images = []
    for key in ("initContainers", "containers"):
        containers = spec.get(key) or []
        if not isinstance(containers, list):
            raise AnsibleFilterError(f"{name}: {key} is no list")
        for one in containers:
            image = one.get("image") if isinstance(one, dict) else None
            if not isinstance(image, str) or not image:
                raise AnsibleFilterError(f"{name}: one of {key} has no image")
            images.append(image)
    if not images:
        raise AnsibleFilterError(f"{name} has no containers")
    return list(dict.fromkeys(images))


def _annotation(holder: t.Mapping[str, t.Any]) -> str:
    metadata = holder.get("metadata")
    notes = metadata.get("annotations") if isinstance(metadata, dict) else None
    return str(notes.get(_ANNOTATION) or "") if isinstance(notes, dict) else ""


# Reading units


def _section(name: str, text: str, wanted: str) -> Section:
    """All sections of that name as one; an empty value forgets those before it, as in systemd."""
    result: Section = {}
    inside = False
    for number, line in _lines(text):
        heading = re.fullmatch(r"\[([^\]]*)\]", line)
        if heading:
            inside = heading[1] == wanted
            continue
        key, equals, value = line.partition("=")
        if not equals:
            raise AnsibleFilterError(f"{name} line {number}: {line!r} is not KEY=VALUE")
        if not inside:
            continue
        values = result.setdefault(key.strip(), [])
        if value.strip():
            values.append(value.strip())
        else:
            values.clear()
    return result


def _lines(text: str) -> t.Iterator[t.Tuple[int, str]]:
    """Lines with their numbers; comments left out, those that end in a backslash joined with the next."""
    begun, started = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if (not stripped and not begun) or stripped.startswith(("#", ";")):
            continue
        if not begun:
            started = number
        if stripped.endswith("\\"):
            begun += stripped[:-1] + " "
            continue
        yield started, begun + stripped
        begun = ""
    if begun.strip():
        yield started, begun.strip()


def _last(section: Section, key: str) -> str:
    values = section.get(key)
    return values[-1] if values else ""


def _words(name: str, key: str, value: str) -> t.List[str]:
    try:
        return shlex.split(value)
    except ValueError as error:
        raise AnsibleFilterError(f"{name}: {key}={value}: {error}") from error


def _arguments(name: str, section: Section) -> t.Dict[str, t.List[str]]:
    """The values of podman's options for user namespaces, and of --pod, in PodmanArgs."""
    result: t.Dict[str, t.List[str]] = {}
    for line in section.get("PodmanArgs", ()):
        words = iter(_words(name, "PodmanArgs", line))
        for word in words:
            option, equals, value = word.partition("=")
            option = option[2:] if option.startswith("--") else ""
            if option not in (*_OPTIONS, "pod"):
                continue
            if not equals:
                value = next(words, "")
            if not value:
                raise AnsibleFilterError(f"{name}: PodmanArgs has --{option} without a value")
            result.setdefault(option, []).append(value)
    return result
