# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: unknown_variables
short_description: List variables with a role's prefix that the role does not know
version_added: 1.0.0
description:
  - Returns those names that begin with the name of a role and an underscore, but are neither options of the role nor names that the role
    uses itself. For a misspelled name, the result includes the most similar option.
  - The roles of this collection use this filter to fail on unknown variables before they read or change anything.
options:
  _input:
    description:
      - The names of variables.
    type: list
    elements: str
    required: true
  role:
    description:
      - The directory of the role. It must contain C(meta/argument_specs.yml).
    type: path
    required: true
  ignored:
    description:
      - Names to ignore because they are used for another purpose.
    type: list
    elements: str
    default: []
positional: role, ignored
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Fail on variables that the role web does not have
  ansible.builtin.assert:
    that: unknown | length == 0
    fail_msg: "Unknown: {{ unknown | join(', ') }}"
  vars:
    # For example ['web_prot (did you mean web_port?)']. In a task of the role itself, role_path is its folder.
    unknown: "{{ query('ansible.builtin.varnames', '^web_') | userns.storage.unknown_variables(playbook_dir ~ '/roles/web') }}"
"""

RETURN = r"""
_value:
  description: The unknown names, each with the most similar option if there is one.
  type: list
  elements: str
"""

import typing as t
from pathlib import Path

from ansible_collections.userns.storage.plugins.plugin_utils import _escapes, _variables


def unknown_variables(names: t.Iterable[str], role: str, ignored: t.Sequence[str] = ()) -> t.Any:
    try:
        found = _variables.unknown(map(str, names), Path(role), tuple(ignored))
    except (OSError, KeyError, TypeError) as error:
        raise _escapes.filter_error("unknown_variables", error) from None
    return _escapes.template_result(found)


class FilterModule:
    """The filter userns.storage.unknown_variables."""

    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        return {"unknown_variables": unknown_variables}
