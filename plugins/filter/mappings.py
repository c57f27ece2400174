# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: mappings
short_description: Parse mappings from text, such as a survey answer
version_added: 1.0.0
description:
  - Converts lines of text into the value of the option O(userns.storage.layer_template#module:mappings).
options:
  _input:
    description:
      - Lines of text, a list of lines, or a list of dictionaries with the options themselves.
      - A line is a user namespace such as V(keep-id) or V(auto:size=4096), or a UID map with its ranges separated by commas, such as
        V(0:1:1000,1000:0:1). If the GID map differs, it follows after a slash.
      - The words V(slots=3), V(runtime="podman 5.4.2"), V(subuidname=web) and V(subgidname=web) can follow. The last two can also be used
        on their own.
    type: raw
    required: true
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Pre-map images for mappings from a survey's text area
  userns.storage.layer_template:
    images: registry.example.org/toolbox:latest
    user: alice
    mappings: "{{ answer | userns.storage.mappings }}"
  vars:
    answer: |
      keep-id
      auto:size=4096 slots=3
      0:1:10000/0:2:10000
"""

RETURN = r"""
_value:
  description: The mappings.
  type: list
  elements: dict
  sample: [{userns: auto, slots: 3}]
"""

import typing as t

from ansible_collections.userns.storage.plugins.module_utils._storage.errors import StorageError
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.grammar import (
    parse_request,
)
from ansible_collections.userns.storage.plugins.plugin_utils import _escapes, _texts


def mappings(value: t.Any) -> t.Any:
    try:
        found = _texts.mappings(value)
        for mapping in found:
            _check(mapping)
        return _escapes.template_result(found)
    except (ValueError, StorageError) as error:
        raise _escapes.filter_error("mappings", error) from None


def _check(mapping: t.Mapping[str, t.Any]) -> None:
    """Check the mappings before anything is done on a host."""
    lists = [mapping.get(name) or [] for name in ("uidmap", "gidmap")]
    texts = [str(mapping.get(name) or "") for name in ("userns", "subuidname", "subgidname")]
    uidmap, gidmap = ([item] if isinstance(item, str) else list(map(str, item)) for item in lists)
    parse_request(texts[0], uidmap, gidmap, texts[1], texts[2])


class FilterModule:
    """The filter userns.storage.mappings."""

    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        return {"mappings": mappings}
