# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: storage_conf
short_description: Set keys in the text of a storage.conf
version_added: 1.0.0
description:
  - Returns the text of a C(storage.conf) with keys set, and every other byte of it as it was, comments included.
  - A text that says what is wanted comes back unchanged.
options:
  _input:
    description:
      - The text of the file. An empty one makes a new file.
    type: str
    required: true
  settings:
    description:
      - A dictionary, or lines such as V(overlay.mountopt=nodev,metacopy=on), as C(podman --storage-opt) takes them.
      - V(driver) is the store's driver, C(DRIVER.KEY) a key of C([storage.options.DRIVER]), another word one of C([storage.options]).
      - A value that begins with V(+) is added to the comma list that is there, as in V(overlay.mountopt=+metacopy=on).
    type: raw
    required: true
positional: settings
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Read what is there
  ansible.builtin.slurp:
    src: /etc/containers/storage.conf
  register: old

- name: Add a mount option to it
  ansible.builtin.copy:
    dest: /etc/containers/storage.conf
    content: "{{ old.content | b64decode | userns.storage.storage_conf({'overlay.mountopt': '+metacopy=on'}) }}"
    backup: true
    owner: root
    group: root
    mode: "0644"
"""

RETURN = r"""
_value:
  description: The new text.
  type: str
"""

import typing as t

from ansible.errors import AnsibleFilterError
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import StorageError
from ansible_collections.userns.storage.plugins.plugin_utils import _storage_conf, _texts


def storage_conf(text: str, settings: t.Any) -> str:
    try:
        wanted = settings if isinstance(settings, dict) else _texts.lines(settings)
        return _storage_conf.edit(text, _storage_conf.settings(wanted))
    except (StorageError, ValueError) as error:
        raise AnsibleFilterError(f"userns.storage.storage_conf: {error}") from error


class FilterModule:
    """The filter userns.storage.storage_conf."""

    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        return {"storage_conf": storage_conf}
