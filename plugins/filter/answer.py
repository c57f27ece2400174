# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: answer
short_description: Interpret a variable that can come from a survey
version_added: 1.0.0
description:
  - AWX passes the answers of a survey as unsafe YAML texts. ansible-core 2.19 and later convert such a text again, so that an empty answer
    becomes null and V(0) becomes an integer. ansible-core 2.16 to 2.18 keep the text. This filter returns the same value in both cases.
options:
  _input:
    description:
      - The variable.
    type: raw
    required: true
  default:
    description:
      - The value if the variable is null or an empty text.
    type: raw
    default: ""
  none:
    description:
      - The value if the variable is the text V(none) in upper or lower case.
    type: raw
    default: ""
positional: default, none
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Use 10m unless the survey contains an answer
  ansible.builtin.debug:
    msg: "{{ prune_min_age | userns.storage.answer('10m') }}"
  vars:
    prune_min_age: ""
    # => 10m

- name: Switch an option off
  ansible.builtin.debug:
    msg: "{{ 'none' | userns.storage.answer('4w') }}"
    # => an empty text
"""

RETURN = r"""
_value:
  description: The variable, with integers and floating-point numbers as texts, or one of the two options.
  type: raw
"""

import typing as t

from ansible_collections.userns.storage.plugins.plugin_utils import _texts


def answer(value: t.Any, default: t.Any = "", none: t.Any = "") -> t.Any:
    if _texts.is_blank(value):
        return default
    return none if _texts.is_none(value) else _texts.number_as_text(value)


class FilterModule:
    """The filter userns.storage.answer."""

    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        return {"answer": answer}
