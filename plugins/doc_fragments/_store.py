# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This doc fragment is PRIVATE to the userns.storage collection.

from __future__ import annotations


class ModuleDocFragment:
    # Which store a module works on; the options are declared in module_utils/_module.py.
    DOCUMENTATION = r"""
options:
  user:
    description:
      - Work in the rootless store of this user. The module must run as root, or as that user.
      - When run as root, the module enters the user's namespace and drops its privileges to those of the user before it opens any file of
        the store.
      - If not set, the module works in the store of the user that runs it. For root this is the rootful store.
    type: str
  users:
    description:
      - Work in the stores of all these users, V(root) for the rootful store, one after the other. The module must run as root for this.
      - A failure for one user does not stop the others. The module reports all failures and fails at the end.
      - If the list is empty, the module does nothing.
      - Mutually exclusive with O(user), O(graphroot) and O(runroot).
    type: list
    elements: str
  storage_conf:
    description:
      - Path of the only C(storage.conf) to read, as with E(CONTAINERS_STORAGE_CONF).
    type: path
  graphroot:
    description:
      - The graph root of the store. It must exist, and a container program must have written to it before.
      - If not set, the module determines it in the same way as podman does, including from podman's own database.
    type: path
  runroot:
    description:
      - The run root of the store.
    type: path
  driver:
    description:
      - The graph driver of the store, V(overlay), V(vfs) or V(btrfs).
      - The module fails if the driver does not match the contents of O(graphroot). It does not create any directory.
    type: str
  storage_options:
    description:
      - Driver options in the format of C(podman --storage-opt), for example V(overlay.mountopt=nodev,metacopy=on).
      - They replace the options in C(storage.conf).
    type: list
    elements: str
    default: []
  runtime:
    description:
      - The program whose store is used, V(podman), V(buildah) or V(cri-o), or the path of its executable. It matters because versions read
        C(storage.conf) in different ways.
      - With V(cri-o), the module reads C(/etc/crio/crio.conf) and all files in C(/etc/crio/crio.conf.d) above C(storage.conf), as CRI-O
        does, and the environment variables of CRI-O such as E(CONTAINER_ROOT) and E(CONTAINER_CONFIG) in the environment of the task. It
        does not read the command line of the unit. C(crio config) prints the configuration in effect.
      - A version can follow the name, for example V(podman 5.4.2). The module then relies on this version, and the program does not have to
        be installed.
      - If not set, the module examines the installed programs, podman first. The task fails if they use different stores, or if none is
        installed and the result depends on the program.
    type: str
  allow_untested_runtime:
    description:
      - Allow changes to the store even if a program on the host uses a newer containers/storage than 1.64, the newest version that this
        version of the collection was tested with. If V(false), the module only reads such a store, and a task that would change it fails.
      - The module determines the version of containers/storage from the program's executable or its package.
    type: bool
    default: false
  lock_timeout:
    description:
      - Maximum number of seconds to wait for a lock of the store that another program holds, or for another process that does the same
        work.
    type: int
    default: 60
requirements:
  - Python 3.9 or later on the managed host, Linux
"""
