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
short_description: Determine the mapped layers that a quadlet unit or a Kubernetes manifest needs
description:
  - Reads the text of a quadlet unit for podman or of a Kubernetes manifest, and returns the images and mappings for
    M(userns.storage.layer_template), so that the user namespace is defined in a single file.
  - In C(.container) and C(.pod) units it reads C(Image), C(Pod), C(UserNS), C(UIDMap), C(GIDMap), C(SubUIDMap), C(SubGIDMap), the older
    C(RemapUsers), C(RemapUid), C(RemapGid) and C(RemapUidSize), and the options for user namespaces in C(PodmanArgs), as the generators of
    podman 5.4 to 6.1 do. It applies drop-ins, and reads quotation marks and continued lines as quadlet does.
  - In a manifest it reads the pods of all documents with their containers and init containers, both pods themselves and the templates in
    objects that create pods, such as a deployment or a cron job. For CRI-O these are the pods with C(hostUsers) V(false) or with the
    annotation C(userns-mode.crio.io) or C(io.kubernetes.cri-o.userns-mode). For podman these are the pods with C(hostUsers) V(false) or
    with the annotation C(io.podman.annotations.userns) where C(podman kube play) reads it. podman does not create pods of stateful sets,
    replica sets and cron jobs.
  - The kubelet gives each new pod with C(hostUsers) V(false) a random range of its IDs. Layers cannot be created in advance for pods that do
    not exist yet, so the filter returns no mapping for these pods and warns, unless O(pod_maps) or O(first_id) is set. On overlay with Linux
    5.19 or later, such pods need no mapped layers.
  - Fails with the name of the value if the mapping depends on a value that cannot be determined, such as a systemd specifier or a variable.
    Warns about files that it ignores, such as files of a directory that are neither units nor manifests.
positional: _input
options:
  _input:
    description:
      - The text of a unit or manifest.
      - Alternatively a dictionary with file names as keys. The filter then looks in it for the pods, C(.image), C(.build) and C(.kube)
        units and manifests that the units reference.
      - Keys can be paths, so that a whole directory can be passed. Drop-ins are identified by their paths, such as
        C(web.container.d/10-image.conf) or C(container.d/all.conf).
    type: raw
    required: true
  pod:
    description:
      - The text of the C(.pod) unit that C(Pod) in a C(.container) unit references, if not all units are passed as a dictionary.
    type: str
  slots:
    description:
      - The number of containers, or pods of a manifest, that run at the same time and need layers with ID ranges of their own.
      - This applies to C(UserNS=auto). With O(first_id), this is the number of ranges to cover for C(hostUsers) V(false).
    type: int
    default: 1
  runtime:
    description:
      - The program that uses the layers, in the format of the option O(userns.storage.layer_template#module:runtime).
      - Manifests are evaluated for CRI-O, unless a C(.kube) unit references the manifest or this option is V(podman). Pods with
        C(hostUsers) V(false) then have automatic namespaces.
    type: str
  first_id:
    description:
      - The first host ID of the kubelet's range, from the line of the user C(kubelet) in C(/etc/subuid). The filter then returns the maps of
        the first O(slots) ranges.
      - The kubelet selects one of all its ranges at random. This is only useful if O(slots) covers the whole range of the kubelet, which
        requires one copy of the image for each range.
    type: int
  ids_per_pod:
    description:
      - The number of IDs of each pod, C(userNamespaces.idsPerPod) in the configuration of the kubelet. It must be a multiple of 65536.
    type: int
    default: 65536
  pod_maps:
    description:
      - The contents of the files C(/var/lib/kubelet/pods/*/userns), in which the kubelet keeps the ranges of existing pods, as a list or as
        a dictionary with the contents as values. The filter returns the maps of these pods for C(hostUsers) V(false).
    type: raw
  pause_image:
    description:
      - The pause image of CRI-O, C(pause_image) in the output of C(crio config). Each pod of CRI-O has a container of this image with the map
        of the pod. If set, the filter adds it to the images of pods for CRI-O.
    type: str
  specifiers:
    description:
      - Values of systemd specifiers by letter. For example, the key C(i) contains the name of the instance.
      - Specifiers that can be determined from the file name, such as C(%i) in C(web@one.container), do not have to be set.
    type: dict
    default: {}
  variables:
    description:
      - Values of variables in images and maps, such as C(${PG_MAJOR}), which systemd expands when the service starts.
      - Variables that C(Environment) in C([Service]) sets do not have to be set here.
    type: dict
    default: {}
seealso:
  - module: userns.storage.layer_template
"""

EXAMPLES = r"""
- name: Show the mapped layers that a unit needs
  ansible.builtin.debug:
    msg: "{{ unit | userns.storage.unit_mapping }}"
  vars:
    unit: |
      [Container]
      Image=docker.io/library/postgres:17
      UserNS=auto:size=70000

- name: Show the mapped layers that a container in a pod needs
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

- name: Show the mapped layers that the existing pods of a CRI-O node need
  ansible.builtin.debug:
    msg: "{{ manifest | userns.storage.unit_mapping(pod_maps=maps, pause_image='registry.k8s.io/pause:3.10') }}"
  vars:
    # On a node, read with ansible.builtin.slurp from the files /var/lib/kubelet/pods/*/userns.
    maps:
      - '{"uidMappings": [{"hostId": 131072, "containerId": 0, "length": 65536}],
        "gidMappings": [{"hostId": 131072, "containerId": 0, "length": 65536}]}'
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

- name: Pre-map the images that the quadlets of this project use
  userns.storage.layer_template:
    images: "{{ item.images }}"
    mappings: "{{ item.mappings }}"
  loop: "{{ dict(names | zip(texts)) | userns.storage.unit_mapping }}"
  vars:
    files: "{{ query('ansible.builtin.fileglob', 'quadlets/*', 'quadlets/*.d/*.conf') }}"
    names: "{{ files | map('relpath', playbook_dir ~ '/quadlets') }}"
    texts: "{{ query('ansible.builtin.file', *files) }}"
"""

RETURN = r"""
_value:
  description:
    - The options for one call of M(userns.storage.layer_template) for each container or pod that has a user namespace of its own. Empty if
      there is no such container or pod.
    - The text of a C(.pod) unit alone does not contain images. Add them to the result, or pass all units together.
  type: list
  elements: dict
  contains:
    images:
      description: Value for the option O(userns.storage.layer_template#module:images).
      type: list
      elements: str
    mappings:
      description: Value for the option O(userns.storage.layer_template#module:mappings).
      type: list
      elements: dict
  sample:
    - images: [docker.io/library/postgres:17]
      mappings:
        - userns: auto:size=70000
"""

import typing as t

from ansible.utils.display import Display
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import MapError
from ansible_collections.userns.storage.plugins.plugin_utils import _escapes
from ansible_collections.userns.storage.plugins.plugin_utils._kubelet import POD_SIZE, Kubelet
from ansible_collections.userns.storage.plugins.plugin_utils._layer_calls import (
    Call,
    Settings,
    checked_image,
)
from ansible_collections.userns.storage.plugins.plugin_utils._quadlet_calls import QuadletReader
from ansible_collections.userns.storage.plugins.plugin_utils._units import UnitError

display = Display()


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
    first_id: t.Any = None,
    specifiers: t.Optional[t.Mapping[str, t.Any]] = None,
    variables: t.Optional[t.Mapping[str, t.Any]] = None,
    ids_per_pod: t.Any = POD_SIZE,
    pod_maps: t.Any = None,
    pause_image: t.Optional[str] = None,
) -> t.Any:
    """The calls of layer_template for units or manifests; see DOCUMENTATION.

    :raises AnsibleFilterError: the input is neither a unit nor a manifest, or cannot be evaluated
    """
    try:
        settings = Settings(
            slots=_number("slots", slots),
            runtime=runtime or "",
            kubelet=Kubelet(
                None if first_id is None else _number("first_id", first_id),
                _number("slots", slots),
                _number("ids_per_pod", ids_per_pod),
                pod_maps,
            ),
            pause_image=checked_image("pause_image", pause_image) if pause_image else "",
            specifiers=_texts(specifiers or {}),
            variables=_texts(variables or {}),
        )
        calls = _calls(units, QuadletReader(settings, pod))
    except (UnitError, MapError) as error:
        raise _escapes.filter_error("unit_mapping", error) from None
    for note in settings.notes:
        display.warning(f"unit_mapping: {_escapes.terminal(note)}")
    return _escapes.template_result(calls)


def _number(name: str, value: t.Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnitError(f"{name} is {value!r}, not a positive integer")
    return value


def _texts(values: t.Mapping[str, t.Any]) -> t.Dict[str, str]:
    return {str(name): str(value) for name, value in values.items()}


def _calls(given: t.Any, reader: QuadletReader) -> t.List[Call]:
    if isinstance(given, str):
        return reader.text("the unit", given)
    if isinstance(given, dict) and all(isinstance(text, str) for text in given.values()):
        return reader.files(_texts(given))
    raise UnitError(
        f"requires the text of a unit, or a dictionary of file names and texts, not {type(given).__name__}"
    )
