# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure the operation of layer_template in a process of the host's Python that has imported everything.

``python3 make_layer.py STORE IMAGE MAP`` with STORE as JSON prints seconds, processor seconds, the bytes of its
largest process, and the result. The time of imports depends on the host's Python and is not included.
"""

from __future__ import annotations

import json
import resource
import sys
import time

from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    layer_template,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.mapping_options import (
    MappingOptions,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import (
    StoreRequest,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.userns import running


def main(store: str, image: str, mapping: str) -> None:
    """Create the mapped layer of an image."""
    options = json.loads(store)
    started = time.perf_counter()
    options["storage_options"] = tuple(options.get("storage_options", ()))
    request = layer_template.TemplateRequest(
        store=StoreRequest(**options),
        images=(image,),
        mappings=(MappingOptions(uidmap=(mapping,)),),
    )
    result = running.run(layer_template.declare, (request,), None)
    seconds = time.perf_counter() - started
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    largest = max(resource.getrusage(kind).ru_maxrss for kind in kinds) * 1024
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps([seconds, used.ru_utime + used.ru_stime, largest, result]))


if __name__ == "__main__":
    main(*sys.argv[1:])
