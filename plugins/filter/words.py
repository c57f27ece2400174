# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: words
short_description: Split text into words, such as a survey answer
version_added: 1.0.0
description:
  - Returns a list for a variable that is a list or a text. A survey's text area provides lines, and a text field provides words separated
    by commas or blanks.
  - Null, an empty text and the text V(none) stand for the empty list.
options:
  _input:
    description:
      - A text or a list of texts.
    type: raw
    required: true
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Read users from a text field
  ansible.builtin.debug:
    msg: "{{ 'alice, bob carol' | userns.storage.words }}"
    # => ['alice', 'bob', 'carol']
"""

RETURN = r"""
_value:
  description: The list of words.
  type: list
  elements: str
"""

import typing as t

from ansible_collections.userns.storage.plugins.plugin_utils import _escapes, _texts


def words(value: t.Any) -> t.Any:
    try:
        return _escapes.template_result(_texts.words(value))
    except ValueError as error:
        raise _escapes.filter_error("words", error) from None


class FilterModule:
    """The filter userns.storage.words."""

    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        return {"words": words}
