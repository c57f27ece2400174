#!/usr/bin/python

# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: image_layers_info
short_description: List the layers of images with what they really cost
version_added: 1.0.0
description:
  - Lists the images of a container store with their layers, and above all with their mapped layers, the ID-mapped copies that
    containers with user namespaces run on and that no command of podman shows.
  - A mapped layer is a copy of the whole image, but its record carries the size of the image's top layer only. This module reads
    the disk.
  - A damaged store is described rather than refused. What is broken carries a status and a problem in words, and the rest is listed
    with it. Only records that cannot be read at all are an error.
  - Nothing is changed. Locks of the store are shared and held for milliseconds.
extends_documentation_fragment:
  - userns.storage._attributes
  - userns.storage._attributes.info_module
  - userns.storage._attributes.actiongroup_store
  - userns.storage._store
options:
  images:
    description:
      - The images to list, by name, ID or digest, or by shell patterns of these such as V(quay.io/*).
      - What no image answers to is left out.
      - Without it all images are listed, and RV(orphans) as well.
    type: list
    elements: str
    default: []
  measure:
    description:
      - How closely to look at the disk.
      - V(none) does not look into the layers, and so finds neither V(damaged) nor V(foreign_root) ones.
      - V(apparent) adds up the sizes of the files, V(exclusive) what only this layer holds on disk, which is what deleting it would free.
        It reads the extents of every file on filesystems that can share data.
    type: str
    choices: [none, apparent, exclusive]
    default: apparent
seealso:
  - module: userns.storage.image_layers
  - module: userns.storage.layer_gc
  - module: userns.storage.layer_template
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: See what the hidden layers of this host really cost
  userns.storage.image_layers_info:
    measure: exclusive
  register: store

- name: Report it
  ansible.builtin.debug:
    msg: >-
      {{ store.totals.mapped.layers }} mapped layers hold {{ store.totals.mapped.exclusive | human_readable }},
      of which {{ store.totals.reclaimable | human_readable }} could go

- name: Look at alice's toolbox images
  userns.storage.image_layers_info:
    images: "*/toolbox*"
    user: alice
"""

RETURN = r"""
images:
  description: The images, in the order of the store.
  returned: always
  type: list
  elements: dict
  contains:
    id:
      description: The image's ID.
      type: str
      sample: 5d0da3dc976460b72c77d94c8a1ad043720b0416bfc16c52c45d4847e53fadb6
    names:
      description: Its names.
      type: list
      elements: str
      sample: [docker.io/library/postgres:17]
    digests:
      description: Digests of its manifests.
      type: list
      elements: str
    created:
      description: When its record was made, RFC 3339 in UTC.
      type: str
      sample: '2026-03-01T12:00:00Z'
    read_only_store:
      description: The additional store that it lies in. None for an image of the store itself.
      type: str
    problem:
      description: What is broken about its own layers, in words. None if nothing is.
      type: str
    layers:
      description: Its own layers, the top one first.
      type: list
      elements: dict
      contains: &layer
        id:
          description: The layer's ID.
          type: str
        uidmap:
          description: The UID map under which its files are stored, in the order of the record. Empty for no map.
          type: list
          elements: str
          sample: ['0:100000:65536']
        gidmap:
          description: The GID map.
          type: list
          elements: str
        created:
          description: When it was made, RFC 3339 in UTC.
          type: str
        recorded_size:
          description: Bytes that the record claims, and that C(podman images) and C(podman system df) count.
          type: int
        size_apparent:
          description:
            - Bytes that its files claim, hard-linked ones once. None if O(measure=none), or if the layer cannot be read.
          type: int
        size_exclusive:
          description:
            - Bytes on disk that only this layer holds. None if O(measure=none), 0 if O(measure=apparent).
          type: int
        inodes:
          description: Inodes that it holds. None if O(measure=none).
          type: int
        status:
          description:
            - V(ok); V(missing), a record without data, or an entry without a record; V(incomplete), never finished;
              V(damaged), the data is there and no runtime could use it, or the owners are still those of the image;
              V(foreign_root), the root directory or a name in it belongs to IDs outside the map.
          type: str
        problem:
          description: The status in words. None for V(ok).
          type: str
        containers:
          description: The containers on it, running or not, of whichever program.
          type: list
          elements: dict
          contains: &container
            id:
              description: The container's ID.
              type: str
            name:
              description: Its name.
              type: str
            known_to_podman:
              description: Whether podman made it. Those of buildah, CRI-O and others are seen by C(podman ps --external) only.
              type: bool
    mapped_layers:
      description:
        - Its mapped layers, in the order of the record. Each has what RV(images[].layers) has, and what follows.
      type: list
      elements: dict
      contains:
        <<: *layer
        duplicate_of:
          description: Another layer of the image with the same map, or one that means the same. None for the one that counts.
          type: str
        depends_on:
          description: Layers whose data it needs on disk. They cannot go before it.
          type: list
          elements: str
        origin:
          description: V(ours) if M(userns.storage.layer_template) made it, else V(runtime).
          type: str
        last_used:
          description: When this collection saw it in use last, RFC 3339 in UTC. None for never.
          type: str
        lease:
          description: Until when it is kept though nobody uses it. None without a lease.
          type: str
    private_copies:
      description:
        - Containers whose own layer holds the whole image once more under another map, as those on images of read-only stores do.
      type: list
      elements: dict
      contains:
        <<: *container
        layer:
          description: The container's layer.
          type: str
        size_apparent:
          description: Bytes that its files claim.
          type: int
        size_exclusive:
          description: Bytes on disk that only it holds.
          type: int
        inodes:
          description: Inodes that it holds.
          type: int
orphans:
  description:
    - What takes space, or a name, and is not accounted for by any image. Empty if O(images) is given.
  returned: always
  type: list
  elements: dict
  contains:
    kind:
      description:
        - V(directory), data without a record; V(link), a short name of overlay that leads nowhere; V(staging), V(trash) and V(records), left by
          a run of this collection that was killed; V(layer), a mapped layer that no image lists, with all that RV(images[].mapped_layers) has.
      type: str
    id:
      description: The layer's ID, or the name.
      type: str
    path:
      description: Where it lies. None for V(layer).
      type: str
    age:
      description: Seconds since it changed last.
      type: int
    size_apparent:
      description: Bytes that its files claim. None if O(measure=none).
      type: int
    size_exclusive:
      description: Bytes on disk that only it holds.
      type: int
    inodes:
      description: Inodes that it holds.
      type: int
totals:
  description: Sums over all layers of the listed images, each layer once.
  returned: always
  type: dict
  contains:
    recorded:
      description: Bytes that the records claim.
      type: int
    apparent:
      description: Bytes that the files claim.
      type: int
    exclusive:
      description: Bytes on disk that one layer alone holds. What layers share with each other is in none of them.
      type: int
    inodes:
      description: Inodes.
      type: int
    mapped:
      description: The same of the mapped layers alone.
      type: dict
      contains:
        layers:
          description: How many there are.
          type: int
        recorded:
          description: Bytes that the records claim.
          type: int
        apparent:
          description: Bytes that the files claim.
          type: int
        exclusive:
          description: Bytes on disk that one layer alone holds.
          type: int
        inodes:
          description: Inodes.
          type: int
    reclaimable:
      description: Bytes that go with the mapped layers on which no container is. For O(measure=exclusive).
      type: int
    reclaimable_inodes:
      description: Inodes that go with them.
      type: int
store:
  description: The store that was looked at.
  returned: always
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
      description: Not asked here, always None.
      type: bool
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.userns.storage.plugins.module_utils._module import STORE_ARGUMENTS, run
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import inventory


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "images": {"type": "list", "elements": "str", "default": []},
            "measure": {
                "type": "str",
                "choices": ["none", "apparent", "exclusive"],
                "default": "apparent",
            },
            **STORE_ARGUMENTS,
        },
        supports_check_mode=True,
    )
    params = module.params
    run(
        module,
        lambda store: inventory.InfoRequest(
            store=store, images=tuple(params["images"]), measure=params["measure"]
        ),
        inventory.info,
    )


if __name__ == "__main__":
    main()
