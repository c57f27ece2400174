# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: systemd_value
short_description: Escape text for a setting in a systemd unit
version_added: 1.0.0
description:
  - Escapes text for settings that use the whole value, such as C(Description), C(PathChanged) or C(WorkingDirectory). Specifiers such as
    C(%h) are not expanded.
  - Fails for text that a unit cannot contain, which is empty text, text with a line break, text that is not UTF-8, and text that begins or
    ends with white space or a backslash.
options:
  _input:
    description:
      - The text to escape.
    type: str
    required: true
seealso:
  - plugin: userns.storage.systemd_command
    plugin_type: filter
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Show a path unit
  ansible.builtin.debug:
    msg: |
      [Path]
      PathChanged={{ '/srv/100%/images.json' | userns.storage.systemd_value }}
    # => PathChanged=/srv/100%%/images.json
"""

RETURN = r"""
_value:
  description: The escaped value.
  type: str
"""

import typing as t

from ansible_collections.userns.storage.plugins.plugin_utils import _escapes


def systemd_value(text: t.Any) -> t.Any:
    try:
        return _escapes.template_result(_escapes.systemd_value(text))
    except ValueError as error:
        raise _escapes.filter_error("systemd_value", error) from None


class FilterModule:
    """The filter userns.storage.systemd_value."""

    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        return {"systemd_value": systemd_value}
