# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: systemd_command
short_description: Quote a command for ExecStart in a systemd unit
version_added: 1.0.0
description:
  - Quotes the words of a command so that systemd reads them unchanged. Neither specifiers such as C(%h) nor variables such as C($HOME) are
    expanded.
  - Fails for words that a unit cannot contain, which are empty words, words with a line break, and words that are not UTF-8.
options:
  _input:
    description:
      - The absolute path of the program and its arguments.
    type: list
    elements: str
    required: true
seealso:
  - plugin: userns.storage.systemd_value
    plugin_type: filter
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Show a service unit
  ansible.builtin.debug:
    msg: |
      [Service]
      ExecStart={{ ['/usr/bin/printf', '%s', 'a b'] | userns.storage.systemd_command }}
    # => ExecStart=/usr/bin/printf "%%s" "a b"
"""

RETURN = r"""
_value:
  description: The quoted command.
  type: str
"""

import typing as t

from ansible.errors import AnsibleFilterError
from ansible_collections.userns.storage.plugins.plugin_utils import _escapes


def systemd_command(argv: t.Any) -> t.Any:
    if not isinstance(argv, (list, tuple)) or not argv:
        raise AnsibleFilterError("userns.storage.systemd_command takes a list of words")
    try:
        return _escapes.template_result(_escapes.systemd_command(argv))
    except ValueError as error:
        raise _escapes.filter_error("systemd_command", error) from None


class FilterModule:
    """The filter userns.storage.systemd_command."""

    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        return {"systemd_command": systemd_command}
