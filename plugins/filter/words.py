# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: words
short_description: Words of a text, as a survey gives it
version_added: 1.0.0
description:
  - Makes a list of a variable that may be a list or a text. A survey's text area gives lines, a text field words with commas or blanks.
options:
  _input:
    description:
      - A text, or a list of texts.
    type: raw
    required: true
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Take users from a text field
  ansible.builtin.debug:
    msg: "{{ 'alice, bob carol' | userns.storage.words }}"
    # => ['alice', 'bob', 'carol']
"""

RETURN = r"""
_value:
  description: The words.
  type: list
  elements: str
"""

import typing as t

from ansible.errors import AnsibleFilterError
from ansible_collections.userns.storage.plugins.plugin_utils import _texts


def words(value: t.Any) -> t.List[str]:
    try:
        return _texts.words(value)
    except ValueError as error:
        raise AnsibleFilterError(f"userns.storage.words: {error}") from error


class FilterModule:
    """The filter userns.storage.words."""

    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        return {"words": words}
