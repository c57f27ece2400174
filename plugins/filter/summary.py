# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: summary
short_description: Summarize results of the modules, with one line for each store
version_added: 1.0.0
description:
  - Returns a text for each store that says what the modules did in it. The roles display these texts at their end.
options:
  _input:
    description:
      - The owners of the stores, V(root) for the rootful store.
    type: list
    elements: str
    required: true
  images:
    description:
      - Registered results of tasks that run M(userns.storage.image_layers) in a loop over the owners.
    type: list
    elements: dict
    default: []
  layers:
    description:
      - The registered result of M(userns.storage.layer_template).
    type: dict
    default: {}
  removals:
    description:
      - The registered result of a task that runs M(userns.storage.layer_gc) in a loop over the owners.
    type: dict
    default: {}
  shared:
    description:
      - The registered result of M(userns.storage.shared_images).
    type: dict
    default: {}
  failures:
    description:
      - Pairs of an owner and a message.
    type: list
    elements: list
    default: []
  predicted:
    description:
      - Whether the tasks ran in check mode.
    type: bool
    default: false
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Display what layer_template did
  ansible.builtin.debug:
    msg: "{{ ['alice', 'bob'] | userns.storage.summary(layers=made) }}"
  vars:
    made:
      layers:
        - {user: alice, action: created, size_exclusive: 1288490188}
        - {user: bob, action: existing}
    # => ['alice: mapped layers: 1 created (1.2 GiB)', 'bob: mapped layers: 1 existing']
"""

RETURN = r"""
_value:
  description: The texts, in the order of the owners.
  type: list
  elements: str
"""

import typing as t

from ansible_collections.userns.storage.plugins.plugin_utils import _escapes, _summaries, _values


def summary(
    stores: t.Sequence[t.Any],
    images: t.Sequence[t.Any] = (),
    layers: t.Any = None,
    removals: t.Any = None,
    shared: t.Any = None,
    failures: t.Sequence[t.Sequence[t.Any]] = (),
    predicted: bool = False,
) -> t.Any:
    try:
        lines = _summaries.store_lines(
            stores, images, layers, removals, shared, failures, predicted
        )
    except _values.Malformed as error:
        raise _escapes.filter_error("summary", error) from None
    return _escapes.template_result(lines)


class FilterModule:
    """The filter userns.storage.summary."""

    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        return {"summary": summary}
