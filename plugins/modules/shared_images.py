#!/usr/bin/python

# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: shared_images
short_description: Share the images of one root-owned store with the rootless users of a host
version_added: 1.0.0
description:
  - Makes the images of a store that root owns (the real store) available to each user's podman, buildah and toolbox, with the owners that
    the user's containers need. Nothing is copied, regardless of the number of users and mappings.
  - Each user gets a read-only image store that consists of records and idmapped mounts of the real store. Plain containers, containers
    with the declared mappings, builds and commits work as with images that the user pulled.
  - An image that is removed from the real store is kept there while a container or an image of a user needs it. During that time its name
    is C(localhost/userns-storage/shared).
  - The users can read all files of the shared images, including secrets in images. With V(*) in O(images), and in a real store of the
    default path, that can include all contents of the real store.
  - The mounts exist until the host shuts down. The unit C(userns-storage.service) creates them again at boot, see the role
    P(userns.storage.share#role).
extends_documentation_fragment:
  - userns.storage._attributes
  - userns.storage._attributes.actiongroup_store
  - userns.storage._mapping
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  graphroot:
    description:
      - The graph root of the real store. It must be an overlay store of root on a filesystem that supports idmapped mounts.
      - Use M(userns.storage.image_layers) with the same O(graphroot) to add images.
    type: path
    default: /var/lib/userns-storage/images
  runroot:
    description: The run root of the store.
    type: path
    default: /run/userns-storage/images
  lock_timeout:
    description: Maximum number of seconds to wait for the locks of a store.
    type: int
    default: 60
  images:
    description:
      - Shell patterns for the names and IDs of the images to share.
      - Other images of the store can become readable for the users, see the description of the module. Keep images that they must not read in
        a different store.
    type: list
    elements: str
    default: ["*"]
  users:
    description:
      - The users with whom to share the images. Users of earlier tasks keep their shared images.
      - With O(state=absent), an empty list means all users.
    type: list
    elements: str
    default: []
  mappings:
    description:
      - The mappings with which containers start immediately, in addition to containers without a user namespace option.
    default: []
  state:
    description:
      - V(present) shares the images.
      - V(absent) stops sharing and removes everything that the module created. It fails while a container or an image of a user needs a
        shared image.
    type: str
    choices: [present, absent]
    default: present
seealso:
  - module: userns.storage.image_layers
  - module: userns.storage.layer_template
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Pull the toolbox image into the shared store
  userns.storage.image_layers:
    images: registry.example.org/toolbox:latest
    graphroot: /var/lib/userns-storage/images
    runroot: /run/userns-storage/images
    driver: overlay

- name: Share it with alice and bob, including for keep-id containers
  userns.storage.shared_images:
    users: [alice, bob]
    mappings:
      - userns: keep-id

- name: Stop sharing
  userns.storage.shared_images:
    state: absent
"""

RETURN = r"""
users:
  description: One entry for each user.
  returned: always
  type: list
  elements: dict
  contains:
    user:
      description: The name of the user.
      type: str
    action:
      description: The action that was performed. It is V(shared), V(existing), V(removed) or V(refused).
      type: str
    reason:
      description: The reason for a refusal, or the items that are kept although they are no longer declared.
      type: str
    store:
      description: The path of the user's read-only image store.
      type: str
    images:
      description: The images in the user's read-only image store.
      type: list
      elements: dict
      contains:
        id:
          description: The ID of the image.
          type: str
        names:
          description: The names of the image.
          type: list
          elements: str
        offered:
          description: Whether the image is declared. Other images are kept while containers or images of the user need them.
          type: bool
        mappings:
          description: The mappings with which containers start immediately.
          type: list
          elements: dict
          contains:
            uidmap:
              description: The UID map in the form in which the runtime writes it.
              type: list
              elements: str
            gidmap:
              description: The GID map in the form in which the runtime writes it.
              type: list
              elements: str
        refused:
          description: The reason why the image, or some of its mappings, cannot be shared with this user.
          type: list
          elements: str
    mounts:
      description: The number of mounts that form the store.
      type: int
    mounts_made:
      description: The number of mounts that were created, or would be created in check mode.
      type: int
    bytes_copied:
      description: The number of bytes of the images' layers that were copied. Always V(0).
      type: int
    configuration:
      description: The configuration file through which the user's runtimes find the store.
      type: str
released:
  description:
    - The IDs of images in the real store that have no name and that no user needs any more.
    - Use M(userns.storage.image_layers) to remove them. The role P(userns.storage.share#role) and its units do this.
  returned: always
  type: list
  elements: str
store:
  description: The store that the module used.
  returned: always
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
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.userns.storage.plugins.module_utils._mappings import (
    MAPPINGS_ARGUMENT,
    read_mapping,
)
from ansible_collections.userns.storage.plugins.module_utils._module import (
    STORE_ARGUMENTS,
    run_as_root,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.shared_images import (
    SharedRequest,
    declare,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import (
    store_request,
)

# Those of the options of a store that are about the real store.
_STORE: t.Mapping[str, t.Mapping[str, str]] = {
    "graphroot": {"default": "/var/lib/userns-storage/images"},
    "runroot": {"default": "/run/userns-storage/images"},
    "lock_timeout": {},
}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **{name: {**STORE_ARGUMENTS[name], **default} for name, default in _STORE.items()},
            "images": {"type": "list", "elements": "str", "default": ["*"]},
            "users": {"type": "list", "elements": "str", "default": []},
            "mappings": {**MAPPINGS_ARGUMENT, "default": []},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    params = module.params
    request = SharedRequest(
        store=store_request(None, {**{name: params[name] for name in _STORE}, "driver": "overlay"}),
        images=tuple(params["images"]),
        users=tuple(params["users"]),
        mappings=tuple(map(read_mapping, params["mappings"])),
        state=params["state"],
        check=module.check_mode,
    )
    run_as_root(module, request, declare)


if __name__ == "__main__":
    main()
