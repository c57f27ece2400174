# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: storage_conf
short_description: Set keys in the text of a storage.conf
version_added: 1.0.0
description:
  - Returns the text of a C(storage.conf) with the given keys set. All other bytes of the text, including comments, stay as they are.
  - Returns the text unchanged if the keys already have the given values.
options:
  _input:
    description:
      - The text of the file. An empty text creates a new configuration.
    type: str
    required: true
  settings:
    description:
      - A dictionary, or lines such as V(overlay.mountopt=nodev,metacopy=on) in the format of C(podman --storage-opt).
      - V(driver) is the driver of the store, C(DRIVER.KEY) is a key of C([storage.options.DRIVER]), and any other word is a key of
        C([storage.options]).
      - A value that begins with V(+) is appended to the existing comma-separated list, for example V(overlay.mountopt=+metacopy=on).
    type: raw
    required: true
positional: settings
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Read the existing file
  ansible.builtin.slurp:
    src: /etc/containers/storage.conf
  register: old

- name: Add a mount option to the file
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

from ansible_collections.userns.storage.plugins.module_utils._storage.errors import StorageError
from ansible_collections.userns.storage.plugins.module_utils._storage.store import conf_edit
from ansible_collections.userns.storage.plugins.plugin_utils import _escapes, _texts


def storage_conf(text: str, settings: t.Any) -> t.Any:
    try:
        given = settings if isinstance(settings, dict) else _texts.lines(settings)
        edited = conf_edit.edit(text, conf_edit.settings(given))
        return _escapes.template_result(edited)
    except (StorageError, ValueError) as error:
        raise _escapes.filter_error("storage_conf", error) from None


class FilterModule:
    """The filter userns.storage.storage_conf."""

    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        return {"storage_conf": storage_conf}
