# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure the operation of shared_images for each of several users, like ``make_layer``.

``python3 share_images.py GRAPHROOT RUNROOT USER...`` shares all images with each user by a separate request, for
containers without a user namespace and with keep-id, and prints the seconds of each request as JSON.
"""

from __future__ import annotations

import json
import sys
import time

from ansible_collections.userns.storage.plugins.module_utils._storage.operations.mapping_options import (
    MappingOptions,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.shared_images import (
    SharedRequest,
    declare,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import (
    StoreRequest,
)


def main(graphroot: str, runroot: str, *users: str) -> None:
    """Share all images with each user."""
    spent = []
    for user in users:
        started = time.perf_counter()
        done = declare(
            SharedRequest(
                store=StoreRequest(graphroot=graphroot, runroot=runroot, driver="overlay"),
                users=(user,),
                mappings=(MappingOptions(userns="keep-id"),),
            )
        )
        spent.append(time.perf_counter() - started)
        if done.get("error"):
            raise SystemExit(done["error"])
    print(json.dumps(spent))


if __name__ == "__main__":
    main(*sys.argv[1:])
