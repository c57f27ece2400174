# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What shared_images does for one user after another, timed as in ``make_layer``.

``python3 share_images.py GRAPHROOT RUNROOT USER...`` shares all images with each user by a request of its own, for a
plain run and for keep-id, and prints the seconds of each as JSON.
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
    """Share with each user."""
    spent = []
    for user in users:
        started = time.perf_counter()
        done = declare(
            SharedRequest(
                store=StoreRequest(graphroot=graphroot, runroot=runroot, driver="overlay"),
                users=(user,),
                wanted=(MappingOptions(userns="keep-id"),),
            )
        )
        spent.append(time.perf_counter() - started)
        if done.get("error"):
            raise SystemExit(done["error"])
    print(json.dumps(spent))


if __name__ == "__main__":
    main(*sys.argv[1:])
