# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: fleet_report
short_description: Create a report from the data that the report role gathered
version_added: 1.0.0
description:
  - Creates one report from the variables that the role P(userns.storage.report#role) sets on each host. The report includes hosts that were
    unreachable or failed.
options:
  _input:
    description:
      - The names of the hosts.
    type: list
    elements: str
    required: true
  facts:
    description:
      - The variables of all hosts, C(hostvars).
    type: dict
    required: true
  form:
    description:
      - V(html) returns one self-contained page, V(markdown) a shorter text, V(lines) a list with one line for each store, and V(totals) a
        dictionary of numbers.
    type: str
    choices: [html, markdown, lines, totals]
    default: html
  title:
    description:
      - The heading of the report.
    type: str
    default: Container stores
  moment:
    description:
      - The time at which the data was gathered, as text for the report.
    type: str
    default: ""
positional: facts, form
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Write a page about all hosts of the play
  ansible.builtin.copy:
    dest: /srv/www/layers.html
    content: "{{ ansible_play_hosts_all | userns.storage.fleet_report(hostvars, 'html', title='Container stores') }}"
    mode: "0644"
  run_once: true
  delegate_to: localhost
"""

RETURN = r"""
_value:
  description: The report.
  type: raw
"""

import typing as t

from ansible_collections.userns.storage.plugins.plugin_utils import (
    _escapes,
    _fleet,
    _fleet_markdown,
    _fleet_page,
    _summaries,
)


def fleet_report(
    names: t.Sequence[str],
    facts: t.Mapping[str, t.Mapping[str, t.Any]],
    form: str = "html",
    title: str = "Container stores",
    moment: str = "",
) -> t.Any:
    found = _fleet.fleet(names, facts)
    if form == "totals":
        return _fleet.totals(found)
    if form == "lines":
        return _escapes.template_result(_summaries.fleet_lines(found))
    render = _fleet_markdown.render if form == "markdown" else _fleet_page.render
    return _escapes.template_result(render(found, title, moment))


class FilterModule:
    """The filter userns.storage.fleet_report."""

    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        return {"fleet_report": fleet_report}
