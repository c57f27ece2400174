# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: fleet_report
short_description: What the role report has gathered, as a page, as Markdown or as totals
version_added: 1.0.0
description:
  - Makes one report of what the role P(userns.storage.report#role) has left in the variables of each host. Hosts that were not reached, or failed,
    are in it.
options:
  _input:
    description:
      - Names of hosts.
    type: list
    elements: str
    required: true
  facts:
    description:
      - The variables of the hosts, C(hostvars).
    type: dict
    required: true
  form:
    description:
      - V(html) is one page with all it needs in it, V(markdown) a shorter text, V(totals) a dictionary of numbers.
    type: str
    choices: [html, markdown, totals]
    default: html
  title:
    description:
      - The heading.
    type: str
    default: Mapped layers
  moment:
    description:
      - When the hosts were asked, in words.
    type: str
    default: ""
positional: facts, form
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Write a page about all hosts of this play
  ansible.builtin.copy:
    dest: /srv/www/layers.html
    content: "{{ ansible_play_hosts_all | userns.storage.fleet_report(hostvars, 'html', title='Mapped layers') }}"
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
    _fleet,
    _fleet_markdown,
    _fleet_page,
)


def fleet_report(
    names: t.Sequence[str],
    facts: t.Mapping[str, t.Mapping[str, t.Any]],
    form: str = "html",
    title: str = "Mapped layers",
    moment: str = "",
) -> t.Any:
    found = _fleet.fleet(names, facts)
    if form == "totals":
        return _fleet.totals(found)
    render = _fleet_markdown.render if form == "markdown" else _fleet_page.render
    return render(found, title, moment)


class FilterModule:
    """The filter userns.storage.fleet_report."""

    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        return {"fleet_report": fleet_report}
