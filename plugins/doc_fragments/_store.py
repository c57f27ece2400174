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
      - Root enters the user's namespace and drops to the user before it opens anything of that store.
      - Without it the module works in the store of whoever runs it, the rootful store for root.
    type: str
  storage_conf:
    description:
      - Read this C(storage.conf) and no other, as E(CONTAINERS_STORAGE_CONF) does.
    type: path
  graphroot:
    description:
      - The store's graph root. It must exist and have been written by a container program before.
      - Found as podman finds it when not given, podman's own database included.
    type: path
  runroot:
    description:
      - The store's run root.
    type: path
  driver:
    description:
      - The graph driver of the store, V(overlay), V(vfs) or V(btrfs).
      - A driver that does not fit what O(graphroot) holds is refused; no folder is created.
    type: str
  storage_options:
    description:
      - Driver options as C(podman --storage-opt) takes them, for example V(overlay.mountopt=nodev,metacopy=on).
      - They replace those of the C(storage.conf).
    type: list
    elements: str
    default: []
  lock_timeout:
    description:
      - Seconds to wait for a lock of the store that another program holds, or for equal work under way elsewhere.
    type: int
    default: 60
requirements:
  - Python 3.9 or later on the managed host, Linux
"""
