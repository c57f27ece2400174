#!/usr/bin/python

# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: subordinate_ids
short_description: Give users subordinate IDs that nobody else has
version_added: 1.0.0
description:
  - Sees to it that users have subordinate UIDs and GIDs in C(/etc/subuid) and C(/etc/subgid), as rootless containers and
    C(podman run --userns=auto) need them.
  - Ranges that are there stay as they are, whatever tool wrote them. A new range touches no other one of either file, under a name or a
    number, and no ID of a local account or group.
  - The files are written under the locks of C(usermod) and C(useradd), and the old ones are kept beside them as those tools keep them.
  - Where C(/etc/nsswitch.conf) gives subordinate IDs to a directory such as FreeIPA, nothing is written. Too few IDs there are an error.
extends_documentation_fragment:
  - userns.storage._attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  users:
    description:
      - Names of users. One without an account, such as V(containers) for the rootful store's automatic namespaces, is taken as it is.
    type: list
    elements: str
    required: true
    aliases: [user, name]
  count:
    description:
      - How many of each kind a user has at least. Who has fewer is given what is missing.
    type: int
    default: 65536
requirements:
  - Python 3.9 or later on the managed host, Linux
seealso:
  - module: userns.storage.layer_template
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Let alice and bob run rootless containers
  userns.storage.subordinate_ids:
    users: [alice, bob]

- name: Room for 64 containers of the rootful store with automatic namespaces
  userns.storage.subordinate_ids:
    users: containers
    count: 4194304
"""

RETURN = r"""
users:
  description: The users with all their ranges, predicted ones in check mode.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: The user.
      type: str
    added:
      description: Whether a range was added.
      type: bool
    uid:
      description: Ranges of UIDs.
      type: list
      elements: dict
      sample: [{start: 100000, count: 65536}]
      contains: &range
        start:
          description: The first ID.
          type: int
        count:
          description: How many there are.
          type: int
    gid:
      description: Ranges of GIDs.
      type: list
      elements: dict
      contains: *range
source:
  description: V(files), or the name of the NSS service that keeps the IDs.
  returned: success
  type: str
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import StorageError
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import granting


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "users": {
                "type": "list",
                "elements": "str",
                "required": True,
                "aliases": ["user", "name"],
            },
            "count": {"type": "int", "default": 65536},
        },
        supports_check_mode=True,
    )
    request = granting.GrantRequest(
        users=tuple(module.params["users"]),
        count=module.params["count"],
        check=module.check_mode,
    )
    try:
        result = granting.grant(request)
    except StorageError as error:
        facts: t.Dict[str, t.Any] = dict(error.facts)
        module.fail_json(msg=str(error), **facts)
    if not module._diff:
        del result["diff"]
    module.exit_json(**result)


if __name__ == "__main__":
    main()
