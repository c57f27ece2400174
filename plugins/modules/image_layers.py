#!/usr/bin/python

# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: image_layers
short_description: Bring an image with its layers, or take it away with all of them
version_added: 1.0.0
description:
  - Brings an image into a container store from a registry, an archive or a directory, and gives it names.
  - Takes an image away with all its layers, mapped ones first. Layers that other images share stay.
  - Images are brought by the host's own C(skopeo), or C(podman) where there is no skopeo.
extends_documentation_fragment:
  - userns.storage._attributes
  - userns.storage._attributes.actiongroup_store
  - userns.storage._store
attributes:
  check_mode:
    support: full
    details:
      - Writes nothing at all. Whether O(source) has another image than the store is asked of the source.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  images:
    description:
      - With O(state=present) the names that the image has in the end, such as V(localhost/app:1). A name without a registry is
        completed with V(localhost/) if O(source) is given, and with V(docker.io/) if not. Another image with such a name loses it.
      - Without O(source) each name is an image of its own, brought from the registry that it names.
      - With O(state=absent) names, IDs or digests. An image with further names only loses the name given.
        By an ID or a digest it goes with all its names.
    type: list
    elements: str
    required: true
    aliases: [image, name]
  source:
    description:
      - Where the image comes from, in the words of C(skopeo copy), such as V(oci:/srv/images/app:1), V(oci-archive:/srv/app.tar),
        V(docker-archive:/srv/app.tar), V(dir:/srv/app) or V(docker://registry.example.org/app:1).
      - The account whose store it is must be able to read it.
    type: str
  state:
    description:
      - V(present) brings the image and gives it its names.
      - V(absent) takes it away. It is refused while containers, stopped ones and those of other programs too, use it.
    type: str
    choices: [present, absent]
    default: present
  pull:
    description:
      - When to bring an image that has one of the names already. V(missing) never, V(newer) if the source has another image,
        V(always) in any case.
      - The module has changed something only if another image or another name came of it.
    type: str
    choices: [missing, newer, always]
    default: missing
  measure:
    description:
      - How closely to look at the layers, as in M(userns.storage.image_layers_info).
    type: str
    choices: [none, apparent, exclusive]
    default: apparent
seealso:
  - module: userns.storage.image_layers_info
  - module: userns.storage.layer_gc
  - module: userns.storage.layer_template
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Bring an image from an archive
  userns.storage.image_layers:
    images:
      - localhost/app:1
      - localhost/app:stable
    source: oci-archive:/srv/images/app-1.tar

- name: Keep an image up to date with its registry
  userns.storage.image_layers:
    image: docker.io/library/postgres:17
    pull: newer

- name: Take an image away with all its mapped layers
  userns.storage.image_layers:
    image: localhost/app:1
    state: absent
"""

RETURN = r"""
images:
  description:
    - The images, as M(userns.storage.image_layers_info) returns them. With O(state=absent), as they were before.
    - In check mode an image that is not there yet is left out.
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
actions:
  description: What was done, or would be in check mode, of V(pulled), V(tagged), V(untagged) and V(removed).
  returned: always
  type: list
  elements: str
removed_layers:
  description: The layers that went, in the order of removal.
  returned: O(state=absent)
  type: list
  elements: str
store:
  description: The store that was worked on.
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
from ansible_collections.userns.storage.plugins.module_utils._module import (
    STORE_ARGUMENTS,
    run_outside,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import images


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "images": {
                "type": "list",
                "elements": "str",
                "required": True,
                "aliases": ["image", "name"],
            },
            "source": {"type": "str"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "pull": {
                "type": "str",
                "choices": ["missing", "newer", "always"],
                "default": "missing",
            },
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
    run_outside(
        module,
        lambda store: images.ImagesRequest(
            store=store,
            images=tuple(params["images"]),
            source=params["source"] or "",
            state=params["state"],
            pull=params["pull"],
            measure=params["measure"],
            check=module.check_mode,
        ),
        images.declare,
    )


if __name__ == "__main__":
    main()
