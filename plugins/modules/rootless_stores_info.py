#!/usr/bin/python

# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: rootless_stores_info
short_description: List the rootless stores of a host, and the stores shared with users
version_added: 1.0.0
description:
  - Looks for the rootless store of each account except root, at the location that the user's podman uses.
  - As root, the module reads the files of a user in a process with only that user's UID, GIDs and permissions. If a home directory does not
    respond within a few seconds, it is reported in RV(failures). If home directories in the same parent directory have not responded for five
    minutes in total, the remaining home directories in it are also reported there, and are not examined.
  - Also lists the stores whose images M(userns.storage.shared_images) shares with users.
extends_documentation_fragment:
  - userns.storage._attributes
  - userns.storage._attributes.info_module
requirements:
  - Python 3.9 or later on the managed host, Linux
  - The module must run as root.
seealso:
  - module: userns.storage.image_layers_info
  - module: userns.storage.shared_images
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Find the users who have a rootless store
  userns.storage.rootless_stores_info:
  register: found
  become: true

- name: List the images of each store
  userns.storage.image_layers_info:
    user: "{{ item.user }}"
  loop: "{{ found.stores }}"
  become: true
"""

RETURN = r"""
stores:
  description: The rootless stores.
  returned: success
  type: list
  elements: dict
  contains:
    user:
      description: The name of the user.
      type: str
    uid:
      description: The UID of the user.
      type: int
    graphroot:
      description: The graph root of the store.
      type: str
      sample: /home/alice/.local/share/containers/storage
failures:
  description: The accounts whose stores could not be determined.
  returned: success
  type: list
  elements: dict
  contains:
    user:
      description: The name of the user.
      type: str
    reason:
      description: A description of the reason.
      type: str
shared_stores:
  description: The stores whose images are shared with users.
  returned: success
  type: list
  elements: dict
  contains:
    graphroot:
      description: The graph root of the store.
      type: str
      sample: /var/lib/userns-storage/images
    runroot:
      description: The run root of the store.
      type: str
    users:
      description: The users with whom images are shared.
      type: list
      elements: dict
      contains:
        user:
          description: The name of the user.
          type: str
        images:
          description: The patterns of the images that are shared with the user.
          type: list
          elements: str
        mappings:
          description: The number of mappings besides the one of containers without options, which every user gets.
          type: int
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.userns.storage.plugins.module_utils._module import leave
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    rootless_stores_info,
)


def main() -> None:
    module = AnsibleModule(argument_spec={}, supports_check_mode=True)
    if os.geteuid() != 0:
        module.fail_json(
            msg="Only root can find the stores of all users. Run the task with become: true."
        )
    leave(module, {"changed": False, **rootless_stores_info.find()})


if __name__ == "__main__":
    main()
