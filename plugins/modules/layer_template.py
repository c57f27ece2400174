#!/usr/bin/python

# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: layer_template
short_description: Pre-map images for containers with user namespaces
version_added: 1.0.0
description:
  - Creates mapped layers in advance. A mapped layer is a copy of an image with the file owners that containers in a user namespace need.
    Otherwise podman, buildah or CRI-O create this copy when the first container with that user namespace starts, and block all other
    commands that use the store during that time.
  - The module builds the mapped layer from a layer of the image (the template) without holding any lock of the store, and adds it to the
    store in milliseconds. The runtimes find and use it without further configuration.
  - If the kernel of the host can shift IDs for the store, no copy is needed. The module then reports this and changes nothing.
  - If the image's own layers carry the map, see M(userns.storage.image_layers), no copy is needed either. For containers with another map
    or without a map, the runtimes copy such an image, and this module creates these copies in advance.
  - The mapped layer belongs to the image. C(podman rmi) removes it together with the image.
extends_documentation_fragment:
  - userns.storage._attributes
  - userns.storage._attributes.action
  - userns.storage._attributes.actiongroup_store
  - userns.storage._mapping
  - userns.storage._mapping.single
  - userns.storage._store
attributes:
  check_mode:
    support: full
    details:
      - Writes nothing. Predicts the action, the number of files and the sizes from the layers of the image.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  images:
    description:
      - The images, each by name, ID or digest, in the format of C(podman inspect).
      - With O(state=absent), images that do not exist are ignored.
    type: list
    elements: str
    required: true
    aliases: [image, name]
  mappings:
    description:
      - Several mappings, each with the options that otherwise define a single mapping.
  state:
    description:
      - V(present) creates the missing mapped layers.
      - V(absent) removes the mapped layers with exactly this map. It fails while a container uses such a layer, including stopped
        containers and containers of buildah.
    type: str
    choices: [present, absent]
    default: present
  pull:
    description:
      - Whether to pull images that are not in the store, with the same programs as M(userns.storage.image_layers). With V(missing), names
        without a registry are completed with V(docker.io/). Ignored with O(state=absent).
      - In check mode, the module cannot predict the layers of images that are not in the store.
    type: str
    choices: [never, missing]
    default: never
  authfile:
    description:
      - See O(userns.storage.image_layers#module:authfile). Used with O(pull=missing).
    type: path
  username:
    description:
      - See O(userns.storage.image_layers#module:username). Used with O(pull=missing).
    type: str
  password:
    description:
      - See O(userns.storage.image_layers#module:password). Used with O(pull=missing).
    type: str
  strategy:
    description:
      - The method for creating the directory tree. V(auto) uses the cheapest method that creates an exact copy in this store.
      - V(snapshot) requires btrfs, V(reflink) a filesystem that can share extents, and V(metacopy) an overlay store with C(metacopy=on) in
        its mount options. V(copy) is always available.
    type: str
    choices: [auto, snapshot, reflink, metacopy, copy]
    default: auto
  force:
    description:
      - Create the layer even if the runtime will shift IDs and not use the layer.
    type: bool
    default: false
  unmapped_ids:
    description:
      - What to do with files whose owner is not covered by the map. V(fail) reports the IDs and creates nothing. V(overflow) changes the
        owner of these files to the overflow ID 65534, as the runtimes do.
    type: str
    choices: [fail, overflow]
    default: fail
  check_with_runtime:
    description:
      - Whether to verify the layers with the host's own podman. For each image and mapping, podman creates a container as the store's user,
        in that user's environment and with the options of this task. The container is never started and is removed afterwards.
      - If podman does not use the layer for the container, the module removes the layer and the task fails.
      - With V(untested), the module verifies layers if a program on the host is newer than the versions that the collection was tested
        with. O(allow_untested_runtime) is then not required to create layers, but still required to remove layers. With V(always), the
        module verifies layers on all hosts.
      - The module also verifies a layer of an earlier task if no container uses the layer, so that no layer remains unverified after an
        interrupted task. The next task with this option removes a container named C(userns-storage-check-...) that an interrupted task left
        behind.
      - Of several layers for O(userns=auto), the module verifies a single layer, because podman assigns the first free range to the
        container.
      - Only podman can verify layers. The module fails for other values of O(runtime). It ignores the version in O(runtime) for the
        verification.
    type: str
    choices: [never, untested, always]
    default: never
  lease:
    description:
      - How long M(userns.storage.layer_gc) keeps a new layer even if no container uses it yet, given as an age such as V(30d).
      - The lease begins when the layer is created. An existing layer keeps its current lease.
    type: str
  time_limit:
    description:
      - Stop after this many seconds and return the number of remaining layers in RV(remaining). The next run continues from there,
        including with a partial layer. This option is intended for maintenance windows.
      - Each run makes progress, even if the time limit is very short. A btrfs snapshot is always created in a single step. The time limit
        does not apply to anything else.
      - A partial layer is kept for one day, or until the host restarts. It is stored outside the store's layers, where no program uses it
        as a layer, and M(userns.storage.layer_gc) does not remove it during that time.
      - If not set, the task continues until all layers are complete, and displays its progress for each host, at most every ten seconds. It
        works for the users of O(users) in turns, and for at most four hours in the store of each user. After that, it continues with the
        other users and fails at the end. The next run continues from there.
    type: int
notes:
  - CRI-O removes a mapped layer from its own store together with the last container that uses it, whoever created the layer. With
    O(runtime=cri-o) the module warns about this. Layers in an additional image store last. Create them with O(graphroot) of that store while it
    is writable and no program uses it as its own store.
  - On the controller, an action plugin of the same name calls the module repeatedly with its own O(time_limit) and displays the progress
    between the calls. No process continues to run on the host after the play is interrupted. In check mode, with C(async), with
    O(state=absent), and with O(time_limit), it calls the module once.
seealso:
  - module: userns.storage.image_layers
  - module: userns.storage.image_layers_info
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Pre-map the toolbox image for alice's keep-id containers
  userns.storage.layer_template:
    images: registry.example.org/toolbox:latest
    userns: keep-id
    user: alice

- name: Pre-map two images of the rootful store for one range
  userns.storage.layer_template:
    images:
      - docker.io/library/postgres:17
      - docker.io/library/redis:8
    uidmap: ["0:100000:65536"]

- name: Prepare for three containers with automatic namespaces and a container with keep-id
  userns.storage.layer_template:
    images: registry.example.org/builder:latest
    mappings:
      - userns: auto
        slots: 3
      - userns: keep-id
    user: runner

- name: Pre-map the toolbox image for all its users on this workstation
  userns.storage.layer_template:
    images: registry.example.org/toolbox:latest
    userns: keep-id
    users: [alice, bob]

- name: Pre-map the images that the units of a quadlet host use
  userns.storage.layer_template:
    images: "{{ item.images }}"
    mappings: "{{ item.mappings }}"
  loop: "{{ lookup('ansible.builtin.file', 'web.container') | userns.storage.unit_mapping }}"

- name: Pre-map as much as possible in a maintenance window of ten minutes
  userns.storage.layer_template:
    images: registry.example.org/very/large:latest
    userns: keep-id
    user: runner
    time_limit: 600

- name: Remove the layer with an old range
  userns.storage.layer_template:
    images: docker.io/library/postgres:17
    uidmap: ["0:300000:65536"]
    state: absent
"""

RETURN = r"""
layers:
  description:
    - One entry for each user, image and map. A failure of one entry does not stop the others.
  returned: always
  type: list
  elements: dict
  contains:
    user:
      description: The owner of the store, V(root) for the rootful store.
      type: str
      sample: alice
    image_id:
      description: The ID of the image. Empty if no image matches the reference.
      type: str
      sample: 5d0da3dc976460b72c77d94c8a1ad043720b0416bfc16c52c45d4847e53fadb6
    image_names:
      description: The names of the image, or the reference that matches no image.
      type: list
      elements: str
    layer_id:
      description: The ID of the mapped layer, or of the image's own layer if that has the map. Empty if there is none, also in check mode.
      type: str
    template_id:
      description: The ID of the layer from which the mapped layer is, or would be, created.
      type: str
    uidmap:
      description: The UID map in the form in which the runtime writes it.
      type: list
      elements: str
      sample: ["0:1:1000", "1000:0:1", "1001:1001:64536"]
    gidmap:
      description: The GID map in the form in which the runtime writes it.
      type: list
      elements: str
    action:
      description:
        - The action that was performed, or would be performed in check mode. It is V(created), V(existing), V(removed), V(not_needed) or
          V(refused).
        - V(pending) is for layers that O(time_limit) left for the next run.
      type: str
    reason:
      description: A description of the reason.
      type: str
      sample: The vfs driver cannot shift IDs, so podman 5.4.2 copies the image for each map.
    advice:
      description: A change of the host that would affect whether a layer is needed.
      type: str
      sample: The overlay driver needs no copies for root on Linux 5.19 or later.
    strategy:
      description: The method by which the directory tree was created. Only set for V(created).
      type: str
    files:
      description: The number of entries in the tree, not counting directories. Only set for V(created).
      type: int
    size_expected:
      description:
        - The expected apparent size in bytes according to the records of the image. It can differ from the actual size. Only set for
          layers that are created or V(pending).
      type: int
    size_apparent:
      description: Apparent size in bytes. Only set for V(created).
      type: int
    size_exclusive:
      description: The number of bytes on disk that only this layer uses. Only set for V(created).
      type: int
    seconds:
      description: The number of seconds spent on this entry.
      type: float
    lock_seconds:
      description: The number of seconds for which the module held the store's locks for writing.
      type: float
    progress:
      description: The progress of a partial layer. C(null) except for V(pending) layers that are already begun.
      type: dict
      contains:
        files:
          description: The number of entries that exist.
          type: int
        bytes:
          description: The apparent size of these entries in bytes.
          type: int
        bytes_expected:
          description: The expected total size in bytes according to the records of the image. It can be larger than the actual size.
          type: int
        seconds_resuming:
          description: The number of seconds that this run needed to examine the work of earlier runs.
          type: float
partial:
  description: Whether O(time_limit) left work for the next run.
  returned: always
  type: bool
remaining:
  description: The number of layers that are left for the next run.
  returned: always
  type: int
store:
  description: The store that the module used.
  returned: when O(users) is not given
  type: dict
  contains:
    graphroot:
      description: The graph root of the store.
      type: str
    runroot:
      description: The run root of the store.
      type: str
    driver:
      description: The graph driver of the store.
      type: str
    backing_filesystem:
      description: The filesystem of the graph root.
      type: str
    rootless:
      description: Whether the store is a user's rootless store.
      type: bool
    shifting:
      description: Whether the runtime shifts IDs for these maps and therefore needs no copies.
      type: bool
pulled:
  description: The names of the images that were pulled, or would be pulled in check mode.
  returned: with O(pull=missing)
  type: list
  elements: str
stores:
  description:
    - All stores in which the module worked, each with the keys of RV(store) and its user.
    - A store in which the module could not work has only the keys C(user) and C(error).
  returned: always
  type: list
  elements: dict
  contains:
    user:
      description: The owner of the store, V(root) for the rootful store.
      type: str
    error:
      description: The reason why the module could not work in the store.
      returned: when nothing could be done
      type: str
    graphroot:
      description: The graph root of the store.
      type: str
    runroot:
      description: The run root of the store.
      type: str
    driver:
      description: The graph driver of the store.
      type: str
    backing_filesystem:
      description: The filesystem of the graph root.
      type: str
    rootless:
      description: Whether the store is a user's rootless store.
      type: bool
    shifting:
      description: Whether the runtime shifts IDs for these maps and therefore needs no copies.
      type: bool
"""

import time
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.userns.storage.plugins.module_utils._mappings import (
    MAPPING_ARGUMENTS,
    MAPPING_EXCLUSIVE,
    MAPPING_OPTIONS,
    MAPPINGS_ARGUMENT,
    read_mapping,
)
from ansible_collections.userns.storage.plugins.module_utils._module import (
    STORE_ARGUMENTS,
    STORE_EXCLUSIVE,
    run,
    run_outside,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    image_pulling,
    image_tools,
    layer_template,
    result_merging,
    runtime_check,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import (
    StoreRequest,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.userns import (
    running as userns,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "images": {
                "type": "list",
                "elements": "str",
                "required": True,
                "aliases": ["image", "name"],
            },
            **MAPPING_ARGUMENTS,
            "mappings": MAPPINGS_ARGUMENT,
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "pull": {"type": "str", "choices": ["never", "missing"], "default": "never"},
            "authfile": {"type": "path"},
            "username": {"type": "str"},
            "password": {"type": "str", "no_log": True},
            "strategy": {
                "type": "str",
                "choices": ["auto", "snapshot", "reflink", "metacopy", "copy"],
                "default": "auto",
            },
            "force": {"type": "bool", "default": False},
            "unmapped_ids": {"type": "str", "choices": ["fail", "overflow"], "default": "fail"},
            "lease": {"type": "str"},
            "check_with_runtime": {
                "type": "str",
                "choices": [runtime_check.NEVER, runtime_check.UNTESTED, runtime_check.ALWAYS],
                "default": runtime_check.NEVER,
            },
            "time_limit": {"type": "int"},
            **STORE_ARGUMENTS,
        },
        mutually_exclusive=[
            *MAPPING_EXCLUSIVE,
            *(("mappings", option) for option in MAPPING_OPTIONS),
            *STORE_EXCLUSIVE,
            ("authfile", "username"),
        ],
        required_together=[("username", "password")],
        required_one_of=[(*MAPPING_OPTIONS, "mappings")],
        supports_check_mode=True,
    )
    params = module.params
    deadline = time.monotonic() + params["time_limit"] if params["time_limit"] is not None else 0.0

    def request(store: StoreRequest) -> layer_template.TemplateRequest:
        return layer_template.TemplateRequest(
            store=store,
            images=tuple(params["images"]),
            mappings=tuple(map(read_mapping, params["mappings"] or [params])),
            state=params["state"],
            strategy=params["strategy"],
            force=params["force"],
            overflow=params["unmapped_ids"] == "overflow",
            lease=params["lease"] or "",
            check=module.check_mode,
            deadline=deadline,
            awaited=True,
        )

    mode = params["check_with_runtime"]

    def checked(request: layer_template.TemplateRequest) -> t.Dict[str, t.Any]:
        return runtime_check.declare(request, mode)

    def inside(request: layer_template.TemplateRequest) -> t.Dict[str, t.Any]:
        if mode != runtime_check.NEVER:
            return checked(request)
        limits = userns.waiting_for_locks(request.store.lock_timeout)
        result: t.Dict[str, t.Any] = userns.run(
            layer_template.declare, (request,), request.store.account, limits
        )
        return result

    def pulled(request: layer_template.TemplateRequest) -> t.Dict[str, t.Any]:
        credentials = image_tools.Credentials(
            params["authfile"] or "", params["username"] or "", params["password"] or ""
        )
        return image_pulling.declare(request, inside, credentials)

    if params["pull"] == "missing" and params["state"] == "present":
        run_outside(module, request, pulled, result_merging.joined)
    if mode != runtime_check.NEVER:
        run_outside(module, request, checked, result_merging.joined)
    run(module, request, layer_template.declare, result_merging.joined)


if __name__ == "__main__":
    main()
