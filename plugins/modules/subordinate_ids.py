#!/usr/bin/python

# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: subordinate_ids
short_description: Assign unique ranges of subordinate IDs to users
version_added: 1.0.0
description:
  - Ensures that users have subordinate UIDs and GIDs in C(/etc/subuid) and C(/etc/subgid), as required for rootless containers and C(podman
    run --userns=auto).
  - Existing ranges are not changed, regardless of the tool that wrote them. A new range does not overlap any other range in either file,
    whether that is listed by name or by number, or the ID of any local account or group.
  - The module writes the files under the locks of C(usermod) and C(useradd), and keeps copies of the old files in
    C(/etc/subuid-) and C(/etc/subgid-), as these tools do.
  - The module reads the files as C(newuidmap) and C(newgidmap) on the host do. A line that these programs ignore, for example because it
    ends with a blank, assigns nothing to its user, and the module warns. The module also never assigns a range to another user that any
    version of these programs would read in such a line.
  - New ranges are between C(SUB_UID_MIN) and C(SUB_UID_MAX), or between C(SUB_GID_MIN) and C(SUB_GID_MAX), in C(/etc/login.defs).
  - The module warns if a user shares subordinate IDs with another user or with a local account.
  - Existing lines are kept byte for byte. A missing newline at the end of a file is added.
  - If C(/etc/nsswitch.conf) assigns subordinate IDs to a directory service such as FreeIPA, the module writes nothing. It fails if a user
    has too few IDs there.
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
      - The names of the users. The module also accepts names without an account, such as V(containers) for the automatic namespaces of the
        rootful store.
    type: list
    elements: str
    required: true
    aliases: [user, name]
  count:
    description:
      - The minimum number of subordinate UIDs and of subordinate GIDs for each user. The module assigns the missing number to users with fewer IDs.
    type: int
    default: 65536
requirements:
  - Python 3.9 or later on the managed host, Linux
seealso:
  - module: userns.storage.layer_template
    description: Pre-maps images with these IDs.
  - ref: ansible_collections.userns.storage.docsite.many_users
    description: Describes hosts on which many users run containers.
  - name: subuid
    description: The manual page of C(/etc/subuid).
    link: https://manpages.debian.org/subuid.5
  - name: newuidmap
    description: The manual page of the program that reads C(/etc/subuid) and maps the IDs of a user.
    link: https://manpages.debian.org/newuidmap.1
  - name: usermod
    description: The manual page of the command whose options C(--add-subuids) and C(--add-subgids) add single ranges.
    link: https://manpages.debian.org/usermod.8
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Allow alice and bob to run rootless containers
  userns.storage.subordinate_ids:
    users: [alice, bob]
  register: ids

- name: Display their ranges
  ansible.builtin.debug:
    var: ids.users

- name: Assign IDs for 64 containers of the rootful store with automatic namespaces
  userns.storage.subordinate_ids:
    users: containers
    count: 4194304
"""

RETURN = r"""
users:
  description:
    - The users with all their ranges, including predicted ranges in check mode.
    - If the task fails after it has written C(/etc/subuid), for example because the filesystem is full, the list contains the ranges that
      were added until then.
  returned: success, or failure after one of the files was written
  type: list
  elements: dict
  contains:
    name:
      description: The name of the user.
      type: str
    added:
      description: Whether a range was added.
      type: bool
    uid:
      description: The ranges of UIDs.
      type: list
      elements: dict
      sample: [{start: 100000, count: 65536}]
      contains: &range
        start:
          description: The first ID of the range.
          type: int
        count:
          description: The number of IDs in the range.
          type: int
    gid:
      description: The ranges of GIDs.
      type: list
      elements: dict
      contains: *range
source:
  description: V(files), or the name of the NSS service that provides the IDs.
  returned: success, or failure after one of the files was written
  type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.userns.storage.plugins.module_utils._module import run_as_root
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.subordinate_ids import (
    AssignRequest,
    assign,
)


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
    request = AssignRequest(
        users=tuple(module.params["users"]),
        count=module.params["count"],
        check=module.check_mode,
    )
    run_as_root(module, request, assign)


if __name__ == "__main__":
    main()
