#!/usr/bin/python

# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: storage_conf
short_description: Set keys in storage.conf for root or for a user
version_added: 1.0.0
description:
  - Sets keys in the configuration that podman, buildah and CRI-O read for a store. All other bytes of the file stay as they are.
  - With containers/storage before 1.63, the module changes C(/etc/containers/storage.conf), or C(~/.config/containers/storage.conf) of the
    user.
  - Since containers/storage 1.63, rootless programs also read all of C(/etc/containers/storage.conf). With such a podman, the module writes
    the keys to a drop-in. For root this is C(/etc/containers/storage.rootful.conf.d/50-userns-storage.conf), which rootless programs do not
    read, and for a user C(~/.config/containers/storage.conf.d/50-userns-storage.conf).
  - If an earlier version of the role P(userns.storage.prepare#role) wrote C(/etc/containers/storage.conf), the module moves its content to
    that drop-in and keeps a backup of the file. If the file has another origin and sets C(graphroot) or C(runroot), rootless podman fails.
    The module then warns and does not change the file.
  - The module determines the applicable case from podman's executable.
  - As root, the module reads and writes the files of a user in a process with only that user's UID, GIDs and permissions. It fails if a
    link refers to a file that the user may not read or write.
  - The module never changes the driver of an existing store.
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
  user:
    description:
      - Set keys for the rootless store of this user. The module must run as root, or as that user.
      - If not set, the module sets the keys for the user that runs it. For root these are the keys of the rootful store.
    type: str
  users:
    description:
      - Set keys for the stores of all these users, V(root) for the rootful store. The module must run as root for this.
      - A failure for one user does not stop the others. The module reports all failures and fails at the end.
      - Mutually exclusive with O(user).
    type: list
    elements: str
  settings:
    description:
      - A dictionary, or lines such as V(overlay.mountopt=nodev,metacopy=on) in the format of C(podman --storage-opt).
      - V(driver) is the driver of the store, C(DRIVER.KEY) is a key of C([storage.options.DRIVER]), and any other word is a key of
        C([storage.options]).
      - A value that begins with V(+) is appended to the comma-separated list in effect, for example V(overlay.mountopt=+metacopy=on).
      - C(additionalimagestores) and C(additionallayerstores) are lists of paths. A text is split at commas. With V(+) in front, as in
        V(additionalimagestores=+/usr/lib/images), the paths are added to the list in effect, with V(-) they are removed from it.
      - If empty, the module only moves a file of an earlier version and warns.
    type: raw
    default: {}
  metacopy:
    description:
      - Add C(metacopy=on) to the mount options of the rootful store if its driver is overlay and the kernel supports this option. Ignored
        for rootless stores, which cannot use it.
    type: bool
    default: false
  backup:
    description:
      - Keep a backup of the old file if the file is changed.
    type: bool
    default: true
requirements:
  - Python 3.9 or later on the managed host, Linux
  - podman on the managed host
seealso:
  - plugin: userns.storage.storage_conf
    plugin_type: filter
  - name: containers-storage.conf
    description: The manual page of the file.
    link: https://github.com/containers/storage/blob/main/docs/containers-storage.conf.5.md
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Store only owners in mapped layers of the rootful store
  userns.storage.storage_conf:
    metacopy: true

- name: Set the driver of a user's store
  userns.storage.storage_conf:
    user: alice
    settings:
      driver: overlay
      overlay.mountopt: +nodev
"""

RETURN = r"""
stores:
  description: The results for the single users, each with C(user) and the keys below, or with C(user) and C(error).
  returned: with O(users)
  type: list
  elements: dict
user:
  description: The user for whose store the keys are set.
  returned: without O(users)
  type: str
file:
  description: The file that contains the keys. Empty in check mode if podman is not installed, because podman's version determines the
    file.
  returned: without O(users)
  type: str
backup_file:
  description: The path of the backup. Empty if no file was replaced.
  returned: without O(users)
  type: str
moved:
  description: The file of an earlier version whose keys were moved to RV(file). Empty if there is none.
  returned: without O(users)
  type: str
driver:
  description: The driver of the store, or the driver that it will have.
  returned: without O(users)
  type: str
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.userns.storage.plugins.module_utils._module import leave
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    ConfigError,
    StorageError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import storage_conf
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.result_merging import (
    Outcome,
    merged,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import (
    account_named,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store import conf_edit


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "user": {"type": "str"},
            "users": {"type": "list", "elements": "str"},
            "settings": {"type": "raw", "default": {}},
            "metacopy": {"type": "bool", "default": False},
            "backup": {"type": "bool", "default": True},
        },
        mutually_exclusive=[("user", "users")],
        supports_check_mode=True,
    )
    users = module.params["users"]
    if users is not None:
        leave(module, merged({user: _outcome(module, user) for user in dict.fromkeys(users)}))
    outcome = _outcome(module, module.params["user"])
    if isinstance(outcome, StorageError):
        outcome = {"error": str(outcome), "facts": dict(outcome.facts)}
    leave(module, outcome)


def _outcome(module: AnsibleModule, user: t.Optional[str]) -> Outcome:
    try:
        return storage_conf.declare(
            storage_conf.ConfRequest(
                account=account_named(user),
                settings=_settings(module.params["settings"]),
                metacopy=module.params["metacopy"],
                backup=module.params["backup"],
                check=module.check_mode,
            )
        )
    except StorageError as error:
        return error


def _settings(value: t.Any) -> t.Dict[str, t.Any]:
    if isinstance(value, str):
        value = [line for line in value.splitlines() if line.strip()]
    try:
        return conf_edit.settings(value or {})
    except (ValueError, TypeError) as error:
        raise ConfigError(
            "settings", str(error), "Write KEY=VALUE lines, or a dictionary."
        ) from error


if __name__ == "__main__":
    main()
