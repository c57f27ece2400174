# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: mappings
short_description: Mappings of a text, as a survey gives it
version_added: 1.0.0
description:
  - Makes of lines what the option O(userns.storage.layer_template#module:mappings) takes.
options:
  _input:
    description:
      - Lines, or a list of them, or a list of dictionaries with the options themselves.
      - A line is a user namespace such as V(keep-id) or V(auto:size=4096), or a UID map with its ranges joined by commas such as
        V(0:1:1000,1000:0:1), with the GID map behind a slash where it is another one.
      - Behind it may stand V(slots=3), V(runtime="podman 5.4.2"), V(subuidname=web) and V(subgidname=web). The last two may also stand alone.
    type: raw
    required: true
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Pre-map what a text area says
  userns.storage.layer_template:
    images: registry.example.org/toolbox:latest
    user: alice
    mappings: "{{ answer | userns.storage.mappings }}"
  vars:
    answer: |
      keep-id
      auto:size=4096 slots=3
      0:1:10000/0:2:10000
"""

RETURN = r"""
_value:
  description: The mappings.
  type: list
  elements: dict
  sample: [{userns: auto, slots: 3}]
"""

import typing as t

from ansible.errors import AnsibleFilterError
from ansible_collections.userns.storage.plugins.plugin_utils import _texts


def mappings(value: t.Any) -> t.List[t.Dict[str, t.Any]]:
    try:
        return _texts.mappings(value)
    except ValueError as error:
        raise AnsibleFilterError(f"userns.storage.mappings: {error}") from error


class FilterModule:
    """The filter userns.storage.mappings."""

    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        return {"mappings": mappings}
