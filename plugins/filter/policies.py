# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: policies
short_description: Parse policies from text, such as a survey answer
version_added: 1.0.0
description:
  - Converts lines of text into a dictionary with the options of M(userns.storage.layer_gc) for each owner of a store.
options:
  _input:
    description:
      - Lines with an owner and options, such as V(alice unused_for=2w max_copies_per_image=1), a list of such lines, or the dictionary
        itself.
    type: raw
    required: true
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Read policies from a survey's text area
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
  description: The options for each store, by owner.
  type: dict
"""

import typing as t

from ansible_collections.userns.storage.plugins.plugin_utils import _escapes, _texts


def policies(value: t.Any) -> t.Any:
    try:
        return _escapes.template_result(_texts.policies(value))
    except ValueError as error:
        raise _escapes.filter_error("policies", error) from None


class FilterModule:
    """The filter userns.storage.policies."""

    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        return {"policies": policies}
