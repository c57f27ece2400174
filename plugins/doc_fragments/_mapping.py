# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This doc fragment is PRIVATE to the userns.storage collection.

from __future__ import annotations

import textwrap

# The options of one mapping; their table is in module_utils/_storage/operations/mapping_options.py.
_USERNS = r"""
userns:
  description:
    - The user namespace in the format of C(podman run --userns).
    - V(keep-id) maps the user's own IDs to themselves, with options as in V(keep-id:uid=1000,gid=1000). V(nomap) does not map the user's
      own IDs.
    - V(auto) uses the ranges that the runtime will choose. It supports options as in V(auto:size=4096).
    - V(host) has no map and needs no copy.
  type: str
uidmap:
  description:
    - The UID map. Entries have the format of C(podman run --uidmap), C(CONTAINER:HOST:SIZE), with podman's flags from podman 4.7 on.
    - In a rootless store, host IDs are IDs in the user's namespace, as in podman.
    - If C(gidmap) is not set, this map is used for both.
  type: list
  elements: str
gidmap:
  description:
    - The GID map, in the same format as C(uidmap). If C(uidmap) is not set, this map is used for both.
  type: list
  elements: str
subuidname:
  description:
    - Use the subordinate UIDs of this name, as C(podman run --subuidname) does. If C(subgidname) is not set, this name is used for both.
  type: str
subgidname:
  description:
    - Use the subordinate GIDs of this name, as C(podman run --subgidname) does. If C(subuidname) is not set, this name is used for both.
  type: str
"""

_OPTIONS = rf"""
{_USERNS.strip()}
runtime:
  description:
    - The program that will use the layers, V(podman), V(buildah) or V(cri-o). Programs and versions write the same map in different ways,
      and only find layers with the map in their own form. A version can follow the name, as in V(podman 5.4.2). The module then relies on
      this version without running the program.
    - If not set, the module uses the first of the three programs that is installed.
  type: str
slots:
  description:
    - With V(auto), the number of containers of the image that run at the same time. The module prepares an ID range for each, because each
      has a range of its own.
  type: int
  default: 1
"""


class ModuleDocFragment:
    # A list of mappings, as the option mappings.
    # Annotated, for ansible-test takes other assignments here for literal strings.
    DOCUMENTATION: str = f"""
options:
  mappings:
    type: list
    elements: dict
    suboptions:
{textwrap.indent(_OPTIONS.strip(), " " * 6)}
"""

    # One mapping, by the options of a module itself.
    SINGLE: str = f"""
options:
{textwrap.indent(_OPTIONS.strip(), " " * 2)}
"""

    # The user namespace alone, for a module whose option runtime is that of the store.
    USERNS: str = f"""
options:
{textwrap.indent(_USERNS.strip(), " " * 2)}
"""
