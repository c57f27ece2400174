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
  - Makes the ID-mapped copy of an image's top layer that podman, buildah or CRI-O would otherwise make when the first
    container with that user namespace starts, with every other command of the host waiting for it.
  - The copy (the mapped layer) is built beside the store without any of its locks, from the image's own layer (the template),
    and put in place in milliseconds. Containers find it by themselves.
  - A host whose kernel shifts IDs needs no copy. The module says so and changes nothing.
  - The mapped layer belongs to the image, C(podman rmi) removes it with the image.
extends_documentation_fragment:
  - userns.storage._attributes
  - userns.storage._attributes.actiongroup_store
  - userns.storage._store
attributes:
  check_mode:
    support: full
    details:
      - Writes nothing at all, and predicts action, files and bytes by reading the image's layers.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  images:
    description:
      - The images, each by name, ID or digest, as C(podman inspect) takes them.
      - With O(state=absent) an image that is not there counts as done.
    type: list
    elements: str
    required: true
    aliases: [image, name]
  userns: &userns
    description:
      - The user namespace, in the words of C(podman run --userns).
      - V(keep-id), with its options as in V(keep-id:uid=1000,gid=1000), keeps the user's own IDs, V(nomap) leaves them out.
      - V(auto), with its options as in V(auto:size=4096), takes the ranges that the runtime will take, see O(slots).
      - V(host) has no map and needs no copy.
    type: str
  uidmap: &uidmap
    description:
      - The UID map, entries as C(podman run --uidmap) takes them, C(CONTAINER:HOST:SIZE), with podman's flags from podman 4.7 on.
      - In a rootless store the host IDs are those of the user's namespace, as podman counts them there.
      - Without O(gidmap) it serves for both.
    type: list
    elements: str
  gidmap: &gidmap
    description:
      - The GID map, like O(uidmap). Without O(uidmap) it serves for both.
    type: list
    elements: str
  subuidname: &subuidname
    description:
      - Map the subordinate UIDs of this name, as C(podman run --subuidname) does. Without O(subgidname) it serves for both.
    type: str
  subgidname: &subgidname
    description:
      - Map the subordinate GIDs of this name, as C(podman run --subgidname) does. Without O(subuidname) it serves for both.
    type: str
  runtime: &runtime
    description:
      - The program that will ask for the layers, V(podman), V(buildah) or V(cri-o), since programs and versions write the same map in
        different ways and only find what is written in theirs. A version behind it, as in V(podman 5.4.2), is believed without
        asking the program.
      - Without it, the first of the three that is installed.
    type: str
  slots: &slots
    description:
      - With O(userns=auto), for how many containers of the image that run at once to prepare layers. Each has a range of its own.
    type: int
    default: 1
  mappings:
    description:
      - Several mappings at once, each with the options that otherwise stand for the one mapping.
    type: list
    elements: dict
    suboptions:
      userns: *userns
      uidmap: *uidmap
      gidmap: *gidmap
      subuidname: *subuidname
      subgidname: *subgidname
      runtime: *runtime
      slots: *slots
  users:
    description:
      - Work in the rootless stores of all these users, one after the other. The module must run as root for that.
      - What is refused to one user does not keep the others from theirs. The module fails in the end and tells all.
      - Where the list is empty there is nothing to do.
      - Mutually exclusive with O(user), O(graphroot) and O(runroot).
    type: list
    elements: str
  state:
    description:
      - V(present) makes the mapped layers that are missing.
      - V(absent) removes those of just this map, and refuses while a container, a stopped one or one of buildah too, uses one.
    type: str
    choices: [present, absent]
    default: present
  strategy:
    description:
      - How the tree is made. V(auto) takes the cheapest one that is faithful on this store.
      - V(snapshot) needs btrfs, V(reflink) a filesystem that shares extents, V(metacopy) an overlay store with C(metacopy=on)
        in its mount options. V(copy) works everywhere.
    type: str
    choices: [auto, snapshot, reflink, metacopy, copy]
    default: auto
  force:
    description:
      - Make the layer even where the runtime will shift IDs and not ask for it.
    type: bool
    default: false
  unmapped_ids:
    description:
      - What to do about files whose owner the map does not cover. V(fail) names the IDs and makes nothing, V(overflow) gives
        those files to the overflow ID 65534, as the runtimes do.
    type: str
    choices: [fail, overflow]
    default: fail
  lease:
    description:
      - For how long M(userns.storage.layer_gc) keeps a new layer though nobody uses it yet, an age such as V(30d).
      - It begins when the layer is made. A layer that is there already keeps the lease it has.
    type: str
  time_limit:
    description:
      - Stop after so many seconds, and tell in RV(remaining) what is left to do. The next run goes on from there, with a layer that is half
        made too. This is for maintenance windows.
      - Each run makes something, however short its time. A snapshot of btrfs is made in one go. Nothing else in a run is limited.
      - Half of a layer is kept for a day, or until the host starts again. It lies beside the store, where nothing takes it for a layer, and
        M(userns.storage.layer_gc) leaves it alone for so long.
      - Without it the task goes on until all is done, and shows every ten seconds or more how far it is, for each host.
    type: int
notes:
  - On the controller an action plugin of the same name calls the module again and again with a O(time_limit) of its own and shows a line
    in between. Nothing runs on when the play is interrupted. In check mode, with C(async), with O(state=absent) and with O(time_limit) it
    calls the module once.
seealso:
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

- name: Be ready for three containers with automatic namespaces, and for one with keep-id
  userns.storage.layer_template:
    images: registry.example.org/builder:latest
    mappings:
      - userns: auto
        slots: 3
      - userns: keep-id
    user: runner

- name: Pre-map the toolbox image for everybody who uses it on this workstation
  userns.storage.layer_template:
    images: registry.example.org/toolbox:latest
    userns: keep-id
    users: [alice, bob]

- name: Pre-map what the units of a quadlet host ask for
  userns.storage.layer_template:
    images: "{{ item.images }}"
    mappings: "{{ item.mappings }}"
  loop: "{{ lookup('ansible.builtin.file', 'web.container') | userns.storage.unit_mapping }}"

- name: Pre-map what can be pre-mapped in the ten minutes of a maintenance window
  userns.storage.layer_template:
    images: registry.example.org/very/large:latest
    userns: keep-id
    user: runner
    time_limit: 600

- name: Take the layer of an old range away
  userns.storage.layer_template:
    images: docker.io/library/postgres:17
    uidmap: ["0:300000:65536"]
    state: absent
"""

RETURN = r"""
layers:
  description:
    - One entry for each user, image and map. One that is refused does not keep the others from being worked on.
  returned: always
  type: list
  elements: dict
  contains:
    user:
      description: Whose store it is in, V(root) for the rootful one.
      type: str
      sample: alice
    image_id:
      description: The image. Empty where none answers to the reference.
      type: str
      sample: 5d0da3dc976460b72c77d94c8a1ad043720b0416bfc16c52c45d4847e53fadb6
    image_names:
      description: Its names, or the reference that no image answers to.
      type: list
      elements: str
    layer_id:
      description: The mapped layer. Empty where there is none, in check mode too.
      type: str
    template_id:
      description: The layer that it is, or would be, made from.
      type: str
    uidmap:
      description: The UID map as the runtime writes it.
      type: list
      elements: str
      sample: ["0:1:1000", "1000:0:1", "1001:1001:64536"]
    gidmap:
      description: The GID map as the runtime writes it.
      type: list
      elements: str
    action:
      description:
        - What was done, or would be in check mode. V(created), V(existing), V(removed), V(not_needed) or V(refused).
        - V(pending) is what O(time_limit) has left to the next run.
      type: str
    reason:
      description: Why, in words.
      type: str
      sample: The vfs driver cannot shift IDs, so podman 5.4.2 copies the image for each map.
    advice:
      description: What would change whether a layer is needed.
      type: str
      sample: The overlay driver needs no copies for root on Linux 5.19 or later.
    strategy:
      description: How the tree was made. Only for V(created).
      type: str
    files:
      description: Entries of the tree other than directories. Only for V(created).
      type: int
    size_apparent:
      description: Bytes that the files seem to have. Only for V(created).
      type: int
    size_exclusive:
      description: Bytes on disk that only this layer holds. Only for V(created).
      type: int
    seconds:
      description: Time spent on this entry.
      type: float
    lock_seconds:
      description: Time for which the store's locks were held to write.
      type: float
    progress:
      description: How far a layer has come that was begun. None for all but some V(pending) ones.
      type: dict
      contains:
        files:
          description: Entries that are made.
          type: int
        bytes:
          description: Bytes that these seem to have.
          type: int
        bytes_expected:
          description: What the image's records make of the whole, of which some may not be needed.
          type: int
        seconds_resuming:
          description: How long it took this run to look through what earlier ones had made.
          type: float
partial:
  description: Whether O(time_limit) has left something to the next run.
  returned: always
  type: bool
remaining:
  description: How many layers it has left.
  returned: always
  type: int
store:
  description: The store that was worked on.
  returned: when O(users) is not given
  type: dict
  contains:
    graphroot:
      description: Its graph root.
      type: str
    runroot:
      description: Its run root.
      type: str
    driver:
      description: Its graph driver.
      type: str
    backing_filesystem:
      description: The filesystem under the graph root.
      type: str
    rootless:
      description: Whether it is a user's own.
      type: bool
    shifting:
      description: Whether the runtime shifts IDs for these maps and so needs no copies.
      type: bool
stores:
  description:
    - All stores that were worked on, each with what RV(store) would tell of it, and with its user.
    - One that could not be worked on at all has only C(user) and C(error).
  returned: always
  type: list
  elements: dict
  contains:
    user:
      description: Whose store it is, V(root) for the rootful one.
      type: str
    error:
      description: Why nothing could be done in it.
      returned: when nothing could be done
      type: str
    graphroot:
      description: Its graph root.
      type: str
    runroot:
      description: Its run root.
      type: str
    driver:
      description: Its graph driver.
      type: str
    backing_filesystem:
      description: The filesystem under the graph root.
      type: str
    rootless:
      description: Whether it is a user's own.
      type: bool
    shifting:
      description: Whether the runtime shifts IDs for these maps and so needs no copies.
      type: bool
"""

import time
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.userns.storage.plugins.module_utils._module import (
    STORE_ARGUMENTS,
    run,
    run_for_users,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    several,
    template,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.asking import (
    Wanted,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.opening import (
    StoreRequest,
)

_MAPS = ("uidmap", "gidmap", "subuidname", "subgidname")
_MAPPING: t.Dict[str, t.Dict[str, t.Any]] = {
    "userns": {"type": "str"},
    "uidmap": {"type": "list", "elements": "str"},
    "gidmap": {"type": "list", "elements": "str"},
    "subuidname": {"type": "str"},
    "subgidname": {"type": "str"},
    "runtime": {"type": "str"},
    "slots": {"type": "int", "default": 1},
}
_EXCLUSIVE = [("userns", option) for option in _MAPS]


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "images": {
                "type": "list",
                "elements": "str",
                "required": True,
                "aliases": ["image", "name"],
            },
            **_MAPPING,
            "mappings": {
                "type": "list",
                "elements": "dict",
                "options": _MAPPING,
                "mutually_exclusive": _EXCLUSIVE,
                "required_one_of": [("userns", *_MAPS)],
            },
            "users": {"type": "list", "elements": "str"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "strategy": {
                "type": "str",
                "choices": ["auto", "snapshot", "reflink", "metacopy", "copy"],
                "default": "auto",
            },
            "force": {"type": "bool", "default": False},
            "unmapped_ids": {"type": "str", "choices": ["fail", "overflow"], "default": "fail"},
            "lease": {"type": "str"},
            "time_limit": {"type": "int"},
            **STORE_ARGUMENTS,
        },
        mutually_exclusive=[
            *_EXCLUSIVE,
            *(("mappings", option) for option in ("userns", *_MAPS)),
            # One place cannot be the store of several users.
            *(("users", option) for option in ("user", "graphroot", "runroot")),
        ],
        required_one_of=[("userns", *_MAPS, "mappings")],
        supports_check_mode=True,
    )
    params = module.params
    deadline = time.monotonic() + params["time_limit"] if params["time_limit"] is not None else 0.0

    def request(store: StoreRequest) -> template.TemplateRequest:
        return template.TemplateRequest(
            store=store,
            images=tuple(params["images"]),
            wanted=tuple(_wanted(one) for one in params["mappings"] or [params]),
            state=params["state"],
            strategy=params["strategy"],
            force=params["force"],
            overflow=params["unmapped_ids"] == "overflow",
            lease=params["lease"] or "",
            check=module.check_mode,
            deadline=deadline,
            awaited=True,
        )

    if params["users"] is None:
        run(module, request, template.declare)
    run_for_users(module, params["users"], request, template.declare, several.joined)


def _wanted(options: t.Mapping[str, t.Any]) -> Wanted:
    return Wanted(
        userns=options["userns"] or "",
        uidmap=tuple(options["uidmap"] or ()),
        gidmap=tuple(options["gidmap"] or ()),
        subuidname=options["subuidname"] or "",
        subgidname=options["subgidname"] or "",
        runtime=options["runtime"] or "",
        slots=options["slots"],
    )


if __name__ == "__main__":
    main()
