# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The conversion of images as a program with the interface of a module."""

from __future__ import annotations

import json
import sys
import time
import typing as t

from ansible_collections.userns.storage.plugins.module_utils._storage.errors import StorageError
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    image_conversion,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import (
    StoreRequest,
    account_named,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.userns import (
    running as userns,
)


def main() -> None:
    """Convert ``images`` (IDs) to ``uidmap`` and ``gidmap`` in the store that the other arguments name."""
    arguments: t.Dict[str, t.Any] = json.loads(sys.argv[1])["ANSIBLE_MODULE_ARGS"]
    check = bool(arguments.get("_ansible_check_mode"))
    images, uidmap, gidmap = (tuple(arguments[key]) for key in ("images", "uidmap", "gidmap"))
    store = StoreRequest(
        account=account_named(arguments.get("user")),
        storage_conf=arguments.get("storage_conf", ""),
        graphroot=arguments.get("graphroot", ""),
        runroot=arguments.get("runroot", ""),
        driver=arguments.get("driver", ""),
        storage_options=tuple(arguments.get("storage_options", ())),
        lock_timeout=arguments.get("lock_timeout", 60.0),
    )
    request = image_conversion.ConversionRequest(store, images, uidmap, gidmap, check)
    started = time.perf_counter()
    try:
        result = userns.run(image_conversion.declare, (request,), store.account)
        result["changed"] = bool(result["layers"])
    except StorageError as error:
        facts = {"kind": type(error).__name__, "facts": error.facts}
        result = {"failed": True, "msg": str(error), **facts}
    result["seconds"] = time.perf_counter() - started
    print(json.dumps(result))


if __name__ == "__main__":
    main()
