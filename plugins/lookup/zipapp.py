# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: zipapp
short_description: Build the program userns-storage for hosts that maintain their stores themselves
version_added: 1.0.0
description:
  - Packs the library of this collection into a single file for Python 3.9 or later, and returns its path on the controller. The file exists
    until the end of the Ansible run.
  - The content of the file is the same on every controller, so that copies of it change only with a new version of the collection.
options:
  _terms:
    description:
      - This lookup does not accept terms.
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Install the program without the role userns.storage.service
  ansible.builtin.copy:
    src: "{{ lookup('userns.storage.zipapp') }}"
    dest: /usr/local/libexec/userns-storage/userns-storage.pyz
    mode: "0755"
"""

RETURN = r"""
_raw:
  description: The path of the file on the controller.
  type: list
  elements: path
"""

import hashlib
import os
import tempfile
import typing as t

from ansible import constants
from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase
from ansible_collections.userns.storage.plugins.plugin_utils import _zipapp


class LookupModule(LookupBase):
    """The lookup userns.storage.zipapp."""

    def run(
        self,
        terms: t.Sequence[t.Any],
        variables: t.Optional[t.Dict[str, t.Any]] = None,
        **kwargs: t.Any,
    ) -> t.List[str]:
        """The path of the program, which is built once in each run of Ansible."""
        if terms:
            raise AnsibleLookupError("userns.storage.zipapp takes no terms")
        program = _zipapp.build()
        folder = str(vars(constants)["DEFAULT_LOCAL_TMP"])
        path = os.path.join(folder, f"userns-storage-{hashlib.sha256(program).hexdigest()}.pyz")
        if not os.path.exists(path):
            # Forks of a run may build it at the same time.
            descriptor, scratch = tempfile.mkstemp(dir=folder)
            with os.fdopen(descriptor, "wb") as file:
                file.write(program)
            os.replace(scratch, path)
        return [path]
