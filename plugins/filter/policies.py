# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: policies
short_description: Policies of stores out of a text, as a survey gives it
version_added: 1.0.0
description:
  - Makes of lines a dictionary of options of M(userns.storage.layer_gc) for each store's owner.
options:
  _input:
    description:
      - Lines of an owner and options such as V(alice unused_for=2w max_copies_per_image=1), or a list of them, or the dictionary itself.
    type: raw
    required: true
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Take policies from a text area
  ansible.builtin.debug:
    msg: "{{ answer | userns.storage.policies }}"
    # => {'alice': {'unused_for': '2w'}, 'root': {'max_copies_per_image': '1'}}
  vars:
    answer: |
      alice unused_for=2w
      root max_copies_per_image=1
"""

RETURN = r"""
_value:
  description: The options of each store, by its owner.
  type: dict
"""

import typing as t

from ansible.errors import AnsibleFilterError
from ansible_collections.userns.storage.plugins.plugin_utils import _texts


def policies(value: t.Any) -> t.Dict[str, t.Dict[str, t.Any]]:
    try:
        return _texts.policies(value)
    except ValueError as error:
        raise AnsibleFilterError(f"userns.storage.policies: {error}") from error


class FilterModule:
    """The filter userns.storage.policies."""

    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        return {"policies": policies}
